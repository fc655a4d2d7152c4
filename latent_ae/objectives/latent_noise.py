"""Mixes latents with noise (l-DeTok, Yang et al. 2025) or adds it (RAE, Zheng et al. 2025) before they are decoded."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from latent_ae.config import Problem, Settings, Weight
from latent_ae.data.rng import latent_noise
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts


class LatentNoiseSettings(Settings):
    """Noise on the latents."""

    noise: Weight = 0.0
    """Standard deviation of the noise in latents, in raw latent units: if mixed, of the noise alone (l-DeTok: 3), if
    added, at the highest level (RAE's noise_tau: 0.8)."""
    noise_form: Literal["mixed", "added"] = "mixed"
    """With a level t that is uniform in [0, 1) for each sample: mixed decodes (1 - t) z + t noise, as l-DeTok; added
    decodes z + t noise, as RAE."""


class LatentNoise(Objective[LatentNoiseSettings]):
    """Mixes each sample's latent with noise, or adds noise to it, at a level that is uniform in [0, 1)."""

    name, section, docs = "latent_noise", "latents", "docs/latents.md"

    @classmethod
    def enabled(cls, own: LatentNoiseSettings) -> bool:
        return own.noise > 0

    @classmethod
    def problems(cls, own: LatentNoiseSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.noise and model is not None and not model.one_grid:
            yield Problem("latents.noise", model.fixed_latent)
        if own.noise_form != "mixed" and not own.noise:
            yield Problem("latents.noise_form", f"{own.noise_form}, and latents.noise is 0: give latents.noise")

    @classmethod
    def describe(cls, own: LatentNoiseSettings, run: RunFacts) -> str:
        if own.noise_form == "added":
            return f"with added noise of standard deviation up to {own.noise:g}"
        return f"mixed with noise of standard deviation {own.noise:g}"

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        level, noise = latent_noise(self.run.seed, numbers, latent_shape)
        return level, noise * self.own.noise

    def prepare(self, batch: Batch, step: int) -> Batch:
        level, noise = batch.draws[self.name]
        noisy = noised if self.own.noise_form == "mixed" else with_noise_added
        return batch._replace(transforms=(*batch.transforms, partial(noisy, level=level, noise=noise)))

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


def with_noise_added(latent: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Return latent + level noise, as `RAE.noising` of the authors' code (bytetriper/RAE, src/stage1/rae.py).

    Args:
        latent: (N, c, h, w).
        level: (N,) in [0, 1].
        noise: (N, c, H, W), whose upper left part is used as in `noised`.
    """
    height, width = latent.shape[-2:]
    return latent + level[:, None, None, None] * noise[..., :height, :width]
