"""A model of what a training step costs, held against measurements, and what it says of many GPUs (docs/cost.md).

    python -m benchmarks.cost_model

One small recipe on the CPU in float32, at four resolutions, batches, widths and numbers of processes. Computed without
running anything (latent_ae_train.cost) are the floating point operations and the memory of a step; three rates, fitted
to all points at once, turn them into seconds. Times are processor seconds of one thread, in turns, medians; those of
several processes are the clock's, with one thread each. Memory needs Linux with glibc. Memory is computed
without a fit but for one number, which the process takes for itself. `--only` measures a part anew, and without words
only fits. Writes benchmarks/results/cost-model.json and cost-gpus.json.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.fresh_step import first_batch, fresh_step
from benchmarks.machine import RESULTS, alternate, save
from benchmarks.step_memory import EAGER
from latent_ae.arithmetic import training_memory_format
from latent_ae_train.build import planned_autoencoder
from latent_ae_train.cost import UTILISATION, gpu_of, step_cost
from latent_ae_train.settings import TrainSettings

BASE = "quickstart model.init=default gan.start=0 gan.discriminator_warmup=0 gan.warmup=0 loss.perceptual_every=1"
DIMENSIONS = {"resolution": (32, 64, 96, 128), "batch": (2, 4, 8, 16), "width": (16, 32, 64, 96)}
PROCESSES = (1, 2, 3, 4)
PROCESS_BATCH = 12
NAME = "cost-model"
GPU, RECIPE = "h100", "sdxl-shape"
GPUS = (8, 64, 1024)
NODE, NVLINK, NETWORK, DISK = 8, 300e9, 40e9, 1e9
"""GPUs of a node; bytes per second of each GPU within a node, between nodes, and of a checkpoint's disk. Assumed: two
thirds of an H100's NVLink and four fifths of a 400 Gbit/s adapter, and a slow shared disk."""


