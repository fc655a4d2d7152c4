"""An initialisation that begins as a linear down- and upsampler instead of as noise (docs/linear-start.md).

A default-initialised autoencoder spends its first thousands of steps learning to copy colours. Here the fresh
network *is* a linear codec; training improves on it. Neither the architecture nor the exported format changes.

How a linear signal c passes a network of GroupNorm, SiLU and residual blocks:

* A *pack* is four neighbouring channels (+c, -c, +K, -K). Residual branches start at zero and shortcuts are the
  identity on packs, so the signal passes the blocks untouched.
* Before an output convolution, the pack lies inside one norm group whose mean is 0 by symmetry and whose standard
  deviation is nearly the constant that K sets; and SiLU(x) - SiLU(-x) = x (the looks-linear trick of
  Balduzzi et al. 2017), so a convolution that reads (+s, -s) reads c.
"""

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

K = 4.0
"""The constant pair's amplitude: large against c (in [-1, 1]), so that the group's scale hardly depends on c."""
SIGNAL_POWER = 0.25
"""Mean square of a photograph's pixels in [-1, 1], assumed for that scale; 2x off changes it by under 2 %."""
INITIAL_LOGVAR = -8.0
"""Posterior std exp(-4) = 0.018: nearly deterministic, against the std of about 1 of a default start."""
DETAIL_GAIN = 4.0
"""Scales the detail latents to about the spread of the colour latents."""
# Synthesis taps. The first three were chosen once, by grid search for the PSNR of the linear codec on photographs.
UPSAMPLE_TAPS = (0.16, 0.68, 0.16)
"""3-tap smoothing after nearest-neighbour upsampling (0.25, 0.5, 0.25 would be bilinear)."""
SLOPE = 0.6
TWIST = 0.3
"""Amplitudes of the horizontal/vertical and of the diagonal detail."""
SHARPEN = 0.08
"""Weight of a Laplacian in the output convolution, which undoes part of the smoothing."""


def linear_start_(autoencoder: AutoencoderKL) -> None:
    """Sets the weights in place so that the fresh autoencoder is a linear codec.

    Latents 0..C-1 are the local mean of each image channel. Up to three more carry detail of the image's mean
    over channels (luma) in the cell: left minus right, top minus bottom, and the diagonal difference, which the
    decoder adds back as lapped odd functions. Latents beyond these keep their default initialisation. The
    log-variance is INITIAL_LOGVAR everywhere. Channels that carry no pack keep their default initialisation, so
    that the residual branches have something to learn from.

    The autoencoder must satisfy ModelSettings.problems() for `init: linear`.
    """
    config = autoencoder.config
    colours = config.in_channels
    # the last downsampler writes the details with the width of the level above it
    room = min(config.block_out_channels[-2:]) // 4 - colours
    details = min(config.latent_channels - colours, 3, room) if len(config.block_out_channels) > 1 else 0
    with torch.no_grad():
        _silence_branches_(autoencoder)
        _encoder_(autoencoder, colours, details)
        _decoder_(autoencoder, colours, details)


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


def _encoder_(autoencoder: AutoencoderKL, colours: int, details: int) -> None:
    encoder, groups = autoencoder.encoder, autoencoder.config.norm_num_groups
    identity = _per_colour(colours, _centre(1.0))
    _write_packs_(encoder.conv_in, identity, groups, from_packs=False)
    downsamplers = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers]
    box = torch.zeros(3, 3)
    box[:2, :2] = 0.25
    for index, conv in enumerate(downsamplers):
        taps = _per_colour(colours, box)
        if index == len(downsamplers) - 1 and details:
            sign = torch.tensor([1.0, -1.0, 0.0])
            side = torch.tensor([1.0, 1.0, 0.0])
            analysis = torch.stack([torch.outer(side, sign), torch.outer(sign, side), torch.outer(sign, sign)])
            luma = (DETAIL_GAIN / 4 / colours) * analysis[:details, None].expand(-1, colours, -1, -1)
            taps = torch.cat([taps, luma])
        _write_packs_(conv, taps, groups, from_packs=True)

    linear = colours + details
    conv_out, latent_channels = encoder.conv_out, autoencoder.config.latent_channels
    conv_out.weight[:linear] = _read_packs(conv_out, _per_colour(linear, _centre(1.0)))
    conv_out.bias[:linear] = 0.0
    conv_out.weight[latent_channels:] = 0.0
    conv_out.bias[latent_channels:] = INITIAL_LOGVAR
    for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        if conv is not None:
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)


