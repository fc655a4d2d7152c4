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
"""Apart on the line of keys are two channels; bins of one channel number less than 2^18."""


class QuantileSketch:
    """Counts of the values of each channel, by bin. Values that are not finite are left out and counted apart."""

    def __init__(self) -> None:
        self.channels = 0
        self.num_nonfinite = 0
        self.keys = np.zeros(0, dtype=np.int64)
        """channel * _STRIDE + bin, ascending."""
        self.counts = np.zeros(0, dtype=np.int64)

    def update(self, values: Tensor) -> None:
        """Takes in NCHW values of any float type."""
        flat = values.detach().cpu().float().transpose(0, 1).flatten(1).numpy()
        self.channels = max(self.channels, len(flat))
        finite = np.isfinite(flat)
        self.num_nonfinite += int((~finite).sum())
        bins = _bins(flat) + _STRIDE * np.arange(len(flat), dtype=np.int64)[:, None]
        self._add(*np.unique(bins[finite], return_counts=True))

    def merge(self, other: "QuantileSketch") -> None:
        """Takes in what another saw, as if its values had come here."""
        self.channels = max(self.channels, other.channels)
        self.num_nonfinite += other.num_nonfinite
        self._add(other.keys, other.counts)

    def _add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self.keys, places = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        total = np.zeros(len(self.keys), dtype=np.int64)
        np.add.at(total, places, np.concatenate([self.counts, counts]))
        self.counts = total

    def distribution(self, channel: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Middles of the occupied bins, ascending float64, and their counts: of one channel, or of all together."""
        if channel is None:
            bins, places = np.unique((self.keys + _STRIDE // 2) % _STRIDE - _STRIDE // 2, return_inverse=True)
            counts = np.zeros(len(bins), dtype=np.int64)
            np.add.at(counts, places, self.counts)
        else:
            own = (self.keys + _STRIDE // 2) // _STRIDE == channel
            bins, counts = self.keys[own] - channel * _STRIDE, self.counts[own]
        return (_edges(bins << _SHIFT) + _edges((bins << _SHIFT) | ((1 << _SHIFT) - 1))) / 2, counts

    def quantiles(self, fractions: Sequence[float], channel: int | None = None) -> list[float]:
        """The smallest value that at least these fractions of the values do not exceed (numpy's `inverted_cdf`).

        Raises ValueError when no finite value was seen.
        """
        values, counts = self.distribution(channel)
        if not len(values):
            raise ValueError("no finite values were seen, so they have no quantiles")
        cumulative = counts.cumsum()
        # the tolerance absorbs what rounding adds to 0.3 * 10
        ranks = np.ceil(np.asarray(fractions) * cumulative[-1] * (1 - 1e-15)).clip(1)
        return [float(value) for value in values[np.searchsorted(cumulative, ranks)]]


def _bins(values: np.ndarray) -> np.ndarray:
    """float32 -> int64 bins in the order of the values."""
    bits = (values + np.float32(0)).view(np.int32)  # -0 becomes 0
    return (np.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) >> _SHIFT).astype(np.int64)


def _edges(ordered: np.ndarray) -> np.ndarray:
    """The floats at places of the ordered line of bit patterns, float64."""
    ordered = ordered.astype(np.int32)
    return np.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).astype(np.int32).view(np.float32).astype(np.float64)
