"""Both networks' optimizers: how a step's gradients are clipped and applied, or passed over."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.models.reconstruct import Reconstructor

from .muon import Muon, inner_weights
from .schedule import GanPhase, ema_decay_at, lr_scale_at
from .settings import TrainSettings

LOGVAR_LR = 10.0
"""Learning rate of the learned log-variance, relative to the networks': one number that has far to go."""


class Update:
    """Holds the optimizers; calling it with the step's number applies the gradients that the parameters hold."""

    def __init__(
        self,
        settings: TrainSettings,
        reconstructor: Reconstructor,
        discriminator: nn.Module | None,
        logvar: nn.Parameter,
        total_correlation: nn.Module | None = None,
    ):
        self.settings, self.logvar = settings, logvar
        self.bad_steps: list[tuple[int, Tensor]] = []
        self.bad_in_a_row = 0
        optim = settings.optim
        inner = inner_weights(reconstructor.autoencoder) if optim.kind == "muon" else []
        self.muon = Muon(inner, optim.lr, optim.weight_decay) if inner else None
        taken = {id(parameter) for parameter in inner}
        rest = [p for p in reconstructor.parameters() if p.requires_grad and id(p) not in taken]
        groups: list[dict[str, Any]] = [{"params": rest, "lr_scale": 1.0}]
        if settings.loss.learned_logvar:
            groups.append({"params": [logvar], "lr_scale": LOGVAR_LR, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.discriminator_lr = optim.discriminator_lr or optim.lr
        self.discriminator_optimizer, self.total_correlation_optimizer = (
            torch.optim.AdamW(
                network.parameters(),
                lr=self.discriminator_lr,
                betas=optim.discriminator_betas,
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                fused=True,
            )
            if network is not None
            else None
            for network in (discriminator, total_correlation)
        )

    def __call__(self, step: int, phase: GanPhase) -> tuple[dict[str, Tensor], Tensor]:
        """Clips and applies the gradients; returns their norms before that, and whether the step was passed over.

        A step whose gradients are not all finite changes neither network nor their optimizers. Nobody waits to find
        that out: the optimizers' kernels read the flag on the device, and it is equal on all processes because the
        gradients were averaged over them.
        """
        settings = self.settings
        scale = lr_scale_at(step, settings.steps, settings.optim)
        families = {"grad_norm": ([self.optimizer, *([self.muon] if self.muon else [])], settings.optim.lr * scale)}
        if phase.discriminator and self.discriminator_optimizer is not None:
            families["grad_norm_discriminator"] = ([self.discriminator_optimizer], self.discriminator_lr * scale)
        if self.total_correlation_optimizer is not None:
            judge = [self.total_correlation_optimizer]
            families["grad_norm_total_correlation"] = (judge, self.discriminator_lr * scale)
        limit = settings.optim.clip or float("inf")
        norms = {
            name: nn.utils.clip_grad_norm_(
                [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]], limit, foreach=True
            )
            for name, (optimizers, _) in families.items()
        }
        checked = [*norms.values(), *([self.logvar.grad] if self.logvar.grad is not None else [])]
        bad = ~torch.stack([value.float() for value in checked]).isfinite().all()
        self.bad_steps.append((step, bad))
        for optimizers, lr in families.values():
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.found_inf = bad.float()  # what a GradScaler sets; the kernels then skip their update
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return norms, bad

    def room(self) -> list[Tensor]:
        """Memory as large as what the optimizers will hold after their first step, and gradients that wait."""
        optimizers = (self.optimizer, self.muon, self.discriminator_optimizer, self.total_correlation_optimizer)
        copies = 1 if self.settings.accumulation > 1 else 0
        return [
            torch.empty_like(parameter)
            for optimizer in optimizers
            if optimizer is not None
            for group in optimizer.param_groups
            for parameter in group["params"]
            for _ in range(copies + (0 if optimizer.state else 1 if optimizer is self.muon else 2))
        ]

    def skipped_steps(self) -> tuple[list[int], int]:
        """Steps since the last call that were skipped, and how many of the newest ones in a row; reads the device."""
        steps, flags = [step for step, _ in self.bad_steps], [flag for _, flag in self.bad_steps]
        self.bad_steps.clear()
        bad: list[bool] = torch.stack(flags).tolist() if flags else []
        unbroken = len(bad) + self.bad_in_a_row
        self.bad_in_a_row = next((age for age, flag in enumerate(reversed(bad)) if not flag), unbroken)
        return [step for step, flag in zip(steps, bad, strict=True) if flag], self.bad_in_a_row


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
