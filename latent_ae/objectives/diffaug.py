"""Differentiable augmentation of the discriminator's input (Zhao et al. 2020, arXiv:2006.10738).

The discriminator must distinguish augmented real images from augmented reconstructions, so it cannot memorise a small
data set; the autoencoder's gradient passes through the augmentation.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["color", "translation", "cutout"]
NUMBERS = 7
"""Number of uniform numbers per image: brightness, saturation, contrast, shift y, x, hole y, x."""
TRANSLATION = 0.125
"""Largest shift as a fraction of the side."""
CUTOUT = 0.5
"""Side of the hole as a fraction of the image's side."""


def augment(images: Tensor, numbers: Tensor, policy: Sequence[Augmentation]) -> Tensor:
    """Augment images differentiably; pixels that are shifted in or cut out are 0.

    Args:
        images: (N, C, H, W) float in [-1, 1].
        numbers: (N, 7), uniform in [0, 1), see NUMBERS.
        policy: Any of color (brightness +- 0.5, saturation x 0 to 2, contrast x 0.5 to 1.5), translation (by up to an
            eighth of the side) and cutout (a square hole of half the side, its centre anywhere).

    Returns:
        (N, C, H, W); colours may leave [-1, 1].
    """
    brightness, saturation, contrast = (numbers[:, i].view(-1, 1, 1, 1).to(images) for i in range(3))
    if "color" in policy:
        images = images + (brightness - 0.5)
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * (2 * saturation) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        images = (images - mean) * (contrast + 0.5) + mean
    if "translation" in policy:
        images = _translate(images, numbers[:, 3:5])
    if "cutout" in policy:
        images = images * _outside_hole(images, numbers[:, 5:7])
    return images


def _translate(images: Tensor, numbers: Tensor) -> Tensor:
    height, width = images.shape[2:]
    # one row of zeros on each side; rows from farther out are clamped onto it
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    rows = _shifted(height, numbers[:, 0])[:, :, None]
    columns = _shifted(width, numbers[:, 1])[:, None, :]
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[samples, rows, columns].permute(0, 3, 1, 2)


def _shifted(side: int, uniform: Tensor) -> Tensor:
    """Return for each row of the result the row of the padded image that it comes from, (N, side)."""
    most = int(side * TRANSLATION + 0.5)
    shift = (uniform * (2 * most + 1)).floor().long() - most
    return (torch.arange(side, device=uniform.device)[None] - shift[:, None] + 1).clamp(0, side + 1)


def _outside_hole(images: Tensor, numbers: Tensor) -> Tensor:
    """Return a mask that is 0 in the hole and 1 elsewhere, (N, 1, H, W)."""
    inside = []
    for side, uniform in zip(images.shape[2:], numbers.unbind(1), strict=True):
        hole = int(side * CUTOUT + 0.5)
        first = (uniform * (side + 1 - hole % 2)).floor().long()[:, None] - hole // 2
        position = torch.arange(side, device=images.device)[None]
        inside.append((position >= first) & (position < first + hole))
    rows, columns = inside
    return (~(rows[:, :, None] & columns[:, None, :])).unsqueeze(1).to(images.dtype)
