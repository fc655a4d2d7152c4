"""Distances of feature sets against closed forms, torch-fidelity and brute force."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from latent_ae.metrics.distances import (
    Gaussian,
    frechet_distance,
    frechet_of_features,
    gaussian_distance,
    jackknife_interval,
    kernel_distance,
    precision_recall,
    squared_mmd,
    student_quantile,
)


def features(count: int, dimensions: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    return np.maximum(rng.normal(size=(count, dimensions)) @ mixing + 0.3 + shift, 0).astype(np.float32)


def test_gaussians_with_a_known_distance():
    # commuting covariances: |a - b|^2 + sum (sqrt(l) - sqrt(m))^2 over their eigenvalues
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    left, right = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    left[0] = 0.0  # singular
    mean_a, mean_b = rng.normal(size=6), rng.normal(size=6)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(left) - np.sqrt(right)).sum()
    measured = frechet_distance(mean_a, (basis * left) @ basis.T, mean_b, (basis * right) @ basis.T)
    assert measured == pytest.approx(expected, rel=1e-7)  # a zero eigenvalue comes back as 1e-16, its root as 1e-8
    # one dimension, and not commuting: 2 x 2 by the closed form of the trace of a root
    assert frechet_distance(np.zeros(1), np.array([[4.0]]), np.ones(1), np.array([[1.0]])) == pytest.approx(2.0)
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    root_trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = np.trace(a) + np.trace(b) - 2 * root_trace
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [40, 200])
def test_features_give_what_torch_fidelity_gives(count):
    a, b = features(count, 64, 1), features(count, 64, 2, shift=0.2)
    statistics = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    # torch-fidelity takes the mean in float32, and below full rank roots of rounding errors
    assert frechet_of_features(a, b) == pytest.approx(expected, rel=1e-5)
    by_sums = frechet_distance(*Gaussian.of(a).moments(), *Gaussian.of(b).moments())
    assert frechet_of_features(a, b) == pytest.approx(by_sums, rel=1e-6)
    assert frechet_of_features(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two images"):
        frechet_of_features(a[:1], b)


def test_sums_add_up_and_come_apart():
    a, b = features(50, 8, 1), features(70, 8, 2)
    whole = Gaussian.of(np.concatenate([a, b]))
    for sums, x in ((Gaussian.of(a) + Gaussian.of(b), np.concatenate([a, b])), (whole - Gaussian.of(b), a)):
        mean, covariance = sums.moments()
        np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_kernel_distance_is_torch_fidelitys_with_its_subsets():
    a, b = features(300, 64, 1), features(300, 64, 2, shift=0.2)
    options = {"kid_subsets": 20, "kid_subset_size": 100, "verbose": False, "kid_kernel": "poly", "rng_seed": 2020}
    options |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    expected = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **options)
    mean, deviation = kernel_distance(a.__getitem__, b.__getitem__, 300, subsets=20, subset_size=100)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-5)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-4)


def test_squared_mmd_is_the_unbiased_sum_and_small_sets_are_taken_whole():
    x, y = features(5, 3, 1).astype(np.float64), features(5, 3, 2).astype(np.float64)

    def kernel(u, v):
        return (u @ v / 3 + 1) ** 3

    inside = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(kernel(u, v) for u in x for v in y) / 25
    assert squared_mmd(x, y) == pytest.approx(inside - 2 * across, rel=1e-12)
    assert kernel_distance(x.__getitem__, y.__getitem__, 5) == (pytest.approx(squared_mmd(x, y)), 0.0)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    paired = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs)
    found = kernel_distance(x.__getitem__, y.__getitem__, 5, paired=True)
    assert found == (pytest.approx(paired / 20, rel=1e-9), 0.0)


def test_a_kernel_distance_of_pairs_has_no_bias():
    """Reconstructions that resemble their originals one by one: comparing these would make it negative."""
    rng = np.random.default_rng(0)
    apart, within, far = [], [], []
    for _ in range(200):
        x = rng.normal(size=(30, 8))
        y = x + 0.01 * rng.normal(size=x.shape)
        apart.append(squared_mmd(x, rng.permutation(y, axis=0)))
        within.append(squared_mmd(x, y, paired=True))
        far.append(squared_mmd(rng.normal(size=(30, 8)), y))
    errors = [np.std(values) / np.sqrt(len(values)) for values in (within, far)]
    assert abs(np.mean(within)) < 4 * errors[0] and abs(np.mean(far)) < 4 * errors[1]
    assert np.mean(apart) < -0.1


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 18, 100])
def test_students_quantile_is_scipys(freedom):
    assert student_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-5)


@pytest.mark.parametrize("groups", [3, 10])
def test_the_jackknife_covers_the_mean_of_normals_in_95_of_100_cases(groups):
    values = np.random.default_rng(0).normal(size=(10_000, groups, 4))
    left_out = (values.sum((1, 2))[:, None] - values.sum(2)) / (4 * (groups - 1))
    intervals = np.array([jackknife_interval(x.mean(), parts) for x, parts in zip(values, left_out, strict=True)])
    covered = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    assert 0.94 < covered < 0.96  # 4.6 standard errors of 10,000 cases


def test_the_jackknife_covers_a_frechet_distance_of_pairs_as_often_as_it_says():
    """Images and reconstructions that resemble them, of one feature, where the distance is (a - b)^2 + (s - t)^2."""
    rng, groups = np.random.default_rng(0), 10
    x = rng.normal(size=(4000, groups, 20))
    y = 1.5 * x + 0.5 + 0.2 * rng.normal(size=x.shape)

    def distance(kept):
        a, b = x[:, kept].reshape(len(x), -1), y[:, kept].reshape(len(y), -1)
        return (a.mean(1) - b.mean(1)) ** 2 + (a.std(1, ddof=1) - b.std(1, ddof=1)) ** 2

    values = distance(slice(None))
    assert values[0] == pytest.approx(frechet_of_features(x[0].reshape(-1, 1), y[0].reshape(-1, 1)), rel=1e-9)
    left_out = np.stack([distance(np.arange(groups) != group) for group in range(groups)], 1)
    intervals = np.array([jackknife_interval(*case) for case in zip(values, left_out, strict=True)])
    covered = np.mean((intervals[:, 0] <= values.mean()) & (values.mean() <= intervals[:, 1]))
    assert 0.94 < covered < 0.96  # 2.9 standard errors; `values.mean()` is the distance for this N


def test_cmmd_is_the_biased_sum_over_gaussian_kernels_also_without_groups(monkeypatch):
    monkeypatch.setattr("latent_ae.metrics.distances.BLOCK", 7)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features(23, 6, 1), features(23, 6, 2, shift=0.2)))

    def expected(x, y):  # google-research/cmmd/distance.py, written out
        def kernel(u, v):
            squares = np.square(u[:, None].astype(np.float64) - v[None]).sum(2)
            return np.exp(-squares / (2 * 10**2)).mean()

        return 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))

    value, left_out = gaussian_distance(a, b, 5)
    assert value == pytest.approx(expected(a, b), rel=1e-9) and value > 0.1
    kept = [np.arange(23) % 5 != group for group in range(5)]
    assert left_out == pytest.approx([expected(a[rows], b[rows]) for rows in kept], rel=1e-9)
    assert gaussian_distance(a, b, 1) == (pytest.approx(value, rel=1e-12), [])


def test_precision_counts_what_is_made_and_recall_the_originals():
    originals = np.array([[0.0], [1.0], [2.0], [3.0]], np.float32)  # third neighbours: 3, 2, 2 and 3 away
    made = np.array([[0.5], [1.5], [50.0], [51.0], [52.0]], np.float32)  # of the first: 50.5 away
    assert precision_recall(originals, made) == (pytest.approx(2 / 5), 1.0)
    assert precision_recall(originals, made + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="4 images or more"):
        precision_recall(originals[:3], made)


def test_precision_and_recall_are_those_of_the_definition():
    a, b = features(60, 8, 1).astype(np.float64), features(60, 8, 2, shift=0.4).astype(np.float64)

    def share_within(points, centres):  # Kynkäänniemi et al. 2019, eq. 1 and 2
        own = np.linalg.norm(centres[:, None] - centres[None], axis=2)
        radii = np.sort(own, axis=1)[:, 3]  # the first is the point itself
        return (np.linalg.norm(points[:, None] - centres[None], axis=2) <= radii).any(1).mean()

    precision, recall = precision_recall(a.astype(np.float32), b.astype(np.float32))
    assert precision == pytest.approx(share_within(b, a)) and recall == pytest.approx(share_within(a, b))
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall
