"""The quantile sketch against numpy, and against itself in other orders and parts."""

import itertools

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_ae.latents.quantiles import RELATIVE_ERROR, QuantileSketch

FRACTIONS = (0.0, 1e-4, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0)


def photograph_latents() -> torch.Tensor:
    """Four channels that photographs make: colours, and a difference of neighbours, of both signs."""
    photo = torch.from_numpy(skimage.data.astronaut()).float().permute(2, 0, 1) / 127.5 - 1
    details = photo[:1, :, 1:] - photo[:1, :, :-1]
    return torch.cat([photo[:, :, 1:], 1e-3 * details])[None]


def sketch_of(parts) -> QuantileSketch:
    sketch = QuantileSketch()
    for part in parts:
        sketch.update(part)
    return sketch


def within_the_stated_error(found, expected) -> None:
    assert RELATIVE_ERROR == 2**-9  # as docs/latents.md says
    np.testing.assert_allclose(found, expected, rtol=RELATIVE_ERROR, atol=1.2e-38)


def test_quantiles_are_numpys_within_the_stated_error():
    latents = photograph_latents()
    sketch = sketch_of([latents])
    values = latents[0].flatten(1).double().numpy()
    for channel, own in enumerate(values):
        expected = np.quantile(own, FRACTIONS, method="inverted_cdf")
        within_the_stated_error(sketch.quantiles(FRACTIONS, channel), expected)
    within_the_stated_error(sketch.quantiles(FRACTIONS), np.quantile(values.ravel(), FRACTIONS, method="inverted_cdf"))
    # where values are dense, interpolating between neighbours makes no difference
    dense = np.quantile(values[3], 0.9)
    assert sketch.quantiles([0.9], 3)[0] == pytest.approx(dense, rel=2 * RELATIVE_ERROR)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_any_floats(values, fraction):
    array = np.asarray(values, dtype=np.float32)
    found = sketch_of([torch.from_numpy(array).view(1, 1, 1, -1)]).quantiles([fraction], 0)
    within_the_stated_error(found, np.quantile(array.astype(np.float64), [fraction], method="inverted_cdf"))


def test_neither_order_nor_parts_change_a_bit():
    parts = list(photograph_latents().split(100, dim=2))
    whole = sketch_of([photograph_latents()])
    for order in itertools.islice(itertools.permutations(range(len(parts))), 0, None, 37):
        left, right = sketch_of(parts[i] for i in order[:2]), sketch_of(parts[i] for i in order[2:])
        left.merge(right)
        assert left.quantiles(FRACTIONS) == whole.quantiles(FRACTIONS)
        assert np.array_equal(left.keys, whole.keys) and np.array_equal(left.counts, whole.counts)
    assert whole.counts.sum() == photograph_latents().numel()


def test_memory_does_not_grow_with_the_number_of_values():
    generator = torch.Generator().manual_seed(0)
    sketch = sketch_of(torch.randn(1, 2, 300, 300, generator=generator) for _ in range(20))
    # 60 binades above the smallest of a million normal values would be generous; two signs, two channels
    assert len(sketch.keys) < 2 * 2 * 60 * 256


def test_values_that_are_not_finite_are_left_out_and_counted():
    sketch = sketch_of([torch.tensor([1.0, torch.nan, torch.inf, 3.0]).view(1, 1, 1, 4)])
    assert sketch.num_nonfinite == 2
    within_the_stated_error(sketch.quantiles([0.5, 1.0]), [1.0, 3.0])
    with pytest.raises(ValueError, match="no finite values"):
        sketch_of([torch.full((1, 1, 1, 1), torch.nan)]).quantiles([0.5])
