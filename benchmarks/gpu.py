"""What only a GPU shows, in one command (docs/gpu-checklist.md).

    python -m benchmarks.gpu

Each part is measured in a process of its own, so that one that fails costs no other; `--only PART ...` repeats some.
Writes benchmarks/results/gpu.json, and step-sd-256px-cuda.json. On a machine without a GPU `--small` goes through all
parts with a small shape, to see that they work, and writes gpu-small.json.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile

from benchmarks.fresh_step import first_batch, fresh_step
from benchmarks.loader import SIDE_PX, images_per_second, write_sources
from benchmarks.machine import RESULTS, alternate, matmul_peak, save, synchronise
from benchmarks.runs import events
from benchmarks.step import count_flops
from latent_ae.arithmetic import float32_arithmetic, training_memory_format
from latent_ae_train.build import planned_autoencoder
from latent_ae_train.cost import step_cost
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GAN = "gan.start=0 gan.discriminator_warmup=0 gan.warmup=0"
SMALL = (
    "model.block_out_channels=[16] model.layers_per_block=1 model.norm_num_groups=4 model.init=default "
    "data.resolution=32 "
    "model.mid_block_add_attention=false gan.channels=8 gan.layers=1"
)
Call = Callable[[], object]


class Shape:
    """The settings of a run of sd-vae, and its parts on the device.

    Args:
        small: Whether the network and its images are small.
    """

    def __init__(self, small: bool):
        self.small, self.batch = small, 2 if small else 8
        self.recipe = f"sd-vae {SMALL if small else ''}".split()

    def settings(self, *words: str, batch: int = 0) -> TrainSettings:
        """Of one process and one pass."""
        size = batch or self.batch
        fixed = [f"batch_size={size}", f"micro_batch_size={size}", "compile=false", *GAN.split()]
        return TrainSettings.load(*self.recipe, *fixed, *words)

    def step(self, *words: str, batch: int = 0, layout: torch.memory_format | None = None) -> tuple[TrainStep, Call]:
        """A training step, and a call of it with the next number and the same images."""
        settings = self.settings(*words, batch=batch)
        step = fresh_step(settings, Accelerator(cpu=DEVICE.type == "cpu", mixed_precision="no"), layout)
        side, size = settings.data.resolution, settings.batch_size
        images = torch.rand(size, 3, side, side, device=DEVICE) * 2 - 1
        latent = 2 * [side // settings.model.factor]
        noise = torch.randn(size, settings.model.latent_channels, *latent, device=DEVICE)
        layout = layout or training_memory_format(DEVICE)
        batch_of = first_batch(step, images.contiguous(memory_format=layout), noise)
        numbers = iter(range(1_000_000))
        return step, lambda: step(next(numbers), iter([batch_of]))


def suite(shape: Shape) -> dict[str, Any]:
    """The project's tests on this machine."""
    words = ["-n", "4"] if not shape.small else ["tests/test_arithmetic.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1])}
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"rc": done.returncode, "seconds": time.perf_counter() - begun, **counts, "failures": failed[:50]}


def quickstart(shape: Shape) -> dict[str, Any]:
    """The README's first command."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"output_dir={scratch}/run", *(["steps=4", "log.every=2", "validate.images=2"] if shape.small else ())]
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "latent_ae", "train", "quickstart", *words], check=True)
        seconds = time.perf_counter() - begun
        last = events(Path(scratch) / "run", "validate")[-1]
        rate = rates_of(Path(scratch) / "run")[-1]
        return {"seconds": seconds, "psnr": last["psnr"], "lpips": last["lpips_vgg"], "images_per_second": rate}


def kinds_of_step(shape: Shape) -> dict[str, Any]:
    """One update of both networks by precision, memory format, compiler and cuDNN's search, in turns."""
    contiguous, last = torch.contiguous_format, torch.channels_last
    kinds: dict[str, tuple[str, torch.memory_format, dict[str, bool]]] = {
        "fp32": ("precision=fp32", last, {}),
        "fp32, TF32": ("precision=fp32", last, {"tf32": True}),
        "bf16": ("precision=bf16", last, {}),
        "bf16, contiguous": ("precision=bf16", contiguous, {}),
        "bf16, cudnn_benchmark": ("precision=bf16", last, {"benchmark": True}),
        "bf16, compiled": ("precision=bf16 compile=true", last, {}),
        "bf16, compiled, contiguous": ("precision=bf16 compile=true", contiguous, {}),
        "bf16, compiled, cudnn_benchmark": ("precision=bf16 compile=true", last, {"benchmark": True}),
    }

    def timed(words: str, layout: torch.memory_format, flags: dict[str, bool]) -> Call:
        _, call = shape.step(*words.split(), layout=layout)

        def under_flags() -> None:
            with float32_arithmetic(**flags):
                call()

        return under_flags

    calls: dict[str, Call] = {name: timed(*kind) for name, kind in kinds.items()}
    flops = count_flops(calls["bf16"])
    for call in calls.values():  # the first ones compile, and let cuDNN search
        call(), call()
    peak = matmul_peak(torch.bfloat16, DEVICE)
    rows = alternate(calls, 3 if shape.small else 9, DEVICE)
    for name, row in rows.items():
        row["images_per_second"] = shape.batch / row["median_s"]
        if "bf16" in name:
            row["share_of_bf16_peak"] = flops / row["median_s"] / peak
    return {"batch": shape.batch, "bf16_peak_tflops": peak / 1e12, "tflop": flops / 1e12, "rows": rows}


