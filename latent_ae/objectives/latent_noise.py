"""Mixes latents with noise before they are decoded (l-DeTok, Yang et al. 2025)."""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from latent_ae.config import Problem, Settings, Weight
from latent_ae.data.rng import latent_noise
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts


class LatentNoiseSettings(Settings):
    """Noise on the latents."""

    noise: Weight = 0.0
    """Standard deviation of the noise mixed into latents, in raw latent units (l-DeTok: 3)."""


class LatentNoise(Objective[LatentNoiseSettings]):
    """Mixes each sample's latent with noise; the fraction of noise is uniform in [0, 1]."""

    name, section, docs = "latent_noise", "latents", "docs/latents.md"

    @classmethod
    def enabled(cls, own: LatentNoiseSettings) -> bool:
        return own.noise > 0

    @classmethod
    def problems(cls, own: LatentNoiseSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.noise and model is not None and not model.one_grid:
            yield Problem("latents.noise", model.fixed_latent)

    @classmethod
    def describe(cls, own: LatentNoiseSettings, run: RunFacts) -> str:
        return f"mixed with noise of standard deviation {own.noise:g}"

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        level, noise = latent_noise(self.run.seed, numbers, latent_shape)
        return level, noise * self.own.noise

    def prepare(self, batch: Batch, step: int) -> Batch:
        level, noise = batch.draws[self.name]
        return batch._replace(transforms=(*batch.transforms, partial(noised, level=level, noise=noise)))

    def backward(self, p: Pass) -> None:
        p.logs["noise_level"] = p.batch.draws[self.name][0].mean()


def noised(latent: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Return (1 - level) latent + level noise.

    Args:
        latent: (N, c, h, w).
        level: (N,) in [0, 1].
        noise: (N, c, H, W) with H >= h and W >= w; its upper left part is used, as good as any, because the numbers are
            independent.
    """
    height, width = latent.shape[-2:]
    return latent.lerp(noise[..., :height, :width], level[:, None, None, None])
