"""Exponential moving average of the autoencoder's weights."""

import copy

import torch
from torch import nn

from .schedule import ema_decay_at


class Ema:
    """Keeps `module`, a float32 copy whose parameters follow those of `source`."""

    def __init__(self, source: nn.Module, decay: float):
        self.decay = decay
        self.module = copy.deepcopy(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        """average <- decay * average + (1 - decay) * source."""
        averages, weights = list(self.module.parameters()), list(source.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - ema_decay_at(step, self.decay))
