"""Sums over blocks of images, which can be merged: statistics and spectra of latents, and the cost of changing them."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from latent_ae.data.held_out import HeldOutImage
from latent_ae.data.images import to_uint8
from latent_ae.data.rng import posterior_noise
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.metrics.similarity import psnr
from latent_ae.models.loading import FirstStage
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_eval.latents.health import TRANSFORMS, RadialSpectrum

CPU_BATCH_PX = 256 * 256
NOISE_SEED = 2**32
"""Added to the seed, so that the noise that perturbs latents differs from the noise that sampled them."""


class Encoded:
    """Sums of the first pass over a block of images: its latents and their spectra."""

    def __init__(self) -> None:
        self.num_images = 0
        self.skipped: list[str] = []
        self.digests: dict[int, str] = {}
        """Digests of the readable images' files, by their numbers."""
        self.statistics = LatentStatistics()
        self.spectra = {"latents": RadialSpectrum(), "images": RadialSpectrum()}

    def merge(self, other: "Encoded") -> None:
        """Add the sums of another block."""
        self.num_images += other.num_images
        self.skipped += other.skipped
        self.digests |= other.digests
        self.statistics.merge(other.statistics)
        for name, spectrum in self.spectra.items():
            spectrum.merge(other.spectra[name])


class Decoded:
    """Sums of the second pass over a block of images, and of how many images."""

    def __init__(self) -> None:
        self.num_images = 0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, key: str, values: Tensor) -> None:
        """Add values of images, (N,), under a name; those that are not finite are left out."""
        known = values[values.isfinite()].double().cpu()
        self.sums[key] = self.sums.get(key, 0.0) + float(known.sum())
        self.counts[key] = self.counts.get(key, 0) + len(known)

    def merge(self, other: "Decoded") -> None:
        """Add the sums of another block."""
        self.num_images += other.num_images
        for key, value in other.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + other.counts[key]

    def mean(self, key: str) -> float | None:
        """Return the mean over images, or None if no image has a value."""
        return self.sums[key] / self.counts[key] if self.counts.get(key) else None


class LatentsMeasurer:
    """Measures blocks of images.

    Args:
        stage: The model.
        device: Where it runs.
        seed: Seed of the noise.
        batch_size: Largest number of images at a time.
        lpips: LPIPS for images of noised latents, or None.
    """

    def __init__(
        self, stage: FirstStage, device: torch.device, *, seed: int, batch_size: int, lpips: LPIPS | None = None
    ):
        self.stage, self.device, self.seed, self.batch_size, self.lpips = stage, device, seed, batch_size, lpips

    @torch.no_grad()
    def encode(self, items: Iterable[HeldOutImage]) -> Encoded:
        """Return the sums over a block's latents: samples of the posterior, or the latents of a deterministic model."""
        block = Encoded()
        for batch in self._batches(items, block.skipped):
            images = self._stacked(batch)
            mean, std = self.stage.encode(images)
            latents = mean
            if std is None:
                block.statistics.update(latents)
            else:
                latents = mean + std * self._noise(batch, mean, self.seed)
                block.statistics.update(latents, mean, 2 * std.log())
            block.spectra["latents"].update(latents)
            block.spectra["images"].update(images)
            block.num_images += len(batch)
            block.digests |= {item.index: item.digest for item in batch}
        return block

    @torch.no_grad()
    def decode(self, items: Iterable[HeldOutImage], sigmas: Sequence[float], latent_std: float) -> Decoded:
        """Return sums of PSNR (dB) and LPIPS of a block's images, decoded from noised, scaled or rotated latents.

        Args:
            items: The images of the block.
            sigmas: Standard deviations of the noise, relative to that of the latents.
            latent_std: Standard deviation of the latents.
        """
        block = Decoded()
        for batch in self._batches(items, []):
            images = self._stacked(batch)
            latents, _ = self.stage.encode(images)
            noise = self._noise(batch, latents, self.seed + NOISE_SEED)
            plain = self.stage.decode(latents)
            for sigma in sigmas:
                decoded = self.stage.decode(latents + sigma * latent_std * noise) if sigma else plain
                block.add(f"psnr/{sigma}", _psnr(images, decoded))
                if self.lpips is not None and min(images.shape[-2:]) >= self.lpips.trunk.min_px:
                    block.add(f"lpips/{sigma}", self.lpips(images, decoded.clamp(-1, 1)))
            for name, change in TRANSFORMS.items():
                odd = any(side % 2 for side in latents.shape[-2:])
                if name == "half size" and (odd or self.stage.side is not None):
                    continue
                changed, decoded = change(images), self.stage.decode(change(latents))
                block.add(f"{name}/in latents", _psnr(changed, decoded))
                block.add(f"{name}/in images", _psnr(changed, self.stage.decode(self.stage.encode(changed).mean)))
                block.add(f"{name}/apart", _psnr(change(plain), decoded))
            block.num_images += len(batch)
        return block

    def _batches(self, items: Iterable[HeldOutImage], skipped: list[str]) -> Iterator[list[HeldOutImage]]:
        """Yield batches of neighbours of one shape, a function of the block alone; unreadable ones go to `skipped`."""
        waiting: list[HeldOutImage] = []
        for item in items:
            if item.image is None:
                skipped.append(f"{item.name}: {item.reason}")
                continue
            size = self.batch_size
            if self.device.type == "cpu":
                size = max(1, min(size, CPU_BATCH_PX // item.image[0].numel()))
            if waiting and (waiting[0].image is None or waiting[0].image.shape != item.image.shape):
                yield waiting
                waiting = []
            waiting.append(item)
            if len(waiting) >= size:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _stacked(self, batch: Sequence[HeldOutImage]) -> Tensor:
        images = torch.stack([item.image for item in batch if item.image is not None])
        return images.to(self.device, memory_format=torch.channels_last)

    def _noise(self, batch: Sequence[HeldOutImage], like: Tensor, seed: int) -> Tensor:
        return posterior_noise(seed, [item.index for item in batch], like.shape[1:]).to(self.device)


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR of 8-bit pixels for each image; nan for an image that is not finite."""
    bad = ~b.isfinite().flatten(1).all(1)
    return psnr(to_uint8(a), to_uint8(b)).masked_fill(bad, torch.nan)
