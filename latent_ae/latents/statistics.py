"""Streaming float64 statistics of a first stage's latents, from which a diffusion model's scaling follows.

The count, means and sums of products of deviations of the channels are enough: they merge over batches and processes
without loss (Chan, Golub & LeVeque 1983), and the overall mean and std follow from them. Quantiles come from integer
counts.
"""

import math
from typing import Any

import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.latents.quantiles import QuantileSketch

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
DEAD_SIGNAL_FRACTION = 0.01
EQUAL_RELATIVE_STD = 1e-12
"""Largest std of equal values after rounding in float64, relative to their mean."""


class _Merging:
    """Count, mean and sums of products of deviations, which merge without loss."""

    count: int
    mean: Tensor
    scatter: Tensor

    def merge(self, other: "_Merging") -> None:
        """Add the values of another object of this class.

        S = Sa + Sb + delta delta^T * na * nb / n (Chan et al., eq. 2.1, for vectors).
        """
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.scatter = self.scatter + other.scatter + self._products(delta) * (self.count * other.count / total)
        self.count = total

    def _products(self, delta: Tensor) -> Tensor:
        """Return those products of a deviation that `scatter` sums."""
        raise NotImplementedError


class Moments(_Merging):
    """Count, mean and population covariance of the channels of NCHW tensors, merged batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        """Number of values per channel."""
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)
        """Sums of products of deviations from the means, (C, C)."""

    def update(self, values: Tensor) -> None:
        """Add the values of an (N, C, H, W) tensor of any float type."""
        batch = Moments()
        # on the CPU: latents are small, and not every accelerator has float64
        flat = values.detach().cpu().double().transpose(0, 1).flatten(1)
        batch.count = flat.shape[1]
        if batch.count:
            batch.mean = flat.mean(1)
            deviations = flat - batch.mean[:, None]
            batch.scatter = deviations @ deviations.T
            self.merge(batch)

    def _products(self, delta: Tensor) -> Tensor:
        return delta.outer(delta)

    @property
    def covariance(self) -> Tensor:
        """Population covariance of the channels, (C, C)."""
        return self.scatter / self.count

    @property
    def variance(self) -> Tensor:
        """Population variance per channel, (C,)."""
        return self.covariance.diagonal()

    def overall(self) -> tuple[float, float]:
        """Return the mean and population standard deviation over all channels together."""
        mean = self.mean.mean()
        # law of total variance; every channel has the same number of values
        variance = (self.variance + (self.mean - mean).square()).mean()
        return float(mean), math.sqrt(float(variance))


class PositionMoments(_Merging):
    """Count, mean and population variance of each value of (C, H, W) tensors of one size, merged batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        """Number of tensors."""
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, dtype=torch.float64)
        """Sums of squared deviations from the means, (C, H, W)."""

    def update(self, values: Tensor) -> None:
        """Add the values of an (N, C, H, W) tensor of any float type."""
        batch = PositionMoments()
        values = values.detach().cpu().double()
        batch.count = len(values)
        if batch.count:
            batch.mean = values.mean(0)
            batch.scatter = (values - batch.mean).square().sum(0)
            self.merge(batch)

    def _products(self, delta: Tensor) -> Tensor:
        return delta.square()

    @property
    def variance(self) -> Tensor:
        """Population variance of each value, (C, H, W)."""
        return self.scatter / self.count


