"""Finite scalar quantisation (Mentzer et al. 2023), as a codebook of which a stock VQModel takes the nearest code.

Finite scalar quantisation (FSQ) bounds each channel by a tanh and rounds it to one of a few levels. Here the levels of
a channel are placed among the latents themselves, such that the borders between neighbours are where the bounded
channel is rounded to another level. The product of all channels' levels is a codebook: the nearest of its codes is the
one to which FSQ rounds.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MARGIN = 1e-3
"""The published margin, by which the bounds are less than the outer levels."""


def grid(levels: Sequence[int]) -> Tensor:
    """Return the codebook of FSQ.

    Args:
        levels: Number of levels of each channel, at least 2.

    Returns:
        (product of the levels, channels) float32; the level of the first channel changes fastest, as in the published
        `codes_to_indices`.
    """
    places = [placed(number) for number in levels]
    return torch.tensor([code[::-1] for code in itertools.product(*reversed(places))])


def placed(levels: int) -> list[float]:
    """Return the values of a channel that stand for its levels, in ascending order.

    The borders between neighbours are where `bounded` is rounded to another level, and lie in the middle of the two.
    That leaves one value free: the middle level lies at 0 if there is one; otherwise the levels beside the middle
    border lie in the middle between this border and the next ones.

    Args:
        levels: Number of levels, at least 2.
    """
    half, offset, shift = _shape_of(levels)
    # at the border between the levels k and k + 1 the bounded channel is k + 1/2
    borders = [math.atanh((level + 0.5 + offset) / half) - shift for level in range(-(levels // 2), (levels - 1) // 2)]
    middle = (levels - 1) // 2
    if levels % 2:
        values = [0.0]
    else:
        gap = borders[middle + 1] - borders[middle] if levels > 2 else 2.0  # two levels have no further border
        values = [borders[middle] - gap / 2]
    for border in borders[middle:]:
        values.append(2 * border - values[-1])
    for border in reversed(borders[:middle]):
        values.insert(0, 2 * border - values[0])
    return values


def bounded(latent: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the bounded channels that FSQ rounds, divided by half the number of levels (`bound`, appendix A.1).

    Args:
        latent: (N, c, h, w).
        levels: Number of levels of each of the c channels.

    Returns:
        (N, c, h, w), between -1 and 1.
    """
    channels = []
    for channel, number in zip(latent.unbind(1), levels, strict=True):
        half, offset, shift = _shape_of(number)
        channels.append((torch.tanh(channel + shift) * half - offset) / (number // 2))
    return torch.stack(channels, 1)


def _shape_of(levels: int) -> tuple[float, float, float]:
    """Return half the width of a bounded channel, its offset, and the shift of the channel before the tanh."""
    half = (levels - 1) * (1 - MARGIN) / 2
    offset = 0.0 if levels % 2 else 0.5
    return half, offset, math.tan(offset / half)
