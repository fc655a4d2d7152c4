"""How well scores separate abnormal from normal images: the area under the ROC curve, and conformal thresholds."""

import math

import numpy as np
import torch
from torch import Tensor

Z95 = 1.959964
"""Two-sided 95 % point of the standard normal distribution."""
FEWEST_SCORES = 10
"""With fewer scores of a kind no interval is given, because it may have no width at all."""
DROPPED_BITS = 12
"""Last bits of a float32 score that `PixelScores` drops."""


def auroc(normal: np.ndarray, abnormal: np.ndarray) -> float:
    """Return the probability that a score of `abnormal` is above one of `normal`, ties counted half (Mann & Whitney).

    Args:
        normal: (N,) scores.
        abnormal: (M,) scores.
    """
    return float(_placements(abnormal, normal).mean())


def auroc_interval(normal: np.ndarray, abnormal: np.ndarray, *, paired: bool = False) -> list[float] | None:
    """Return the 95 % interval of the area under the ROC curve, [low, high].

    DeLong's variance (DeLong, DeLong, Clarke-Pearson 1988) on the logit's scale (Pepe 2003), on which areas near 1 are
    less skewed and the interval stays within 0 and 1.

    Args:
        normal: (N,) scores.
        abnormal: (M,) scores.
        paired: normal[i] and abnormal[i] come from the same image, so that both vary together (Obuchowski 1997, for
            clusters of two).

    Returns:
        The interval; None with fewer than `FEWEST_SCORES` of a kind, or if the scores separate the kinds completely,
        from which no width can be estimated.
    """
    if min(len(normal), len(abnormal)) < FEWEST_SCORES:
        return None
    above, below = _placements(abnormal, normal), 1 - _placements(normal, abnormal)
    area = float(above.mean())
    if area in (0.0, 1.0):
        return None
    if paired:
        variance = (above + below).var(ddof=1) / len(above)
    else:
        variance = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below)
    centre, half = math.log(area / (1 - area)), Z95 * math.sqrt(variance) / (area * (1 - area))
    return [1 / (1 + math.exp(-end)) for end in (centre - half, centre + half)]


def _placements(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the fraction of `others` below each score, ties counted half."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / (2 * len(ranked))


def conformal_threshold(normal: np.ndarray, false_positive_rate: float) -> float | None:
    """Return a threshold that a further normal score exceeds with at most the given probability, for any distribution.

    It is the ceil((n + 1)(1 - rate))-th smallest of n scores (split conformal prediction: Vovk et al. 2005; Lei et al.
    2018), if all n + 1 scores are exchangeable.

    Args:
        normal: (n,) scores of normal images.
        false_positive_rate: The probability, 0 to 1.

    Returns:
        The threshold; None if n is under 1 / rate - 1, too few for the guarantee.
    """
    rank = math.ceil((len(normal) + 1) * (1 - false_positive_rate) - 1e-9)
    return float(np.sort(normal)[rank - 1]) if rank <= len(normal) else None


class PixelScores:
    """Area under the ROC curve over any number of pixels, in 8 MB.

    Scores that agree in their first 12 binary digits (a relative difference under 0.0005) count as ties.
    """

    def __init__(self) -> None:
        # the bit patterns of non-negative floats are in the order of their values
        self.counts = torch.zeros(2, 2 ** (31 - DROPPED_BITS), dtype=torch.int64)

    def add(self, scores: Tensor, mask: Tensor) -> None:
        """Add pixels.

        Args:
            scores: Float32 >= 0, of any shape.
            mask: Bool of the same shape, True for abnormal pixels.
        """
        keys = scores.detach().cpu().float().contiguous().view(torch.int32) >> DROPPED_BITS
        for row, chosen in enumerate((~mask.cpu(), mask.cpu())):
            self.counts[row] += torch.bincount(keys[chosen].long(), minlength=self.counts.shape[1])

    def auroc(self) -> float | None:
        """Return the area under the ROC curve; None without pixels of both kinds."""
        normal, abnormal = self.counts.double()
        if not normal.sum() or not abnormal.sum():
            return None
        below = normal.cumsum(0) - normal / 2
        return float((abnormal * below).sum() / normal.sum() / abnormal.sum())
