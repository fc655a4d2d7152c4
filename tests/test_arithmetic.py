"""What training computes in float32, how exactly, and what Adam makes of small gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.models.registry import class_of
from latent_ae_train.loop import train
from latent_ae_train.step import TrainStep
from tests.tiny import GAN, MODEL, build_step, micro_batches, settings_for

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
KL = {**MODEL, **BLOCKS}
ASYMMETRIC = {
    **BLOCKS,
    "down_block_out_channels": [8, 16],
    "up_block_out_channels": [8, 16],
    "latent_channels": 4,
    "norm_num_groups": 2,
}
SHAPES = {
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": KL,
    "FlowAutoencoderKL": KL,
    "AsymmetricAutoencoderKL": ASYMMETRIC,
}
POSTERIOR = ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in")


def record(module: nn.Module, names: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """Input and output of these layers in the passes to come."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, args, output: seen.update({name: [args[0].detach(), output.detach()]})

    for name in names:
        module.get_submodule(name).register_forward_hook(hook(name))
    return seen


def exactly(layer: nn.Module, features: Tensor) -> Tensor:
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    return F.conv2d(features.double(), weight, bias, layer.stride, layer.padding)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_posterior_is_float32_under_autocast(kind: str) -> None:
    """From the features that enter the encoder's last layer to those that leave the decoder's first."""
    torch.manual_seed(0)
    model = class_of(kind)(**SHAPES[kind])
    seen = record(model, (*POSTERIOR, "encoder.conv_in"))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        result = Reconstructor(model)(torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8))
    assert seen["encoder.conv_in"][1].dtype == torch.bfloat16, "the rest is not"
    for name in POSTERIOR:
        given, made = seen[name]
        assert made.dtype == torch.float32, name
        torch.testing.assert_close(made.double(), exactly(model.get_submodule(name), given), rtol=1e-5, atol=1e-6)
    assert torch.equal(seen["quant_conv"][0], seen["encoder.conv_out"][1])
    assert torch.equal(seen["post_quant_conv"][0], result.latent)
    assert torch.equal(seen["decoder.conv_in"][0], seen["post_quant_conv"][1])
    if result.logvar is not None:
        for moment in (result.mean, result.logvar):
            assert float((moment.bfloat16().float() != moment).float().mean()) > 0.9, "it is no bfloat16 number"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_bf16_leaves_the_posterior_alone(checkpointing: bool) -> None:
    settings = settings_for(precision="bf16", gan=GAN, loss={"kl": 1e-3}, gradient_checkpointing=checkpointing)
    step = build_step(settings)
    seen = record(step.bare_reconstructor.autoencoder, (*POSTERIOR, "encoder.conv_in"))
    gradients: dict[str, Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    step(0, micro_batches(0, settings))
    assert {name: made.dtype for name, (_, made) in seen.items()} == {
        **dict.fromkeys(POSTERIOR, torch.float32),
        "encoder.conv_in": torch.bfloat16,
    }
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients.values())


def tf32_flags() -> tuple[bool, ...]:
    """Whether convolutions and products may round: by the older flags, and, where there are any, by the newer."""
    older = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return (*older, *(precision == "tf32" for precision in newer_flags()))


def newer_flags() -> list[str]:
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    return [cudnn.conv.fp32_precision, products.fp32_precision] if hasattr(cudnn, "conv") else []


@pytest.mark.parametrize("before", [(True, False), (False, True)])
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_as_asked_and_then_as_before(tf32: bool, before: tuple[bool, bool]) -> None:
    ordinary = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    try:
        outside = tf32_flags()
        with float32_arithmetic(tf32=tf32, repeatable=True):
            assert set(tf32_flags()) == {tf32}
            assert torch.backends.cudnn.deterministic
        assert tf32_flags() == outside and not torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = ordinary


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has one kind of flag")
@pytest.mark.parametrize("tf32", [False, True])
def test_the_newer_flags_of_a_caller_are_no_trouble(tf32: bool) -> None:
    """PyTorch raises a RuntimeError where the older flags are read after the newer ones said something else."""
    conv, outside = torch.backends.cudnn.conv, tf32_flags()
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        with float32_arithmetic(tf32=tf32):
            assert set(newer_flags()) == {"tf32" if tf32 else "ieee"}
        assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = before
    assert tf32_flags() == outside


class Seen(Exception):
    pass


def flags_of_a_run() -> tuple[bool, ...]:
    return (*tf32_flags(), torch.backends.cudnn.benchmark)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_run_computes_as_its_settings_say(tf32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its validation and its steps, and afterwards the flags are the caller's, although this run ends badly."""
    from latent_ae_train.validate import Validator

    during: list[tuple[bool, ...]] = []
    measure = Validator.measure

    def measuring(self: Validator, *words: Any) -> dict[str, Any]:
        during.append(flags_of_a_run())
        return measure(self, *words)

    def stepping(self: TrainStep, *_: Any) -> dict[str, Tensor]:
        during.append(flags_of_a_run())
        raise Seen

    monkeypatch.setattr(Validator, "measure", measuring)
    monkeypatch.setattr(TrainStep, "__call__", stepping)
    outside = flags_of_a_run()
    fast = {"tf32": tf32, "cudnn_benchmark": tf32}
    settings = settings_for(output_dir=str(tmp_path), **fast, validate={"images": 1}, data={"num_workers": 0})
    with pytest.raises(Seen):
        train(settings)
    assert len(during) == 3, "the baseline, the model as it starts, and a step"
    assert {flag for flags in during for flag in flags} == {tf32}
    assert flags_of_a_run() == outside


@pytest.mark.parametrize("network", ["autoencoder", "discriminator"])
def test_adam_does_not_take_a_small_gradient_for_none(network: str) -> None:
    """A gradient of 1e-9, the order of the KL term's at a log-variance, moves its weight by the learning rate."""
    step = build_step(settings_for(gan=GAN))
    optimizer = step.optimizers.autoencoder if network == "autoencoder" else step.optimizers.adversaries["gan"]
    (weight, *_) = optimizer.param_groups[0]["params"]
    before, weight.grad = weight.detach().clone(), torch.full_like(weight, 1e-9)
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), torch.full_like(weight, 1e-3), rtol=1e-2, atol=1e-6)
