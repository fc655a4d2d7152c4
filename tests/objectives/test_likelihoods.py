"""Likelihoods against scipy, the ELBO that training minimises, and the likelihood that an export carries."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.models.likelihood import (
    LIKELIHOODS,
    STATED,
    Likelihood,
    bits_per_dimension,
    log_likelihood,
    read_likelihood,
)
from latent_ae.models.loading import load_first_stage
from latent_ae.models.posterior import draw
from tests.runs import words
from tests.tiny import build_step, global_batch, micro_batches, settings_for

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0


def test_against_scipy() -> None:
    image = torch.linspace(-1.3, 1.3, 7, dtype=torch.float64)[:, None]
    for scale in (0.02, 0.3):
        logvar = torch.tensor(2.0 * math.log(scale), dtype=torch.float64)
        found = log_likelihood("gaussian", image, LEVELS, logvar)
        torch.testing.assert_close(found, torch.from_numpy(stats.norm.logpdf(LEVELS, image, scale)))
        edges = np.concatenate([[-np.inf], (LEVELS[:-1] + 1.0 / 255.0).numpy(), [np.inf]])
        for kind, law in (("logistic", stats.logistic), ("gaussian", stats.norm)):
            # of the two tails the one that does not cancel
            below, above = (f((edges - image.numpy()) / scale) for f in (law.cdf, law.sf))
            mass = np.maximum(np.diff(below, axis=1), -np.diff(above, axis=1))
            found = log_likelihood(kind, image, LEVELS, logvar, discretised=True)
            known = mass > 1e-12
            assert known.mean() > 0.1
            torch.testing.assert_close(found[known], torch.from_numpy(np.log(mass[known])), rtol=1e-3, atol=1e-6)
            assert found.isfinite().all()
            torch.testing.assert_close(found.exp().sum(1), torch.ones(7, dtype=torch.float64))
    binary = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    expected = stats.bernoulli.logpmf([0, 1], (1 + np.tanh(image.numpy())) / 2)
    found = log_likelihood("bernoulli", image, binary, torch.tensor(0.0))
    torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("kind", [kind for kind in LIKELIHOODS if kind != "logistic_mixture"])
def test_gradients_in_float32_stay_finite(kind: str) -> None:
    image = torch.tensor([-30.0, -1.0, 0.0, 0.3, 30.0])[:, None].requires_grad_()
    for scale in (1e-3, 10.0):
        logvar = torch.tensor(2.0 * math.log(scale), requires_grad=True)
        found = log_likelihood(kind, image, LEVELS.float(), logvar)  # type: ignore[arg-type]
        slopes = torch.autograd.grad(found.sum() + 0.0 * logvar, (image, logvar))
        assert found.isfinite().all() and all(slope.isfinite().all() for slope in slopes)


def test_bits_per_dimension() -> None:
    """A uniform choice of 256 levels has 8 bits; a density needs the width of a level to say so."""
    assert bits_per_dimension(torch.tensor(math.log(256.0)), "logistic") == pytest.approx(8.0)
    assert bits_per_dimension(torch.tensor(math.log(256.0)), "gaussian", discretised=True) == pytest.approx(8.0)
    assert bits_per_dimension(torch.tensor(math.log(2.0)), "logit_laplace") == pytest.approx(1.0 + math.log2(127.5))
    assert bits_per_dimension(torch.tensor(math.log(2.0)), "gaussian") == pytest.approx(1.0 + math.log2(127.5))


def test_the_logit_laplace_density_is_scipys() -> None:
    """The density of a Laplace distribution of the logit, times the slopes of logit and map; it integrates to 1.

    The gradients, too, are those of torch's own transformed distribution.
    """
    image = torch.linspace(-1.1, 1.1, 5, dtype=torch.float64)[:, None].requires_grad_()
    log_scale = torch.tensor([[-2.0], [0.3], [-0.5], [0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    found = log_likelihood("logit_laplace", image, LEVELS, 2.0 * log_scale)
    value, location = (0.1 + 0.8 * (x.detach().numpy() + 1) / 2 for x in (LEVELS, image))
    spread = np.exp(log_scale.detach().numpy())
    density = stats.laplace.pdf(np.log(value / (1 - value)), np.log(location / (1 - location)), spread)
    torch.testing.assert_close(found.exp(), torch.from_numpy(density / (value * (1 - value)) * 0.4))
    # all that the map reaches between 0 and 1
    wide = torch.linspace(-1.25, 1.25, 2_000_001, dtype=torch.float64)[1:-1]
    whole = log_likelihood("logit_laplace", image, wide, 2.0 * log_scale).exp().sum(1) * (wide[1] - wide[0])
    torch.testing.assert_close(whole[:4], torch.ones(4, dtype=torch.float64), rtol=1e-3, atol=0)
    mapped = torch.special.logit(0.5 + 0.4 * image)
    law = torch.distributions.Laplace(mapped, log_scale.exp(), validate_args=False)
    to_pixels = [torch.distributions.SigmoidTransform(), torch.distributions.AffineTransform(-1.25, 2.5)]
    expected = torch.distributions.TransformedDistribution(law, to_pixels, validate_args=False).log_prob(LEVELS)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(one.sum(), (image, log_scale)) for one in (found, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("kind", [kind for kind in LIKELIHOODS if kind not in STATED])
def test_the_loss_is_minus_the_elbo(kind: str) -> None:
    """Of torch's own distributions and KL, gradients of all weights and of the learned scale included."""
    learned = kind != "bernoulli"
    extra = {"scale": 0.2} if learned else {}
    loss = {"pixel": kind, "kl": 1.0, "learned_logvar": learned, **extra}
    settings = settings_for(loss=loss, batch_size=4)
    step, reference = build_step(settings), build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    images, noise = global_batch(0, settings)
    slope: list[torch.Tensor] = []
    if learned:
        step.objectives["reconstruction"].logvar.register_hook(lambda gradient: slope.append(gradient))
    means = step(0, micro_batches(0, settings))
    model = reference.bare_reconstructor.autoencoder
    posterior = model.encode(images).latent_dist
    image = model.decode(posterior.mean + posterior.std * noise).sample
    scale = torch.tensor(0.2, requires_grad=True)
    if kind == "bernoulli":
        nll = -torch.distributions.Bernoulli((1 + torch.tanh(image)) / 2, validate_args=False).log_prob(
            (images + 1) / 2
        )
    elif kind == "gaussian":
        nll = -torch.distributions.Normal(image, scale).log_prob(images)
    else:
        upper, lower = (torch.sigmoid((images - image + sign / 255) / scale) for sign in (1, -1))
        first, last = images < -1 + 1 / 255, images > 1 - 1 / 255
        nll = -torch.log(torch.where(last, 1.0, upper) - torch.where(first, 0.0, lower))
    prior = torch.distributions.Normal(0.0, 1.0)
    own = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(own, prior).sum() / images.numel()
    (nll.mean() + kl).backward()
    assert float(means[kind]) == pytest.approx(nll.mean().item(), rel=1e-4)
    assert float(means["kl"]) == pytest.approx(kl.item(), rel=1e-5)
    nats = nll.mean().item() + kl.item() + (math.log(127.5) if kind == "gaussian" else 0.0)
    assert float(means["bits_per_dimension"]) == pytest.approx(nats / math.log(2), rel=1e-4)
    for name, parameter in reference.bare_reconstructor.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
    if learned:
        moved = step.objectives["reconstruction"].logvar.item() - 2 * math.log(0.2)
        assert scale.grad is not None and moved * scale.grad.item() < 0, "downhill"


