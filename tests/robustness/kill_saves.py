"""kill -9 at random moments while checkpoints are written and pruned: python -m tests.robustness.kill_saves [TIMES]

After each kill the newest checkpoint must be whole and at most one save old, and a restart must go on from it.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from latent_ae.models.run_checkpoint import find_damage
from latent_ae_train.checkpoint import (
    complete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from latent_ae_train.step import TrainStep
from tests.tiny import GAN, STATE, build_step, micro_batches, settings_for


def save_for_ever(run: Path, train_step: TrainStep, first: int, pipe: int) -> None:
    """What is killed: saves step after step, tells of each that is done, keeps two."""
    step = first
    while True:
        step += 1
        save_checkpoint(run, train_step, {**STATE, "step": step})
        os.write(pipe, f"{step}\n".encode())
        prune_checkpoints(run, {step, step - 1})


def kill_once(run: Path, train_step: TrainStep, wait_s: float) -> int:
    """One kill after `wait_s`; returns the newest checkpoint's step. Raises AssertionError when anything is lost."""
    before = newest_checkpoint(run)
    first = before.step if before is not None else 0
    if before is not None:
        load_checkpoint(before, train_step)
        assert before.state()["step"] == first
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            save_for_ever(run, train_step, first, write)
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(wait_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the saving process failed by itself"
    with os.fdopen(read) as told:
        done = [int(line) for line in told]
    newest = newest_checkpoint(run)
    acknowledged = done[-1] if done else first
    assert (newest.step if newest is not None else 0) >= acknowledged, f"lost {acknowledged}: {newest}"
    for checkpoint in complete_checkpoints(run):
        assert find_damage(checkpoint.folder) is None, checkpoint
    return newest.step if newest is not None else 0


def kill_many(folder: Path, times: int, seed: int = 0) -> list[int]:
    """Newest step after each kill."""
    torch.set_num_threads(1)  # a child of fork has no other
    train_step = build_step(settings_for(gan=GAN, ema={"decay": 0.9}, batch_size=2))
    train_step(0, micro_batches(0, train_step.settings))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as elsewhere:
        save_checkpoint(Path(elsewhere), train_step, {**STATE, "step": 1})
    longest = 5 * (time.monotonic() - began)  # a few saves, however busy the machine is
    rng = random.Random(seed)
    return [kill_once(folder, train_step, rng.uniform(0.0, longest)) for _ in range(times)]


if __name__ == "__main__":
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        steps = kill_many(Path(folder), times)
        left = sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())
    print(f"{times} kills, {steps[-1]} checkpoints written, none lost or broken; left: {', '.join(left)}")
