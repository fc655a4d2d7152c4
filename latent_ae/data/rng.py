"""Which image, crop, flip and noise a sample has: pure functions of the seed and the sample's global number.

And which images stand for all of a source where only some are measured or shown: `spread`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

# streams of random numbers that must never overlap: the highest word of Philox's counter
CROP, NOISE, ORDER, BLOCK, AUGMENT, LATENT_NOISE, CHANNELS, EQUIVARIANCE, BINARY, PERMUTATION, SPREAD = range(11)


def crop_rng(seed: int, number: int) -> np.random.Generator:
    """The generator that decides crop and flip of a sample."""
    return np.random.Generator(_philox(seed, number, CROP))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The images of an epoch, each once: (num_images,) integers."""
    # sorted raw words instead of Generator.permutation, whose algorithm NumPy may change
    order = np.argsort(_philox(seed, epoch, ORDER).random_raw(num_images), kind="stable")
    return order.astype(np.uint32) if num_images < 2**32 else order


def block_order(seed: int, epoch: int, reader: int, block: int, size: int) -> np.ndarray:
    """The order of a block of `size` images that a stream's reader shuffles: (size,) integers."""
    return np.argsort(_philox(seed, epoch, BLOCK, reader, block).random_raw(size), kind="stable")


def spread(seed: int, size: int, number: int) -> np.ndarray:
    """The images that stand for a source of `size`: at most `number`, ascending, (min(size, number),) int64.

    The source is cut into `number` stretches of equal length (to within one image), and one image is drawn from each.
    So the choice is even over the source's order, and over class folders, which lie one after another in it; a regular
    step could meet the same class again and again. No image is more than half again as likely as another.
    """
    if number >= size or not number:
        return np.arange(min(size, number))
    if 2 * number > size:  # stretches of one and of two images would make some twice as likely: draw those to leave out
        return np.delete(np.arange(size), spread(seed, size, size - number))
    borders = np.arange(number + 1) * size // number
    words = _philox(seed, size, SPREAD).random_raw(number)
    return borders[:-1] + (words % np.diff(borders).astype(np.uint64)).astype(np.int64)


def choice_facts(chosen: np.ndarray, size: int, seed: int, method: str = "spread") -> dict[str, Any]:
    """What a result says of the images `chosen` from a source of `size`, JSON-ready."""
    facts = {"method": "all" if len(chosen) == size else method, "number": len(chosen), "of": size}
    if len(chosen) == size:
        return facts
    return facts | {"seed": seed, "fingerprint": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()}


def posterior_noise(seed: int, numbers: Sequence[int], shape: Sequence[int], draw: int = 0) -> torch.Tensor:
    """Standard normal noise of the samples `numbers`: (N, *shape) float32, independent of their crops.

    `draw` counts several draws from the same posterior.
    """
    generators = (np.random.Generator(_philox(seed, number, NOISE, block=draw)) for number in numbers)
    noise = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in generators]
    return torch.from_numpy(np.stack(noise))


def augmentation_numbers(seed: int, numbers: Sequence[int], count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) that decide how the discriminator's view of the samples changes: (N, count) float32."""
    generators = (np.random.Generator(_philox(seed, number, AUGMENT)) for number in numbers)
    return torch.from_numpy(np.stack([generator.random(count, dtype=np.float32) for generator in generators]))


def latent_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise for the latents of the samples: its level (N,), uniform in [0, 1), and (N, *shape) standard normal."""
    generators = [np.random.Generator(_philox(seed, number, LATENT_NOISE)) for number in numbers]
    levels = np.array([generator.random() for generator in generators], dtype=np.float32)
    noise = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in generators]
    return torch.from_numpy(levels), torch.from_numpy(np.stack(noise))


def kept_channels(seed: int, numbers: Sequence[int], least: int, channels: int) -> torch.Tensor:
    """How many first channels of each sample's latent are kept: (N,) integers, uniform from `least` to `channels`."""
    drawn = [np.random.Generator(_philox(seed, number, CHANNELS)).random() for number in numbers]
    return torch.tensor([least + int(value * (channels - least + 1)) for value in drawn])


def binary_images(seed: int, numbers: Sequence[int], images: torch.Tensor) -> torch.Tensor:
    """NCHW in [-1, 1] -> NCHW of -1 and 1, 1 with probability (x + 1) / 2; black and white stay as they are."""
    generators = (np.random.Generator(_philox(seed, number, BINARY)) for number in numbers)
    drawn = np.stack([generator.random(tuple(images.shape[1:]), dtype=np.float32) for generator in generators])
    return torch.where(torch.from_numpy(drawn).to(images.device) < 0.5 * (images + 1.0), 1.0, -1.0)


def equivariance_numbers(seed: int, step: int) -> np.ndarray:
    """Four uniform numbers in [0, 1) that decide how a step's latents are scaled and turned."""
    return np.random.Generator(_philox(seed, step, EQUIVARIANCE)).random(4)


def permutations(seed: int, step: int, count: int, dimensions: int) -> np.ndarray:
    """For each latent dimension an order of a step's `count` samples: (count, dimensions) int64."""
    words = _philox(seed, step, PERMUTATION).random_raw(count * dimensions).reshape(count, dimensions)
    return np.argsort(words, axis=0, kind="stable")


def _philox(seed: int, number: int, stream: int, reader: int = 0, block: int = 0) -> np.random.Philox:
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, block, reader, stream], dtype=np.uint64))


@dataclass(frozen=True)
class Share:
    """Which samples are a rank's."""

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def micro_steps(self) -> int:
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def numbers(self, step: int) -> list[int]:
        """Samples of the rank's micro-batch `step`, counted from the run's beginning."""
        batch, micro_step = divmod(step, self.micro_steps)
        first = batch * self.batch_size + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))
