"""Flow matching on cached latents: training samples, and validation of a model.

Time t goes from 0 (latent) to 1 (noise): x_t = (1 - t) x_0 + t noise, and the model predicts the velocity noise - x_0
(rectified flow: Liu et al. 2022; the convention of diffusers' flow_prediction). All random choices for a sample (image,
flip, posterior noise, noise, time, whether its class is dropped) are functions of the seed and the sample's number.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from latent_ae.data.rng import augmentation_numbers, choice_facts, epoch_order, posterior_noise, spread
from latent_ae.latents.cache import LatentCache
from latent_ae_eval.generation.settings import DiffusionSettings

NULL_CLASS = 1000
"""The null class of DiTPipeline's guidance, whatever the number of classes."""
CLASS_DROPOUT = 0.1
TIMES = 1000
"""The model gets 1000 t as its timestep, as from a scheduler."""
BINS = 10
CHOICE_SEED = 0
"""Seed of the choice of images, the same for every seed of a run, so that runs differ by training only."""
VALIDATION, STATISTICS = 2**61, 2**62
"""First numbers of the samples for validation and for statistics, which are not in the training."""


class FlowBatch(NamedTuple):
    """Inputs and target of the model for N samples."""

    x: Tensor
    """x_t, (N, C, h, w)."""
    t: Tensor
    """(N,) in [0, 1]."""
    classes: Tensor
    """(N,) int64."""
    velocity: Tensor
    """noise - x_0, (N, C, h, w)."""

    def to(self, device: torch.device) -> "FlowBatch":
        """Return the batch on a device."""
        return FlowBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def flow_batch(
    latents: LatentCache, seed: int, numbers: Sequence[int], rows: Sequence[int] | np.ndarray, t: Tensor | None = None
) -> FlowBatch:
    """Return samples for flow matching.

    Args:
        latents: The latents.
        seed: Seed of the samples.
        numbers: Numbers of N samples.
        rows: Numbers of their N images.
        t: (N,) times in [0, 1] in place of random ones; then no class is dropped.
    """
    uniform = augmentation_numbers(seed, numbers, 3)
    posterior, noise = posterior_noise(seed, numbers, (2, *latents.shape)).unbind(1)
    flips = uniform[:, 0] < 0.5 if latents.has_flips else None
    drawn = latents.batch(rows, flips, posterior if latents.has_posterior else None)
    x0 = fed_latents(latents, drawn)
    classes = classes_of(latents, rows)
    if t is None:
        # logit-normal with mean 0 and standard deviation 1: the best of the densities in SD3 (Esser et al. 2024, 3.1)
        t = torch.special.ndtri(uniform[:, 1]).sigmoid()
        classes = torch.where(uniform[:, 2] < CLASS_DROPOUT, NULL_CLASS, classes)
    s = t.view(-1, 1, 1, 1)
    return FlowBatch((1 - s) * x0 + s * noise, t, classes, noise - x0)


def fed_latents(latents: LatentCache, raw: Tensor) -> Tensor:
    """Return latents as the model learns them, (N, C, h, w), so that the pipeline can decode its samples.

    DiTPipeline divides by the scaling factor and adds nothing before it decodes, so latents are scaled but not shifted.
    Latents with a mean and std of each channel are normalised completely, and `StandInDecoder` inverts this.

    Args:
        latents: The cache, which holds the scaling.
        raw: (N, C, h, w) raw latents.
    """
    return raw * latents.scaling_factor if latents.scaling.mean is None else latents.scaled(raw)


def raw_latents(latents: LatentCache, fed: Tensor) -> Tensor:
    """Return raw latents, (N, C, h, w), for latents as the model learns them: the inverse of `fed_latents`."""
    return fed / latents.scaling_factor if latents.scaling.mean is None else latents.unscaled(fed)


def classes_of(latents: LatentCache, rows: Sequence[int] | np.ndarray) -> Tensor:
    """Return the classes of images, (N,) int64: the null class for an image without a label, 0 if there are no classes.

    Args:
        latents: The latents.
        rows: Numbers of N images.
    """
    if latents.labels is None:
        return torch.zeros(len(rows), dtype=torch.int64)
    labels = torch.from_numpy(latents.labels[np.asarray(rows)])
    return torch.where(labels < 0, NULL_CLASS, labels)


