"""Scores of images by what their first stage fails to reconstruct, and the maps from which scores are computed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_ae.data.rng import posterior_noise
from latent_ae.models.codes import has_codes, latent_of_codes, nearest_codes
from latent_ae.models.density import Density, reconstruction_features
from latent_ae.models.loading import FirstStage
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_eval.anomaly.density import Mixture
from latent_ae_eval.anomaly.neighbours import Neighbours

PIXEL, PERCEPTUAL, NEAREST = "pixel_error", "lpips", "neighbours"
LARGEST_ENERGY = 1e6
"""Replaces minus a log-density that is not finite, nats."""
LARGEST_SQUARE = 4.0
"""Largest squared difference of two values in [-1, 1], which also replaces differences that are not finite."""


@dataclass(frozen=True)
class Scored:
    """Scores of a batch of N images of one shape."""

    reconstruction: Tensor
    """(N, C, H, W) float32."""
    maps: dict[str, Tensor]
    """(N, H, W) float32 >= 0, by name."""
    scores: dict[str, np.ndarray]
    """(N,) float64, by name: means and largest values of the maps."""
    parts: dict[str, np.ndarray]
    """(N,) float64 parts of the ELBO; empty if it is not requested or there is no posterior."""
    latents: np.ndarray
    """(N, D) float64, flattened posterior means; (N, 0) if the model is a function."""
    errors: np.ndarray
    """(N, 2) float64, `reconstruction_features`; (0, 2) without a mixture that is fitted."""
    images: Tensor
    """(N, C, H, W), as they were scored."""


class Scorer:
    """Computes the scores of images.

    Args:
        stage: The model.
        lpips: LPIPS, or None.
        blur_px: Standard deviation by which maps of squared error are smoothed; None depends on the size.
        seed: Seed of the posterior's noise.
        elbo: Whether to compute the parts of the ELBO.
        device: Where the networks run.
        mixture: A density to be fitted, or None; it scores once `fit` has been called.
        neighbours: A bank of patches, or None; likewise.
        density: The density that was trained with the model, or None.
    """

    def __init__(
        self,
        stage: FirstStage,
        lpips: LPIPS | None,
        *,
        blur_px: float | None,
        seed: int,
        elbo: bool,
        device: torch.device,
        mixture: Mixture | None = None,
        neighbours: Neighbours | None = None,
        density: Density | None = None,
    ):
        self.mixture, self.neighbours, self.fitted = mixture, neighbours, False
        self.density = None if density is None else density.to(device)
        self.latents, self.errors = list[np.ndarray](), list[np.ndarray]()
        self.stage, self.lpips, self.blur_px, self.seed, self.device = stage, lpips, blur_px, seed, device
        self.elbo = elbo and stage.has_posterior

    @property
    def names(self) -> list[str]:
        """Names of the scores; `negative_elbo` is computed by the function of this name."""
        lpips = ["lpips_mean", "lpips_max"] if self.lpips is not None else []
        fitted = {"negative_elbo": self.elbo, "density": self.density is not None, "mixture": self.mixture}
        fitted |= {"neighbours": self.neighbours}
        return ["pixel_mean", "pixel_max", *lpips, *(name for name, there in fitted.items() if there)]

    def learn(self, scored: Scored) -> None:
        """Take in normal images that were scored, from which `fit` fits."""
        if self.neighbours is not None:
            self.neighbours.learn(scored.images)
        if self.mixture is not None:
            self.latents.append(scored.latents)
            self.errors.append(scored.errors)

    def fit(self) -> None:
        """Fit the density to what was taken in. Raises UserError if that is too little."""
        if self.mixture is not None:
            self.mixture.fit(np.concatenate(self.latents), np.concatenate(self.errors))
        self.fitted = True

    @torch.no_grad()
    def score(self, images: Tensor, numbers: Sequence[int]) -> Scored:
        """Return the scores of images.

        Args:
            images: (N, C, H, W) float in [-1, 1].
            numbers: Numbers of the images, which determine the posterior's noise.
        """
        images = images.to(self.device)
        parts: dict[str, Tensor] = {}
        latents = images.new_empty(len(images), 0)
        if self.stage.module is None:
            reconstruction = self.stage.reconstruct(images)
        else:
            mean, logvar = self.stage.moments(images)
            reconstruction, latents = self.stage.decode(mean), mean
            if self.elbo and logvar is not None:
                noise = posterior_noise(self.seed, numbers, mean.shape[1:]).to(self.device)
                sample = self.stage.decode(mean + torch.exp(0.5 * logvar) * noise)
                parts["squares"] = _squares(images, sample).double().flatten(1).sum(1)
                mean, logvar = mean.double(), logvar.double()
                kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
                most = LARGEST_ENERGY * mean[0].numel()
                parts["kl"] = kl.nan_to_num(nan=most, posinf=most)
        squares = _squares(images, reconstruction).mean(1)
        maps = {PIXEL: blurred(squares, self.blur_px)}
        scores = {"pixel_mean": squares.double().mean((1, 2)), "pixel_max": maps[PIXEL].amax((1, 2))}
        if self.lpips is not None:
            shown = reconstruction.nan_to_num(nan=-1).clamp(-1, 1)
            scores["lpips_mean"], maps[PERCEPTUAL] = self.lpips.maps(images, shown)
            scores["lpips_max"] = maps[PERCEPTUAL].amax((1, 2))
        if self.density is not None and self.stage.module is not None:
            known = latents  # as in training; a VQModel encodes to latents before they are codes
            if has_codes(self.stage.module):
                known = latent_of_codes(self.stage.module, nearest_codes(self.stage.module, latents)).float()
            scores["density"] = self.density(self.density.features(known, images, reconstruction)).nan_to_num(
                nan=LARGEST_ENERGY, posinf=LARGEST_ENERGY
            )
        flat = latents.double().flatten(1).cpu().numpy()
        # only the density takes them
        errors = reconstruction_features(images, reconstruction).cpu().numpy() if self.mixture else np.empty((0, 2))
        if self.neighbours is not None and self.fitted:
            scores["neighbours"], maps[NEAREST] = self.neighbours.score(images)
        found = _numbers(scores)
        if self.mixture is not None and self.fitted:
            found["mixture"] = self.mixture.energies(flat, errors)
        return Scored(reconstruction, maps, found, _numbers(parts), flat, errors, images)


def _squares(images: Tensor, reconstruction: Tensor) -> Tensor:
    return (images - reconstruction).square().nan_to_num(nan=LARGEST_SQUARE, posinf=LARGEST_SQUARE)


def _numbers(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: column.double().cpu().numpy() for name, column in values.items()}


def negative_elbo(row: dict[str, Any], variance: float) -> float:
    """Return the negative ELBO of an image in nats per pixel and channel, from one sample of the posterior.

    (squares / (2 variance) + n / 2 log(2 pi variance) + KL) / n, for a Gaussian around the reconstruction (Kingma &
    Welling 2014).

    Args:
        row: Has `squares` (summed squared error), `kl` (nats) and `numbers` (n, values of the image).
        variance: Variance of the Gaussian, in [-1, 1] units.
    """
    count = row["numbers"]
    likelihood = row["squares"] / (2 * variance) + count / 2 * math.log(2 * math.pi * variance)
    return float((likelihood + row["kl"]) / count)


def blurred(maps: Tensor, sigma_px: float | None) -> Tensor:
    """Smooth maps by a Gaussian cut at three standard deviations; the border is repeated outwards.

    Args:
        maps: (N, H, W) float32.
        sigma_px: Standard deviation, px; None takes 1/64 of the shorter side, at least 1.
    """
    sigma = sigma_px or max(1.0, min(maps.shape[1:]) / 64)
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=maps.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = F.pad(maps[:, None], [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))[:, 0].clamp(min=0)
