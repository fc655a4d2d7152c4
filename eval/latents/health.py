"""Formulas for the health of latents: rank, distance from a Gaussian, spectrum, and changes that they should follow.

spectrum = RadialSpectrum()
spectrum.update(latents)                    # NCHW; merge() adds another spectrum
print(spectrum.slope())                     # 0 for white noise, about -2 for photographs
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FAR = 5.0
"""Distance from the mean in standard deviations from which a value is an outlier; 5.7e-7 of a Gaussian are."""
RINGS = 32
FITTED = 0.1
"""Lowest frequency of the fit of a slope, relative to Nyquist's."""
DISTORTED = 4.0
"""A grid of n px has its spectrum distorted by the window below this / n of Nyquist's frequency, two cycles."""
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "half size": lambda x: F.avg_pool2d(x, 2),
    "turned by 90 degrees": lambda x: torch.rot90(x, 1, (-2, -1)),
    "turned by 180 degrees": lambda x: torch.rot90(x, 2, (-2, -1)),
}
"""Changes of (N, C, H, W) images and latents; half size averages 2 x 2 px, so sides must be even."""


def effective_rank(covariance: np.ndarray | Tensor) -> float:
    """Return exp of the entropy of the eigenvalues as fractions of their sum (Roy & Vetterli 2007), between 1 and C.

    Args:
        covariance: (C, C). Equal eigenvalues give C, zeros give 0.
    """
    eigenvalues = np.linalg.eigvalsh(np.asarray(covariance, dtype=np.float64)).clip(min=0)
    if not eigenvalues.sum() > 0:
        return 0.0
    shares = eigenvalues / eigenvalues.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def wasserstein_to_normal(values: np.ndarray, counts: np.ndarray) -> float:
    """Return the 1-Wasserstein distance between standardised values and N(0, 1); 0 for a Gaussian.

    This is the integral of |Q(p) - Phi^-1(p)| over p, solved on each step of the quantile function Q.

    Args:
        values: (n,) ascending values.
        counts: (n,) how often each value occurs.

    Returns:
        The distance; nan if all values are equal.
    """
    mean, std = _mean_std(values, counts)
    if not std > 0:
        return math.nan
    z = torch.from_numpy((values - mean) / std)
    ends = torch.from_numpy(np.concatenate([[0.0], counts.cumsum() / counts.sum()]).clip(0, 1))
    low, high = ends[:-1], ends[1:]
    middle = torch.special.ndtr(z).clamp(low, high)  # where Phi^-1 crosses the step
    density_low, density_middle, density_high = (_density(torch.special.ndtri(p)) for p in (low, middle, high))
    # the antiderivative of Phi^-1 is -phi(Phi^-1)
    below = z * (middle - low) - (density_low - density_middle)
    above = (density_middle - density_high) - z * (high - middle)
    return float((below + above).sum())


def excess_kurtosis(values: np.ndarray, counts: np.ndarray) -> float:
    """Return the fourth moment of the standardised values minus 3: 0 for a Gaussian, 3 for a Laplace distribution.

    Args:
        values: (n,) values.
        counts: (n,) how often each value occurs.

    Returns:
        The excess kurtosis; nan if all values are equal.
    """
    mean, std = _mean_std(values, counts)
    return float(np.average(((values - mean) / std) ** 4, weights=counts)) - 3 if std > 0 else math.nan


def outlier_share(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the fraction of values more than FAR standard deviations from their mean, and the largest distance.

    Args:
        values: (n,) values.
        counts: (n,) how often each value occurs.

    Returns:
        The fraction, and the largest distance in standard deviations; zeros if all values are equal.
    """
    mean, std = _mean_std(values, counts)
    if not std > 0:
        return 0.0, 0.0
    distance = np.abs(values - mean) / std
    return float(counts[distance > FAR].sum() / counts.sum()), float(distance.max())


def _mean_std(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    mean = float(np.average(values, weights=counts))
    return mean, math.sqrt(float(np.average((values - mean) ** 2, weights=counts)))


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


class RadialSpectrum:
    """Power over spatial frequency, averaged over directions, channels and images, in RINGS up to Nyquist's frequency.

    The mean of each channel is subtracted and a Hann window applied; white noise of variance v has power v in every
    ring but the lowest, of fewer than two cycles on a grid, which have less. Frequencies are relative to Nyquist's,
    half a cycle per px, so that grids of several sizes can be averaged.
    """

    def __init__(self) -> None:
        # by ring: of all frequencies, and of those that the window leaves as they are
        self.power_sum = np.zeros((2, RINGS))
        self.frequency_sum = np.zeros((2, RINGS))
        self.count = np.zeros((2, RINGS), dtype=np.int64)

    def update(self, images: Tensor) -> None:
        """Add (N, C, H, W) values. Grids with a side under 4 px have no spectrum and are left out."""
        height, width = images.shape[-2:]
        if min(height, width) < 4:
            return
        rows, columns = (torch.hann_window(n, periodic=True, device=images.device) for n in (height, width))
        window = rows[:, None] * columns
        values = images.detach().float()
        mean = (values * window).sum((-2, -1), keepdim=True) / window.sum()
        transformed = torch.fft.fft2((values - mean) * window)
        power = (transformed.abs().square() / window.square().sum()).sum((0, 1)).double().cpu().numpy()
        down, across = (2 * np.abs(np.fft.fftfreq(n)) for n in (height, width))
        frequency = np.hypot(down[:, None], across)
        ring = np.ceil(frequency * RINGS - 1e-9).astype(int) - 1
        inside = (ring >= 0) & (ring < RINGS)  # without the mean and the corners beyond Nyquist's frequency
        whole = inside & (frequency >= DISTORTED / min(height, width) - 1e-9)
        number = len(images) * images.shape[1]
        for row, chosen in enumerate((inside, whole)):
            self.power_sum[row] += np.bincount(ring[chosen], power[chosen], RINGS)
            self.frequency_sum[row] += np.bincount(ring[chosen], number * frequency[chosen], RINGS)
            self.count[row] += number * np.bincount(ring[chosen], minlength=RINGS)

    def merge(self, other: "RadialSpectrum") -> None:
        """Add another spectrum."""
        self.power_sum = self.power_sum + other.power_sum
        self.frequency_sum = self.frequency_sum + other.frequency_sum
        self.count = self.count + other.count

    def rings(self, row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return mean frequency, relative to Nyquist's, and mean power of the non-empty rings, ascending, (n,) each.

        Args:
            row: 0 for all frequencies, 1 for those that the window leaves as they are.
        """
        filled = self.count[row] > 0
        counts = self.count[row][filled]
        return self.frequency_sum[row][filled] / counts, self.power_sum[row][filled] / counts

    def slope(self) -> float | None:
        """Return the slope of log power over log frequency, by least squares over the rings that are not distorted.

        None if there are fewer than three, as on grids of 4 px.
        """
        frequency, power = self.rings(1)
        fitted = (frequency >= FITTED) & (power > 0)
        if fitted.sum() < 3:
            return None
        return float(np.polyfit(np.log(frequency[fitted]), np.log(power[fitted]), 1)[0])

    def high_share(self) -> float | None:
        """Return the fraction of power above half of Nyquist's frequency, 3/4 for white noise; None without power."""
        frequency, _ = self.rings()
        power = self.power_sum[0][self.count[0] > 0]
        return float(power[frequency > 0.5].sum() / power.sum()) if power.sum() > 0 else None
