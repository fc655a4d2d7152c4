"""Two runs of two processes, of which the second one's gradient, then weight, is spoilt in the second step.

Each writes its exit codes, and what it found, to OUT/rankN.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

import latent_ae_train.loop
from latent_ae.__main__ import main
from latent_ae_train.step import TrainStep
from tests.runs import words

out, pictures, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
latent_ae_train.loop.finish_run = lambda *_: {}
Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # another run comes
original, skipped = TrainStep.__call__, list[int]()


def run(name: str, call: Any, *more: str) -> tuple[int, str]:
    TrainStep.__call__ = call  # type: ignore[method-assign]
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main(words(pictures, out / name, "micro_batch_size=2", "log.every=1", *more))
    return code, error.getvalue()


def bad_gradient(self: TrainStep, step: int, batches: Any) -> Any:
    if step == 1 and rank == 1:
        batches = (batch._replace(images=batch.images * float("nan")) for batch in batches)
    before = [parameter.detach().clone() for parameter in self.bare_reconstructor.parameters()]
    means = original(self, step, batches)
    after = self.bare_reconstructor.parameters()
    if all(torch.equal(old, new) for old, new in zip(before, after, strict=True)):
        skipped.append(step + 1)
    return means


def bad_weight(self: TrainStep, step: int, batches: Any) -> Any:
    means = original(self, step, batches)
    if step == 1 and rank == 1:
        with torch.no_grad():
            self.bare_reconstructor.last_layer[0, 0, 0, 0] += 1e-6
    return means


# that the weights are equal in the end is what the check in every step says, by not stopping
code, _ = run("gradient", bad_gradient, "gan.weight=0", "steps=4")
answers: dict[str, Any] = {"gradient": [code, skipped]}
answers["weight"] = run("weight", bad_weight, "checkpoint.every=4")
(out / f"rank{rank}").write_text(json.dumps(answers))
PartialState().destroy_process_group()
