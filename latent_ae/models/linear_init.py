"""An initialisation that makes an autoencoder a linear down- and upsampler instead of noise (docs/linear-start.md).

A default-initialised autoencoder spends its first thousands of steps learning to copy colours. Here the fresh
network *is* a linear codec; training improves on it. Neither the architecture nor the exported format changes.

A linear signal c passes a network of GroupNorm, SiLU and residual blocks as follows:

* A *pack* is four neighbouring channels (+c, -c, +K, -K). Residual branches start at zero and shortcuts are the
  identity on packs, so the signal passes the blocks untouched.
* Before an output convolution, the pack lies inside one norm group whose mean is 0 by symmetry and whose standard
  deviation is nearly the constant that K sets; and SiLU(x) - SiLU(-x) = x (the looks-linear trick of
  Balduzzi et al. 2017), so a convolution that reads (+s, -s) reads c.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

K = 4.0
"""Amplitude of the constant pair: large compared with c in [-1, 1], so that the group's scale hardly depends on c."""
SIGNAL_POWER = 0.25
"""Assumed mean square of a photograph's pixels in [-1, 1]; an error by a factor of 2 changes the scale by under 2 %."""
INITIAL_LOGVAR = -8.0
"""The posterior std is exp(-4) = 0.018: nearly deterministic, while the default initialisation has a std of about 1."""
FIRST_GAIN, NEXT_GAIN = 4.0, 2.0
"""Gains of a detail at the level that takes it and at each level after it: its std is about that of the colours."""
DETAILS = ("h", "v", "d", "hh", "vv", "hd", "vd", "hm", "vm", "hv", "vh", "dd", "dm", "dh", "dv")
"""Luma details in the order in which latents carry them, roughly by their variance in photographs.

Each letter says what one level computes from 2 x 2 pixels; the last letter is for the coarsest level. m is the mean, h
left minus right, v top minus bottom, d the diagonal difference. Levels before the first letter compute the mean.
"""


class Synthesis(NamedTuple):
    """Taps of the decoder, fitted to minimise the squared error of the linear codec on photographs (BSDS500)."""

    side: float
    """3-tap smoothing (side, 1 - 2 side, side) across a detail's direction."""
    slope: float
    """Amplitude of h and v."""
    twist: float
    """Amplitude of d."""
    sharpen: float
    """Weight of a Laplacian in the output convolution, which undoes part of the smoothing."""


SYNTHESIS = Synthesis(side=0.15, slope=0.45, twist=0.22, sharpen=1.0)
SYNTHESIS_F2 = Synthesis(side=0.18, slope=0.3, twist=0.12, sharpen=0.4)
SMOOTHING = (0.245, 0.2, 0.05)
"""The same 3-tap smoothing after nearest-neighbour upsampling, from the finest level on (0.25 is bilinear)."""


def linear_start_(autoencoder: AutoencoderKL) -> None:
    """Set the weights in place so that the fresh autoencoder is a linear codec.

    Latents 0..C-1 are the local mean of each image channel; the next ones carry DETAILS of the image's mean over
    channels (luma), which the decoder adds back as lapped functions. Latents beyond these keep their default
    initialisation. The log-variance is INITIAL_LOGVAR everywhere. Channels that carry no pack keep their default
    initialisation, so that the residual branches have something to learn from.

    The autoencoder must satisfy ModelSettings.problems() for `init: linear`.
    """
    config = autoencoder.config
    stages = signals_at(config.in_channels, tuple(config.block_out_channels), config.latent_channels)
    with torch.no_grad():
        _silence_branches_(autoencoder)
        _encoder_(autoencoder, stages)
        _decoder_(autoencoder, stages)


def signals_at(colours: int, widths: Sequence[int], latents: int) -> list[list[str]]:
    """Return the signals after 0, 1, ... downsamplers: colours "0", "1", ..., then luma details, as words of DETAILS.

    There are as many details as latents and widths allow.

    Args:
        colours: Channels of the images.
        widths: Channels of each level, from the finest.
        latents: Channels of the latents.
    """
    levels = len(widths) - 1
    words = [word.rjust(levels, "m") for word in DETAILS if len(word) <= levels]

    def stages(details: Sequence[str]) -> list[list[str]]:
        kept = [
            dict.fromkeys(word[:level] for word in details if word[:level].strip("m")) for level in range(levels + 1)
        ]
        return [[*map(str, range(colours)), *prefixes] for prefixes in kept]

    def fits(details: Sequence[str]) -> bool:
        # both networks pass the signals of a level on to its neighbours
        rooms = [min(widths[max(0, level - 1) : level + 2]) // 4 for level in range(levels + 1)]
        return all(len(signals) <= room for signals, room in zip(stages(details), rooms, strict=True))

    count = max(0, min(len(words), latents - colours))
    while count and not fits(words[:count]):
        count -= 1
    return stages(words[:count])


def _silence_branches_(autoencoder: AutoencoderKL) -> None:
    for name, module in autoencoder.named_modules():
        if name.endswith("conv2") or name.endswith("to_out.0"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("conv_shortcut"):
            channels = module.in_channels, module.out_channels
            packed = min(channels)
            module.weight[:packed] = 0.0
            module.weight[range(packed), range(packed)] = 1.0
            module.bias[:packed] = 0.0


def _encoder_(autoencoder: AutoencoderKL, stages: list[list[str]]) -> None:
    encoder, groups, colours = autoencoder.encoder, autoencoder.config.norm_num_groups, len(stages[0])
    _write_packs_(encoder.conv_in, _each(colours, _centre(1.0)), groups, from_packs=False)
    signs = {
        "m": (1.0, 1.0, 1.0, 1.0),
        "h": (1.0, -1.0, 1.0, -1.0),
        "v": (1.0, 1.0, -1.0, -1.0),
        "d": (1.0, -1.0, -1.0, 1.0),
    }
    analysis = {kind: F.pad(torch.tensor(sign).view(2, 2) / 4, (0, 1, 0, 1)) for kind, sign in signs.items()}
    downsamplers = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers]
    for conv, fine, coarse in zip(downsamplers, stages[:-1], stages[1:], strict=True):
        taps = torch.zeros(len(coarse), len(fine), 3, 3)
        taps[range(colours), range(colours)] = analysis["m"]
        for row, word in enumerate(coarse[colours:], colours):
            if word[:-1].strip("m"):
                taps[row, fine.index(word[:-1])] = NEXT_GAIN * analysis[word[-1]]
            else:
                taps[row, :colours] = FIRST_GAIN / colours * analysis[word[-1]]
        _write_packs_(conv, taps, groups, from_packs=True)

    linear = len(stages[-1])
    conv_out, latent_channels = encoder.conv_out, autoencoder.config.latent_channels
    conv_out.weight[:linear] = _read_packs(conv_out, _each(linear, _centre(1.0)))
    conv_out.bias[:linear] = 0.0
    conv_out.weight[latent_channels:] = 0.0
    conv_out.bias[latent_channels:] = INITIAL_LOGVAR
    for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        if conv is not None:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)


