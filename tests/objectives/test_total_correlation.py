"""Beta-VAE's capacity and FactorVAE's total correlation: gradients against the loss written out, resume bit for bit."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.data.rng import permutations
from latent_ae.models.posterior import kl_per_dimension
from latent_ae.models.reconstruct import Reconstruction
from latent_ae.objectives.base import Batch, Pass
from latent_ae.objectives.kl import capacity_at, capacity_loss
from latent_ae.objectives.total_correlation import (
    LatentDiscriminator,
    TotalCorrelation,
    minibatch_total_correlation,
)
from latent_ae_train.settings import LossSettings, TrainSettings
from tests.runs import differing_tensors, words
from tests.tiny import build_step, global_batch, micro_batches, moved, settings_for, weights

FACTOR_VAE = {"kl": 1e-3, "total_correlation": 7.0, "total_correlation_width": 16}
IMAGE_ELEMENTS = 3 * 16 * 16
MINIBATCH = "loss.total_correlation_estimate=minibatch"


def test_the_capacity_is_of_each_sample_and_rises_in_a_line() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = (torch.randn(3, 2, 4, 4, generator=generator).mul(s).requires_grad_() for s in (1.0, 0.3))
    normal = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    totals = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    capacity = float(totals.detach().mean())
    assert totals.min() < capacity < totals.max()
    expected = sum(abs(totals[n] - capacity) for n in range(3)) / 3 / 50
    loss = capacity_loss([kl_per_dimension(mean, logvar)], 50, capacity)
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, (mean, logvar), retain_graph=True)
    for ours, other in zip(torch.autograd.grad(loss, (mean, logvar)), theirs, strict=True):
        torch.testing.assert_close(ours, other)
    levels = [kl_per_dimension(mean, logvar).detach()[:, :1], kl_per_dimension(mean, logvar).detach()[:, 1:]]
    torch.testing.assert_close(capacity_loss(levels, 50, capacity), loss.detach())

    loss_settings = LossSettings(kl=1.0, kl_capacity=12.0, kl_capacity_steps=4)
    assert [capacity_at(step, loss_settings, 100) for step in (0, 1, 4, 50)] == [0.0, 3.0, 12.0, 12.0]
    assert capacity_at(25, LossSettings(kl=1.0, kl_capacity=12.0), 100) == 3.0


def test_the_rate_goes_to_the_capacity_from_either_side() -> None:
    for capacity in (5.0, 400.0):
        loss = {"pixel_weight": 0.0, "kl": 1.0, "kl_capacity": capacity, "kl_capacity_steps": 1}
        step = build_step(settings_for(loss=loss, optim={"lr": 1e-2}))
        logs = [step(number, micro_batches(number % 4, step.settings)) for number in range(50)]
        rates = [float(means["kl"]) * IMAGE_ELEMENTS for means in logs]
        assert float(logs[0]["kl_capacity"]) == 0.0 and float(logs[1]["kl_capacity"]) == capacity
        assert abs(rates[-1] - capacity) < 0.2 * abs(rates[0] - capacity), (rates[0], rates[-1])


def test_permutations_are_of_seed_and_step() -> None:
    order = permutations(3, 5, 64, 7)
    assert order.shape == (64, 7) and (np.sort(order, 0) == np.arange(64)[:, None]).all()
    assert len({column.tobytes() for column in order.T}) == 7
    assert np.array_equal(order, permutations(3, 5, 64, 7))
    assert not np.array_equal(order, permutations(3, 6, 64, 7)) and not np.array_equal(order, permutations(4, 5, 64, 7))


def test_both_gradients_are_those_of_algorithm_2() -> None:
    settings = settings_for(loss=FACTOR_VAE, optim={"lr": 1e-30})
    step = build_step(settings)
    model, judge = step.bare_reconstructor, step.objectives["total_correlation"].adversary
    assert judge is not None
    found: dict[str, torch.Tensor] = {}
    for network, optimizer in (
        (model, step.optimizers.autoencoder),
        (judge, step.optimizers.adversaries["total_correlation"]),
    ):
        optimizer.register_step_pre_hook(
            lambda *_, network=network: found.update({n: p.grad.clone() for n, p in network.named_parameters()})
        )
    means = step(4, micro_batches(4, settings))
    images, noise = global_batch(4, settings)
    result = model(images, noise)
    logits = judge(result.latent.flatten(1))
    kl = kl_per_dimension(result.mean, result.logvar).sum() / 8
    loss = (result.image - images).abs().mean() + (1e-3 * kl + 7.0 * logits.mean()) / IMAGE_ELEMENTS
    names = [name for name, _ in model.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    z = result.latent.detach().flatten(1)
    order = permutations(settings.seed, 4, 4, z.shape[1])
    permuted = torch.stack([z[4:, j][torch.from_numpy(order[:, j])] for j in range(z.shape[1])], 1)
    logits, targets = torch.cat([judge(z[:4]), judge(permuted)]), torch.tensor([1.0] * 4 + [0.0] * 4)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets)
    names = [name for name, _ in judge.named_parameters()]
    expected |= dict(zip(names, torch.autograd.grad(cross_entropy, list(judge.parameters())), strict=True))
    assert found.keys() == expected.keys() and len(names) == 12
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7, msg=name)
    torch.testing.assert_close(means["total_correlation_discriminator"], cross_entropy.detach())
    right = ((logits > 0).float() == targets).float().mean()
    assert float(means["total_correlation_accuracy"]) == pytest.approx(float(right))


def test_the_estimate_is_that_of_gaussians() -> None:
    """The total correlation of a Gaussian with correlation r is -ln(1 - r^2) / 2."""
    torch.manual_seed(0)
    judge = LatentDiscriminator(2, 32)
    settings = settings_for(loss=FACTOR_VAE)
    objective = TotalCorrelation(settings.loss, settings.facts(), judge)
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3, betas=(0.5, 0.9))
    estimates, accuracies = [], []
    for step in range(300):
        a, b = torch.randn(2, 512)
        latent = torch.stack([a, 0.8 * a + 0.6 * b], 1)[:, :, None, None].requires_grad_()
        out = Reconstruction(latent, latent, latent, latent, latent)
        batch = Batch(latent, latent, latent, range(512), full_size=2)
        passed = Pass(batch, out, step, 1, None, {"total_correlation": judge}, None)
        objective.backward(passed)
        means = passed.logs
        estimates.append(float(means["total_correlation"]))
        accuracies.append(float(means["total_correlation_accuracy"]))
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(estimates[-100:]) == pytest.approx(-0.5 * math.log(1 - 0.8**2), abs=0.1)
    # of the best guess, by which density is larger: (1 + the total variation distance) / 2
    x = np.random.default_rng(0).normal(size=(2, 100_000))
    a, b = x[0], 0.8 * x[0] + 0.6 * x[1]
    ratio = np.exp((b**2 - ((b - 0.8 * a) / 0.6) ** 2) / 2) / 0.6  # of the densities of b with and without a
    best = 0.5 + 0.5 * np.maximum(0, 1 - 1 / ratio).mean()
    assert np.mean(accuracies[-100:]) == pytest.approx(best, abs=0.02)


def test_the_minibatch_estimate_is_that_of_gaussians() -> None:
    """Means of correlation 0.8 and a posterior of variance 1/4: q(z) has the correlation 0.8 / 1.25."""
    generator = torch.Generator().manual_seed(0)
    a, b, *noise = torch.randn(4, 2000, generator=generator)
    mean = torch.stack([a, 0.8 * a + 0.6 * b], 1)[:, :, None, None]
    for correlated in (True, False):
        if not correlated:
            mean[:, 1] = mean[torch.randperm(2000, generator=generator), 1]
        logvar = torch.full_like(mean, math.log(0.25))
        latent = mean + 0.5 * torch.stack(noise, 1)[:, :, None, None]
        expected = -0.5 * math.log(1 - 0.64**2) if correlated else 0.0
        assert float(minibatch_total_correlation(latent, mean, logvar)) == pytest.approx(expected, abs=0.03)
    # posteriors that are far from each other: each sample knows its own only
    apart = 1e3 * torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 1, 1)
    found = minibatch_total_correlation(apart, apart, torch.zeros_like(apart))
    assert float(found) == pytest.approx(2 * math.log(8))


def test_the_gradient_of_beta_tcvae_is_that_of_its_published_estimate() -> None:
    """minibatch-weighted sampling as the authors write it, with the number of images, from torch's normal density."""
    settings = settings_for(
        loss={"kl": 1.0, "total_correlation": 5.0, "total_correlation_estimate": "minibatch"}, optim={"lr": 1e-30}
    )
    step = build_step(settings)
    model = step.bare_reconstructor
    assert step.objectives["total_correlation"].adversary is None
    found: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    means = step(4, micro_batches(4, settings))
    images, noise = global_batch(4, settings)
    result = model(images, noise)
    z, mean, logvar = (x.flatten(1).double() for x in (result.latent, result.mean, result.logvar))
    log_q = torch.stack(
        [torch.distributions.Normal(m, torch.exp(0.5 * s)).log_prob(z) for m, s in zip(mean, logvar, strict=True)], 1
    )
    dataset_size, dimensions = 12_345, z.shape[1]
    joint = log_q.sum(2).exp().sum(1).log() - math.log(dataset_size * 8)
    marginals = (log_q.exp().sum(1).log() - math.log(dataset_size * 8)).sum(1)
    published = (joint - marginals).mean()
    kl = kl_per_dimension(result.mean, result.logvar).sum() / 8
    loss = (result.image - images).abs().mean() + (kl + 5.0 * published) / IMAGE_ELEMENTS
    names = [name for name, _ in model.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    constant = (dimensions - 1) * math.log(dataset_size)
    assert float(means["total_correlation"]) == pytest.approx(float(published) - constant, abs=1e-3)


def test_a_step_that_is_not_finite_leaves_the_discriminator_alone() -> None:
    settings = settings_for(loss=FACTOR_VAE)
    step = build_step(settings)
    step(0, micro_batches(0, settings))
    before, number = (
        weights(step.objectives["total_correlation"].adversary),
        next(iter(step.optimizers.adversaries["total_correlation"].state.values()))["step"],
    )
    number = number.clone()
    spoilt = [batch._replace(noise=batch.noise * float("nan")) for batch in micro_batches(1, settings)]
    step(1, iter(spoilt))
    assert step.skipped_steps()[0] == [1] and not moved(before, weights(step.objectives["total_correlation"].adversary))
    assert next(iter(step.optimizers.adversaries["total_correlation"].state.values()))["step"] == number
    step(2, micro_batches(2, settings))
    assert moved(before, weights(step.objectives["total_correlation"].adversary)) == before.keys()


def test_the_discriminator_goes_on_bit_for_bit(pictures: Path, tmp_path: Path, no_finish: None) -> None:
    more = ("loss.total_correlation=5", "loss.total_correlation_width=8", "checkpoint.keep=9", "gan.weight=0")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(words(pictures, whole, *more)) == 0
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints/step-00000006")
    assert main(words(pictures, killed, *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(killed / last, whole / last) == []
    assert (whole / last / "total_correlation.safetensors").is_file()
    optimizers = torch.load(whole / last / "optimizer.pt", weights_only=True)
    assert (
        optimizers.keys() == {"autoencoder", "total_correlation"}
        and len(optimizers["total_correlation"]["state"]) == 12
    )


def test_it_is_neither_dropped_nor_added_under_way(
    pictures: Path, tmp_path: Path, no_finish: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(words(pictures, run, "gan.weight=0")) == 0
    names = {path.name for path in (run / "checkpoints/step-00000006").iterdir()}
    assert not any("correlation" in name for name in names) and "correlation" not in (run / "log.jsonl").read_text()
    assert "kl_capacity" not in (run / "log.jsonl").read_text()
    assert main(words(pictures, run, "gan.weight=0", "loss.total_correlation=5", "steps=8")) == 2
    assert "loss.total_correlation: 0.0 in step-00000006, now 5.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, key",
    [
        (("micro_batch_size=2",), "loss.total_correlation: permutes"),
        (("batch_size=7",), "batch_size: 7 has no two halves"),
        (("batch_size=2",), "batch_size: 2 has no two halves"),
        (("latents.equivariance=0.5",), "latents.equivariance: changes the latent's size"),
        (("train=decoder",), "loss.total_correlation: shapes the posterior"),
        (("loss.total_correlation=0", "loss.total_correlation_width=8"), "loss.total_correlation_width: there is no"),
        ((MINIBATCH, "loss.total_correlation_width=8"), "loss.total_correlation_width: there is no discriminator"),
        ((MINIBATCH, "loss.total_correlation=0"), "loss.total_correlation_estimate: needs a weight"),
        ((MINIBATCH, "micro_batch_size=2"), "loss.total_correlation: compares each latent with the posteriors"),
        ((MINIBATCH, "batch_size=1"), "batch_size: 1 has no other posterior"),
    ],
)
def test_what_cannot_be_is_refused(changes: tuple[str, ...], key: str) -> None:
    with pytest.raises(UserError) as refused:
        load_settings(TrainSettings, "quickstart", ["loss.total_correlation=5", "batch_size=8", *changes])
    assert key in str(refused.value)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="permutes each latent dimension over the whole batch of 8, and a pass holds 4"):
        load_settings(TrainSettings, "quickstart", ["loss.total_correlation=5", "batch_size=8"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (("loss.kl_capacity=5", "loss.kl_target=0.1"), "kl_capacity: draws the rate to a value of its own"),
        (("loss.kl_capacity=5", "loss.free_bits=0.1"), "kl_capacity: draws the rate to a value of its own"),
        (("loss.kl_capacity=5", "loss.kl=0"), "loss.kl: 0 takes the KL term away"),
        (("loss.kl_capacity_steps=5",), "loss.kl_capacity_steps: there is no kl_capacity"),
        (("loss.kl_capacity=5", "train=decoder"), "loss.kl_capacity: shapes the posterior"),
    ],
)
def test_a_capacity_that_makes_no_sense_is_refused(changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_settings(TrainSettings, "quickstart", list(changes))
    assert message in str(refused.value)


def test_models_without_fitting_latents_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = ("gan.weight=0", "loss.total_correlation=5")
    assert main(words(pictures, tmp_path / "a", *judged, "data.resolution=64", "model.latent_channels=16")) == 2
    assert "loss.total_correlation: the latent has 16,384 dimensions" in capsys.readouterr().err
    wide = ("data.resolution=32", "model.latent_channels=4", "batch_size=600", MINIBATCH)
    assert main(words(pictures, tmp_path / "c", *judged, *wide)) == 2
    assert "batch_size: 600 latents of 1,024 dimensions" in capsys.readouterr().err
    blocks = "encoder_block_out_channels: [8, 8], decoder_block_out_channels: [8, 8]"
    tiny = (
        f"model={{kind: AutoencoderTiny, config: {{{blocks}, num_encoder_blocks: [1, 1], num_decoder_blocks: [1, 1]}}}}"
    )
    assert main([word for word in words(pictures, tmp_path / "b", *judged) if "model." not in word] + [tiny]) == 2
    assert (
        "loss.total_correlation: needs a Gaussian posterior, which this AutoencoderTiny does not have"
        in capsys.readouterr().err
    )


def test_any_weight_turns_it_on() -> None:
    on = [settings_for(loss={"total_correlation": weight}).objectives for weight in (0.0, 1e-3, 0.5, 2.0)]
    assert [TotalCorrelation in objectives for objectives in on] == [False, True, True, True]
