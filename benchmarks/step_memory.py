"""The memory of a training step as it is computed before a run, against what the process really takes.

    python -m benchmarks.step_memory

Each shape in a process of its own that gives back at once what it frees, else its size varies; so it needs Linux with
glibc. Measured is the peak of the resident memory in a step (forward and backward, with the optimizers' states
reserved), less what the process held before the networks were built. Writes benchmarks/results/step-memory.json.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.machine import save
from latent_ae.models.build import factor_of, facts_of, latent_channels_of
from latent_ae_train.build import build_objectives, planned_autoencoder, starting_autoencoder
from latent_ae_train.cost import step_cost
from latent_ae_train.data import drawn_batch
from latent_ae_train.optim import Ema
from latent_ae_train.preflight import dearest_step
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep

SHAPES = {
    "quickstart, twice as wide, 128 px": ["quickstart", "data.resolution=128", "model.block_out_channels=[64,128,128]"],
    "sd-vae, fp32, 128 px, batch 2": ["sd-vae", "precision=fp32", "data.resolution=128", "batch_size=2"],
    "vqgan, 128 px": ["vqgan", "data.resolution=128"],
}
EAGER = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1:])))
        return
    rows = {}
    for name, words in SHAPES.items():
        command = [sys.executable, "-m", "benchmarks.step_memory", *words]
        child = subprocess.run(command, env=os.environ | EAGER, check=True, stdout=subprocess.PIPE, text=True)
        rows[name] = json.loads(child.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
    save("step-memory", {"shapes": SHAPES, "rows": rows})


def measured(words: list[str]) -> dict[str, float]:
    """The computed and the measured peak of one step, MB."""
    settings = TrainSettings.load(*words)
    computed = step_cost(settings, planned_autoencoder(settings), gpu=False).peak(settings.micro_batch)
    accelerator = Accelerator(cpu=True)
    gc.collect()
    before = _status("VmRSS")
    autoencoder = starting_autoencoder(settings)
    objectives = build_objectives(settings, autoencoder, accelerator.device)
    for objective in objectives:
        objective.run = settings.facts(facts_of(autoencoder))
    ema = Ema(autoencoder, settings.ema.decay) if settings.ema.decay else None
    step = TrainStep(settings, accelerator, autoencoder, objectives, ema)
    states = [tensor.fill_(1) for tensor in step.optimizers.memory_placeholder()]  # so that their pages are there
    side, size = settings.data.resolution, settings.micro_batch
    latent = (latent_channels_of(autoencoder), *2 * [side // factor_of(autoencoder)])
    batch = drawn_batch(torch.rand(size, 3, side, side), torch.randn(size, *latent), range(size), objectives)
    for _ in range(2):  # the first one also loads kernels
        for network in step.networks:
            network.zero_grad(set_to_none=True)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        step.forward_backward(batch, dearest_step(step))
        peak = _status("VmHWM") - before
    del states
    return {"computed_mb": computed / 1e6, "measured_mb": peak / 1e6, "computed_over_measured": computed / peak}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    main()