def words_of(resolution: int = 64, batch: int = 4, width: int = 32) -> list[str]:
    channels = f"model.block_out_channels=[{width},{2 * width},{2 * width}]"
    return [*BASE.split(), channels, f"data.resolution={resolution}", f"batch_size={batch}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["time", "memory", "processes"], help="what is measured anew")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    path = RESULTS / f"{NAME}.json"
    measured: dict[str, Any] = json.loads(path.read_text())["measured"] if path.exists() else {}
    parts: dict[str, Callable[[int], Any]] = {"time": times, "memory": memories, "processes": launches}
    for part in parts if arguments.only is None else arguments.only:
        measured[part] = parts[part](arguments.rounds)
        if part == "processes":  # a fit on another machine needs those of this one
            measured["cores"] = os.cpu_count() or 1
    save(NAME, {"base": BASE, "process_batch": PROCESS_BATCH, "measured": measured, **fitted(measured)})
    save("cost-gpus", extrapolated())


def points() -> dict[str, list[str]]:
    """Settings of each point, by its name."""
    return {
        f"{dimension} {value}": words_of(**{dimension: value})
        for dimension, values in DIMENSIONS.items()
        for value in values
    }


def computed(words: list[str]) -> tuple[float, float, float]:
    """Operations, and bytes of activations and of all else, of a step."""
    settings = TrainSettings.load(*words)
    cost = step_cost(settings, planned_autoencoder(settings), gpu=False)
    size = settings.batch_size
    return cost.flops_per_image * size, cost.peak(size) - cost.fixed, cost.fixed


def times(rounds: int) -> dict[str, float]:
    """Processor seconds of a step at each point, one thread."""
    torch.set_num_threads(1)
    calls = {name: call_of(words) for name, words in points().items()}
    for call in calls.values():  # the first is slower
        call()
    rows = alternate(calls, rounds, torch.device("cpu"))
    return {name: row["median_s"] for name, row in rows.items()}


def call_of(words: list[str], accelerator: Accelerator | None = None) -> Callable[[], object]:
    """A training step on the same images again and again."""
    settings = TrainSettings.load(*words)
    step = fresh_step(settings, accelerator or Accelerator(cpu=True, mixed_precision="no"))
    size, side, factor = settings.micro_batch, settings.data.resolution, settings.model.factor
    images = torch.rand(size, 3, side, side) * 2 - 1
    noise = torch.randn(size, settings.model.latent_channels, side // factor, side // factor)
    batch = first_batch(step, images.contiguous(memory_format=training_memory_format(torch.device("cpu"))), noise)
    numbers = iter(range(1_000_000))
    return lambda: step(next(numbers), iter([batch] * settings.accumulation))


def memories(rounds: int) -> dict[str, dict[str, float]]:
    """Computed and measured peak memory at each point, as benchmarks.step_memory has them."""
    rows = {}
    for name, words in points().items():
        command = [sys.executable, "-m", "benchmarks.step_memory", *words]
        child = subprocess.run(command, env=os.environ | EAGER, check=True, stdout=subprocess.PIPE, text=True)
        rows[name] = json.loads(child.stdout.splitlines()[-1])
        print(name, rows[name], file=sys.stderr, flush=True)
    return rows


def launches(rounds: int) -> dict[str, float]:
    """Seconds of a step of the same batch on several processes of one thread."""
    rows: dict[str, list[float]] = {str(count): [] for count in PROCESSES}
    for _ in range(max(1, rounds // 2)):
        for count in PROCESSES:
            words = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={count}"]
            words += ["--multi_gpu"] if count > 1 else []
            environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*words, "-m", "benchmarks.cost_model", "--worker"],
                env=environment,
                cwd=Path(__file__).parent.parent,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            rows[str(count)].append(float(done.stdout.splitlines()[-1]))
            print(f"{count} processes: {rows[str(count)][-1]:.2f} s", file=sys.stderr, flush=True)
    return {count: statistics.median(values) for count, values in rows.items()}


def work() -> None:
    """One of several processes: prints the median seconds of a step."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    call, seconds = call_of(words_of(batch=PROCESS_BATCH), accelerator), []
    for _ in range(5):
        accelerator.wait_for_everyone()
        begun = time.perf_counter()
        call()
        accelerator.wait_for_everyone()
        seconds.append(time.perf_counter() - begun)
    if accelerator.is_main_process:
        print(statistics.median(seconds[1:]))


def fitted(measured: dict[str, Any]) -> dict[str, Any]:
    """The rates, and what the model says of each point beside what was measured."""
    costs = {name: computed(words) for name, words in points().items()}
    names = list(costs)
    table = torch.tensor([costs[name] for name in names], dtype=torch.float64)
    seconds = torch.tensor([measured["time"][name] for name in names], dtype=torch.float64)
    # relative errors are made small, so that small steps count like large ones
    rates = torch.linalg.lstsq(table / seconds[:, None], torch.ones(len(names), 1, dtype=torch.float64)).solution[:, 0]
    modelled = table @ rates
    memory = measured["memory"]
    own = statistics.median(row["measured_mb"] - row["computed_mb"] for row in memory.values())
    rows = {
        name: {"measured_s": float(seconds[i]), "modelled_s": float(modelled[i]), **memory[name]}
        for i, name in enumerate(names)
    }
    # one process: the same for a larger batch; each of several has its share of it, and cores are shared out
    alone = measured["processes"]["1"] / float(_cost(words_of(batch=PROCESS_BATCH)) @ rates)
    shares = {
        count: alone
        * float(_cost(words_of(batch=PROCESS_BATCH // count)) @ rates)
        * max(1.0, count / measured["cores"])
        for count in PROCESSES
    }
    sent = {count: 2 * (count - 1) / count for count in PROCESSES}
    late = [(measured["processes"][str(count)] - shares[count]) / sent[count] for count in PROCESSES if count > 1]
    each = max(0.0, statistics.mean(late))
    processes = {
        str(count): {
            "measured_s": measured["processes"][str(count)],
            "modelled_s": shares[count] + each * sent[count],
        }
        for count in PROCESSES
    }
    return {
        "rates": {
            "gflops": 1e-9 / float(rates[0]),
            "activations_gb_per_s": 1e-9 / float(rates[1]),
            "weights_gb_per_s": 1e-9 / float(rates[2]),
            "all_reduce_s": each,
            "memory_of_process_mb": own,
        },
        "points": rows,
        "processes": processes,
    }


def _cost(words: list[str]) -> torch.Tensor:
    return torch.tensor(computed(words), dtype=torch.float64)


def extrapolated() -> dict[str, Any]:
    """What the model says of RECIPE on many GPUs, with the assumptions above; no GPU was measured."""
    settings, gpu = TrainSettings.load(RECIPE), gpu_of(GPU)
    cost = step_cost(settings, planned_autoencoder(settings))
    trained = cost.gradients
    rate = UTILISATION * gpu.tflops * 1e12
    loader = json.loads((RESULTS / "loader.json").read_text())
    per_core = loader["images_per_processor_second"]["JPEG folder, 1 worker(s)"]
    checkpoint = cost.networks + cost.average + cost.optimizers
    rows: dict[str, Any] = {}
    for count in GPUS:
        each = max(1, math.ceil(settings.batch_size / count))
        compute = each * cost.flops_per_image / rate
        bandwidth = NVLINK if count <= NODE else NETWORK
        reduce = 2 * (count - 1) / count * trained / bandwidth
        # gradients are reduced during the backward pass, which is two thirds of the step
        waiting = max(0.0, reduce - compute * 2 / 3)
        saving = checkpoint / DISK / settings.checkpoint.every
        step = compute + waiting + saving
        rows[str(count)] = {
            "images_per_gpu": each,
            "batch": each * count,
            "compute_ms": 1e3 * compute,
            "all_reduce_ms": 1e3 * reduce,
            "waiting_ms": 1e3 * waiting,
            "checkpoint_ms": 1e3 * saving,
            "images_per_second": each * count / step,
            "loader_cores_per_gpu": each / step / per_core,
        }
    assumed = {"utilisation": UTILISATION, "node": NODE, "nvlink": NVLINK, "network": NETWORK, "disk": DISK}
    return {"recipe": RECIPE, "gpu": GPU, **assumed, "loader_per_core": per_core, "rows": rows}


if __name__ == "__main__":
    main()
