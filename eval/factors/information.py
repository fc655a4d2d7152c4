"""Mutual information between latent dimensions and known factors, and the gap that is left of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 20
"""Bins of equal width between each dimension's least and largest value (Locatello et al. 2019)."""


class Gap(NamedTuple):
    """How much more the most informative dimension tells of a factor than the next one."""

    value: float
    """Mutual information relative to the factor's entropy."""
    dimension: int
    """The most informative one."""


def binned(codes: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(N, D) numbers -> (N, D) integers from 0 to bins - 1; a dimension that never varies is 0."""
    low, high = codes.min(0), codes.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.minimum((codes - low) / width * bins, bins - 1).astype(np.int64)


def mutual_information(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """(D, K) nats, of (N, D) and (N, K) non-negative integers: that of the N pairs' own frequencies."""
    found = np.empty((codes.shape[1], factors.shape[1]))
    for k, factor in enumerate(factors.T):
        values = int(factor.max()) + 1
        marginal = entropy(np.bincount(factor))
        for d, code in enumerate(codes.T):
            joint = np.bincount(code * values + factor)
            found[d, k] = entropy(np.bincount(code)) + marginal - entropy(joint)
    return np.maximum(found, 0.0)  # rounding


def entropy(counts: np.ndarray) -> float:
    """Nats, of how often each value occurs."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def gaps(information: np.ndarray, entropies: np.ndarray) -> list[Gap]:
    """The mutual information gap of each factor (Chen et al. 2018, eq. 6): (I of the best - I of the next) / H.

    `information` (D, K) and `entropies` (K,) in nats. Of one dimension, the next is 0.
    """
    padded = np.vstack([information, np.zeros_like(information[:1])])
    order = np.argsort(-padded, axis=0, kind="stable")[:2]
    best, following = np.take_along_axis(padded, order, 0)
    return [Gap(float(gap), int(d)) for gap, d in zip((best - following) / entropies, order[0], strict=True)]


def gaussian_total_correlation(codes: np.ndarray) -> float:
    """-ln det R / 2 nats, R the correlations of (N, D) numbers: the total correlation of the Gaussian fitted to them.

    As Locatello et al. 2019 measure it; what is not linear stays unseen. Dimensions that never vary are left out; where
    others are copies of each other it is infinite, and computed as far as float64 goes.
    """
    varying = codes[:, np.ptp(codes, 0) > 0].astype(np.float64)
    if varying.shape[1] < 2:
        return 0.0
    values = np.linalg.eigvalsh(np.corrcoef(varying, rowvar=False))
    return float(-0.5 * np.log(np.maximum(values, np.finfo(np.float64).eps)).sum())


def measured(codes: np.ndarray, factors: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Mutual information, each factor's gap and their mean (MIG), and the total correlation; JSON-ready.

    `codes` (N, D) float, `factors` (N, K) non-negative integers.
    """
    information = mutual_information(binned(codes), factors)
    entropies = np.array([entropy(np.bincount(factor)) for factor in factors.T])
    found = gaps(information, entropies)
    return {
        "mig": float(np.mean([gap.value for gap in found])),
        "gaps": {name: gap.value for name, gap in zip(names, found, strict=True)},
        "dimensions": {name: gap.dimension for name, gap in zip(names, found, strict=True)},
        "total_correlation": gaussian_total_correlation(codes),
        "mutual_information": information.tolist(),
    }
