"""What the latents' regularisers draw for samples: functions of the seed and the sample's global number."""

from collections.abc import Callable, Sequence

from torch import Tensor

from latent_ae.latent_changes import LatentChange
from latent_ae.order import kept_channels, latent_noise

from .config import TrainSettings


def latent_change(
    settings: TrainSettings, numbers: Sequence[int], shape: Sequence[int], send: Callable[[Tensor], Tensor]
) -> LatentChange | None:
    """Noise and channels for the samples `numbers` with latents of `shape`, `send` to the device; None: all is off."""
    latents, seed = settings.latents, settings.seed
    change = LatentChange()
    if latents.noise:
        level, noise = latent_noise(seed, numbers, shape)
        change = change._replace(noise_level=send(level), noise=send(noise * latents.noise))
    if latents.min_channels:
        change = change._replace(kept_channels=send(kept_channels(seed, numbers, latents.min_channels, shape[0])))
    return None if change == LatentChange() else change
