"""The discrete VAE against torch's distributions, its noise, its temperature, and the gradients of a training step."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Laplace,
    SigmoidTransform,
    TransformedDistribution,
    kl_divergence,
)

from latent_ae.__main__ import main
from latent_ae.data.rng import gumbel_noise
from latent_ae.models.codes import nearest_codes
from latent_ae.models.discrete import DiscreteVAE
from latent_ae.models.likelihood import Likelihood
from latent_ae.models.loading import first_stage, load_first_stage
from latent_ae.models.posterior import draw
from latent_ae.models.quantize import Quantiser, Relaxation
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives.code_relaxation import CodeRelaxationSettings, temperature_at
from latent_ae.objectives.codebook import perplexity
from latent_ae_eval.likelihood.bounds import Estimator
from latent_ae_eval.likelihood.measure import measure_likelihood
from latent_ae_eval.likelihood.settings import LikelihoodSettings
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.settings import ReconSettings
from tests.runs import SHAPES, differing_tensors, family_words
from tests.tiny import build_step, micro_batches, settings_for
from tests.tiny_models import pictures as images_of
from tests.tiny_models import tiny

CODES, GRID = 16, (16, 16)


@pytest.fixture(scope="module")
def model() -> DiscreteVAE:
    network = tiny("DiscreteVAE").eval().requires_grad_(False)
    assert isinstance(network, DiscreteVAE)
    network.encoder.conv_out.weight.mul_(20.0)  # posteriors that are neither uniform nor certain
    return network


def uniform(logits: Tensor) -> Categorical:
    return Categorical(logits=torch.zeros_like(logits))


def test_a_relaxed_draw_is_torchs_gumbel_softmax(model: DiscreteVAE) -> None:
    images = images_of()
    logits = model.logits(images)
    torch.manual_seed(3)  # F.gumbel_softmax draws its noise in this way
    gumbel = -torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
    torch.manual_seed(3)
    weights = F.gumbel_softmax(logits, tau=0.7, dim=1)
    latent, codes, rate = model.draw_codes(images, Relaxation(gumbel, 0.7))
    expected = torch.tensordot(weights, model.embedding.weight, dims=([1], [0])).movedim(-1, 1)
    torch.testing.assert_close(latent, expected)
    by_position = logits.movedim(1, -1)
    kl = kl_divergence(Categorical(logits=by_position), uniform(by_position))
    torch.testing.assert_close(rate[:, 0], kl, rtol=1e-4, atol=1e-6)
    assert 0.1 < float(rate.mean()) < math.log(CODES) - 0.1 and torch.equal(codes.indices, logits.argmax(1))
    # towards temperature 0 it is a draw from the posterior itself (Gumbel-max)
    cold, _, _ = model.draw_codes(images, Relaxation(gumbel, 1e-4))
    clear = (logits + gumbel).topk(2, 1).values.diff(dim=1).abs() > 2e-3
    assert float(clear.float().mean()) > 0.9
    difference = cold - model.vectors((logits + gumbel).argmax(1))
    assert float((difference * clear).abs().max()) < 1e-4


def certain(model: DiscreteVAE) -> DiscreteVAE:
    """The same codes are the most likely, and no other is possible."""
    sure = copy.deepcopy(model)
    sure.encoder.conv_out.weight.mul_(1e6)
    return sure


def test_the_frequencies_of_drawn_codes_are_the_posterior(model: DiscreteVAE) -> None:
    images, number = images_of(8)[:1], 2000
    noise = torch.randn(number, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = draw(model, images.expand(number, -1, -1, -1), noise)
    (codes,) = nearest_codes(model, drawn.latent)
    assert torch.equal(model.vectors(codes), drawn.latent)
    law = Categorical(logits=model.logits(images).movedim(1, -1))
    for row in range(4):
        for column in range(4):
            expected = number * law.probs[0, row, column].double()
            seen = torch.bincount(codes[:, row, column], minlength=CODES).double()
            often = expected >= 5
            pairs = [torch.cat([one[often], one[~often].sum()[None]]) for one in (seen, expected)]
            found, wanted = (one[pairs[1] > 1e-3] for one in pairs)
            assert stats.chisquare(found.numpy(), (wanted * number / wanted.sum()).numpy()).pvalue > 1e-4
    by_position = (law.log_prob(codes) - math.log(1 / CODES)).sum((1, 2))
    torch.testing.assert_close(drawn.log_ratio, -by_position, rtol=1e-4, atol=1e-4)
    kl = kl_divergence(law, Categorical(logits=torch.zeros(CODES))).expand(number, -1, -1)
    torch.testing.assert_close(drawn.rates[0][:, 0], kl, rtol=1e-4, atol=1e-5)
    assert torch.equal(draw(model, images, noise[:1]).latent, drawn.latent[:1]), "of the sample alone"
    assert model.draw(images, torch.full((1, 4, 4, 4), 9.0)).latent.isfinite().all(), "beyond the last code"
    mode, sure = draw(model, images, None), certain(model)
    assert torch.equal(mode.latent, model.encode(images).latent)
    assert not torch.equal(mode.latent, drawn.latent[:1])
    assert torch.equal(draw(sure, images, noise[:1]).latent, mode.latent)


def test_recon_decodes_drawn_codes_too(model: DiscreteVAE, pictures: Path) -> None:
    """They are the same ones in every evaluation, and those of `draw`; with a posterior that is certain, the mode's."""
    settings = ReconSettings(
        resize_px=32, crop_px=32, lpips=(), frechet=(), limit=3, num_workers=0, baseline=False, batch_size=2
    )
    # of copies, because an evaluation changes the layout of a model's weights
    one, again = (evaluate_reconstruction(copy.deepcopy(model), pictures, settings) for _ in range(2))
    assert one["images"] == again["images"] and all(row["mode_psnr"] != row["sample_psnr"] for row in one["images"])
    assert one["metrics"].keys() == {"mode", "sample"}
    sure = evaluate_reconstruction(certain(model), pictures, settings)
    assert sure["metrics"]["sample"] == sure["metrics"]["mode"]
    assert [row["mode_psnr"] for row in sure["images"]] == [row["mode_psnr"] for row in one["images"]]


