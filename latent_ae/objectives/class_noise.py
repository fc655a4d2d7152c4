"""Adds the noise of AutoencoderRAE's own `noise_tau` to latents before they are decoded (RAE, Zheng et al. 2025)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.data.rng import CLASS_NOISE, latent_noise
from latent_ae.objectives.base import Batch, Objective, Pass


class ClassNoise(Objective[Any]):
    """Adds sigma * noise to each sample's latent, with sigma uniform in [0, noise_tau], as the class does in training.

    The class draws from the global random state and in `encode`; here the numbers depend on the seed and the sample
    alone, and latents that are measured, exported or validated have no noise.

    Args:
        tau: The largest sigma, in units of the encoder's features (RAE: 0.8).
        scale: Factor from these units to those of the latents, a scalar or (c, h, w).
    """

    name, docs = "class_noise", "docs/family.md"

    def __init__(self, tau: float, scale: Tensor):
        super().__init__()
        self.tau, self.scale = tau, scale  # no buffer: it is part of the autoencoder and would only be saved twice

    @classmethod
    def of(cls, autoencoder: nn.Module) -> "ClassNoise | None":
        """Return the objective for an autoencoder; None if its config has no noise."""
        config: Any = autoencoder.config
        if not (tau := float(config.get("noise_tau") or 0.0)):
            return None
        # the class adds it to the features and divides by the deviation afterwards
        return cls(tau, config.scaling_factor / (autoencoder._latents_std.detach().float() + 1e-5))

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        level, noise = latent_noise(self.run.seed, numbers, latent_shape, CLASS_NOISE)
        return level * self.tau, noise

    def prepare(self, batch: Batch, step: int) -> Batch:
        sigma, noise = batch.draws[self.name]
        change = partial(with_noise, sigma=sigma, noise=noise * self.scale)
        return batch._replace(transforms=(*batch.transforms, change))

    def backward(self, p: Pass) -> None:
        p.logs["class_noise_sigma"] = p.batch.draws[self.name][0].mean()


def with_noise(latent: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return latent + sigma noise.

    Args:
        latent: (N, c, h, w).
        sigma: (N,).
        noise: (N, c, h, w).
    """
    return torch.addcmul(latent, sigma[:, None, None, None], noise)
