"""Fits the transformer over codes to the latents of a data set, measures its rate, and draws samples."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.data.rng import augmentation_numbers, choice_facts, epoch_order, spread
from latent_ae.latents.cache import LatentCache
from latent_ae.metrics.similarity import FEWEST, bootstrap_interval
from latent_ae.models.codes import latent_of_codes, nearest_codes
from latent_ae.models.registry import family_of
from latent_ae_eval.generation.flow import CHOICE_SEED
from latent_ae_eval.generation.sampling import generators
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.generation.training import Trainer
from latent_ae_eval.sample.transformer import CodeTransformer

MOST_IMAGES = 10_000
"""Largest number of images in which the frequencies of codes are counted."""


class CodeImages:
    """Images as sequences of codes: all levels, the coarsest first, each in raster order.

    Args:
        module: The first stage, which has codes.
        latents: The latents of the images.
        device: Where nearest codes are computed.
    """

    def __init__(self, module: Any, latents: LatentCache, device: torch.device):
        self.module, self.latents, self.device = module, latents, device
        self.codes = int(family_of(module).codes(module.config) or 0)
        self.sides = [grid.shape[-1] for grid in self._grids([0], None)]

    def __len__(self) -> int:
        return len(self.latents)

    def sequences(self, rows: Sequence[int] | np.ndarray, flips: Tensor | None = None) -> Tensor:
        """Return the codes of images by their numbers, (N, P) int64 on the device; `flips` says which are mirrored."""
        return torch.cat([grid.flatten(1) for grid in self._grids(rows, flips)], 1)

    @torch.no_grad()
    def _grids(self, rows: Sequence[int] | np.ndarray, flips: Tensor | None) -> tuple[Tensor, ...]:
        return nearest_codes(self.module, self.latents.batch(rows, flips).to(self.device))


class CodeTrainer(Trainer):
    """Trains a `CodeTransformer` by the negative log-likelihood of codes, in nats per code.

    Args:
        images: The images to train on.
        settings: The recipe.
        device: Where the transformer is trained.
    """

    def __init__(self, images: CodeImages, settings: DiffusionSettings, device: torch.device):
        self.images = images
        super().__init__(images.latents, settings, device)

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return CodeTransformer(
                self.images.codes, self.images.sides, self.settings.chosen("width"), self.settings.chosen("depth")
            )

    def loss(self) -> Tensor:
        seed, size, count = self.settings.seed, self.settings.chosen("batch_size"), len(self.images)
        numbers = range(self.step * size, (self.step + 1) * size)
        rows = [int(epoch_order(seed, number // count, count)[number % count]) for number in numbers]
        flips = augmentation_numbers(seed, numbers, 1)[:, 0] < 0.5 if self.latents.has_flips else None
        sequence = self.images.sequences(rows, flips)
        with self.autocast():
            logits = self.model(sequence)
        return nats(logits, sequence).mean()


class CodeValidation:
    """The negative log-likelihood of the codes of held-out images.

    The trivial predictor draws the codes of a level independently, with their frequencies in the images trained on.

    Args:
        held_out: Held-out images.
        train: The images trained on.
        settings: The number of images, and the batch size.
        values: Number of values of an image, C x H x W.
    """

    def __init__(self, held_out: CodeImages, train: CodeImages, settings: DiffusionSettings, values: int):
        chosen = spread(CHOICE_SEED, len(held_out), settings.chosen("validation_images"))
        self.choice, self.values = choice_facts(chosen, len(held_out), CHOICE_SEED), values
        size = settings.chosen("batch_size")
        self.batches = [held_out.sequences(chosen[first : first + size]) for first in range(0, len(chosen), size)]
        frequencies = code_frequencies(train, size)
        self.trivial = torch.cat([-frequencies.gather(1, batch.T).T.double() for batch in self.batches])
        self.nats = self.trivial
        """Negative log-likelihood of each code of each image as last measured, (N, P)."""

    @torch.no_grad()
    def measure(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Return nats and bits of a code, bits per dimension, and nats relative to the trivial predictor's."""
        self.nats = torch.cat([nats(model(batch.to(device)), batch.to(device)).double() for batch in self.batches])
        found = {key: float(values.mean()) for key, values in self.bits().items()}
        return {
            "loss": float(self.nats.mean()),
            "relative_loss": float(self.nats.mean() / self.trivial.mean()),
            **found,
        }

    def bits(self) -> dict[str, np.ndarray]:
        """Return bits per dimension and per code of each image, (N,), as last measured."""
        bits = (self.nats / math.log(2.0)).cpu().numpy()
        return {"bits_per_dimension": bits.sum(1) / self.values, "bits_per_code": bits.mean(1)}

    def metrics(self, seed: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Return the means over images, and their 95 % intervals if there are enough images."""
        bits = self.bits()
        intervals = {key: bootstrap_interval(list(one), seed) for key, one in bits.items() if len(one) >= FEWEST}
        return {"n": len(self.nats)} | {key: float(one.mean()) for key, one in bits.items()}, intervals


def nats(logits: Tensor, sequence: Tensor) -> Tensor:
    """Return -ln p of each code given those before it, (N, P) float32.

    Args:
        logits: (N, P, codes).
        sequence: (N, P) int64.
    """
    return F.cross_entropy(logits.float().transpose(1, 2), sequence, reduction="none")


def code_frequencies(images: CodeImages, size: int) -> Tensor:
    """Return the logarithm of each code's frequency at each position's level, (P, codes); each counts once more.

    Args:
        images: The images, of which up to MOST_IMAGES count.
        size: Number of images at a time.
    """
    rows, lengths = spread(CHOICE_SEED, len(images), MOST_IMAGES), [side**2 for side in images.sides]
    counts = torch.ones(len(lengths), images.codes, dtype=torch.float64, device=images.device)
    for first in range(0, len(rows), size):
        for level, part in enumerate(images.sequences(rows[first : first + size]).split(lengths, 1)):
            counts[level] += torch.bincount(part.flatten(), minlength=images.codes)
    shares = (counts / counts.sum(1, keepdim=True)).log().float()
    return shares.repeat_interleave(torch.tensor(lengths, device=images.device), 0)


def code_samples(
    model: CodeTransformer, module: Any, count: int, settings: DiffusionSettings, device: torch.device
) -> Iterator[Tensor]:
    """Yield latents of samples, (N, c, h, w); sample i is a function of the transformer, the seed and i.

    Its codes are drawn with the numbers of `torch.rand(P)` from the generator of `sampling.generators`.

    Args:
        model: The transformer.
        module: The first stage.
        count: Number of samples.
        settings: Seed, and number of images at a time.
        device: Where the transformer runs.
    """
    for first in range(0, count, settings.images_at_a_time):
        numbers = range(first, min(first + settings.images_at_a_time, count))
        length = sum(model.sizes)
        uniform = torch.stack([torch.rand(length, generator=one) for one in generators(settings.seed, numbers)])
        yield latent_of_codes(module, model.grids(model.sample(uniform.to(device))))
