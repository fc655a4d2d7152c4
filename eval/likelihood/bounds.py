"""Bounds on the log-likelihood of images, from samples of their posteriors; all in nats, summed in float64."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latent_ae.data.rng import binary_images, posterior_noise
from latent_ae.models.likelihood import STATED, LikelihoodKind, log_likelihood
from latent_ae.models.loading import FirstStage
from latent_ae.models.logistic_mixture import mixture_log_likelihood
from latent_ae.models.posterior import Drawn, drawer

FIT_VALUES = 2**21
"""Largest number of pixel values to which a scale is fitted."""
SCALES = 1e-4, 4.0
"""Range of fitted scales, in [-1, 1] units."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of N images, nats per image."""

    distortion: np.ndarray
    """(N,) minus log p(x | z), mean over the samples."""
    rates: np.ndarray
    """(N, levels) KL(q(z | x) || p(z)) of each level of the latent."""
    curve: np.ndarray
    """(N, sizes) importance-weighted bounds for `curve_sizes` samples; for one it is minus distortion and rate."""
    effective: np.ndarray
    """(N,) effective number of samples."""


def curve_sizes(samples: int) -> list[int]:
    """Return 1, 2, 4, ... and `samples`: the numbers of samples for which bounds are computed."""
    return sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})


def importance_bound(log_weights: Tensor, size: int) -> Tensor:
    """Return the log of the mean of `size` weights (Burda et al. 2016, eq. 8), mean over the K // size groups of K.

    Args:
        log_weights: (N, K) log weights of K samples, nats.
        size: Number of weights in a group.

    Returns:
        (N,) nats.
    """
    groups = log_weights[:, : log_weights.shape[1] // size * size].unflatten(1, (-1, size))
    return (torch.logsumexp(groups, 2) - math.log(size)).mean(1)


def effective_samples(log_weights: Tensor) -> Tensor:
    """Return the squared sum of the weights over the sum of their squares, 1 to K (Kong 1992).

    Args:
        log_weights: (N, K) log weights of K samples, nats.

    Returns:
        (N,).
    """
    return torch.exp(2.0 * torch.logsumexp(log_weights, 1) - torch.logsumexp(2.0 * log_weights, 1))


class Estimator:
    """Estimates bounds from posterior samples; the noise is a function of seed, image and number of the sample.

    Args:
        stage: A first stage with a random posterior.
        kind: The likelihood of pixels given the latent.
        seed: Seed of the samples.
        discretised: For a Gaussian, whether to use the probability of 8-bit levels instead of the density.
        device: Where the model runs.
    """

    def __init__(
        self, stage: FirstStage, kind: LikelihoodKind, *, seed: int, discretised: bool, device: torch.device
    ) -> None:
        self.stage, self.kind, self.seed, self.discretised, self.device = stage, kind, seed, discretised, device

    @torch.no_grad()
    def measure(self, images: Tensor, numbers: Sequence[int], samples: int, scale: float | None) -> Bounds:
        """Return bounds on the log-likelihood of images.

        The log weight of a sample z is log p(x | z) + log p(z) - log q(z | x). For bernoulli x is a binary draw of the
        images, while z comes from the images themselves: any q gives a bound.

        Args:
            images: (N, C, H, W) in [-1, 1], sides multiples of the downsampling factor.
            numbers: Numbers of the images.
            samples: Number of posterior samples.
            scale: Scale of the likelihood in [-1, 1] units; None for a likelihood that takes none.
        """
        images = images.to(self.device)
        target = (binary_images(self.seed, numbers, images) if self.kind == "bernoulli" else images).double()
        logvar = torch.tensor(2.0 * math.log(scale or 1.0), dtype=torch.float64, device=self.device)
        likelihoods, ratios, rates = [], [], []
        for drawn in self._draws(images, numbers, samples):
            if self.kind in STATED:
                image, stated = (part.double() for part in self.stage.decode_distribution(drawn.latent))
                if self.kind == "logistic_mixture":
                    by_pixel = mixture_log_likelihood(stated, target)
                else:
                    by_pixel = log_likelihood(self.kind, image, target, 2.0 * stated)
            else:
                decoded = self.stage.decode(drawn.latent).double()
                by_pixel = log_likelihood(self.kind, decoded, target, logvar, discretised=self.discretised)
            likelihoods.append(by_pixel.flatten(1).sum(1))
            ratios.append(drawn.log_ratio.double())
            rates.append(torch.stack([rate.double().flatten(1).sum(1) for rate in drawn.rates], 1))
        log_weights = torch.stack(likelihoods, 1) + torch.stack(ratios, 1)
        distortion, rate = -torch.stack(likelihoods, 1).mean(1), torch.stack(rates).mean(0)
        # for one sample the KL in closed form has less variance than the ratios
        curve = [-distortion - rate.sum(1)]
        curve += [importance_bound(log_weights, size) for size in curve_sizes(samples)[1:]]
        parts = distortion, rate, torch.stack(curve, 1), effective_samples(log_weights)
        return Bounds(*(part.cpu().numpy() for part in parts))

    @torch.no_grad()
    def pairs(self, images: Tensor, numbers: Sequence[int], count: int) -> Tensor:
        """Return up to `count` values of each image, decoded from one sample and true: (2, N x count) on the CPU.

        Args:
            images: (N, C, H, W) in [-1, 1].
            numbers: Numbers of the images.
            count: Number of values per image.
        """
        (drawn,) = self._draws(images.to(self.device), numbers, 1)
        decoded = self.stage.decode(drawn.latent)
        chosen = []
        for number, one in zip(numbers, torch.stack([decoded.cpu(), images.cpu()], 1).flatten(2), strict=True):
            generator = torch.Generator().manual_seed(number)
            chosen.append(one[:, torch.randperm(one.shape[1], generator=generator)[:count]])
        return torch.cat(chosen, 1)

    def _draws(self, images: Tensor, numbers: Sequence[int], samples: int) -> Iterator[Drawn]:
        stage = self.stage
        assert stage.module is not None
        draw = drawer(stage.module, images.to(stage.dtype))
        shape = [stage.latent_channels, *(side // stage.factor for side in images.shape[2:])]
        for number in range(samples):
            noise = posterior_noise(self.seed, numbers, shape, number).to(self.device)
            yield draw(noise)


def fitted_scale(kind: LikelihoodKind, pairs: Tensor, *, discretised: bool) -> float:
    """Return the most likely scale, by golden section on its logarithm.

    Args:
        kind: The likelihood, gaussian or logistic.
        pairs: (2, n) decoded and true values in [-1, 1].
        discretised: Whether probabilities of 8-bit levels are used.
    """
    decoded, true = pairs.double()

    def loss(log_scale: float) -> float:
        logvar = torch.tensor(2.0 * log_scale, dtype=torch.float64)
        return -float(log_likelihood(kind, decoded, true, logvar, discretised=discretised).mean())

    golden = (math.sqrt(5.0) - 1.0) / 2.0
    low, high = map(math.log, SCALES)
    left, right = high - golden * (high - low), low + golden * (high - low)
    losses = loss(left), loss(right)
    while high - low > 1e-4:
        if losses[0] < losses[1]:
            high, right = right, left
            left = high - golden * (high - low)
            losses = loss(left), losses[0]
        else:
            low, left = left, right
            right = low + golden * (high - low)
            losses = losses[1], loss(right)
    return math.exp((low + high) / 2.0)
