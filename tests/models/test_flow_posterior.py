"""The flow posterior: its determinant and density against autograd, and a posterior that no diagonal Gaussian has."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.autograd.functional import jacobian

from latent_ae.__main__ import main
from latent_ae.models.flow import Coupling, FlowAutoencoderKL
from latent_ae.models.posterior import draw
from tests.runs import differing_tensors, family_words
from tests.tiny_models import TWO, tiny
from tests.tiny_models import pictures as images_of


def noise_for(images: torch.Tensor, channels: int = 4) -> torch.Tensor:
    shape = (len(images), channels, *(side // 2 for side in images.shape[-2:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def test_a_fresh_flow_is_the_autoencoder_bit_for_bit() -> None:
    torch.manual_seed(0)
    plain = AutoencoderKL(**TWO, latent_channels=4).eval()
    torch.manual_seed(0)
    model = FlowAutoencoderKL(**TWO, latent_channels=4).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    images, noise = images_of(16), noise_for(images_of(16))
    with torch.no_grad():
        expected, found = draw(plain, images, noise), draw(model, images, noise)
        assert torch.equal(found.latent, expected.latent) and torch.equal(found.log_ratio, expected.log_ratio)
        assert torch.equal(model.encode(images).latent, expected.mean)
        torch.testing.assert_close(model(images).sample, plain(images).sample, atol=1e-5, rtol=0)
    assert found.logvar is None and found.rates[0].shape == found.latent.shape
    # on average over noise, the KL
    with torch.no_grad():
        many = torch.stack([draw(model, images, torch.randn_like(noise)).rates[0].sum() for _ in range(400)])
    assert many.mean().item() == pytest.approx(expected.rates[0].sum().item(), abs=4 * many.std().item() / 20)


@pytest.mark.parametrize("side", [2, 4, 6])
@torch.no_grad()
def test_the_density_is_that_of_the_change_of_variables(side: int) -> None:
    """log q(z | x) = log q0(z0) - log |det df/dz0|, with the whole Jacobian by autograd."""
    model, images = tiny("FlowAutoencoderKL").eval(), images_of(side)[:1]
    noise, moments = noise_for(images), AutoencoderKL.encode(model, images).latent_dist
    context = torch.cat([moments.mean, moments.logvar], 1)

    def f(flat: torch.Tensor) -> torch.Tensor:
        latent = flat.view(noise.shape)
        for coupling in model.flow:
            latent = coupling(latent, context)[0]
        return latent.flatten()

    z0 = moments.mean + moments.std * noise
    with torch.enable_grad():
        determinant = torch.linalg.slogdet(jacobian(f, z0.flatten()).double()).logabsdet
    drawn = model.draw(images, noise)
    torch.testing.assert_close(drawn.latent.flatten(), f(z0.flatten()))
    log_q0 = torch.distributions.Normal(moments.mean, moments.std).log_prob(z0).double().sum()
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(drawn.latent).double().sum()
    expected = float(log_q0 - determinant - log_p)
    assert abs(float(determinant)) > 0.02
    assert float(drawn.rates[0].sum()) == pytest.approx(expected, abs=2e-4)
    assert float(-drawn.log_ratio) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("side", [2, 8])
@torch.no_grad()
def test_layers_are_undone_by_their_own_networks(side: int) -> None:
    """As real NVP says: what is kept gives back the scale and shift of the rest."""
    model, images = tiny("FlowAutoencoderKL").eval(), images_of(side)
    moments = AutoencoderKL.encode(model, images).latent_dist
    context = torch.cat([moments.mean, moments.logvar], 1)
    z0 = moments.mean + moments.std * noise_for(images)
    latent = model.draw(images, noise_for(images)).latent
    touched, masks = torch.zeros_like(z0[0]), set[tuple[float, ...]]()
    for coupling in reversed(model.flow):
        kept = coupling.mask(latent)
        # of what is kept alone, so that the rest cannot have had a say
        moved, log_scale = coupling(kept * latent, context)
        shift = moved - kept * latent
        latent = kept * latent + (1 - kept) * (latent - shift) * torch.exp(-log_scale)
        touched += 1 - kept
        masks.add(tuple(kept.flatten().tolist()))
        assert 0 < kept.sum() < kept.numel() and not (kept * log_scale).any()
    assert not torch.allclose(latent, model.draw(images, noise_for(images)).latent, atol=1e-2)
    torch.testing.assert_close(latent, z0, atol=1e-4, rtol=1e-4)
    assert (touched == 2).all(), "of four layers each value is moved by two"
    assert len(masks) == (2 if side == 2 else 4), "a single place has no checkerboard"


def test_the_gradient_is_that_of_the_sampled_kl() -> None:
    """Of the rates' sum to the moments and the flow, against log q - log p written out through autograd."""
    model, images = tiny("FlowAutoencoderKL"), images_of(4)[:1]
    noise = noise_for(images)
    model.draw(images, noise).rates[0].sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    moments = AutoencoderKL.encode(model, images).latent_dist
    context = torch.cat([moments.mean, moments.logvar], 1)
    z0 = moments.mean + moments.std * noise

    def f(flat: torch.Tensor) -> torch.Tensor:
        latent = flat.view(noise.shape)
        for coupling in model.flow:
            latent = coupling(latent, context)[0]
        return latent.flatten()

    determinant = torch.linalg.slogdet(jacobian(f, z0.flatten(), create_graph=True)).logabsdet
    # noise is given: -log q0 at z0 is sum(log std) and a constant
    (-moments.logvar.sum() / 2 - determinant + f(z0.flatten()).square().sum() / 2).backward()
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-3, rtol=1e-3)
    assert any("flow.0" in name for name in found) and any("encoder" in name for name in found)


