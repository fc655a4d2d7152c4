"""What is done to a latent between sampling and decoding, to train latents that bear it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LatentChange(NamedTuple):
    """Noise, then channels, then size and turn; what is None or 0 changes nothing."""

    noise_level: Tensor | None = None
    """(N,) in [0, 1]: how much of a sample's latent is noise."""
    noise: Tensor | None = None
    """The noise, shaped like the latent."""
    kept_channels: Tensor | None = None
    """(N,) integers: so many first channels of a sample stay, the others are 0."""
    side_px: int | None = None
    """The latent is scaled to this side, latent px."""
    quarter_turns: int = 0


def changed(latent: Tensor, change: LatentChange) -> Tensor:
    """The latent, N x c x h x w, as the decoder gets it."""
    if change.noise_level is not None and change.noise is not None:
        latent = noised(latent, change.noise_level, change.noise)
    if change.kept_channels is not None:
        latent = first_channels(latent, change.kept_channels)
    return scaled_and_turned(latent, change.side_px, change.quarter_turns)


def noised(latent: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """(1 - level) latent + level noise, `level` one number for each sample (l-DeTok, Yang et al. 2025)."""
    return torch.lerp(latent, noise, level[:, None, None, None])


def first_channels(latent: Tensor, kept: Tensor) -> Tensor:
    """The first `kept` channels of each sample, 0 elsewhere (Rippel et al. 2014; DC-AE 1.5, Chen et al. 2025)."""
    channels = torch.arange(latent.shape[1], device=latent.device)
    return latent * (channels < kept[:, None])[:, :, None, None]


def scaled_and_turned(x: Tensor, side_px: int | None, quarter_turns: int) -> Tensor:
    """NCHW scaled bilinearly to a square, then turned, as EQ-VAE does to latents and images alike."""
    if side_px is not None:
        x = F.interpolate(x, size=(side_px, side_px), mode="bilinear", align_corners=False)
    return torch.rot90(x, quarter_turns, (-1, -2)) if quarter_turns else x
