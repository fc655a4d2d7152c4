"""Areas, intervals and thresholds against scipy, definitions and simulation."""

import numpy as np
import pytest
import torch
from scipy.special import logit
from scipy.stats import mannwhitneyu, norm

from latent_ae_eval.anomaly.roc import PixelScores, auroc, auroc_interval, conformal_threshold


def two_sets(seed: int = 0, n: int = 40, m: int = 25) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, n).round(1), rng.normal(0.7, 1, m).round(1)  # with ties


def test_area_equals_mann_whitney_and_a_case_by_hand():
    normal, abnormal = two_sets()
    assert auroc(normal, abnormal) == pytest.approx(mannwhitneyu(abnormal, normal).statistic / 40 / 25, abs=1e-12)
    assert auroc(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == (1 + 1 + 0.5 + 1) / 4


def test_interval_is_delongs_by_its_definition():
    normal, abnormal = two_sets()
    psi = (abnormal[:, None] > normal) + 0.5 * (abnormal[:, None] == normal)
    variance = psi.mean(1).var(ddof=1) / 25 + psi.mean(0).var(ddof=1) / 40
    area, (low, high) = psi.mean(), auroc_interval(normal, abnormal)
    assert (logit(low) + logit(high)) / 2 == pytest.approx(logit(area), abs=1e-9)
    # the logit's slope is 1 / (A (1 - A))
    assert (logit(high) - logit(low)) / 2 == pytest.approx(1.96 * variance**0.5 / (area * (1 - area)), rel=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_are_as_wide_as_areas_spread(paired):
    rng = np.random.default_rng(0)
    areas, widths = [], []
    for _ in range(600):
        shared = rng.normal(0, 1, 60) if paired else np.zeros(60)
        normal, abnormal = shared + rng.normal(0, 0.5, 60), shared + 0.4 + rng.normal(0, 0.5, 60)
        areas.append(auroc(normal, abnormal))
        low, high = auroc_interval(normal, abnormal, paired=paired)
        widths.append((high - low) / 2 / 1.96)
    assert np.mean(widths) == pytest.approx(np.std(areas), rel=0.1)


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_hold_the_area_as_often_as_they_say(paired):
    """Few images and a high area, where an interval cut at 1 holds it 84 times in 100."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(800):
        shared = rng.normal(0, 0.7, 20) if paired else np.zeros(20)
        own = 0.51**0.5 if paired else 1.0
        normal, abnormal = shared + rng.normal(0, own, 20), shared + 2 + rng.normal(0, own, 20)
        interval = auroc_interval(normal, abnormal, paired=paired)
        held += [interval[0] <= norm.cdf(2**0.5) <= interval[1]] if interval else []
    assert 0.93 < np.mean(held) < 0.98


def test_no_interval_where_nothing_is_out_of_order_and_of_few_images():
    assert auroc_interval(np.arange(15.0), np.arange(15.0, 30)) is None
    assert auroc_interval(np.arange(15.0), np.arange(9.0)) is None
    # three pairs in a row, whose areas leave no variance
    assert auroc_interval(np.array([1.0, 3.0, 5.0]), np.array([2.0, 4.0, 6.0]), paired=True) is None


@pytest.mark.parametrize("count, rate", [(19, 0.1), (19, 0.05), (30, 0.1), (7, 0.5)])
def test_threshold_keeps_its_false_positive_rate(count, rate):
    scores = np.random.default_rng(0).exponential(size=(20_000, count + 1))
    thresholds = np.array([conformal_threshold(row[:-1], rate) for row in scores])
    exceeded = (scores[:, -1] > thresholds).mean()
    deviation = (rate * (1 - rate) / len(scores)) ** 0.5
    assert exceeded < rate + 4 * deviation  # the promise
    assert exceeded > rate - 1 / (count + 1) - 4 * deviation  # and no more conservative than it must be


def test_too_few_normal_scores_promise_nothing():
    assert conformal_threshold(np.arange(18.0), 0.05) is None
    assert conformal_threshold(np.arange(19.0), 0.05) == 18


def test_area_over_pixels_equals_that_of_all_scores_at_once():
    generator = torch.Generator().manual_seed(0)
    pooled, pixels = [], PixelScores()
    assert pixels.auroc() is None
    for _ in range(3):
        scores, mask = torch.rand(9, 11, generator=generator) ** 3, torch.rand(9, 11, generator=generator) < 0.2
        scores[mask] *= 1.3
        scores[:4] = 0  # ties count half
        pixels.add(scores, mask)
        pooled.append((scores[~mask].numpy(), scores[mask].numpy()))
    normal, abnormal = (np.concatenate(part) for part in zip(*pooled, strict=True))
    assert pixels.auroc() == pytest.approx(auroc(normal, abnormal), abs=1e-3)
