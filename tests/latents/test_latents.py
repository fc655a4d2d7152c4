"""Latent statistics against numpy on the concatenated data."""

import json
import math

import numpy as np
import pytest
import torch

from latent_ae.config import UserError
from latent_ae.latents.quantiles import RELATIVE_ERROR
from latent_ae.latents.statistics import LatentStatistics


def batches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 5.0, 2.0]).view(1, 3, 1, 1)
    offset = torch.tensor([1000.0, -3.0, 0.0]).view(1, 3, 1, 1)
    return [torch.randn(n, 3, h, 4, generator=generator) * scale + offset for n, h in ((4, 4), (1, 2), (7, 4), (3, 8))]


def numpy_channels(parts: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([part.double().transpose(0, 1).flatten(1).numpy() for part in parts], axis=1)


def collect(parts: list[torch.Tensor]) -> LatentStatistics:
    statistics = LatentStatistics()
    for part in parts:
        statistics.update(part)
    return statistics


def test_equals_numpy_on_the_concatenation():
    parts = batches()
    values = numpy_channels(parts)
    statistics = collect(parts)
    assert statistics.count == values.size
    np.testing.assert_allclose(statistics.channel_mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose(statistics.channel_std, values.std(1), rtol=1e-12)
    np.testing.assert_allclose(statistics.channel_covariance, np.cov(values, bias=True), rtol=1e-9, atol=1e-12)
    assert statistics.shift_factor == pytest.approx(values.mean(), rel=1e-12)
    assert statistics.scaling_factor == pytest.approx(1 / values.std(), rel=1e-12)


def test_small_spread_around_a_large_mean_survives():
    values = 1e6 + torch.randn(8, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    statistics = collect(list(values.split(1)))
    assert statistics.std == pytest.approx(values.numpy().std(), rel=1e-6)


def test_merged_shards_equal_one_pass():
    parts = batches()
    left, right, empty = collect(parts[::2]), collect(parts[1::2]), LatentStatistics()
    left.merge(right)
    left.merge(empty)
    empty.merge(left)
    whole = collect(parts)
    for merged in (left, empty):
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.channel_mean, whole.channel_mean, rtol=1e-12)
        np.testing.assert_allclose(merged.channel_std, whole.channel_std, rtol=1e-12)
        np.testing.assert_allclose(merged.channel_covariance, whole.channel_covariance, rtol=1e-9, atol=1e-12)
        assert merged.quantiles() == whole.quantiles() and merged.quantiles(1) == whole.quantiles(1)
        assert merged.std == pytest.approx(whole.std, rel=1e-12)


def test_the_summary_holds_all_of_it_as_json():
    parts = batches()
    values = numpy_channels(parts)
    summary = json.loads(json.dumps(collect(parts).summary()))
    fractions = [float(fraction) for fraction in summary["quantiles"]]
    rounding = {"rtol": RELATIVE_ERROR}
    np.testing.assert_allclose(
        list(summary["quantiles"].values()), np.quantile(values, fractions, method="inverted_cdf"), **rounding
    )
    for found, own in zip(summary["channel_quantiles"], values, strict=True):
        np.testing.assert_allclose(list(found.values()), np.quantile(own, fractions, method="inverted_cdf"), **rounding)
    np.testing.assert_allclose(summary["channel_covariance"], np.cov(values, bias=True), rtol=1e-9, atol=1e-12)


def test_scaled_latents_have_mean_zero_and_variance_one():
    parts = batches()
    statistics = collect(parts)
    scaled = (numpy_channels(parts) - statistics.shift_factor) * statistics.scaling_factor
    assert scaled.mean() == pytest.approx(0, abs=1e-9)
    assert scaled.var() == pytest.approx(1, rel=1e-9)


def test_a_pattern_that_all_images_share_is_no_signal():
    """Such as a border that an encoder makes where it pads."""
    border = torch.zeros(2, 8, 8)
    border[0, 0], border[1] = 3.0, 1.0
    generator = torch.Generator().manual_seed(0)
    for live in (False, True):
        statistics, other = LatentStatistics(), LatentStatistics()
        for part in (statistics, other):
            mean = border.repeat(6, 1, 1, 1)
            mean[:, 1] += live * torch.randn(6, 8, 8, generator=generator)
            part.update(mean, mean, torch.zeros_like(mean))
        statistics.merge(other)
        assert statistics.dead_channels == ([0] if live else [0, 1])
    alone = LatentStatistics()
    alone.update(mean[:1], mean[:1], torch.zeros(1, 2, 8, 8))
    assert alone.dead_channels == []  # of one image nothing else is known
    statistics.update(mean[..., :4], mean[..., :4], torch.zeros(6, 2, 8, 4))
    assert statistics.dead_channels == [] and not statistics.one_size
    merged = LatentStatistics()
    merged.merge(statistics)
    merged.merge(other)
    assert not merged.one_size


def test_kl_equals_torch_distributions_and_dead_channels_are_found():
    generator = torch.Generator().manual_seed(1)
    mean, logvar = torch.randn(16, 4, 4, 4, generator=generator), torch.full((16, 4, 4, 4), -4.0)
    mean[:, 1], logvar[:, 1] = mean[:, 1] * 0.01, 0.0  # collapsed to N(0, 1)
    mean[:, 2] = 7.0  # says the same of every image, whatever its KL
    mean[:, 3], logvar[:, 3] = mean[:, 3] * 0.01, -20.0  # small but precise
    statistics = LatentStatistics()
    for part in zip(mean.split(5), mean.split(5), logvar.split(5), strict=True):
        statistics.update(*part)
    posterior = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean((0, 2, 3))
    np.testing.assert_allclose(statistics.channel_kl, kl.numpy(), rtol=1e-9)
    assert statistics.dead_channels == [1, 2]
    assert statistics.summary()["kl_nats_per_dim"] == pytest.approx(float(kl.mean()))


def test_without_posterior_no_kl_is_claimed():
    summary = collect(batches()).summary()
    assert "kl_nats_per_dim" not in summary and "dead_channels" not in summary
    with pytest.raises(ValueError, match="together"):
        LatentStatistics().update(torch.zeros(1, 1, 2, 2), mean=torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("latents", "cause"),
    [
        (torch.full((3, 2, 4, 4), 0.1), "all 96 latent values are equal"),
        (torch.full((1, 1, 2, 2), math.nan), "not finite"),
        (torch.tensor([0.0, math.inf]).view(1, 1, 1, 2), "not finite"),
        (torch.zeros(0, 4, 2, 2), "no latents were seen"),
    ],
)
def test_latents_that_cannot_be_scaled_are_refused_with_the_cause(latents, cause):
    statistics = LatentStatistics()
    statistics.update(latents)
    for name in ("scaling_factor", "shift_factor"):
        with pytest.raises(UserError, match=cause):
            getattr(statistics, name)