def test_a_flow_fits_what_no_diagonal_gaussian_can() -> None:
    """z ~ N(0, I) in two dimensions, x = z1 + z2 + noise of deviation 0.3: the posterior is a narrow ridge.

    The evidence is known, and so is the best diagonal Gaussian's bound: its precisions are the posterior's own.
    """
    x, deviation = 1.0, 0.3
    power = deviation**2
    evidence = -0.5 * (math.log(2 * math.pi * (2 + power)) + x**2 / (2 + power))
    # KL of the best mean-field Gaussian is half the logarithm of prod(precisions) / det(precision matrix)
    precision = torch.tensor([[1 + 1 / power, 1 / power], [1 / power, 1 + 1 / power]])
    best = evidence - 0.5 * math.log(float(precision.diagonal().prod() / torch.linalg.det(precision)))
    assert evidence - best > 0.7
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Coupling(2, 16, number) for number in range(4))
    moments = torch.nn.Parameter(torch.zeros(1, 4, 1, 1))
    optimizer = torch.optim.Adam([moments, *layers.parameters()], lr=1e-2)

    def bound(count: int) -> torch.Tensor:
        mean, logvar = moments.chunk(2, 1)
        noise = torch.randn(count, 2, 1, 1)
        latent, log_q = mean + (0.5 * logvar).exp() * noise, -0.5 * (noise.square() + logvar + math.log(2 * math.pi))
        for layer in layers:
            latent, log_scale = layer(latent, moments.expand(count, -1, -1, -1))
            log_q = log_q - log_scale
        log_p = -0.5 * (latent.square() + math.log(2 * math.pi))
        error = x - latent.sum((1, 2, 3))
        likelihood = -0.5 * (error.square() / power + math.log(2 * math.pi * power))
        return (likelihood + (log_p - log_q).sum((1, 2, 3))).mean()

    for _ in range(250):
        optimizer.zero_grad()
        (-bound(128)).backward()
        optimizer.step()
    with torch.no_grad():
        reached = float(bound(20_000))
    assert best + 0.8 * (evidence - best) < reached < evidence + 0.02


def test_half_precision_draws_float32() -> None:
    model = tiny("FlowAutoencoderKL").eval().to(torch.bfloat16)
    images = images_of(8)
    with torch.no_grad():
        drawn = model.draw(images.to(torch.bfloat16), noise_for(images))
        assert drawn.latent.dtype == drawn.rates[0].dtype == torch.float32
        assert model(images.to(torch.bfloat16)).sample.dtype == torch.bfloat16


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="flow_layers 0"):
        FlowAutoencoderKL(**TWO, flow_layers=0)


@pytest.mark.usefixtures("no_finish")
def test_training_resumes_and_refuses_what_it_cannot_do(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("optim.schedule=constant", "micro_batch_size=2")
    assert main(family_words(pictures, whole, "FlowAutoencoderKL", *more)) == 0
    assert main(family_words(pictures, parts, "FlowAutoencoderKL", *more, "steps=2")) == 0
    assert main(family_words(pictures, parts, "FlowAutoencoderKL", *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(whole / last, parts / last) == []
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all("kl_per_dimension" in line for line in lines if line["event"] == "train")
    words = ("loss.total_correlation=1", "micro_batch_size=4")
    assert main(family_words(pictures, tmp_path / "tc", "FlowAutoencoderKL", *words)) == 2
    assert "loss.total_correlation: needs a Gaussian posterior" in capsys.readouterr().err
    assert main(family_words(pictures, tmp_path / "free", "FlowAutoencoderKL", "loss.free_bits=0.1")) == 2
    assert "loss.free_bits: the rates of this FlowAutoencoderKL are of single samples" in capsys.readouterr().err
    assert main(family_words(pictures, tmp_path / "for", "FlowAutoencoderKL", "export_for=sd")) == 2
    assert "sd: its pipelines take the class AutoencoderKL, not FlowAutoencoderKL" in capsys.readouterr().err
