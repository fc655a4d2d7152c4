"""Trains the tiny networks for 20 steps and saves every tensor; run by test_step.py on one or two processes.

The third argument breaks the step on purpose, so that the test can be seen to fail:
`bypass` calls the bare autoencoder (its gradients are then not synchronised), `local_weight` lets every process
measure its own adaptive weight, `unfrozen` lets the generator's loss fill the discriminator's gradients.
"""

import json
import sys
from typing import Any

import torch

from latent_ae_train import step as step_module
from latent_ae_train.step import TrainStep
from tests.tiny import build_step, micro_batches, settings_for, weights


def break_step(step: TrainStep, how: str) -> None:
    if how == "bypass":
        step.reconstructor = step.bare_reconstructor
        step._without_synchronisation = lambda: torch.enable_grad()  # type: ignore[method-assign]
    elif how == "local_weight":
        reduce = step.accelerator.reduce

        def local(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            reduce(tensor.clone(), *args, **kwargs)
            return tensor

        step.accelerator.reduce = local  # type: ignore[method-assign]
    elif how == "unfrozen":
        parameters = list(step.bare_discriminator.parameters()) if step.bare_discriminator is not None else []
        original = step_module.generator_loss

        def leaking(*args: Any) -> torch.Tensor:
            objective = original(*args)
            objective.backward(inputs=parameters, retain_graph=True)
            return objective

        step_module.generator_loss = leaking


def main() -> None:
    torch.set_num_threads(1)
    settings = settings_for(**json.loads(sys.argv[1]))
    step = build_step(settings)
    break_step(step, sys.argv[3])
    rank = step.accelerator.process_index
    for number in range(20):
        step(number, micro_batches(number, settings, rank))
    tensors = {f"autoencoder.{name}": value for name, value in weights(step.bare_reconstructor).items()}
    tensors |= {f"discriminator.{name}": value for name, value in weights(step.bare_discriminator).items()}
    tensors |= {f"ema.{name}": value for name, value in weights(step.ema.module if step.ema else None).items()}
    tensors |= {f"state.{name}": value for name, value in step.state.state_dict().items()}
    if not sys.argv[3]:
        flat = torch.cat([value.flatten() for value in tensors.values()])
        every = step.accelerator.gather(flat[None])
        assert bool((every == every[0]).all()), "the processes hold different tensors"
    if rank == 0:
        torch.save(tensors, sys.argv[2])
    step.accelerator.end_training()


if __name__ == "__main__":
    main()
