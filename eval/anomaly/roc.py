"""How well scores tell the abnormal from the normal: the area under the ROC curve, and thresholds with a guarantee."""

import math

import numpy as np
import torch
from torch import Tensor

Z95 = 1.959964
"""Two-sided 95 % point of the standard normal distribution."""
FEWEST_SCORES = 10
"""Scores of each kind under which no interval is given: it may have no width at all."""
DROPPED_BITS = 12


def auroc(normal: np.ndarray, abnormal: np.ndarray) -> float:
    """Probability that a score of `abnormal` lies above one of `normal`, ties counted half (Mann and Whitney)."""
    return float(_placements(abnormal, normal).mean())


def auroc_interval(normal: np.ndarray, abnormal: np.ndarray, *, paired: bool = False) -> list[float] | None:
    """95 % interval of the area: DeLong's variance (DeLong, DeLong, Clarke-Pearson 1988) on the logit's scale (Pepe
    2003), on which areas near 1 are less skewed and the interval stays within 0 and 1.

    `paired`: normal[i] and abnormal[i] come of the same image, so that both vary together (Obuchowski 1997, of
    clusters of two). None with fewer than `FEWEST_SCORES` of a kind, or where none is out of order: that says nothing
    of the width.
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
    """Share of `others` below each score, ties counted half."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / (2 * len(ranked))


def conformal_threshold(normal: np.ndarray, false_positive_rate: float) -> float | None:
    """A threshold that a further normal score exceeds with at most this probability, whatever the distribution.

    The ceil((n + 1)(1 - rate))-th smallest of n scores (split conformal prediction: Vovk et al. 2005; Lei et al. 2018),
    if all n + 1 are exchangeable. None where n is under 1 / rate - 1, too few for the promise.
    """
    rank = math.ceil((len(normal) + 1) * (1 - false_positive_rate) - 1e-9)
    return float(np.sort(normal)[rank - 1]) if rank <= len(normal) else None


class PixelScores:
    """Area under the ROC curve over any number of pixels, in 8 MB: scores that agree in their first 12 binary digits
    (a relative difference under 0.0005) count as ties."""

    def __init__(self) -> None:
        # the bits of floats that are not negative are in the order of their values
        self.counts = torch.zeros(2, 2 ** (31 - DROPPED_BITS), dtype=torch.int64)

    def add(self, scores: Tensor, mask: Tensor) -> None:
        """`scores`: float32 >= 0; `mask`: bool of the same shape, true for abnormal pixels."""
        keys = scores.detach().cpu().float().contiguous().view(torch.int32) >> DROPPED_BITS
        for row, chosen in enumerate((~mask.cpu(), mask.cpu())):
            self.counts[row] += torch.bincount(keys[chosen].long(), minlength=self.counts.shape[1])

    def auroc(self) -> float | None:
        """None without pixels of both kinds."""
        normal, abnormal = self.counts.double()
        if not normal.sum() or not abnormal.sum():
            return None
        below = normal.cumsum(0) - normal / 2
        return float((abnormal * below).sum() / normal.sum() / abnormal.sum())
