"""What one pass of the step works on, and what the latents' regularisers make of it.

What they draw is a function of the seed and the sample's global number, or of seed and step, so it does not depend on
how a batch is split.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latent_ae.data.rng import kept_channels, latent_noise
from latent_ae.models.latent_changes import LatentChange, scaled_and_turned

from .schedule import equivariance_at
from .settings import TrainSettings


class MicroBatch(NamedTuple):
    """What one pass works on, on the device."""

    images: Tensor
    """float32 NCHW in [-1, 1], channels-last."""
    noise: Tensor
    """Standard normal, shaped like the latent."""
    perceptual_rows: slice
    """Rows that LPIPS looks at (loss.perceptual_every)."""
    augmentation: Tensor | None = None
    """Uniform numbers for gan.diffaug, N x 14: the first half for the real image, the other for its reconstruction."""
    change: LatentChange | None = None
    """Noise and channels for the latents (latents.noise, latents.min_channels)."""


def latent_change(
    settings: TrainSettings, numbers: Sequence[int], shape: Sequence[int], send: Callable[[Tensor], Tensor]
) -> LatentChange | None:
    """Noise and channels for the samples `numbers` with latents of `shape`, `send` to the device; None: all is off."""
    latents, seed = settings.latents, settings.seed
    if not (latents.noise or latents.min_channels):
        return None
    change = LatentChange()
    if latents.noise:
        level, noise = latent_noise(seed, numbers, shape)
        change = change._replace(noise_level=send(level), noise=send(noise * latents.noise))
    if latents.min_channels:
        change = change._replace(kept_channels=send(kept_channels(seed, numbers, latents.min_channels, shape[0])))
    return change


def as_drawn(batch: MicroBatch, step: int, settings: TrainSettings) -> tuple[MicroBatch, Tensor, dict[str, Tensor]]:
    """The batch with the images that are to come out, the images to encode, and what to log."""
    means: dict[str, Tensor] = {}
    images, change = batch.images, batch.change
    if change is not None and change.noise_level is not None:
        means["noise_level"] = change.noise_level.mean()
    if change is not None and change.kept_channels is not None:
        means["kept_channels"] = change.kept_channels.float().mean()
    if not settings.latents.equivariance:
        return batch, images, means
    side = batch.noise.shape[-1]
    factor = images.shape[-1] // side
    drawn = equivariance_at(step, settings, side, factor)
    means["scale"] = torch.full((), 1.0 if drawn is None else drawn.side_px / side, device=images.device)
    if drawn is None:
        return batch, images, means
    target = scaled_and_turned(images, drawn.side_px * factor, drawn.quarter_turns)
    if drawn.of_latent:
        change = (change or LatentChange())._replace(side_px=drawn.side_px, quarter_turns=drawn.quarter_turns)
        return batch._replace(images=target, change=change), images, means
    # noise for the smaller latent: any part of standard normal noise is standard normal
    part = (..., slice(drawn.side_px), slice(drawn.side_px))
    if change is not None and change.noise is not None:
        change = change._replace(noise=change.noise[part])
    return batch._replace(images=target, noise=batch.noise[part], change=change), target, means
