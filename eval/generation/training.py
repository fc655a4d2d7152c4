"""Trains a transformer on latents on a fixed budget, by flow matching, and resumes a training that was killed."""

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.latents.cache import LatentCache
from latent_ae_eval.generation.flow import NULL_CLASS, predicted, squared_error, training_batch
from latent_ae_eval.generation.settings import HEAD_CHANNELS, DiffusionSettings

CHECKPOINT_SECONDS = 60
"""Time between checkpoints, s."""


def new_transformer(shape: tuple[int, int, int], settings: DiffusionSettings) -> DiTTransformer2DModel:
    """Return a DiT for latents of `shape`, (C, h, w), initialised like facebookresearch/DiT's initialize_weights."""
    channels, side, _ = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DiTTransformer2DModel(
            num_attention_heads=settings.chosen("width") // HEAD_CHANNELS,
            attention_head_dim=HEAD_CHANNELS,
            in_channels=channels,
            out_channels=channels,
            num_layers=settings.chosen("depth"),
            sample_size=side,
            patch_size=settings.chosen("patch_size") or 2 - side % 2,
            attention_bias=True,
            num_embeds_ada_norm=NULL_CLASS,
        )
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if "timestep_embedder.linear" in name:
                nn.init.normal_(module.weight, std=0.02)
            elif name.endswith("norm1.linear") or name in ("proj_out_1", "proj_out_2"):
                nn.init.zeros_(module.weight)
    # evaluation mode, because in training mode each block would drop classes; `flow_batch` drops them
    return model.eval()


class Trainer:
    """The transformer, its averaged copy and AdamW; `step` counts the training steps made.

    It learns by flow matching; a subclass has another network and another loss.

    Args:
        latents: The latents to train on.
        settings: The recipe.
        device: Where the transformer is trained.
    """

    def __init__(self, latents: LatentCache, settings: DiffusionSettings, device: torch.device):
        self.latents, self.settings, self.device = latents, settings, device
        self.model = self.network().to(device)
        self.average = self.network().to(device).requires_grad_(False)
        rate = settings.chosen("lr")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.step, self.steps = 0, settings.chosen("steps")

    def network(self) -> nn.Module:
        """Return the untrained network, the same one in each call."""
        return new_transformer(self.latents.shape, self.settings)

    def loss(self) -> Tensor:
        """Return the mean loss of the step's batch, a scalar on the device."""
        batch = training_batch(self.latents, self.settings, self.step).to(self.device)
        with self.autocast():
            velocity = predicted(self.model, batch)
        return squared_error(velocity, batch).mean()

    def autocast(self) -> torch.autocast:
        """Return a context of the precision in which the network computes."""
        bf16 = self.settings.chosen("precision") == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def losses(self) -> Iterator[Tensor]:
        """Train up to the last step, and yield the loss of each step, a scalar on the device."""
        while self.step < self.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.step)
            loss = self.loss()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            # a shorter average in the first steps, so that it forgets the initial weights
            decay = min(self.settings.chosen("ema_decay"), (1 + self.step) / (10 + self.step))
            own = [parameter.detach() for parameter in self.model.parameters()]
            torch._foreach_lerp_(list(self.average.parameters()), own, 1 - decay)
            yield loss.detach()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: it rises over the first twentieth, then falls as a cosine to a tenth."""
        warmup = max(1, self.steps // 20)
        part = (step - warmup) / max(1, self.steps - warmup)
        shape = (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * part)
        return float(self.settings.chosen("lr")) * shape

    def state(self) -> dict[str, Any]:
        """Return everything that `load` restores."""
        networks = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        return networks | {"optimizer": self.optimizer.state_dict(), "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of an interrupted training."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


class Measure(Protocol):
    """Measures a network on held-out latents; `relative_loss` is the loss over that of a trivial predictor."""

    def measure(self, model: Any, device: torch.device) -> dict[str, Any]:
        """Return a point of the loss curve."""


def trained(trainer: Trainer, validation: Measure, path: Path, key: str, bar: tqdm) -> list[dict[str, Any]]:
    """Train to the end and return the points of the loss curve.

    Args:
        trainer: The training.
        validation: Measures the points of the curve.
        path: The checkpoint, from which the training resumes if its key is the same.
        key: Digest of everything that the weights depend on.
        bar: Progress bar over samples.

    Raises:
        UserError: If the loss is not finite, or a checkpoint cannot be written.
    """
    curve: list[dict[str, Any]] = []
    total = torch.zeros((), device=trainer.device)
    steps, size = trainer.steps, trainer.settings.chosen("batch_size")
    if (checkpoint := _loaded(path, key, trainer.device)) is not None:
        trainer.load(checkpoint["trainer"])
        curve, total = checkpoint["curve"], checkpoint["total"]
        bar.update(trainer.step * size)
        bar.write(f"resuming from step {trainer.step:,}", file=sys.stderr)
    points = np.linspace(0, steps, min(trainer.settings.validations, steps + 1)).round().astype(int).tolist()

    def measure() -> None:
        behind = curve[-1]["step"] if curve else trainer.step
        own = float(total) / (trainer.step - behind) if trainer.step > behind else None
        if own is not None and not np.isfinite(own):
            raise UserError(f"lr: the transformer diverged before step {trainer.step:,}; lower lr")
        measured = validation.measure(trainer.average, trainer.device)
        curve.append({"step": trainer.step, "images": trainer.step * size, "train_loss": own} | measured)
        total.zero_()

    saved = time.monotonic()
    if not curve:
        measure()
    for loss in trainer.losses():
        total += loss
        bar.update(size)
        if trainer.step in points:
            measure()
            bar.set_postfix({"relative loss": f"{curve[-1]['relative_loss']:.3f}"})
        if time.monotonic() - saved > CHECKPOINT_SECONDS or trainer.step == steps:
            _save({"key": key, "trainer": trainer.state(), "curve": curve, "total": total}, path)
            saved = time.monotonic()
    return curve


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a process that is killed leaves the whole file or none. Raise UserError if it fails."""
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error


def _loaded(path: Path, key: str, device: torch.device) -> dict[str, Any] | None:
    """Return the checkpoint of the same training; None if there is none, it is broken, or it has another key."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises many kinds for a file that is not whole
        return None
    return state if state.get("key") == key else None