def _decoder_(autoencoder: AutoencoderKL, colours: int, details: int) -> None:
    decoder, groups = autoencoder.decoder, autoencoder.config.norm_num_groups
    _write_packs_(decoder.conv_in, _per_colour(colours + details, _centre(1.0)), groups, from_packs=False)
    smooth = torch.tensor(UPSAMPLE_TAPS)
    slope, side = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.25, 0.5, 0.25])
    synthesis = torch.stack(
        [
            SLOPE * torch.outer(side, slope),
            SLOPE * torch.outer(slope, side),
            TWIST * torch.outer(slope, slope),
        ]
    )
    upsamplers = [block.upsamplers[0].conv for block in decoder.up_blocks if block.upsamplers]
    for index, conv in enumerate(upsamplers):
        taps = _per_colour(colours, torch.outer(smooth, smooth))
        if index == 0 and details:
            luma = (synthesis[:details] / DETAIL_GAIN).expand(colours, -1, -1, -1)
            taps = torch.cat([taps, luma], dim=1)
        _write_packs_(conv, taps, groups, from_packs=True)

    laplacian = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])
    taps = _per_colour(colours, _centre(1.0) + SHARPEN * laplacian)
    decoder.conv_out.weight[:] = _read_packs(decoder.conv_out, taps)
    nn.init.zeros_(decoder.conv_out.bias)


def _centre(value: float) -> Tensor:
    taps = torch.zeros(3, 3)
    taps[1, 1] = value
    return taps


def _per_colour(count: int, taps: Tensor) -> Tensor:
    """The same 3x3 taps for each of `count` signals, none across: count x count x 3 x 3."""
    return torch.eye(count)[:, :, None, None] * taps


def _write_packs_(conv: nn.Conv2d, taps: Tensor, groups: int, *, from_packs: bool) -> None:
    """Makes the convolution's first channels packs that hold taps (out x in x 3 x 3) applied to its input.

    Packs without a signal fill the last norm group that holds one, so that its mean stays 0.
    """
    signals_out, signals_in = taps.shape[:2]
    per_group = conv.out_channels // groups
    packed = math.ceil(4 * signals_out / per_group) * per_group
    conv.weight[:packed] = 0.0
    bias = torch.tensor([0.0, 0.0, K, -K])
    conv.bias[:packed] = bias.repeat(packed // 4)
    for out in range(signals_out):
        for source in range(signals_in):
            # (+c) becomes (+c), (-c) becomes (-c); a plain input feeds both
            plus, minus = (4 * source, 4 * source + 1) if from_packs else (source, source)
            conv.weight[4 * out, plus] = taps[out, source]
            conv.weight[4 * out + 1, minus] = taps[out, source] if from_packs else -taps[out, source]


def _read_packs(conv: nn.Conv2d, taps: Tensor) -> Tensor:
    """Weights, out x conv.in_channels x 3 x 3, that apply taps to signals packed before GroupNorm and SiLU."""
    signals_out, signals_in = taps.shape[:2]
    # the norm divides by the root mean square of (c, -c, K, -K)
    scale = math.sqrt((SIGNAL_POWER + K**2) / 2)
    weight = torch.zeros(signals_out, conv.in_channels, 3, 3)
    weight[:, 0 : 4 * signals_in : 4] = scale * taps
    weight[:, 1 : 4 * signals_in : 4] = -scale * taps
    return weight
