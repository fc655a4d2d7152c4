"""The hierarchical VAE against torch's distributions, a linear model whose evidence is known, and the training step."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from latent_ae.__main__ import main
from latent_ae.models.hierarchical import HierarchicalVAE, packed
from latent_ae.models.loading import first_stage
from latent_ae.models.posterior import draw
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives.kl import free_bits_loss, kl_loss, kl_terms
from latent_ae_train.settings import LossSettings, TrainSettings
from tests.runs import difference_of_the_third_step, differing_tensors, family_words, words
from tests.tiny_models import tiny

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
SIZES = (3 * 4 * 4, 16 * 16)


@pytest.fixture(scope="module")
def model() -> HierarchicalVAE:
    """Levels of 4, 8 (layers alone) and 16 px, all weights random."""
    network = tiny("HierarchicalVAE").eval().requires_grad_(False)
    assert isinstance(network, HierarchicalVAE)
    return network


def noise_for(count: int, seed: int = 2, size: int = sum(SIZES)) -> Tensor:
    return torch.randn(count, size, 1, 1, generator=torch.Generator().manual_seed(seed))


def distributions(model: HierarchicalVAE, images: Tensor, latents: list[Tensor]) -> list[tuple[Normal, Normal]]:
    """Posterior and prior of each level given `latents` above it, with the model's layers put together anew."""
    features = model.encoder(images)
    top, middle, bottom = model.decoder.levels
    start = model.decoder.start.expand(len(images), -1, -1, -1)

    def pair(level: Any, state: Tensor) -> tuple[Normal, Normal]:
        mean, log_std = level.prior(state)
        shift, log_scale = level.posterior(torch.cat([state, features[level.side]], 1))
        prior = Normal(mean.double(), log_std.double().exp())
        return Normal(mean + prior.scale * shift, prior.scale * log_scale.double().exp()), prior

    state = start + top.conv_latent(latents[0])
    state = middle.stack(state.repeat_interleave(2, 2).repeat_interleave(2, 3))
    state = bottom.stack(state.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return [pair(top, start), pair(bottom, state)]


def test_rates_and_ratio_against_torchs_distributions(model: HierarchicalVAE) -> None:
    noise = noise_for(3)
    drawn = draw(model, IMAGES, noise)
    assert [tuple(rate.shape) for rate in drawn.rates] == [(3, 3, 4, 4), (3, 1, 16, 16)] and drawn.logvar is None
    levels = model.unpacked(drawn.latent)
    ratio = torch.zeros(3, dtype=torch.float64)
    for (own, prior), rate, z, eps in zip(
        distributions(model, IMAGES, levels), drawn.rates, levels, model.unpacked(noise), strict=True
    ):
        torch.testing.assert_close(rate.double(), kl_divergence(own, prior), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(z.double(), own.mean + own.stddev * eps, rtol=1e-4, atol=1e-5)
        ratio += (prior.log_prob(z) - own.log_prob(z)).sum((1, 2, 3))
        assert float(rate.min()) > 0 and not torch.allclose(prior.stddev, torch.ones_like(prior.stddev), atol=0.02)
    torch.testing.assert_close(drawn.log_ratio.double(), ratio, rtol=1e-4, atol=1e-3)


def test_the_mode_is_each_levels_given_the_modes_above(model: HierarchicalVAE) -> None:
    mode = model.encode(IMAGES).latent
    drawn = draw(model, IMAGES, None)
    assert torch.equal(mode, drawn.latent) and torch.equal(mode, drawn.mean)
    levels = model.unpacked(mode)
    ratio = torch.zeros(3, dtype=torch.float64)
    for (own, prior), z in zip(distributions(model, IMAGES, levels), levels, strict=True):
        torch.testing.assert_close(z.double(), own.mean, rtol=1e-4, atol=1e-5)
        ratio += (prior.log_prob(z) - own.log_prob(own.mean)).sum((1, 2, 3))
    torch.testing.assert_close(drawn.log_ratio.double(), ratio, rtol=1e-4, atol=1e-3)


def test_the_ratios_mean_is_minus_the_rate(model: HierarchicalVAE) -> None:
    """E_q[log p(z) - log q(z|x)] = -sum of E[KL of each level], the lower ones' given what is drawn above."""
    image = IMAGES[:1].expand(250, -1, -1, -1)
    drawn = [draw(model, image, noise_for(250, seed)) for seed in range(8)]
    difference = torch.cat([one.log_ratio + sum(rate.sum((1, 2, 3)) for rate in one.rates) for one in drawn])
    spread = float(difference.std())
    assert abs(float(difference.mean())) < 5 * spread / math.sqrt(2000) and spread > 0.1


def test_the_bound_of_a_linear_model_is_below_its_evidence_and_tight_in_the_limit() -> None:
    """Two levels of one number each, z2 ~ N(w z1, s^2), x ~ N(u z1 + v z2, r^2): the evidence is a Gaussian's.

    Layers are put in by hand; the posterior is the exact one of each level given the one above but for a factor on its
    spread. With factor 1 every sample's bound is log p(x) exactly; otherwise bounds of more samples are closer.
    """
    w, s, u, v, r = 0.8, 0.6, 0.5, 1.2, 0.4
    variance = u**2 + 2 * u * v * w + v**2 * (w**2 + s**2) + r**2
    x = torch.tensor([-1.0, 0.3, 1.7])
    evidence = Normal(0.0, math.sqrt(variance)).log_prob(x)
    given = v**2 * s**2 + r**2  # of x given z1
    slope = u + v * w
    shape1, shape2 = 1 / (1 + slope**2 / given), 1 / (1 / s**2 + v**2 / r**2)  # posterior variances
    network = HierarchicalVAE(
        1, 1, width=3, level_sides=(1, 1), level_channels=(1, 1), blocks=0, norm_num_groups=1
    ).requires_grad_(False)
    top, bottom = network.decoder.levels

    class Given(nn.Module):
        def __init__(self, moments: Any) -> None:
            super().__init__()
            self.moments = moments

        def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = self.moments(features)
            return mean, torch.log(torch.as_tensor(std)).expand_as(mean)

    # state: z1, z2, 0; features of the image: x in the first channel
    network.decoder.start.zero_()
    network.encoder.conv_in = nn.Conv2d(1, 3, 1).requires_grad_(False)
    network.encoder.conv_in.weight.copy_(torch.tensor([1.0, 0, 0])[:, None, None, None])
    network.encoder.conv_in.bias.zero_()
    for place, level in enumerate((top, bottom)):
        level.conv_latent.weight.zero_()[place] = 1.0
        level.conv_latent.bias.zero_()

    def bounds(factor: float, noise: Tensor) -> Tensor:
        top.prior = Given(lambda h: (0 * h[:, :1], 1.0))
        top.posterior = Given(lambda f: (shape1 * slope / given * f[:, 3:4], factor * math.sqrt(shape1)))
        bottom.prior = Given(lambda h: (w * h[:, :1], s))

        def second(f: Tensor) -> tuple[Tensor, float]:
            mean = shape2 * (w * f[:, :1] / s**2 + v * (f[:, 3:4] - u * f[:, :1]) / r**2)
            return (mean - w * f[:, :1]) / s, factor * math.sqrt(shape2) / s

        bottom.posterior = Given(second)
        drawn = network.draw(x.repeat(len(noise) // 3)[:, None, None, None], noise)
        z1, z2 = (level.flatten() for level in network.unpacked(drawn.latent))
        return Normal(u * z1 + v * z2, r).log_prob(x.repeat(len(noise) // 3)) + drawn.log_ratio

    tight = bounds(1.0, noise_for(30, size=2))
    torch.testing.assert_close(tight, evidence.repeat(10), rtol=1e-4, atol=1e-4)
    loose = bounds(1.5, noise_for(3 * 64 * 40, size=2)).view(40, 64, 3)
    means = [float((loose.unflatten(1, (-1, k)).logsumexp(2) - math.log(k) - evidence).mean()) for k in (1, 4, 16, 64)]
    assert all(low < high for low, high in itertools.pairwise(means)) and means[0] < -0.3 and -0.02 < means[-1] < 0.005
    # and the joint of the two latents is what the prior draws
    joint = network.sample_prior(noise_for(20_000, size=2)).flatten(1)
    expected = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, w], [w, w**2 + s**2]]))
    torch.testing.assert_close(joint.T.cov(), expected.covariance_matrix, atol=0.04, rtol=0)


def test_packing_is_the_levels_one_after_the_other(model: HierarchicalVAE) -> None:
    top, bottom = torch.arange(2 * 48.0).view(2, 3, 4, 4), -torch.arange(2 * 256.0).view(2, 1, 16, 16)
    whole = packed([top, bottom])
    assert whole.shape == (2, 304, 1, 1) and torch.equal(whole[1, :48, 0, 0], top[1].flatten())
    assert all(torch.equal(a, b) for a, b in zip(model.unpacked(whole), (top, bottom), strict=True))
    for wrong in (whole[:, 1:], whole.view(2, 76, 2, 2)):
        with pytest.raises(ValueError, match="a latent is N x 304 x 1 x 1"):
            model.decode(wrong)
    stage = first_stage(model)
    assert (stage.factor, stage.latent_channels, stage.has_posterior) == (32, 304, False)


def test_the_prior_is_drawn_level_by_level(model: HierarchicalVAE) -> None:
    """With the noise that a posterior equal to the prior would have."""
    noise = noise_for(3)
    latents = model.unpacked(model.sample_prior(noise))
    for (_, prior), z, eps in zip(distributions(model, IMAGES, latents), latents, model.unpacked(noise), strict=True):
        torch.testing.assert_close(z.double(), prior.mean + prior.stddev * eps, rtol=1e-4, atol=1e-5)
    still = model.unpacked(model.sample_prior(torch.zeros_like(noise)))
    torch.testing.assert_close(still[0][0], model.decoder.levels[0].prior(model.decoder.start)[0][0])
    # before training posterior and prior are one
    torch.manual_seed(0)
    fresh = HierarchicalVAE(width=8, level_sides=(4, 8), level_channels=(2, 1), norm_num_groups=2).requires_grad_(False)
    noise = noise_for(3, size=96)
    drawn = fresh.draw(IMAGES, noise)
    assert torch.equal(drawn.latent, noise) and torch.equal(fresh.sample_prior(noise), noise)
    assert float(torch.cat([rate.flatten() for rate in drawn.rates]).abs().max()) == 0.0
    assert float(drawn.log_ratio.abs().max()) == 0.0


def test_a_pass_decodes_what_was_drawn(model: HierarchicalVAE) -> None:
    noise = noise_for(3)
    result = Reconstructor(model)(IMAGES, noise)
    drawn = model.draw(IMAGES, noise)
    assert torch.equal(result.image, model.decode(drawn.latent).sample)
    assert all(torch.equal(a, b) for a, b in zip(result.rates, drawn.rates, strict=True))
    assert torch.equal(model(IMAGES).sample, model.decode(model.encode(IMAGES).latent).sample)
    # each level's latent is felt by the image
    for part in (slice(0, 48), slice(48, None)):
        changed = drawn.latent.clone()
        changed[:, part] += 1.0
        assert float((model.decode(changed).sample - result.image).abs().max()) > 1e-3


def test_the_log_has_each_levels_rate(model: HierarchicalVAE) -> None:
    """Nats per image element, which sum to kl; and free bits are a floor for the channels of all levels."""
    drawn = draw(model, IMAGES, noise_for(3))
    objective, means = kl_terms(LossSettings(kl=1.0), drawn.rates, IMAGES[0].numel())
    levels = distributions(model, IMAGES, model.unpacked(drawn.latent))
    for number, (own, prior) in enumerate(levels, start=1):
        expected = kl_divergence(own, prior).sum().item() / IMAGES.numel()
        assert float(means[f"kl_level_{number}"]) == pytest.approx(expected, rel=1e-4)
    assert "kl_level_3" not in means
    assert float(means["kl"]) == pytest.approx(float(means["kl_level_1"] + means["kl_level_2"]), rel=1e-5)
    assert float(objective) == float(kl_loss(drawn.rates, IMAGES[0].numel()))
    floor = float(torch.cat([rate.mean((2, 3)) for rate in drawn.rates], 1).median())
    expected = sum(
        max(floor, float(rate[n, c].mean())) * rate[n, c].numel()
        for rate in drawn.rates
        for n in range(3)
        for c in range(rate.shape[1])
    )
    free, share = free_bits_loss(drawn.rates, IMAGES[0].numel(), floor)
    assert float(free) == pytest.approx(expected / IMAGES.numel(), rel=1e-5) and 0 < float(share) < 1


def test_checkpointed_gradients_are_the_same(model: HierarchicalVAE) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = tiny("HierarchicalVAE").train()
        assert isinstance(network, HierarchicalVAE)
        calls: list[nn.Module] = []
        network.decoder.stack.blocks[0].register_forward_pre_hook(lambda block, _, calls=calls: calls.append(block))
        if checkpointing:
            network.enable_gradient_checkpointing()
        Reconstructor(network)(IMAGES, noise_for(3)).image.square().mean().backward()
        assert len(calls) == (2 if checkpointing else 1), "computed again in the backward pass"
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


@pytest.mark.trained
@pytest.mark.usefixtures("no_finish")
def test_a_run_resumes_and_splits_alike(pictures: Path, tmp_path: Path) -> None:
    more = (
        *("optim.schedule=constant", "micro_batch_size=2", "ema.decay=0.5", "loss.pixel=logistic", "loss.kl=1"),
        *("loss.learned_logvar=true", "loss.kl_warmup=3", "loss.kl_balance=true", "loss.spectral=1e-3"),
    )
    whole, parts, two = tmp_path / "whole", tmp_path / "parts", tmp_path / "two"
    assert main(family_words(pictures, whole, "HierarchicalVAE", *more)) == 0
    assert main(family_words(pictures, parts, "HierarchicalVAE", *more, "steps=2")) == 0
    shutil.copytree(parts, two)
    assert main(family_words(pictures, parts, "HierarchicalVAE", *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(whole / last, parts / last) == []
    assert difference_of_the_third_step(two, family_words(pictures, two, "HierarchicalVAE", *more)) < 1e-5
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    logged = [event for event in log if event["event"] == "train"][-1]
    assert logged["kl"] == pytest.approx(logged["kl_level_1"] + logged["kl_level_2"], rel=1e-5) and logged["kl"] > 0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "loss.pixel=logistic_mixture",
            "loss.pixel: logistic_mixture needs a decoder that gives a mixture for each pixel",
        ),
        ("latents.noise=1", "latents.noise: changes a latent"),
        ("latents.min_channels=2", "latents.min_channels: changes a latent"),
        ("latents.equivariance=0.5", "latents.equivariance: changes a latent"),
        ("alignment.model=.", "alignment.model: needs latents on one grid"),
        ("train=decoder", "train: decoder: the latents of this HierarchicalVAE are made by both parts"),
        ("validate.crop_px=32", "validate.crop_px: 32, and this HierarchicalVAE takes images of 16 px only"),
        ("model.config={level_sides: [4, 6], level_channels: [1, 1]}", "each of level_sides [4, 6] must divide"),
        ("model.config={level_sides: [4], level_channels: [0]}", "must be of the same levels, some > 0"),
        ("model.config={level_sides: [4, 8], level_channels: [1]}", "must be of the same levels"),
        ("model.config={norm_num_groups: 7}", "model.config: HierarchicalVAE refuses it"),
        ("model.config={mixtures: -1}", "mixtures -1 must not be negative"),
        ("model.config={open_log_std: .nan}", "open_log_std nan must be a number"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    pictures: Path, tmp_path: Path, word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # the last of several words for one key counts
    assert main(family_words(pictures, tmp_path / "run", "HierarchicalVAE", "gan.weight=0", word)) == 2
    assert said in capsys.readouterr().err


def test_images_of_another_size_are_refused(
    model: HierarchicalVAE, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="takes images of 32 x 32 px, not 64 x 32"):
        model.encode(torch.zeros(1, 3, 64, 32))
    model.save_pretrained(tmp_path / "model")
    further = [word for word in words(pictures, tmp_path / "run") if not word.startswith("model.")]
    further += ["model={}", f"init_from={tmp_path / 'model'}"]
    assert main([*further, "data.resolution=64", "validate.crop_px=64"]) == 2
    assert "takes images of 32 px only" in capsys.readouterr().err
    assert main([*further, "data.resolution=32", "validate.crop_px=32", "latents.noise=1"]) == 2
    assert "latents.noise: changes a latent" in capsys.readouterr().err


def test_the_recipe_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "hierarchical-vae", "--dry-run"]) == 0
    assert "629,995 parameters, factor 32, latent 1792 x 1 x 1 for 32 px" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["nvae-cifar10", "vdvae-cifar10"])
def test_published_posteriors_begin_near_their_priors_on_every_level(recipe: str) -> None:
    """With open_log_std 0. Where each latent makes the next one wider, 30 levels end in thousands of nats per value."""
    config = dict(TrainSettings.load(recipe).model.config)
    widths = config["width"]
    config["width"] = widths // 8 if isinstance(widths, int) else [width // 8 for width in widths]
    config["norm_num_groups"] = 4
    torch.manual_seed(0)
    model = HierarchicalVAE(sample_size=32, **config).eval()
    size = sum(count * side * side for count, side, _ in model.shapes)
    with torch.no_grad():
        drawn = model.draw(torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, size, 1, 1))
    assert len(drawn.rates) == len(model.shapes) >= 30
    assert max(float(rate.mean()) for rate in drawn.rates) < 1.0, [float(rate.mean()) for rate in drawn.rates]