class LatentStatistics:
    """Mean, covariance, quantiles and KL of latents, overall and per channel, updated batch by batch.

    statistics = LatentStatistics()
    statistics.update(latents)                  # N x C x h x w, raw: posterior samples or modes
    statistics.gather()                         # only if several processes updated it
    z = (latents - statistics.shift_factor) * statistics.scaling_factor

    Args:
        per_position: Whether to keep the mean and variance of each position, too; then all latents have one size.
    """

    def __init__(self, per_position: bool = False) -> None:
        self.per_position = per_position
        self.positions = PositionMoments()
        """Mean and variance of each value; empty without `per_position`."""
        self.latents = Moments()
        self.sketch = QuantileSketch()
        self.posterior_means = Moments()
        self.means_by_position = PositionMoments()
        self.one_size = True
        """Whether all posteriors have one size so far; `means_by_position` is of these."""
        self.posterior_variances = Moments()
        self.kl = Moments()

    def update(self, latents: Tensor, mean: Tensor | None = None, logvar: Tensor | None = None) -> None:
        """Add a batch of latents.

        Args:
            latents: (N, C, h, w) raw latents of any float type: posterior samples or modes.
            mean: (N, C, h, w) mean of the posterior; None for latents without a posterior.
            logvar: (N, C, h, w) log-variance of the posterior; None for latents without a posterior.

        Raises:
            ValueError: If only one of `mean` and `logvar` is given.
        """
        if (mean is None) != (logvar is None):
            raise ValueError("give the posterior's mean and logvar together, or neither")
        self.latents.update(latents)
        if self.per_position:
            self.positions.update(latents)
        self.sketch.update(latents)
        if mean is not None and logvar is not None:
            mean, logvar = mean.detach().cpu().double(), logvar.detach().cpu().double()
            variance = logvar.exp()
            self.posterior_means.update(mean)
            seen = self.means_by_position
            self.one_size = self.one_size and (not seen.count or seen.mean.shape == mean.shape[1:])
            if self.one_size:
                seen.update(mean)
            self.posterior_variances.update(variance)
            # KL(N(mean, variance) || N(0, 1)) of one latent value, in nats (Kingma & Welling 2014, appendix B)
            self.kl.update(0.5 * (mean.square() + variance - 1 - logvar))

    def merge(self, other: "LatentStatistics") -> None:
        """Add the latents of another object, as if they had been added here."""
        for mine, theirs in zip(self._moments(), other._moments(), strict=True):
            mine.merge(theirs)
        self.positions.merge(other.positions)
        seen, more = self.means_by_position, other.means_by_position
        fit = not (seen.count and more.count) or seen.mean.shape == more.mean.shape
        self.one_size = self.one_size and other.one_size and fit
        if self.one_size:
            seen.merge(more)
        self.sketch.merge(other.sketch)

    def gather(self) -> None:
        """Merge the statistics of all processes, in the order of their ranks. Every process must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts = [LatentStatistics() for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, self)
        merged = LatentStatistics(self.per_position)
        for part in parts:
            merged.merge(part)
        self.__dict__.update(merged.__dict__)

    def _moments(self) -> tuple[Moments, ...]:
        return self.latents, self.posterior_means, self.posterior_variances, self.kl

    @property
    def count(self) -> int:
        """Number of latent values, all channels together."""
        return self.latents.count * len(self.latents.mean)

    @property
    def mean(self) -> float:
        """Mean over all values. Raises UserError like `std`."""
        return self._checked()[0]

    @property
    def std(self) -> float:
        """Population standard deviation over all values.

        Raises:
            UserError: If there are no latents, some are not finite, or all are equal.
        """
        return self._checked()[1]

    @property
    def shift_factor(self) -> float:
        """The overall mean, which is subtracted from a latent before scaling. Raises UserError like `std`."""
        return self.mean

    @property
    def scaling_factor(self) -> float:
        """1 / std: `(z - shift_factor) * scaling_factor` has unit variance. Raises UserError like `std`."""
        return 1 / self.std

    @property
    def channel_mean(self) -> list[float]:
        """Mean of each channel."""
        return [float(value) for value in self.latents.mean]

    @property
    def channel_std(self) -> list[float]:
        """Population standard deviation of each channel."""
        return [float(value) for value in self.latents.variance.sqrt()]

    @property
    def channel_covariance(self) -> list[list[float]]:
        """Population covariance of the channels over all positions, C x C."""
        return [[float(value) for value in row] for row in self.latents.covariance]

    def quantiles(self, channel: int | None = None) -> dict[str, float]:
        """Return the quantiles at QUANTILES by fraction; the module quantiles.py states their error.

        Args:
            channel: The channel; None takes all channels together.

        Raises:
            ValueError: If no latent value is finite.
        """
        return dict(zip(map(str, QUANTILES), self.sketch.quantiles(QUANTILES, channel), strict=True))

    @property
    def channel_kl(self) -> list[float]:
        """Mean KL to N(0, 1) per latent value of each channel, in nats; empty if no posterior was given."""
        return [float(value) for value in self.kl.mean]

    @property
    def dead_channels(self) -> list[int]:
        """Channels whose sampled values hardly depend on the image; empty if no posterior was given.

        A channel is dead if the variance of the posterior mean over images is at most 1 % of that plus the posterior's
        variance. For a posterior that collapsed to N(0, 1) this is the active-units threshold of Burda et al. 2016, and
        it does not depend on the scale of the latents. The variance is that at each position, averaged over positions,
        so that a pattern that all images share is none; of one image, or of several sizes, it is over positions, too.
        """
        if not self.posterior_means.count:
            return []
        signal, noise, count = (
            self.posterior_means.variance,
            self.posterior_variances.mean,
            self.means_by_position.count,
        )
        if self.one_size and count > 1:
            signal = self.means_by_position.variance.mean((1, 2)) * count / (count - 1)
        dead = signal <= DEAD_SIGNAL_FRACTION * (signal + noise)
        return [channel for channel, flag in enumerate(dead.tolist()) if flag]

    def summary(self) -> dict[str, Any]:
        """Return all statistics by name, JSON-ready; KL is in nats. Raises UserError like `std`."""
        summary: dict[str, Any] = {
            "count": self.count,
            "mean": self.mean,
            "std": self.std,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "channel_mean": self.channel_mean,
            "channel_std": self.channel_std,
            "channel_covariance": self.channel_covariance,
            "quantiles": self.quantiles(),
            "channel_quantiles": [self.quantiles(channel) for channel in range(len(self.latents.mean))],
        }
        if self.kl.count:
            summary |= {
                "kl_nats_per_dim": float(self.kl.mean.mean()),
                "channel_kl_nats_per_dim": self.channel_kl,
                "dead_channels": self.dead_channels,
            }
        return summary

    def _checked(self) -> tuple[float, float]:
        if not self.latents.count:
            raise UserError("no latents were seen, so they have no statistics; give at least one image")
        mean, std = self.latents.overall()
        if not math.isfinite(mean) or not math.isfinite(std):
            raise UserError(
                "the latents hold values that are not finite (NaN or infinity), so they cannot be scaled; "
                "the weights have diverged: take an earlier checkpoint, or train with a lower learning rate"
            )
        if std <= EQUAL_RELATIVE_STD * abs(mean):
            raise UserError(
                f"all {self.count} latent values are equal ({mean:g}), so they cannot be scaled; the encoder "
                "ignores its input: train it longer, lower the KL weight, or use images that differ"
            )
        return mean, std
