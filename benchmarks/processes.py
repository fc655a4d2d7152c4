"""How the cost of an update grows with processes: the same global batch on 1 and on 2 CPU processes.

    python -m benchmarks.processes

On one processor the cores are shared out, so 2 processes at best keep the speed of 1; what is lost is the price of
synchronising. Writes benchmarks/results/processes.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.fresh_step import first_batch, fresh_step
from benchmarks.machine import save
from latent_ae.arithmetic import training_memory_format
from latent_ae.models.build import count_parameters
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.settings import TrainSettings

BATCH, SIDE_PX = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=8, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.updates)
        return
    cores = os.cpu_count() or 1
    contestants = {
        f"1 process, {cores} threads": (1, cores, BATCH),
        f"1 process, {cores} threads, accumulation 2": (1, cores, BATCH // 2),
        f"2 processes, {max(1, cores // 2)} thread(s) each": (2, max(1, cores // 2), BATCH // 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, (processes, threads, micro_batch) in contestants.items():
            seconds[name].append(launch(processes, threads, micro_batch, arguments.updates))
            print(f"{name:<40} {seconds[name][-1]:.2f} s per update", file=sys.stderr)
    save(
        "processes",
        {
            "batch": BATCH,
            "side_px": SIDE_PX,
            "parameters": count_parameters(starting_autoencoder(settings_of(BATCH))),
            "seconds_per_update": {name: statistics.median(values) for name, values in seconds.items()},
            "all": seconds,
        },
    )


def launch(processes: int, threads: int, micro_batch: int, updates: int) -> float:
    words = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
    words += ["--multi_gpu"] if processes > 1 else []
    words += ["-m", "benchmarks.processes", "--worker", "--updates", str(updates)]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": str(threads),
        "BENCHMARK_MICRO_BATCH": str(micro_batch),
    }
    root = Path(__file__).parent.parent
    done = subprocess.run(words, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.strip().splitlines()[-1])


def settings_of(micro_batch: int) -> TrainSettings:
    values: dict[str, Any] = {
        "batch_size": BATCH,
        "micro_batch_size": micro_batch,
        "model": {"block_out_channels": (64, 128, 256)},
        "loss": {"perceptual": 0},
        "gan": {"start": 0, "discriminator_warmup": 0, "warmup": 0},
    }
    return TrainSettings.model_validate(values)


def work(updates: int) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings = settings_of(int(os.environ["BENCHMARK_MICRO_BATCH"]))
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    step, layout = fresh_step(settings, accelerator), training_memory_format(accelerator.device)
    size, side = settings.micro_batch, SIDE_PX // settings.model.factor
    images = (torch.rand(size, 3, SIDE_PX, SIDE_PX) * 2 - 1).to(memory_format=layout)
    micro_batch = first_batch(step, images, torch.randn(size, 4, side, side))
    seconds = []
    for number in range(updates + 2):
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        step(number, iter([micro_batch] * settings.accumulation))
        accelerator.wait_for_everyone()
        seconds.append(time.perf_counter() - started)
    if accelerator.is_main_process:
        print(statistics.median(seconds[2:]))


if __name__ == "__main__":
    main()
