"""One update of both networks: the schedules of latent-diffusion and of the diffusers example against ours.

    python -m benchmarks.step --shape small --latent-diffusion CHECKOUT --taming CHECKOUT
    python -m benchmarks.step --shape sd --batch 2 --rounds 3 --latent-diffusion CHECKOUT --taming CHECKOUT

The baseline is latent-diffusion's own loss module, from checkouts of CompVis/latent-diffusion and
CompVis/taming-transformers, around the same autoencoder; without checkouts it is that module's schedule. All others
share LPIPS and PatchGAN, too. In one process, in turns, medians. Writes benchmarks/results/step-*.json.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fresh_step import first_batch, fresh_step
from benchmarks.machine import alternate, matmul_peak, save
from benchmarks.rivals import (
    GAN_WEIGHT,
    Networks,
    diffusers_example_step,
    latent_diffusion_checkout_step,
    latent_diffusion_step,
)
from latent_ae.arithmetic import training_memory_format
from latent_ae.models.build import build_autoencoder, count_parameters
from latent_ae.models.patch_discriminator import PatchDiscriminator
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.settings import TrainSettings


class Shape(NamedTuple):
    widths: tuple[int, ...]
    layers: int
    side_px: int
    batch: int


SHAPES = {"small": Shape((64, 128, 256), 2, 64, 8), "sd": Shape((128, 256, 512, 512), 2, 128, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--side", type=int, help="px; default: that of the shape")
    parser.add_argument("--batch", type=int, help="images per update; default: that of the shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="ours also with torch.compile")
    parser.add_argument("--latent-diffusion", type=Path, metavar="CHECKOUT", help="for its loss module")
    parser.add_argument("--taming", type=Path, metavar="CHECKOUT", help="which that one imports")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    side, batch = arguments.side or shape.side_px, arguments.batch or shape.batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {"fp32": matmul_peak(torch.float32, device)}
    # a small product first: where bf16 is emulated a large one takes minutes
    bf16_is_fast = bf16_speed(device) > 0.5
    if bf16_is_fast:
        peaks["bf16"] = matmul_peak(torch.bfloat16, device)
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    calls: dict[str, Callable[[], object]] = {}
    if arguments.latent_diffusion is not None:
        nets = rival_networks(shape, torch.float32, device)
        step = latent_diffusion_checkout_step(nets, arguments.latent_diffusion, arguments.taming, device)
        calls["a  latent-diffusion's own loss, fp32"] = lambda: step(nets, images)
    else:
        calls["a  latent-diffusion's schedule, fp32"] = rival(shape, latent_diffusion_schedule, images, torch.float32)
    calls |= {
        "b  diffusers example, fp32": rival(shape, diffusers_example_step, images, torch.float32),
        "c  ours, fp32": ours(shape, images, "fp32"),
    }
    if arguments.compile:
        calls["c  ours, fp32, compiled"] = ours(shape, images, "fp32", compiled=True)
    if bf16_is_fast:
        calls["b  diffusers example, bf16 weights"] = rival(shape, diffusers_example_step, images, torch.bfloat16)
        calls["c  ours, bf16"] = ours(shape, images, "bf16")
        if arguments.compile:
            calls["c  ours, bf16, compiled"] = ours(shape, images, "bf16", compiled=True)
    else:
        print("bf16 is emulated on this machine: its contestants are left out", file=sys.stderr)
    flops = {name: count_flops(call) for name, call in calls.items()}  # and a first call, which is not timed
    measured = alternate(calls, arguments.rounds, device)
    for name, result in measured.items():
        peak = peaks["bf16" if "bf16" in name else "fp32"]
        result["images_per_second"] = batch / result["median_s"]
        result["tflop"] = flops[name] / 1e12
        # compiled code is not seen by the counter: it does the work of the plain step
        result["share_of_matmul_peak"] = flops[name.replace(", compiled", "")] / result["median_s"] / peak
    kind = torch.backends.cpu.get_cpu_capability().lower() if device.type == "cpu" else device.type
    save(
        f"step-{arguments.shape}-{side}px-{kind}",
        {
            "shape": {"widths": shape.widths, "layers": shape.layers, "side_px": side, "batch": batch},
            "parameters": count_parameters(autoencoder_of(shape)),
            "matmul_peak_gflops": {name: round(value / 1e9, 1) for name, value in peaks.items()},
            "left_out": None if bf16_is_fast else "bf16: emulated on this processor, slower than fp32",
            "rounds": arguments.rounds,
            "contestants": measured,
        },
    )


def bf16_speed(device: torch.device) -> float:
    """Speed of a convolution in bf16 relative to fp32."""
    import time

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 64, 32, 32, device=device, dtype=dtype)
        weight = torch.randn(64, 64, 3, 3, device=device, dtype=dtype)
        torch.nn.functional.conv2d(x, weight)
        started = time.perf_counter()
        for _ in range(3):
            torch.nn.functional.conv2d(x, weight).sum().item()
        seconds.append(time.perf_counter() - started)
    return seconds[0] / seconds[1]


def settings_of(shape: Shape, **more: Any) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "model": {"block_out_channels": shape.widths, "layers_per_block": shape.layers},
            "gan": {"start": 0, "discriminator_warmup": 0, "warmup": 0},
            "ema": {"decay": 0.999},
            **more,
        }
    )


def autoencoder_of(shape: Shape) -> Any:
    return build_autoencoder(settings_of(shape).model, sample_size=shape.side_px)


def latent_diffusion_schedule(nets: Networks, images: torch.Tensor) -> None:
    """A step with the adversarial term, and LPIPS on all images."""
    latent_diffusion_step(nets, images, 1.0, GAN_WEIGHT, 1, slice(None))


def rival_networks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Networks:
    autoencoder = autoencoder_of(shape).to(device, dtype)
    return Networks(autoencoder, PatchDiscriminator(3).to(device, dtype), LPIPS("vgg").to(device, dtype))


def rival(
    shape: Shape, step: Callable[[Networks, torch.Tensor], None], images: torch.Tensor, dtype: torch.dtype
) -> Any:
    nets = rival_networks(shape, dtype, images.device)
    return lambda: step(nets, images)


def ours(shape: Shape, images: torch.Tensor, precision: str, *, compiled: bool = False) -> Any:
    batch = len(images)
    settings = settings_of(shape, precision=precision, batch_size=batch, compile=compiled)
    accelerator = Accelerator(cpu=images.device.type == "cpu", mixed_precision="no")
    step = fresh_step(settings, accelerator)
    latent = torch.randn(batch, 4, *(2 * [images.shape[-1] // settings.model.factor]), device=images.device)
    images = images.to(memory_format=training_memory_format(images.device))
    micro_batch = first_batch(step, images, latent)
    numbers = iter(range(1_000_000))
    return lambda: step(next(numbers), iter([micro_batch]))


def count_flops(call: Callable[[], object]) -> int:
    """Of convolutions and matrix products, forward and backward."""
    call()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
