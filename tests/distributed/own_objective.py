"""An objective from outside the package with a parameter, an adversary and a count; and its step on two processes."""

from pathlib import Path
from typing import Any

import torch

from latent_ae.objectives.base import Objective, Pass
from latent_ae_train.step import TrainStep
from tests.tiny import build_step, micro_batches, settings_for


class Judged(Objective):
    """A gain on the error that trains, an adversary that guesses the error's size, and a count of passes."""

    name = "judged"
    passes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))
        self.register_buffer("passes", torch.zeros(()))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.adversary = torch.nn.Linear(1, 1)

    def backward(self, p: Pass) -> None:
        self.passes += 1
        error = (p.image.detach() - p.batch.target).square().mean()
        guess = p.adversaries[self.name](error[None])
        (guess.sum() / p.accumulation).backward(inputs=list(self.adversary.parameters()))
        p.send_loss(self.gain * error)


def gradients(step: TrainStep) -> dict[str, torch.Tensor]:
    """Those of the parameter and of the adversary in one step."""
    found: dict[str, torch.Tensor] = {}
    own = step.objectives["judged"]

    def look(*_: Any) -> None:
        named = [("gain", own.gain), *step.bare_adversaries["judged"].named_parameters()]
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    step.optimizers.autoencoder.register_step_pre_hook(look)
    step(0, micro_batches(0, step.settings, step.accelerator.process_index))
    return found


def on_two_processes(rank: int, place: Path) -> None:
    """Writes what rank 0 found into `place`/two.pt."""
    found = gradients(build_step(settings_for(batch_size=8, micro_batch_size=2), more=[Judged()]))
    if rank == 0:
        torch.save(found, place / "two.pt")
