"""Memory and arithmetic of a step, computed without data, against a step that runs."""

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae_train.build import planned_autoencoder
from latent_ae_train.cost import GPUS, RESERVED, Allocations, StepCost, gpu_of, step_cost
from latent_ae_train.preflight import dearest_step
from latent_ae_train.settings import TrainSettings
from tests.tiny import GAN, build_step, micro_batches, settings_for

VQ = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "num_vq_embeddings": 16,
    "norm_num_groups": 4,
}
DC = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 16],
    "decoder_block_out_channels": [8, 16],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], [5]],
    "decoder_qkv_multiscales": [[], [5]],
}
SHAPES: dict[str, dict[str, Any]] = {
    "AutoencoderKL, GAN, average": {"gan": GAN, "ema": {"decay": 0.9}, "loss": {"kl": 1e-6}},
    "VQModel, accumulation": {"model": {"kind": "VQModel", "config": VQ}, "micro_batch_size": 4},
    "AutoencoderDC, bf16": {"model": {"kind": "AutoencoderDC", "config": DC}, "precision": "bf16"},
}


def shape(name: str) -> TrainSettings:
    changes = dict(SHAPES[name])
    model = changes.pop("model", None)
    settings = settings_for(**changes)
    return settings.model_copy(update={"model": type(settings.model)(**model)}) if model else settings


def cost_of(settings: TrainSettings, gpu: bool = False) -> StepCost:
    return step_cost(settings, planned_autoencoder(settings), gpu)


@pytest.mark.parametrize("name", SHAPES)
def test_the_computed_memory_is_what_the_allocator_counts_in_a_step(name: str) -> None:
    settings = shape(name)
    (batch, *_) = micro_batches(0, settings)
    gc.collect()  # what is freed meanwhile would count, too
    # oneDNN's kernels for bf16 take buffers on some processors, which are not of the step
    onednn = torch.backends.mkldnn.flags(enabled=settings.precision == "fp32")
    with onednn, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build_step(settings)
        states = step.optimizers.memory_placeholder()
        step.forward_backward(batch, dearest_step(step))
    events = profiler.profiler.kineto_results.events()
    sizes = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"])
    measured = int(sizes.cumsum(0).max())
    # in tensors that exist before the step
    assert len(states)
    assert cost_of(settings).peak(settings.micro_batch) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_reserved_memory_is_that_of_the_optimizers_states(kind: str) -> None:
    settings = settings_for(optim={"kind": kind}, gan=GAN, micro_batch_size=4)
    step = build_step(settings)
    reserved = sum(one.nbytes for one in step.optimizers.memory_placeholder())
    gradients = sum(p.nbytes for network in step.networks for p in network.parameters())  # of the earlier pass
    step(0, micro_batches(0, settings))
    states = [state for optimizer in step.optimizers.by_name.values() for state in optimizer.state.values()]
    kept = sum(one.nbytes for state in states for name, one in state.items() if name != "step")
    assert reserved == kept + gradients


def test_the_arithmetic_is_that_of_the_convolutions() -> None:
    settings = settings_for()  # L1 alone: one forward pass and one backward pass
    macs = []

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        macs.append(output[0].numel() * layer.weight[0].numel())

    model = build_step(settings).bare_reconstructor
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)  # type: ignore[arg-type]
    (batch,) = micro_batches(0, settings)
    with torch.no_grad():
        model(batch.images[:1], batch.noise[:1])
    # forward, and the gradients of weights and inputs; the images need none
    assert cost_of(settings).flops_per_image == 2 * (3 * sum(macs) - macs[0])


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_arithmetic_of_a_convolution_in_groups(groups: int) -> None:
    images = torch.randn(2, 8, 6, 6, requires_grad=True)
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=groups)
    with Allocations() as counted:
        layer(images).sum().backward()
    macs = 2 * 16 * 6 * 6 * (8 // groups) * 9  # images x channels x positions x what each is a sum of
    assert counted.flops == 3 * 2 * macs  # forward, and the gradients of weights and inputs


def test_the_largest_micro_batch_fits_and_the_next_one_does_not() -> None:
    cost, memory = StepCost(100, 50, 200, 100, 80, 60, 1), 1500.0
    most = cost.largest_micro_batch(memory)
    assert most > 1
    assert cost.peak(most) <= (1 - RESERVED) * memory < cost.peak(most + 1)
    assert cost.largest_micro_batch(500.0) == 0


def test_a_gpu_keeps_norms_in_float32_under_bf16() -> None:
    bf16, fp32 = (settings_for(precision=precision) for precision in ("bf16", "fp32"))
    assert cost_of(bf16).per_image < cost_of(bf16, gpu=True).per_image
    assert cost_of(fp32, gpu=True).per_image == pytest.approx(cost_of(fp32).per_image, rel=0.05)


def test_no_weights_are_needed_to_compute_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from latent_ae.pretrained import lpips

    def none(*_: Any) -> None:
        raise UserError("the weights are not there")

    monkeypatch.setattr(lpips, "weight_file", none)
    without, with_it = (cost_of(settings_for(loss={"perceptual": weight})) for weight in (0.0, 1.0))
    vgg16 = 14_714_688 * 4  # parameters of its convolutions
    assert with_it.networks - without.networks == pytest.approx(vgg16, rel=0.001)


def test_a_gpu_has_a_name_or_a_size() -> None:
    assert gpu_of("H100") == GPUS["h100"] and gpu_of("RTX 4090") == GPUS["rtx4090"]
    assert gpu_of("24").memory_gb == gpu_of("24GB").memory_gb == 24
    for word in ("h1000", "-3", "nan", "inf"):
        with pytest.raises(UserError, match="give its memory in GB, or one of a100-40gb, a100"):
            gpu_of(word)


def test_the_plan_states_it_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    # the second phase begins with the discriminator of the first
    words = [
        "loss.perceptual=0",
        "data.resolution=32",
        "gan.start=0",
        "phases=[{steps: 4}, {steps: 8, train: decoder}]",
    ]
    assert main(["train", "quickstart", *words, "--dry-run", "--gpu", "h100"]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("memory:", "of which:", "arith"))
    ]
    assert len(lines) == 6
    assert "for a micro-batch of 8; up to" in lines[0] and "into 85.9 GB" in lines[0]
    assert lines[1].startswith("of which:      networks ") and "gradients" in lines[1]
    assert main(["train", "quickstart", "--gpu", "h100"]) == 2
    assert "--gpu: is for a plan: give --dry-run, too" in capsys.readouterr().err
