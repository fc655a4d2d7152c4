"""Muon against the singular value decomposition and torch's own implementation."""

import pytest
import torch
from torch import nn

from latent_ae.models.build import build_autoencoder
from latent_ae.models.settings import ModelSettings
from latent_ae_train.muon import Muon, inner_weights, orthogonalised
from tests.runs import SHAPES
from tests.tiny import GAN, SIDE, build_step, micro_batches, moved, settings_for, weights


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_the_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    """The singular vectors stay; the singular values, here over two orders of magnitude, come near 1."""
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(side, rank, dtype=torch.float64)).Q for side in shape)
    matrix = u @ torch.diag(torch.logspace(0, -2, rank, dtype=torch.float64)) @ v.mT
    inner = u.mT @ orthogonalised(3.0 * matrix) @ v
    values = inner.diagonal()
    assert values.min() > 0.65 and values.max() < 1.25
    torch.testing.assert_close(inner - torch.diag(values), torch.zeros_like(inner), atol=1e-9, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon, install a newer one")
def test_steps_equal_those_of_torch() -> None:
    ours = nn.Parameter(torch.randn(16, 8, 3, 3).to(memory_format=torch.channels_last))
    theirs = nn.Parameter(ours.detach().flatten(1).clone())
    start = theirs.detach().clone()
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon([ours], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(16, 8, 3, 3)
        theirs.grad = ours.grad.flatten(1).clone()
        optimizer.step(), reference.step()
    way, difference = theirs.detach() - start, ours.detach().flatten(1) - theirs.detach()
    assert difference.norm() < 0.02 * way.norm(), "but for torch's bfloat16"
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_muon_takes_the_inner_weights_and_adamw_the_rest() -> None:
    step = build_step(settings_for(optim={"kind": "muon"}, gan=GAN, model={"mid_block_add_attention": True}))
    assert step.optimizers.muon is not None
    names = {id(p): name for name, p in step.bare_reconstructor.named_parameters()}
    inner, rest = (
        {names[id(p)] for p in o.param_groups[0]["params"]} for o in (step.optimizers.muon, step.optimizers.autoencoder)
    )
    assert inner | rest == set(names.values()) and not inner & rest
    assert all(name.endswith((".bias", "conv_in.weight", "conv_out.weight")) or "norm" in name for name in rest)
    assert "autoencoder.decoder.mid_block.attentions.0.to_q.weight" in inner
    before = weights(step.bare_reconstructor)
    for number in range(2):
        step(number, micro_batches(number, step.settings))
    assert moved(before, weights(step.bare_reconstructor)) >= inner
    fixed = build_step(settings_for(train="decoder")).bare_reconstructor.autoencoder
    assert inner_weights(fixed)
    assert not {id(weight) for weight in inner_weights(fixed)} & {id(weight) for weight in fixed.encoder.parameters()}


ENDS = {f"{part}.{name}.weight" for part in ("encoder", "decoder") for name in ("conv_in", "conv_out")}
OUTSIDE = {
    "VQModel": ENDS | {"quantize.embedding.weight"},
    "DiscreteVAE": ENDS | {"embedding.weight"},
    "VQVAE2": {f"encoder.{name}.weight" for name in ("up.0.conv_in", "to_vectors.1")}
    | {f"decoder.{end}.weight" for end in ("conv_in", "conv_out")}
    | {f"quantize.{level}.embedding.weight" for level in (0, 1)},
    "AutoencoderTiny": {f"{part}.layers.{end}.weight" for part in ("encoder", "decoder") for end in ("first", "last")},
    "HierarchicalVAE": (ENDS | {"decoder.start"}) - {"encoder.conv_out.weight", "decoder.conv_in.weight"},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_of_every_class_it_takes_the_inner_weights(kind: str) -> None:
    """Neither first and last layers nor what is no linear map."""
    network = build_autoencoder(ModelSettings(kind=kind, config=SHAPES[kind]), sample_size=SIDE)
    inner = {id(weight) for weight in inner_weights(network)}
    left = {name for name, weight in network.named_parameters() if weight.ndim > 1 and id(weight) not in inner}
    if kind == "AutoencoderTiny":
        last = {part: len(getattr(network, part).layers) - 1 for part in ("encoder", "decoder")}
        left = {name.replace(".0.", ".first.").replace(f".{last[name[:7]]}.", ".last.") for name in left}
    masks = {name for name in left if "condition_encoder" in name}  # get no gradient
    assert left - masks == OUTSIDE.get(kind, ENDS)


def test_the_published_autoencoder_dc_changes_the_size_in_its_first_and_last_layer() -> None:
    config = SHAPES["AutoencoderDC"] | {f"{part}_layers_per_block": [0, 1] for part in ("encoder", "decoder")}
    settings = settings_for(model={"kind": "AutoencoderDC", "config": config}, gan=GAN, optim={"kind": "muon"})
    step = build_step(settings)
    for number in range(2):
        means = step(number, micro_batches(number, settings))
    assert means["adaptive_weight"] > 0
    ends = {"encoder.conv_in.conv", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out.conv"}
    names = {id(p): name for name, p in step.bare_reconstructor.autoencoder.named_parameters() if p.ndim > 1}
    rest = {id(p) for p in step.optimizers.autoencoder.param_groups[0]["params"]}
    assert {names[key] for key in names.keys() & rest} == {f"{name}.weight" for name in ends}


def test_clipping_looks_at_both_optimizers_gradients() -> None:
    norms = [
        build_step(settings_for(optim={"kind": kind}))(0, micro_batches(0, settings_for()))["grad_norm"]
        for kind in ("adamw", "muon")
    ]
    torch.testing.assert_close(*norms)