def test_the_learned_scale_finds_the_error() -> None:
    """The best variance of a Gaussian is the mean squared error (Rybkin et al. 2021, eq. 5)."""
    settings = settings_for(loss={"pixel": "gaussian", "scale": 0.5, "learned_logvar": True}, optim={"lr": 1e-2})
    step = build_step(settings)
    for parameter in step.bare_reconstructor.parameters():
        parameter.requires_grad_(False)
    (batch,) = micro_batches(0, settings)
    error = (step.bare_reconstructor(batch.images, batch.noise).image - batch.images).square().mean().item()
    step.bare_reconstructor.autoencoder.decoder.conv_out.bias.requires_grad_(True)
    step.optimizers.autoencoder.param_groups[0]["params"] = []
    for number in range(80):
        step(number, iter([batch]))
    likelihood = step.objectives["reconstruction"].facts()["likelihood"]
    assert likelihood["kind"] == "gaussian" and likelihood["scale"] == pytest.approx(math.sqrt(error), rel=0.05)


def test_a_draw_and_its_ratio() -> None:
    """log p(z) - log q(z | x) against torch's distributions; its mean over draws is minus the KL."""
    step = build_step(settings_for())
    model = step.bare_reconstructor.autoencoder.eval()
    images, _ = global_batch(0, step.settings)
    posterior = model.encode(images).latent_dist
    own, prior = torch.distributions.Normal(posterior.mean, posterior.std), torch.distributions.Normal(0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    with torch.no_grad():
        for _ in range(200):
            noise = torch.randn(posterior.mean.shape, generator=generator)
            drawn = draw(model, images, noise)
            expected = (prior.log_prob(drawn.latent) - own.log_prob(drawn.latent)).sum((1, 2, 3))
            torch.testing.assert_close(drawn.log_ratio, expected, rtol=1e-4, atol=1e-3)
            ratios.append(drawn.log_ratio)
    kl = torch.distributions.kl_divergence(own, prior).sum((1, 2, 3))
    torch.testing.assert_close(drawn.rates[0].sum((1, 2, 3)), kl)
    samples = torch.stack(ratios)
    assert bool(((samples.mean(0) + kl).abs() < 5 * samples.std(0) / math.sqrt(200)).all())


@pytest.mark.usefixtures("no_finish")
def test_a_checkpoint_knows_its_likelihood(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("loss.pixel=logistic", "loss.scale=0.3", "loss.learned_logvar=true", "loss.kl=1", "steps=2")
    assert main(words(pictures, run, *more)) == 0
    found = load_first_stage(str(run)).likelihood
    assert found is not None and found.kind == "logistic" and found.scale not in (None, 0.3)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained = next(event for event in log if event["event"] == "train")
    assert trained["bits_per_dimension"] == pytest.approx((trained["logistic"] + trained["kl"]) / math.log(2))
    # what is fixed is as the settings have it, not as an older checkpoint
    assert main(words(pictures, run, *more, "loss.learned_logvar=false", "steps=3")) == 2
    again = tmp_path / "fixed"
    assert main(words(pictures, again, "loss.pixel=gaussian", "loss.scale=0.3", "steps=2")) == 0
    assert main(words(pictures, again, "loss.pixel=gaussian", "loss.scale=0.2", "steps=4")) == 0
    assert load_first_stage(str(again)).likelihood == Likelihood("gaussian", 0.2)


def test_an_export_knows_its_likelihood(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(words(pictures, run, "loss.pixel=bernoulli", "loss.kl=1", "steps=2", "gan.weight=0")) == 0
    assert load_first_stage(str(run / "export")).likelihood == Likelihood("bernoulli", None)
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    assert read_likelihood(tmp_path / "again") == Likelihood("bernoulli", None)
    (tmp_path / "again/likelihood.json").write_text('{"kind": "gaussian", "scale": -1}')
    with pytest.raises(UserError, match=r"likelihood of .*again"):
        load_first_stage(str(tmp_path / "again"))
    for wrong, key in (
        (("loss.scale=0.2",), "loss.scale"),
        (("loss.pixel=bernoulli", "loss.learned_logvar=true"), "loss.learned_logvar"),
    ):
        assert main(words(pictures, tmp_path / "wrong", *wrong)) == 2
        assert key in capsys.readouterr().err


@pytest.mark.usefixtures("no_finish")
def test_a_learned_scale_and_its_loss_stay(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, base = tmp_path / "run", ("loss.pixel=logistic", "loss.learned_logvar=true", "gan.weight=0")
    assert main(words(pictures, run, *base, "steps=2")) == 0
    for change in ("loss.scale=0.5", "loss.pixel=gaussian"):
        assert main(words(pictures, run, *base, change, "steps=3")) == 2
        assert change.partition("=")[0] in capsys.readouterr().err
    assert main(words(pictures, run, *base, "loss.pixel_weight=0")) == 2
    assert "loss.pixel_weight: 0 takes the likelihood away" in capsys.readouterr().err
