"""A run's training step from its beginning, without a run folder."""

import torch
from accelerate import Accelerator

from latent_ae.objectives.base import Batch
from latent_ae_train.build import build_objectives, compile_blocks, starting_autoencoder
from latent_ae_train.data import drawn_batch
from latent_ae_train.optim import Ema
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep


def fresh_step(
    settings: TrainSettings, accelerator: Accelerator, layout: torch.memory_format | None = None
) -> TrainStep:
    """The step as `train` builds it, or with another memory format of the networks."""
    autoencoder = starting_autoencoder(settings).to(accelerator.device)
    objectives = build_objectives(settings, autoencoder, accelerator.device)
    ema = Ema(autoencoder, settings.ema.decay) if settings.ema.decay else None
    if settings.facts().compiles_on(accelerator.device):
        compile_blocks(autoencoder)
    return TrainStep(settings, accelerator, autoencoder, objectives, ema, layout)


def first_batch(step: TrainStep, images: torch.Tensor, noise: torch.Tensor) -> Batch:
    """Images and noise as the samples 0, 1, ... of the step's run."""
    objectives = list(step.objectives.values())
    return drawn_batch(images, noise, range(len(images)), objectives, lambda tensor: tensor.to(images.device))
