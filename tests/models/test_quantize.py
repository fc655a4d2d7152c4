"""Codes, and the gradients that pass them, against the published formulas and diffusers' quantiser."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import Tensor

from latent_ae.models.fsq import grid, placed
from latent_ae.models.quantize import Quantiser, quantised, rotated
from latent_ae.objectives.codebook import codebook_loss


def stock_codes(latent: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """What diffusers takes: the quantised latent and the indices, (N, h, w)."""
    quantizer = VectorQuantizer(*codebook.shape, beta=0.25)
    quantizer.embedding.weight.data.copy_(codebook)
    vectors, _, (_, _, indices) = quantizer(latent)
    return vectors, indices.view(latent[:, 0].shape)


def flat(tensor: Tensor) -> Tensor:
    """The vector at each position, (positions, c)."""
    return tensor.movedim(1, -1).flatten(0, 2)


def test_codes_of_length_1_are_compared_by_direction_as_in_llamagen() -> None:
    """LlamaGen normalises latents and codes before all else; diffusers gets the stored codes and the raw latent."""
    torch.manual_seed(0)
    codebook = F.normalize(torch.randn(40, 5), dim=1).requires_grad_()
    latent = (3 * torch.randn(2, 5, 6, 4)).requires_grad_()
    towards = torch.randn_like(latent)
    ours, codes = quantised(latent, codebook, Quantiser(normalised=True))
    stock, indices = stock_codes(latent.detach(), codebook.detach())
    assert torch.equal(codes.indices, indices) and torch.equal(codes.vectors, codebook[indices].movedim(-1, 1))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)
    loss = (ours * towards).sum() + codebook_loss(codes.latent, codes.vectors, 0.25)
    found = torch.autograd.grad(loss, (latent, codebook))

    z, table = F.normalize(flat(latent), dim=1), F.normalize(codebook, dim=1)
    chosen = (z @ table.T).argmax(1)
    assert torch.equal(chosen.view_as(indices), indices), "the largest cosine"
    e = table[chosen]
    through = z + (e - z).detach()
    theirs = (
        (through * flat(towards)).sum() + (e - z.detach()).square().mean() + 0.25 * (z - e.detach()).square().mean()
    )
    for one, other in zip(found, torch.autograd.grad(theirs, (latent, codebook)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert float((found[1] * codebook).detach().sum(1).abs().max()) < 1e-6, "no gradient along a code's length"


def test_the_rotation_trick_is_that_of_the_paper() -> None:
    """Against the explicit matrix, which is a rotation in the plane of latent and code."""
    torch.manual_seed(0)
    latent, codebook = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    ours, codes = quantised(latent, codebook, Quantiser(rotation=True))
    _, indices = stock_codes(latent.detach(), codebook.detach())
    assert torch.equal(codes.indices, indices) and torch.equal(ours, codes.vectors), "the code itself"
    torch.testing.assert_close(rotated(latent, codes.vectors), codes.vectors)
    gradient = torch.randn_like(latent)
    found, none = torch.autograd.grad((ours * gradient).sum(), (latent, codebook), allow_unused=True)
    assert none is None
    for e, q, at_code, at_latent in zip(*(flat(x.detach()) for x in (latent, ours, gradient, found)), strict=True):
        u, v = e / e.norm(), q / q.norm()
        w = (u + v) / (u + v).norm()
        rotation = torch.eye(4) - 2 * torch.outer(w, w) + 2 * torch.outer(v, u)
        torch.testing.assert_close(rotation @ u, v)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), rtol=0, atol=1e-6)
        aside = torch.linalg.qr(torch.stack([u, v], 1), mode="complete").Q[:, 2:]
        torch.testing.assert_close(rotation @ aside, aside, rtol=0, atol=1e-6, msg="what is not in the plane stays")
        torch.testing.assert_close(at_latent, q.norm() / e.norm() * rotation.T @ at_code, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_finite_where_latent_and_code_are_opposite() -> None:
    latent = torch.tensor([1.0, 2.0, -1.0]).view(1, 3, 1, 1).requires_grad_()
    (found,) = torch.autograd.grad(rotated(latent, -2 * latent.detach()).sum(), latent)
    assert found.isfinite().all()
    torch.testing.assert_close(rotated(latent, -2 * latent), -2 * latent)


def published_fsq(z: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """Mentzer et al. 2023, appendix A.1: (positions, c) to the quantised latent and the indices."""
    number = torch.tensor(levels)
    half_l = (number - 1) * (1 - 1e-3) / 2
    offset = torch.where(number % 2 == 1, 0.0, 0.5)
    shift = torch.tan(offset / half_l)
    bounded = torch.tanh(z + shift) * half_l - offset
    half_width = number // 2
    quantized = (bounded + (bounded.round() - bounded).detach()) / half_width
    basis = torch.tensor([1, *levels[:-1]]).cumprod(0)
    return quantized, ((quantized.detach() * half_width + half_width).round().long() * basis).sum(1)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 4, 3, 2], [16, 2]])
def test_the_nearest_code_of_the_grid_is_what_fsq_rounds_to(levels: list[int]) -> None:
    torch.manual_seed(0)
    latent = (1.5 * torch.randn(3, len(levels), 20, 20)).requires_grad_()
    ours, codes = quantised(latent, grid(levels), Quantiser(levels=tuple(levels)))
    stock, indices = stock_codes(latent.detach(), grid(levels))
    assert torch.equal(codes.indices, indices) and torch.equal(ours, codes.vectors)
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-6)
    theirs, numbers = published_fsq(flat(latent), levels)
    assert torch.equal(indices.flatten(), numbers) and len(numbers.unique()) > 0.3 * len(grid(levels))
    gradient = torch.randn_like(latent)
    (found,) = torch.autograd.grad((ours * gradient).sum(), latent)
    (expected,) = torch.autograd.grad((theirs * flat(gradient)).sum(), latent)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("levels", range(2, 40))
def test_levels_lie_in_order_and_their_borders_where_fsq_rounds_to_another(levels: int) -> None:
    values = torch.tensor(placed(levels), dtype=torch.float64)
    assert len(values) == levels and (values.diff() > 0).all()
    middles = (values[1:] + values[:-1]) / 2
    for side, expected in ((-1e-5, 0), (1e-5, 1)):
        _, numbers = published_fsq((middles + side)[:, None].float(), [levels])
        assert numbers.tolist() == [number + expected for number in range(levels - 1)]