def _decoder_(autoencoder: AutoencoderKL, stages: list[list[str]]) -> None:
    decoder, groups, colours = autoencoder.decoder, autoencoder.config.norm_num_groups, len(stages[0])
    given = SYNTHESIS if len(stages) > 2 else SYNTHESIS_F2
    _write_packs_(decoder.conv_in, _each(len(stages[-1]), _centre(1.0)), groups, from_packs=False)
    upsamplers = [block.upsamplers[0].conv for block in decoder.up_blocks if block.upsamplers]
    side, slope = _smoothing(given.side), torch.tensor([-1.0, 0.0, 1.0])
    for level, conv in zip(range(len(upsamplers) - 1, -1, -1), upsamplers, strict=True):
        smooth = _smoothing(SMOOTHING[min(level, len(SMOOTHING) - 1)])
        synthesis = {
            "m": torch.outer(smooth, smooth),
            "h": given.slope * torch.outer(side, slope),
            "v": given.slope * torch.outer(slope, side),
            "d": given.twist * torch.outer(slope, slope),
        }
        fine, coarse = stages[level], stages[level + 1]
        taps = torch.zeros(len(fine), len(coarse), 3, 3)
        taps[range(colours), range(colours)] = synthesis["m"]
        for column, word in enumerate(coarse[colours:], colours):
            if word[:-1].strip("m"):
                taps[fine.index(word[:-1]), column] = synthesis[word[-1]] / NEXT_GAIN
            else:
                taps[:colours, column] = synthesis[word[-1]] / FIRST_GAIN
        _write_packs_(conv, taps, groups, from_packs=True)

    taps = _centre(1.0)
    if upsamplers:
        taps += given.sharpen * torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])
    decoder.conv_out.weight[:] = _read_packs(decoder.conv_out, _each(colours, taps))
    nn.init.zeros_(decoder.conv_out.bias)


def _smoothing(side: float) -> Tensor:
    return torch.tensor([side, 1 - 2 * side, side])


def _centre(value: float) -> Tensor:
    taps = torch.zeros(3, 3)
    taps[1, 1] = value
    return taps


def _each(count: int, taps: Tensor) -> Tensor:
    """Return weights, (count, count, 3, 3), that apply the same 3 x 3 taps to each signal and mix no signals."""
    return torch.eye(count)[:, :, None, None] * taps


def _write_packs_(conv: nn.Conv2d, taps: Tensor, groups: int, *, from_packs: bool) -> None:
    """Set weights so that the first output channels are packs of the signals that `taps`, (out, in, 3, 3), compute.

    Packs without a signal fill up the last norm group that holds a signal, so that its mean stays 0.
    """
    signals_out, signals_in = taps.shape[:2]
    per_group = conv.out_channels // groups
    packed = math.ceil(4 * signals_out / per_group) * per_group
    conv.weight[:packed] = 0.0
    bias = torch.tensor([0.0, 0.0, K, -K])
    conv.bias[:packed] = bias.repeat(packed // 4)
    for out in range(signals_out):
        for source in range(signals_in):
            # +c of the input gives +c, and -c gives -c; an input without packs gives both
            plus, minus = (4 * source, 4 * source + 1) if from_packs else (source, source)
            conv.weight[4 * out, plus] = taps[out, source]
            conv.weight[4 * out + 1, minus] = taps[out, source] if from_packs else -taps[out, source]


def _read_packs(conv: nn.Conv2d, taps: Tensor) -> Tensor:
    """Return weights, (out, conv.in_channels, 3, 3), that apply taps to packs that passed GroupNorm and SiLU."""
    signals_out, signals_in = taps.shape[:2]
    # the norm divides by the root mean square of (c, -c, K, -K)
    scale = math.sqrt((SIGNAL_POWER + K**2) / 2)
    weight = torch.zeros(signals_out, conv.in_channels, 3, 3)
    weight[:, 0 : 4 * signals_in : 4] = scale * taps
    weight[:, 1 : 4 * signals_in : 4] = -scale * taps
    return weight
