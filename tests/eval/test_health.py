"""The formulas of latents' health against analytic answers, NumPy and SciPy."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from latent_ae_eval.latents.health import (
    TRANSFORMS,
    RadialSpectrum,
    effective_rank,
    excess_kurtosis,
    outlier_share,
    wasserstein_to_normal,
)

POINTS = (np.arange(200_000) + 0.5) / 200_000


def ones(values: np.ndarray) -> np.ndarray:
    return np.ones(len(values), dtype=np.int64)


def test_effective_rank_of_known_spectra():
    assert effective_rank(np.eye(5)) == pytest.approx(5)
    assert effective_rank(np.diag([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.outer([1, 2, 3], [1, 2, 3])) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.zeros((3, 3))) == 0
    random = np.random.default_rng(0).normal(size=(6, 6))
    covariance = random @ random.T
    entropy = scipy.stats.entropy(np.linalg.svd(covariance, compute_uv=False))
    assert effective_rank(torch.from_numpy(covariance)) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("name", ["uniform", "laplace", "logistic", "expon"])
def test_the_distance_from_a_gaussian_is_scipys(name):
    values = getattr(scipy.stats, name).ppf(POINTS) * 3 - 7
    standardised = (values - values.mean()) / values.std()
    expected = scipy.stats.wasserstein_distance(standardised, scipy.stats.norm.ppf(POINTS))
    assert wasserstein_to_normal(values, ones(values)) == pytest.approx(expected, abs=2e-5)
    assert excess_kurtosis(values, ones(values)) == pytest.approx(scipy.stats.kurtosis(values), rel=1e-9)


def test_a_gaussian_has_no_distance_and_counts_stand_for_repeated_values():
    gaussian = scipy.stats.norm.ppf(POINTS) * 5 + 2
    assert wasserstein_to_normal(gaussian, ones(gaussian)) < 1e-4
    values, counts = np.array([-1.0, 0.0, 2.0]), np.array([3, 2, 1])
    repeated = np.sort(np.repeat(values, counts))
    for formula in (wasserstein_to_normal, excess_kurtosis):
        assert formula(values, counts) == pytest.approx(formula(repeated, ones(repeated)), rel=1e-12)
    # two equal peaks: |-1 - z| and |1 - z| over the halves of a Gaussian
    expected, _ = scipy.integrate.quad(lambda z: 2 * abs(1 - z) * scipy.stats.norm.pdf(z), 0, 12)
    assert wasserstein_to_normal(np.array([-3.0, 5.0]), np.array([7, 7])) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(wasserstein_to_normal(np.array([2.0]), np.array([9])))


def test_outliers_are_counted_beyond_five_standard_deviations():
    values, counts = np.array([-1.0, 1.0, 60.0]), np.array([500, 500, 1])
    std = math.sqrt(float(np.average((values - np.average(values, weights=counts)) ** 2, weights=counts)))
    share, farthest = outlier_share(values, counts)
    assert share == 1 / 1001 and farthest == pytest.approx((60 - 60 / 1001) / std)
    assert outlier_share(np.array([3.0]), np.array([4])) == (0.0, 0.0)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fractal(exponent: float, side: int, count: int = 8) -> torch.Tensor:
    """Periodic images whose power falls with frequency to the power -exponent."""
    frequency = torch.from_numpy(np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)))
    frequency[0, 0] = math.inf
    spectrum = torch.fft.fft2(noise(1, count, 2, side, side).double()) / frequency ** (exponent / 2)
    return torch.fft.ifft2(spectrum).real.float()


def test_white_noise_has_a_level_spectrum_of_its_variance():
    spectrum = RadialSpectrum()
    for side in (64, 48):  # grids of other sizes are averaged
        spectrum.update(3 * noise(side, 32, 3, side, 2 * side) + 100)
    frequency, power = spectrum.rings()
    assert len(frequency) == 32 and frequency[0] > 0 and frequency[-1] <= 1
    np.testing.assert_allclose(power[2:], 9, rtol=0.06)
    assert spectrum.slope() == pytest.approx(0, abs=0.02)
    assert spectrum.high_share() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_slope_of_a_power_law_is_found(exponent):
    spectrum = RadialSpectrum()
    spectrum.update(fractal(exponent, 128))
    assert spectrum.slope() == pytest.approx(-exponent, abs=0.1)


@pytest.mark.parametrize("side", [8, 16, 32])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_slope_of_a_power_law_does_not_depend_on_the_grid(side, exponent):
    """The lowest frequencies, which the window distorts, are many of a latent's few."""
    spectrum = RadialSpectrum()
    large = fractal(exponent, 128, 200)
    for top in range(0, 128, 32):  # pieces, because a grid that wraps around has no edges
        spectrum.update(large[..., top : top + side, top : top + side])
    assert spectrum.slope() == pytest.approx(-exponent, abs=0.15)
    small = RadialSpectrum()
    small.update(large[..., :4, :4])
    assert small.slope() is None and small.high_share() is not None


def test_a_wave_lies_in_the_ring_of_its_frequency():
    spectrum = RadialSpectrum()
    wave = torch.cos(2 * math.pi * 0.3 * torch.arange(64.0))  # 0.3 cycles per px: 0.6 of Nyquist's
    spectrum.update((wave[:, None] + torch.zeros(64))[None, None])
    frequency, power = spectrum.rings()
    assert frequency[power.argmax()] == pytest.approx(0.6, abs=1 / 32)


def test_spectra_merge_and_small_grids_have_none():
    whole, left, right = RadialSpectrum(), RadialSpectrum(), RadialSpectrum()
    images = noise(0, 6, 2, 16, 24)
    whole.update(images)
    left.update(images[:2])
    right.update(images[2:])
    left.merge(right)
    np.testing.assert_allclose(left.rings()[1], whole.rings()[1], rtol=1e-6)
    tiny = RadialSpectrum()
    tiny.update(noise(0, 1, 1, 2, 2))
    assert len(tiny.rings()[0]) == 0 and tiny.slope() is None and tiny.high_share() is None


def test_transforms_move_and_average_pixels():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    array = image[0, 0].numpy()
    assert np.array_equal(TRANSFORMS["turned by 90 degrees"](image)[0, 0], np.rot90(array))
    assert np.array_equal(TRANSFORMS["turned by 180 degrees"](image)[0, 0], np.rot90(array, 2))
    assert np.array_equal(TRANSFORMS["half size"](image)[0, 0], array.reshape(2, 2, 2, 2).mean((1, 3)))