def compiled_gradients(shape: Shape) -> dict[str, float]:
    """How far the gradients of a compiled step are from those of the plain one: |difference| / |gradient|."""
    gradients: list[dict[str, torch.Tensor]] = []
    for word in ("false", "true"):
        torch.manual_seed(0)
        step, call = shape.step(f"compile={word}", "precision=fp32")
        found: dict[str, torch.Tensor] = {}
        step.optimizers.autoencoder.register_step_pre_hook(
            lambda *_, found=found, step=step: found.update(
                {name: one.grad.clone() for name, one in step.bare_reconstructor.named_parameters()}
            )
        )
        with float32_arithmetic():
            call()
        gradients.append(found)
    plain, compiled = gradients
    difference = torch.stack([(compiled[name] - one).norm() for name, one in plain.items()]).norm()
    return {"relative_difference": float(difference / torch.stack([one.norm() for one in plain.values()]).norm())}


def largest_batch(shape: Shape) -> dict[str, Any]:
    """Memory and images/s by micro-batch, doubled until it no longer fits, beside the computed memory."""
    rows: dict[str, Any] = {}
    for name, words in {
        "plain": "compile=false",
        "gradient_checkpointing": "compile=false gradient_checkpointing=true",
        "compiled": "compile=true",
    }.items():
        settings = shape.settings("precision=bf16", *words.split())
        cost, size = step_cost(settings, planned_autoencoder(settings), gpu=DEVICE.type == "cuda"), 2
        rows[name] = {"computed_largest": cost.largest_micro_batch(_memory()), "sizes": {}}
        while not shape.small or size <= 4:
            try:
                step, call = shape.step("precision=bf16", *words.split(), batch=size)
                call()
                row = alternate({name: call}, 3, DEVICE)[name]
            except torch.OutOfMemoryError:
                break
            row["images_per_second"] = size / row["median_s"]
            row["computed_memory_gb"] = round(cost.peak(size) / 1e9, 2)
            rows[name]["sizes"][size] = row
            size *= 2
            del step, call  # before the next one is built
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def top_ten(shape: Shape) -> dict[str, Any]:
    """The kernels on which a step in bf16 spends its time, plain and compiled."""
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    key = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    result: dict[str, Any] = {}
    for name, word in {"plain": "compile=false", "compiled": "compile=true"}.items():
        _, call = shape.step("precision=bf16", word)
        for _ in range(3):
            call()
        synchronise(DEVICE)
        with profile(activities=[activity]) as seen:
            call()
            synchronise(DEVICE)
        table = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))
        total = sum(getattr(row, key) for row in table)
        result[name] = [
            {"kernel": row.key[:100], "calls": row.count, "share": round(getattr(row, key) / total, 4)}
            for row in table[:10]
        ]
    return result


def whole_program(shape: Shape) -> dict[str, Any]:
    """`latent-ae train sd-vae` with its loader: images/s of its log, beside the loader alone."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "jpeg"
        write_sources(folder, SIDE_PX)
        steps = 4 if shape.small else 200
        words = (
            f"output_dir={scratch}/run data.source={folder} steps={steps} batch_size={4 * shape.batch} "
            f"micro_batch_size={4 * shape.batch} validate.every={steps} validate.images=8 checkpoint.every={steps} "
            f"log.every={steps // 4} data.num_workers=8 {GAN}"
        )
        words += " compile=false data.num_workers=1" if shape.small else ""
        subprocess.run([sys.executable, "-m", "latent_ae", "train", *shape.recipe, *words.split()], check=True)
        workers, batches = (1, 8) if shape.small else (8, 100)
        loader, per_core = images_per_second({"source": str(folder)}, workers, batches)
        return {
            "images_per_second": rates_of(Path(scratch) / "run"),
            "loader_images_per_second": loader,
            "loader_images_per_processor_second": per_core,
        }


def against_schedules(shape: Shape) -> dict[str, Any]:
    """`benchmarks.step`, whose own file has the figures."""
    words = "--shape sd --side 256 --batch 4 --rounds 7 --compile" if not shape.small else "--help"
    subprocess.run([sys.executable, "-m", "benchmarks.step", *words.split()], check=True, stdout=sys.stderr)
    return {"file": "step-sd-256px-cuda.json"}


PARTS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "quickstart": quickstart,
    "kinds_of_step": kinds_of_step,
    "compiled_gradients": compiled_gradients,
    "largest_batch": largest_batch,
    "top_ten": top_ten,
    "whole_program": whole_program,
    "against_schedules": against_schedules,
    "suite": suite,
}


def rates_of(run: Path) -> list[float]:
    """The images/s in a run's log; its first line has none."""
    return [line["images_per_second"] for line in events(run, "train") if "images_per_second" in line]


def _memory() -> float:
    """Bytes of the device."""
    return float(torch.cuda.mem_get_info()[1]) if DEVICE.type == "cuda" else 16e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="a small shape, on any device")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        (part,) = arguments.only
        print(json.dumps(PARTS[part](Shape(arguments.small))))
        return
    if DEVICE.type == "cpu" and not arguments.small:
        parser.error("no GPU is available to PyTorch; --small tries all parts without one")
    name = "gpu-small" if arguments.small else "gpu"
    path = RESULTS / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    for part in arguments.only:
        print(f"{part}:", file=sys.stderr)
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", "--only", part]
        command += ["--small"] if arguments.small else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        ended = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
        results[part] = ended
        save(name, {"parts": copy.deepcopy(results)})
        print(f"  {json.dumps(ended)[:400]}", file=sys.stderr)


if __name__ == "__main__":
    main()
