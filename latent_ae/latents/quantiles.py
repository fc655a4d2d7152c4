"""Quantiles of any number of values in bounded memory, exactly the same in any order and on any number of processes.

Values are counted in bins that follow the float32 bit pattern: sign, exponent and the first 8 bits of the mantissa. The
counts are integers, so merging is exact. A bin is at most 2^-8 of its value wide and is read at its middle, so a
quantile is within a relative 2^-9 of the order statistic that it stands for (the bound of DDSketch, Masson et al. 2019,
with fixed bins). Values under float32's smallest normal number (1.2e-38) are known to within that number.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

MANTISSA_BITS = 8
RELATIVE_ERROR = 2.0 ** -(MANTISSA_BITS + 1)
_SHIFT = 23 - MANTISSA_BITS
_STRIDE = np.int64(1) << 40
"""Distance of the keys of two channels; one channel has fewer than 2^18 bins."""


class QuantileSketch:
    """Counts the values of each channel by bin. Values that are not finite are left out and counted separately."""

    def __init__(self) -> None:
        self.channels = 0
        self.num_nonfinite = 0
        self.keys = np.zeros(0, dtype=np.int64)
        """channel * _STRIDE + bin, ascending."""
        self.counts = np.zeros(0, dtype=np.int64)

    def update(self, values: Tensor) -> None:
        """Count the values of an (N, C, H, W) tensor of any float type."""
        flat = values.detach().cpu().float().transpose(0, 1).flatten(1).numpy()
        self.channels = max(self.channels, len(flat))
        finite = np.isfinite(flat)
        self.num_nonfinite += int((~finite).sum())
        bins = _bins(flat) + _STRIDE * np.arange(len(flat), dtype=np.int64)[:, None]
        self._add(*np.unique(bins[finite], return_counts=True))

    def merge(self, other: "QuantileSketch") -> None:
        """Add the counts of another sketch, exactly as if its values had been counted here."""
        self.channels = max(self.channels, other.channels)
        self.num_nonfinite += other.num_nonfinite
        self._add(other.keys, other.counts)

    def _add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self.keys, places = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        total = np.zeros(len(self.keys), dtype=np.int64)
        np.add.at(total, places, np.concatenate([self.counts, counts]))
        self.counts = total

    def distribution(self, channel: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the occupied bins and their counts.

        Args:
            channel: The channel; None takes all channels together.

        Returns:
            The middles of the bins, ascending, (M,) float64, and the number of values in each, (M,) int64.
        """
        if channel is None:
            bins, places = np.unique((self.keys + _STRIDE // 2) % _STRIDE - _STRIDE // 2, return_inverse=True)
            counts = np.zeros(len(bins), dtype=np.int64)
            np.add.at(counts, places, self.counts)
        else:
            own = (self.keys + _STRIDE // 2) // _STRIDE == channel
            bins, counts = self.keys[own] - channel * _STRIDE, self.counts[own]
        return (_edges(bins << _SHIFT) + _edges((bins << _SHIFT) | ((1 << _SHIFT) - 1))) / 2, counts

    def quantiles(self, fractions: Sequence[float], channel: int | None = None) -> list[float]:
        """Return for each fraction the smallest value that this part of the values does not exceed.

        This is numpy's method `inverted_cdf`, to within the relative error of the bins.

        Args:
            fractions: Numbers from 0 to 1.
            channel: The channel; None takes all channels together.

        Raises:
            ValueError: If no finite value was counted.
        """
        values, counts = self.distribution(channel)
        if not len(values):
            raise ValueError("no finite values were seen, so they have no quantiles")
        cumulative = counts.cumsum()
        # the tolerance absorbs what rounding adds to 0.3 * 10
        ranks = np.ceil(np.asarray(fractions) * cumulative[-1] * (1 - 1e-15)).clip(1)
        return [float(value) for value in values[np.searchsorted(cumulative, ranks)]]


def _bins(values: np.ndarray) -> np.ndarray:
    """Return the int64 bin of each float32 value; bins are in the order of the values."""
    bits = (values + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (np.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) >> _SHIFT).astype(np.int64)


def _edges(ordered: np.ndarray) -> np.ndarray:
    """Return the float64 values at positions in the ordered sequence of float32 bit patterns."""
    ordered = ordered.astype(np.int32)
    return np.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).astype(np.int32).view(np.float32).astype(np.float64)