def training_batch(latents: LatentCache, settings: DiffusionSettings, step: int) -> FlowBatch:
    """Return the training batch of a step; each image occurs once per epoch, each epoch in another order."""
    size, count = settings.chosen("batch_size"), len(latents)
    numbers = range(step * size, (step + 1) * size)
    rows = [int(epoch_order(settings.seed, number // count, count)[number % count]) for number in numbers]
    return flow_batch(latents, settings.seed, numbers, rows)


class Trivial(NamedTuple):
    """The trivial predictor, which knows only the mean and variance of each latent value and assumes independence."""

    mean: Tensor
    """(C, h, w), of scaled latents."""
    variance: Tensor
    """(C, h, w), of scaled latents."""

    @staticmethod
    def of(latents: LatentCache, seed: int, most: int = 10_000) -> "Trivial":
        """Measure means and variances on up to `most` images, spread over all."""
        chosen = spread(CHOICE_SEED, len(latents), most)
        count = len(chosen)
        total = squares = torch.zeros(latents.shape, dtype=torch.float64)
        for first in range(0, count, 512):
            picked = range(first, min(first + 512, count))
            rows = chosen[picked.start : picked.stop]
            numbers = [STATISTICS + number for number in picked]
            x0 = flow_batch(latents, seed, numbers, rows, torch.zeros(len(rows))).x.double()
            total, squares = total + x0.sum(0), squares + x0.square().sum(0)
        mean = total / count
        return Trivial(mean.float(), (squares / count - mean.square()).clamp(min=0).float())

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[noise - x_0 | x_t] for independent x_0 ~ N(mean, variance): the regression of Gaussians.

        Args:
            x: (N, C, h, w) x_t.
            t: (N,) in [0, 1].
        """
        s = t.view(-1, 1, 1, 1)
        slope = (s - (1 - s) * self.variance) / ((1 - s).square() * self.variance + s.square())
        return slope * (x - (1 - s) * self.mean) - self.mean


class Validation:
    """The velocity's mean squared error on held-out latents at fixed noise and times, which are even over [0, 1].

    The loss itself cannot be compared between first stages. Its ratio to the trivial predictor's loss on the same
    samples is the part that the model could not explain by dependencies between latent values.

    Args:
        latents: Held-out latents.
        trivial: The trivial predictor.
        settings: The number of images, batch size and seed.
    """

    def __init__(self, latents: LatentCache, trivial: Trivial, settings: DiffusionSettings):
        chosen = spread(CHOICE_SEED, len(latents), settings.chosen("validation_images"))
        self.choice = choice_facts(chosen, len(latents), CHOICE_SEED)
        count = len(chosen)
        self.batches = []
        for first in range(0, count, settings.chosen("batch_size")):
            picked = range(first, min(first + settings.chosen("batch_size"), count))
            numbers = [VALIDATION + number for number in picked]
            rows = chosen[picked.start : picked.stop]
            within = augmentation_numbers(settings.seed, numbers, 4)[:, 3]
            t = (torch.tensor([number % BINS for number in picked]) + within) / BINS
            self.batches.append(flow_batch(latents, settings.seed, numbers, rows, t))
        self.bins = torch.cat([(batch.t * BINS).long().clamp(max=BINS - 1) for batch in self.batches])
        self.trivial = self._by_bin(
            [squared_error(trivial.velocity(batch.x, batch.t), batch) for batch in self.batches]
        )

    @torch.no_grad()
    def measure(self, model: DiTTransformer2DModel, device: torch.device) -> dict[str, Any]:
        """Return loss and loss relative to the trivial predictor's, overall and for each tenth of the time."""
        errors = []
        for batch in self.batches:
            placed = batch.to(device)
            errors.append(squared_error(predicted(model, placed), placed).cpu())
        loss = self._by_bin(errors)
        return {
            "loss": float(loss.mean()),
            "relative_loss": float(loss.mean() / self.trivial.mean()),
            "loss_by_time": loss.tolist(),
            "relative_loss_by_time": (loss / self.trivial).tolist(),
        }

    def _by_bin(self, errors: Sequence[Tensor]) -> Tensor:
        """Return the means over the samples of each non-empty tenth of the time, (bins,) float64."""
        joined = torch.cat(list(errors)).double()
        return torch.stack([joined[self.bins == number].mean() for number in self.bins.unique().tolist()])


def squared_error(velocity: Tensor, batch: FlowBatch) -> Tensor:
    """Return the mean squared error of a predicted velocity, (N, C, h, w), for each sample: (N,) float32."""
    return (velocity.float() - batch.velocity).square().flatten(1).mean(1)


def predicted(model: DiTTransformer2DModel, batch: FlowBatch) -> Tensor:
    """Return the model's velocity for a batch, (N, C, h, w)."""
    velocity: Tensor = model(batch.x, timestep=TIMES * batch.t, class_labels=batch.classes).sample
    return velocity
