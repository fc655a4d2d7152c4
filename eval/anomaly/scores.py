"""Scores of images by what their first stage fails to reconstruct, and the maps they are taken from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_ae.data.rng import posterior_noise
from latent_ae.models.loading import FirstStage
from latent_ae.pretrained.lpips import LPIPS

PIXEL, PERCEPTUAL = "pixel_error", "lpips"
LARGEST_SQUARE = 4.0
"""Largest squared difference of two values in [-1, 1]; it stands for what is not finite."""


@dataclass(frozen=True)
class Scored:
    """A batch: N images of one shape."""

    reconstruction: Tensor
    """NCHW float32."""
    maps: dict[str, Tensor]
    """(N, H, W) float32 >= 0, by name."""
    scores: dict[str, np.ndarray]
    """(N,) float64, by name: means and largest values of the maps."""
    parts: dict[str, np.ndarray]
    """(N,) float64: what the ELBO is made of; empty where it is not wanted or there is no posterior."""


class Scorer:
    def __init__(
        self,
        stage: FirstStage,
        lpips: LPIPS | None,
        *,
        blur_px: float | None,
        seed: int,
        elbo: bool,
        device: torch.device,
    ):
        self.stage, self.lpips, self.blur_px, self.seed, self.device = stage, lpips, blur_px, seed, device
        self.elbo = elbo and stage.has_posterior

    @property
    def names(self) -> list[str]:
        """Names of the scores; `negative_elbo` gives the last one."""
        lpips = ["lpips_mean", "lpips_max"] if self.lpips is not None else []
        return ["pixel_mean", "pixel_max", *lpips, *(["negative_elbo"] if self.elbo else [])]

    @torch.no_grad()
    def score(self, images: Tensor, numbers: Sequence[int]) -> Scored:
        """`images`: NCHW in [-1, 1]; `numbers`: of the images, which the posterior's noise is a function of."""
        images = images.to(self.device)
        parts: dict[str, Tensor] = {}
        if self.stage.module is None:
            made = self.stage.reconstruct(images)
        else:
            mean, logvar = self.stage.moments(images)
            made = self.stage.decode(mean)
            if self.elbo and logvar is not None:
                noise = posterior_noise(self.seed, numbers, mean.shape[1:]).to(self.device)
                sample = self.stage.decode(mean + torch.exp(0.5 * logvar) * noise)
                parts["squares"] = _squares(images, sample).double().flatten(1).sum(1)
                mean, logvar = mean.double(), logvar.double()
                parts["kl"] = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
        squares = _squares(images, made).mean(1)
        maps = {PIXEL: blurred(squares, self.blur_px)}
        scores = {"pixel_mean": squares.double().mean((1, 2)), "pixel_max": maps[PIXEL].amax((1, 2))}
        if self.lpips is not None:
            shown = made.nan_to_num(nan=-1).clamp(-1, 1)
            scores["lpips_mean"], maps[PERCEPTUAL] = self.lpips.maps(images, shown)
            scores["lpips_max"] = maps[PERCEPTUAL].amax((1, 2))
        return Scored(made, maps, _numbers(scores), _numbers(parts))


def _squares(images: Tensor, made: Tensor) -> Tensor:
    return (images - made).square().nan_to_num(nan=LARGEST_SQUARE, posinf=LARGEST_SQUARE)


def _numbers(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: column.double().cpu().numpy() for name, column in values.items()}


def negative_elbo(row: dict[str, Any], variance: float) -> float:
    """Nats per pixel and channel of one sample of the posterior, under a Gaussian of this variance around its
    reconstruction: (squares / (2 variance) + n / 2 log(2 pi variance) + KL) / n (Kingma and Welling 2014)."""
    count = row["numbers"]
    likelihood = row["squares"] / (2 * variance) + count / 2 * math.log(2 * math.pi * variance)
    return float((likelihood + row["kl"]) / count)


def blurred(maps: Tensor, sigma_px: float | None) -> Tensor:
    """(N, H, W) smoothed by a Gaussian cut at three standard deviations, the border repeated outwards.

    `sigma_px` None: 1/64 of the shorter side, at least 1.
    """
    sigma = sigma_px or max(1.0, min(maps.shape[1:]) / 64)
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=maps.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = F.pad(maps[:, None], [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))[:, 0].clamp(min=0)
