"""A training step on networks small enough for a test, but real ones."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from latent_ae.data.rng import augmentation_numbers
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.models.run_checkpoint import MANIFEST
from latent_ae.objectives.diffaug import NUMBERS
from latent_ae.pretrained.vision import VisionModel
from latent_ae_train.build import (
    compile_networks,
    starting_autoencoder,
    starting_discriminator,
    starting_projection,
    starting_total_correlation,
)
from latent_ae_train.distillation import Teacher
from latent_ae_train.micro_batch import MicroBatch, latent_change
from latent_ae_train.optim import Ema
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep

SIDE, LATENT = 16, (4, 8, 8)
MODEL = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
}
STATE = {"settings": {}, "num_processes": 1, "stream_states": [None]}
"""Of a checkpoint, besides its step."""
GAN = {
    **{"weight": 0.5, "start": 0, "discriminator_warmup": 0, "warmup": 0, "channels": 8, "layers": 1},
    "adaptive_cap": 100.0,  # so that the adaptive weight moves
}


def settings_for(**changes: Any) -> TrainSettings:
    """Tiny settings; `section={...}` changes keys of a section. Relations between keys are not checked."""
    values: dict[str, Any] = {
        "steps": 100,
        "batch_size": 8,
        "model": MODEL,
        "data": {"resolution": SIDE},
        "loss": {"perceptual": 0.0, "kl": 0.0},
        "gan": {"weight": 0.0},
        "optim": {"lr": 1e-3, "warmup": 0, "schedule": "constant", "clip": 0.0},
        "ema": {"decay": 0.0},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainSettings.model_validate(values)


def build_step(settings: TrainSettings, perceptual: nn.Module | None = None) -> TrainStep:
    """The step on a fresh model; equal settings give equal weights, on every process."""
    accelerator = Accelerator(cpu=True)
    autoencoder = starting_autoencoder(settings)
    ema = Ema(autoencoder, settings.ema.decay) if settings.ema.decay else None
    discriminator = starting_discriminator(settings, 3) if settings.gan.weight else None
    if settings.compile:
        compile_networks(autoencoder, discriminator)
    if discriminator is not None:
        discriminator = accelerator.prepare_model(discriminator)
    vision = projection = None
    if settings.alignment.model:
        vision = VisionModel(settings.alignment.model, LATENT[1])
        projection = starting_projection(settings, LATENT[0], vision.num_features)
    reconstructor = accelerator.prepare_model(Reconstructor(autoencoder, projection))
    judge = starting_total_correlation(settings, math.prod(LATENT)) if settings.loss.total_correlation else None
    teacher = Teacher(settings, autoencoder) if settings.distillation.teacher is not None else None
    return TrainStep(settings, accelerator, reconstructor, discriminator, perceptual, ema, vision, judge, teacher)


def global_batch(
    step: int, settings: TrainSettings, latent: Sequence[int] = LATENT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noise of a step, a function of its number."""
    generator = torch.Generator().manual_seed(1000 + step)
    smooth = torch.randn(settings.batch_size, 3, SIDE // 4, SIDE // 4, generator=generator)
    images = nn.functional.interpolate(smooth, size=SIDE, mode="bicubic").clamp(-1, 1)
    return images, torch.randn(settings.batch_size, *latent, generator=generator)


def micro_batches(
    step: int, settings: TrainSettings, rank: int = 0, latent: Sequence[int] = LATENT
) -> Iterator[MicroBatch]:
    """This rank's share of the global batch, cut as the loader cuts it."""
    images, noise = global_batch(step, settings, latent)
    size, every = settings.micro_batch, settings.loss.perceptual_every
    for index in range(settings.accumulation):
        first = (index * settings.processes + rank) * size
        rows = slice(-(step * settings.batch_size + first) % every, None, every)
        number = step * settings.batch_size + first
        augmentation = augmentation_numbers(0, range(number, number + size), 2 * NUMBERS)
        change = latent_change(settings, range(number, number + size), latent, lambda tensor: tensor)
        yield MicroBatch(images[first : first + size], noise[first : first + size], rows, augmentation, change)


def weights(module: nn.Module | None) -> dict[str, torch.Tensor]:
    """A copy of the parameters."""
    return {} if module is None else {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def reseal(folder: Path) -> None:
    """Makes the manifest fit what lies in the checkpoint now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
