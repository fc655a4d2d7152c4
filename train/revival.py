"""Codes that nothing is quantised to start again as latents of the day (Dhariwal et al. 2020, random restarts)."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast
from torch import Tensor

if TYPE_CHECKING:
    from .step import TrainStep


@torch.no_grad()
def revive_codes(train_step: "TrainStep", step: int, counts: Tensor, bad: Tensor) -> None:
    """Ages the codes by `counts` of the global batch, and gives those that were not taken for `loss.revive_after` steps
    a latent of the step's first sample, drawn by (seed, step), with no memory in the optimizer.

    Equal on all processes, and nobody waits for the device. A step that was passed over (`bad`) changes nothing.
    """
    settings, state, optimizer = train_step.settings, train_step.state, train_step.optimizer
    codebook = train_step.bare_reconstructor.codebook
    if not codebook.requires_grad or train_step.fresh_codes is None:
        return
    # the first process has the first sample
    fresh = broadcast(train_step.fresh_codes) if train_step.accelerator.num_processes > 1 else train_step.fresh_codes
    age = torch.where(counts > 0, 0.0, state.code_age + 1.0)
    dead = (age > settings.loss.revive_after) & ~bad
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) % 2**63)
    chosen = torch.randint(len(fresh), (len(codebook),), generator=generator)
    if codebook.is_cuda:
        chosen = chosen.pin_memory().to(codebook.device, non_blocking=True)
    codebook.copy_(torch.where(dead[:, None], fresh[chosen].to(codebook.dtype), codebook))
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[codebook][name]
        moment.copy_(torch.where(dead[:, None], 0.0, moment))
    state.code_age.copy_(torch.where(bad, state.code_age, torch.where(dead, 0.0, age)))
