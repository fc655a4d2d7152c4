"""The optimizers of all networks: learning rates, clipping, and skipping of steps with non-finite gradients."""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latent_ae.models.borrowed_encoder import BorrowedEncoder
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives.base import Objective

from .layerwise import Layerwise
from .muon import Muon, inner_weights
from .run_config import OptimSettings
from .settings import TrainSettings


class Optimizers:
    """AdamW, or Muon with AdamW, for the autoencoder, and an AdamW for each adversary.

    Calling it with the step's number applies the gradients that the parameters hold.

    Args:
        settings: The run's settings.
        reconstructor: The autoencoder with its heads, not wrapped for distributed training.
        objectives: Their parameters train with the autoencoder, each objective's in its own group.
    """

    def __init__(self, settings: TrainSettings, reconstructor: Reconstructor, objectives: Sequence[Objective[Any]]):
        self.settings, self.objectives = settings, objectives
        self.skipped = SkippedSteps()
        optim = settings.optim
        inner = inner_weights(reconstructor.autoencoder) if optim.kind == "muon" else []
        self.muon = Muon(inner, optim.lr, optim.weight_decay) if inner else None
        taken = {id(parameter) for parameter in inner}
        self.rest = [p for p in reconstructor.parameters() if p.requires_grad and id(p) not in taken]
        self.layerwise = Layerwise(reconstructor, settings.data.crop_sizes[0]) if settings.layerwise else None
        self.objective_parameters = [parameter for objective in objectives for parameter in objective.parameters()]
        self.unclipped = {id(parameter) for parameter in self.objective_parameters}
        self.autoencoder = self.new_adamw()
        self.adversary_lr = optim.discriminator_lr or optim.lr
        self.adversaries = {
            objective.name: torch.optim.AdamW(
                objective.adversary.parameters(),
                lr=self.adversary_lr,
                betas=optim.discriminator_betas,
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                fused=True,
            )
            for objective in objectives
            if objective.adversary is not None
        }

    def new_adamw(self) -> torch.optim.AdamW:
        """Return the autoencoder's AdamW without moments, in groups by what `layerwise` holds."""
        optim, groups = self.settings.optim, [{"params": self.rest, "lr_scale": 1.0}]
        if self.layerwise is not None:
            groups = self.layerwise.groups(self.rest)
        for objective in self.objectives:
            if own := list(objective.parameters()):
                groups.append({"params": own, "lr_scale": objective.lr_scale, "weight_decay": 0.0})
        return torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    @property
    def by_name(self) -> dict[str, torch.optim.Optimizer]:
        """All optimizers by their names in a checkpoint."""
        muon = {"muon": self.muon} if self.muon is not None else {}
        adversaries = {one.network_name: self.adversaries[one.name] for one in self.objectives if one.adversary}
        return {"autoencoder": self.autoencoder, **muon, **adversaries}

    def __call__(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Clip and apply the gradients.

        A step whose gradients are not all finite, or whose norm is above `optim.skip_above`, changes neither networks
        nor optimizers. Nothing waits for the device: the optimizers' kernels read the flag there, and it is equal on
        all processes because the gradients were averaged over them.

        Args:
            step: Number of the step, from 0.

        Returns:
            Gradient norms before clipping by name, and a bool scalar, True if the step was skipped; on the device.
        """
        settings = self.settings
        scale = lr_scale_at(step, settings.steps, settings.optim)
        muon: list[torch.optim.Optimizer] = [self.muon] if self.muon is not None else []
        families = {"grad_norm": ([self.autoencoder, *muon], settings.optim.lr * scale)}
        for objective in self.objectives:
            if objective.adversary is not None and objective.trains_adversary(step):
                family = [self.adversaries[objective.name]], self.adversary_lr * scale
                families[f"grad_norm_{objective.network_name}"] = family
        limit, own = settings.optim.clip or float("inf"), self.unclipped
        norms = {
            name: nn.utils.clip_grad_norm_(
                [
                    parameter
                    for optimizer in optimizers
                    for group in optimizer.param_groups
                    for parameter in group["params"]
                    if id(parameter) not in own
                ],
                limit,
                foreach=True,
            )
            for name, (optimizers, _) in families.items()
        }
        # the gradients of objectives' parameters are not clipped, but they must be finite, too
        checked = [*norms.values(), *(p.grad.norm() for p in self.objective_parameters if p.grad is not None)]
        not_finite = ~torch.stack([value.float() for value in checked]).isfinite().all()
        too_large = ~not_finite & (norms["grad_norm"] > (settings.optim.skip_above or float("inf")))
        self.skipped.record(step, not_finite, too_large)
        skipped = not_finite | too_large
        for optimizers, lr in families.values():
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.found_inf = skipped.float()  # what a GradScaler sets; the kernels then skip their update
                layerwise = self.layerwise if optimizer is self.autoencoder else None
                with layerwise.centred() if layerwise is not None else nullcontext():
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return norms, skipped

    def memory_placeholder(self) -> list[Tensor]:
        """Return tensors as large as the optimizers' state after the first step and the gradients of earlier passes."""
        copies = 1 if self.settings.accumulation > 1 else 0
        return [
            torch.empty_like(parameter)
            for optimizer in self.by_name.values()
            for group in optimizer.param_groups
            for parameter in group["params"]
            for _ in range(copies + (0 if optimizer.state else 1 if optimizer is self.muon else 2))
        ]


class Skipped(NamedTuple):
    """The steps that changed nothing, counted from 0."""

    not_finite: list[int]
    """Steps whose gradients were not all finite."""
    too_large: list[int]
    """Steps whose gradient norm was above `optim.skip_above`."""
    in_a_row: int
    """How many of the newest steps changed nothing, for either reason."""


class SkippedSteps:
    """Remembers on the device which steps changed nothing."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, Tensor]] = []
        self.in_a_row = 0

    def record(self, step: int, not_finite: Tensor, too_large: Tensor) -> None:
        """Keep the flags of a step, bool scalars of which at most one is true."""
        self.recorded.append((step, not_finite + 2 * too_large))

    def newest(self) -> Skipped:
        """Return the steps since the last call that changed nothing. Waits for the device."""
        steps, reasons = [step for step, _ in self.recorded], [reason for _, reason in self.recorded]
        self.recorded.clear()
        found: list[int] = torch.stack(reasons).tolist() if reasons else []
        unbroken = len(found) + self.in_a_row
        self.in_a_row = next((age for age, reason in enumerate(reversed(found)) if not reason), unbroken)
        not_finite, too_large = (
            [step for step, reason in zip(steps, found, strict=True) if reason == wanted] for wanted in (1, 2)
        )
        return Skipped(not_finite, too_large, self.in_a_row)


class Ema:
    """Keeps `module`, a copy of `source` whose parameters are the exponential moving average of the source's.

    Its buffers are the source's: the running statistics of a batch normalisation are averages already.

    Args:
        source: The float32 network that is averaged.
        decay: Largest decay of the average, 0 to 1.
    """

    def __init__(self, source: nn.Module, decay: float):
        self.decay = decay
        # a first stage that only encodes is not trained: both have the same one
        encoder = getattr(source, "encoder", None)
        shared = [encoder.original] if isinstance(encoder, BorrowedEncoder) else []
        self.module = copy.deepcopy(source, {id(one): one for one in shared}).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        """Update the average: average <- decay * average + (1 - decay) * source; `step` counts from 0."""
        averages, weights = list(self.module.parameters()), list(source.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - ema_decay_at(step, self.decay))
        for buffer, current in zip(self.module.buffers(), source.buffers(), strict=True):
            buffer.copy_(current)


def lr_scale_at(step: int, steps: int, optim: OptimSettings) -> float:
    """Return the fraction of the learning rate in a step: linear warm-up, then constant or cosine.

    Args:
        step: Number of the step, from 0.
        steps: Number of steps of the run.
        optim: The schedule.
    """
    warm = min(1.0, (step + 1) / (optim.warmup + 1))
    if optim.schedule == "constant":
        return warm
    progress = min(1.0, max(0, step - optim.warmup) / max(1, steps - optim.warmup))
    return warm * (optim.final_lr + (1.0 - optim.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def ema_decay_at(step: int, decay: float) -> float:
    """Return the decay in a step (from 0): small at first, so that the average forgets the initial weights."""
    return min(decay, (1.0 + step) / (10.0 + step))