def test_bounds_of_one_code_approach_the_exact_likelihood(model: DiscreteVAE) -> None:
    """Images of one position, whose likelihood is the mean over all codes; the ELBO, too, is a sum over them."""
    images, model = images_of(2), copy.deepcopy(model)
    model.encoder.conv_out.weight.mul_(0.1)  # all codes are drawn often enough
    every = torch.arange(CODES).view(-1, 1, 1)
    location, log_scale = model.decoder(model.vectors(every)).double().chunk(2, 1)
    law = TransformedDistribution(
        Laplace(location[:, None], log_scale[:, None].exp()),
        [SigmoidTransform(), AffineTransform(-1.25, 2.5)],
        validate_args=False,
    )
    likelihoods = law.log_prob(images.double()).flatten(2).sum(2).T  # (images, codes)
    posterior = Categorical(logits=model.logits(images)[..., 0, 0].double())
    exact = likelihoods.logsumexp(1) - math.log(CODES)
    elbo = (posterior.probs * (likelihoods - posterior.logits - math.log(CODES))).sum(1)
    assert (elbo < exact - 0.05).all()
    samples = 4096
    bounds = Estimator(
        first_stage(model), "logit_laplace", seed=0, discretised=True, device=torch.device("cpu")
    ).measure(images, [0, 1], samples, None)
    error = (posterior.probs * (likelihoods - (posterior.probs * likelihoods).sum(1, keepdim=True)) ** 2).sum(1)
    assert (abs(bounds.curve[:, 0] - elbo.numpy()) < 4 * (error / samples).sqrt().numpy() + 1e-4).all()
    # the variance of a weight over its squared mean, divided by their number
    spread = ((2 * (likelihoods - math.log(CODES)) - posterior.logits).logsumexp(1) - 2 * exact).exp() - 1
    assert (spread < 100).all()
    assert (abs(bounds.curve[:, -1] - exact.numpy()) < 4 * (spread / samples).sqrt().numpy()).all()


