"""Mutual information between latent dimensions and known factors, and the mutual information gap."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 20
"""Number of bins of equal width between each dimension's smallest and largest value (Locatello et al. 2019)."""


class Gap(NamedTuple):
    """How much more informative the best dimension is about a factor than the next one."""

    value: float
    """Difference of mutual information, relative to the factor's entropy."""
    dimension: int
    """The most informative dimension."""


def binned(codes: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return the bins of (N, D) numbers, (N, D) integers from 0 to bins - 1; a constant dimension is 0."""
    low, high = codes.min(0), codes.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.minimum((codes - low) / width * bins, bins - 1).astype(np.int64)


def mutual_information(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the mutual information of each dimension and factor, from the frequencies of their pairs.

    Args:
        codes: (N, D) non-negative integers.
        factors: (N, K) non-negative integers.

    Returns:
        (D, K) nats.
    """
    information = np.empty((codes.shape[1], factors.shape[1]))
    for k, factor in enumerate(factors.T):
        values = int(factor.max()) + 1
        marginal = entropy(np.bincount(factor))
        for d, code in enumerate(codes.T):
            joint = np.bincount(code * values + factor)
            information[d, k] = entropy(np.bincount(code)) + marginal - entropy(joint)
    return np.maximum(information, 0.0)  # rounding errors may be negative


def entropy(counts: np.ndarray) -> float:
    """Return the entropy in nats of a distribution, from how often each value occurs."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def gaps(information: np.ndarray, entropies: np.ndarray) -> list[Gap]:
    """Return the mutual information gap of each factor (Chen et al. 2018, eq. 6): (best - next I) / H.

    Args:
        information: (D, K) mutual information, nats. With one dimension the next I is 0.
        entropies: (K,) entropies H of the factors, nats.
    """
    padded = np.vstack([information, np.zeros_like(information[:1])])
    order = np.argsort(-padded, axis=0, kind="stable")[:2]
    best, following = np.take_along_axis(padded, order, 0)
    return [Gap(float(gap), int(d)) for gap, d in zip((best - following) / entropies, order[0], strict=True)]


def gaussian_total_correlation(codes: np.ndarray) -> float:
    """Return the total correlation of the Gaussian fitted to codes, -ln det R / 2 nats with R their correlations.

    Locatello et al. 2019 measure it so; dependences that are not linear are not seen. Constant dimensions are left out.
    If dimensions are copies of each other it is infinite, and computed as far as float64 allows.

    Args:
        codes: (N, D) numbers.
    """
    varying = codes[:, np.ptp(codes, 0) > 0].astype(np.float64)
    if varying.shape[1] < 2:
        return 0.0
    values = np.linalg.eigvalsh(np.corrcoef(varying, rowvar=False))
    return float(-0.5 * np.log(np.maximum(values, np.finfo(np.float64).eps)).sum())


def measured(codes: np.ndarray, factors: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return mutual information, each factor's gap, their mean (MIG), and the total correlation, JSON-ready.

    Args:
        codes: (N, D) float.
        factors: (N, K) non-negative integers.
        names: Names of the K factors.
    """
    information = mutual_information(binned(codes), factors)
    entropies = np.array([entropy(np.bincount(factor)) for factor in factors.T])
    each = gaps(information, entropies)
    return {
        "mig": float(np.mean([gap.value for gap in each])),
        "gaps": {name: gap.value for name, gap in zip(names, each, strict=True)},
        "dimensions": {name: gap.dimension for name, gap in zip(names, each, strict=True)},
        "total_correlation": gaussian_total_correlation(codes),
        "mutual_information": information.tolist(),
    }