def test_codes_that_are_almost_equal_are_found_again(model: DiscreteVAE) -> None:
    """Pairs that are 2e-4 apart, between which the distances of a matrix product do not tell."""
    network = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(CODES // 2, 4, generator=generator)
    apart = 2e-4 * F.normalize(torch.randn(CODES // 2, 4, generator=generator), dim=1)
    network.embedding.weight.copy_(torch.cat([first, first + apart]))
    indices = torch.randint(CODES, (3, *GRID), generator=generator)
    (found,) = nearest_codes(network, network.vectors(indices))
    assert torch.equal(found, indices)


def test_the_noise_is_gumbels_and_each_samples_own() -> None:
    noise = gumbel_noise(7, [3, 4], (CODES, *GRID))
    assert torch.equal(noise[1:], gumbel_noise(7, [4], (CODES, *GRID))) and noise.dtype == torch.float32
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise, gumbel_noise(8, [3, 4], (CODES, *GRID)))
    many = gumbel_noise(0, range(20), (CODES, *GRID)).flatten()
    assert stats.kstest(many.numpy(), stats.gumbel_r.cdf).pvalue > 1e-3


def test_codes_and_images_of_a_folder(model: DiscreteVAE, tmp_path: Path) -> None:
    """Numbers of codes are enough to decode, and a stored model gives the same ones."""
    images = images_of()
    encoded = model.encode(images)
    assert encoded.indices.shape == (2, *GRID) and len(encoded.indices.unique()) > 3
    assert torch.equal(encoded.latent, model.vectors(encoded.indices))
    image = model.decode(encoded.latent).sample
    assert torch.equal(model(images).sample, image)
    location, _ = model.decoder(encoded.latent).chunk(2, 1)
    torch.testing.assert_close(0.1 + 0.8 * (image + 1) / 2, torch.sigmoid(location))
    model.save_pretrained(tmp_path)
    stage = load_first_stage(str(tmp_path))
    assert torch.equal(stage.reconstruct(images), image) and torch.equal(stage.encode(images).mean, encoded.latent)
    settings = LikelihoodSettings(resize_px=32, crop_px=32, limit=2, samples=2, num_workers=0)
    result = measure_likelihood(str(tmp_path), "photos", settings)
    assert result["likelihood"] == {"kind": "logit_laplace", "scale": None, "scale_from": None, "discretised": False}
    assert result["latent_dimensions"] == 16 * 16 and stage.random
    assert stage.family is not None and stage.family.codes(model.config) == CODES
    # without noise, as validation runs, training's forward pass takes the most likely codes
    result = Reconstructor(model)(images)
    assert torch.equal(result.image, image) and len(result.codes) == 1
    assert torch.equal(result.codes[0].indices, encoded.indices) and torch.equal(result.latent, encoded.latent)


def test_the_prior_is_uniform(model: DiscreteVAE) -> None:
    noise = torch.randn(40, 4, *GRID, generator=torch.Generator().manual_seed(0))
    drawn = model.sample_prior(noise).movedim(1, -1).flatten(0, 2)
    found = (drawn[:, None] == model.embedding.weight).all(2)
    assert bool((found.sum(1) == 1).all())
    assert stats.chisquare(found.sum(0).numpy()).pvalue > 1e-3
    assert model.sample_prior(torch.full((1, 4, 1, 1), 9.0)).isfinite().all(), "beyond the last code"


def test_the_temperature_falls_along_a_cosine() -> None:
    own = CodeRelaxationSettings(temperature_steps=100)
    assert temperature_at(0, own, 1000) == 1.0
    assert temperature_at(50, own, 1000) == pytest.approx((1 + 1 / 16) / 2)
    assert temperature_at(25, own, 1000) == pytest.approx(1 / 16 + 15 / 16 * math.cos(math.pi / 8) ** 2)
    assert temperature_at(100, own, 1000) == temperature_at(999, own, 1000) == 1 / 16
    assert temperature_at(50, CodeRelaxationSettings(), 100) == pytest.approx((1 + 1 / 16) / 2)


def test_a_step_minimises_the_published_loss() -> None:
    """Minus log p(x | z) and 6.6 times the KL, each summed over an image, divided by the image's elements.

    Written out with torch's distributions, for the gradients of all weights. After a third of its warm-up along a
    cosine, the weight has risen to a quarter.
    """
    model = {"kind": "DiscreteVAE", "config": SHAPES["DiscreteVAE"]}
    loss = {"pixel": "logit_laplace", "kl": 6.6, "kl_warmup": 8, "kl_warmup_shape": "cosine"}
    settings = settings_for(model=model, loss=loss, batch_size=4, optim={"lr": 1e-30}, steps=4)
    step, number = build_step(settings), 2
    gradients: dict[str, Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    (batch,) = batches = list(micro_batches(number, settings, latent=(3, 8, 8)))
    logs = step(number, iter(batches))

    reference = build_step(settings).bare_reconstructor
    network = reference.autoencoder
    logits = network.encoder(batch.images).movedim(1, -1)
    gumbel = gumbel_noise(0, range(8, 12), (32, 8, 8)).movedim(1, -1)
    temperature = 1 / 16 + (1 - 1 / 16) / 2
    latent = torch.softmax((logits + gumbel) / temperature, -1) @ network.embedding.weight
    location, log_scale = network.decoder(latent.movedim(-1, 1)).chunk(2, 1)
    law = Laplace(location, log_scale.exp())
    to_pixels = [SigmoidTransform(), AffineTransform(-1.25, 2.5)]
    nats = -TransformedDistribution(law, to_pixels, validate_args=False).log_prob(batch.images).sum()
    kl = kl_divergence(Categorical(logits=logits), uniform(logits)).sum()
    ((nats + 6.6 / 4 * kl) / batch.images.numel()).backward()

    elements = batch.images.numel()
    assert float(logs["logit_laplace"]) == pytest.approx(nats.item() / elements, rel=1e-4)
    assert float(logs["kl"]) == pytest.approx(kl.item() / elements, rel=1e-4)
    assert float(logs["kl_per_dimension"]) == pytest.approx(kl.item() / (4 * 64), rel=1e-4), "of a position"
    assert float(logs["kl_weight"]) == pytest.approx(6.6 / 4) and float(logs["temperature"]) == temperature
    entropy = Categorical(logits=logits).entropy().mean()
    assert float(logs["code_entropy"]) == pytest.approx(entropy.item(), rel=1e-4)
    bits = ((nats + kl) / elements / math.log(2)).item() + math.log2(127.5)
    assert float(logs["bits_per_dimension"]) == pytest.approx(bits, rel=1e-4)
    counts = torch.bincount(logits.argmax(-1).flatten(), minlength=32).float()
    assert float(logs["codebook_perplexity"]) == pytest.approx(float(perplexity(counts)), rel=1e-5)
    compared = {name: p.grad for name, p in reference.named_parameters()}
    assert gradients.keys() == compared.keys()
    for name, gradient in compared.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-3, atol=1e-6, msg=name)


def test_a_decoder_alone_learns_from_the_most_likely_codes() -> None:
    model = {"kind": "DiscreteVAE", "config": SHAPES["DiscreteVAE"]}
    settings = settings_for(model=model, loss={"pixel": "logit_laplace", "kl": 1.0}, batch_size=4, train="decoder")
    step = build_step(settings)
    assert not step.objectives["code_relaxation"].draw([0], (3, 8, 8))
    batch = next(micro_batches(0, settings, latent=(3, 8, 8)))
    with torch.no_grad():
        expected = step.bare_reconstructor.autoencoder(batch.images).sample
    done = step.forward_backward(batch._replace(draws={}, quantiser=Quantiser()), 0)
    assert torch.equal(done.out.image.detach(), expected) and "kl" not in done.logs
    trained = {name for name, p in step.bare_reconstructor.autoencoder.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("decoder.") for name in trained)


@pytest.mark.trained
@pytest.mark.usefixtures("no_finish")
def test_a_run_resumes_where_it_stopped(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With noise and temperature of the steps, in passes of two samples; and its checkpoints know the likelihood."""
    more = ("loss.pixel=logit_laplace", "loss.kl=1", "loss.kl_warmup=3", "ema.decay=0.5", "micro_batch_size=2")
    more = (*more, "codebook.temperature_steps=5", "gan.weight=0", "optim.schedule=constant")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(family_words(pictures, whole, "DiscreteVAE", *more)) == 0
    assert main(family_words(pictures, parts, "DiscreteVAE", *more, "steps=2")) == 0
    assert main(family_words(pictures, parts, "DiscreteVAE", *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(whole / last, parts / last) == []
    events = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    logged = [event["temperature"] for event in events if event["event"] == "train"]
    assert logged == pytest.approx(
        [temperature_at(n, CodeRelaxationSettings(temperature_steps=5), 6) for n in (1, 3, 5)]
    )
    assert load_first_stage(str(whole / last)).likelihood == Likelihood("logit_laplace", None)
    shutil.rmtree(parts)
    capsys.readouterr()
    assert main([*family_words(pictures, parts, "DiscreteVAE", *more), "--dry-run"]) == 0
    assert "temperature:   from 1 to 0.0625 by step 5\n" in capsys.readouterr().out
    assert main([*family_words(pictures, parts, "VQModel"), "--dry-run"]) == 0
    assert "temperature:  " not in capsys.readouterr().out
