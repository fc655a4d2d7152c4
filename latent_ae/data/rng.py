"""Random choices for each sample (image, crop, flip, noise) as pure functions of the seed and its global number.

`spread` chooses the images that represent a source if only some are measured or shown.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

# streams of random numbers that must never overlap: the highest word of Philox's counter
CROP, NOISE, ORDER, BLOCK, AUGMENT, LATENT_NOISE, CHANNELS, EQUIVARIANCE, BINARY, PERMUTATION, SPREAD, FLIP = range(12)
MIXTURE, BUCKET, CLASS_NOISE, DOWNSAMPLING, REPLAY, BACKGROUND, NEIGHBOUR, RENDERING, GUMBEL, STYLE = range(12, 22)
PATH, DECODING = range(22, 24)
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
"""Its fractional part as a fraction of 2 ** 64."""


def crop_rng(seed: int, number: int) -> np.random.Generator:
    """Return the generator that decides crop and flip of the sample `number`."""
    return np.random.Generator(_philox(seed, number, CROP))


def mirrored(seed: int, number: int) -> bool:
    """Return whether the sample `number` is mirrored if its crop is not random."""
    return bool(_philox(seed, number, FLIP).random_raw() % 2)


def epoch_permutation(seed: int, epoch: int, num_images: int, source: int = 0) -> np.ndarray:
    """Return the order of the images in an epoch, each once: (num_images,) integers.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        num_images: Number of images.
        source: Number of the source in a mixture.
    """
    # sorted raw words instead of Generator.permutation, whose algorithm NumPy may change
    order = np.argsort(_philox(seed, epoch, ORDER, source).random_raw(num_images), kind="stable")
    return order.astype(np.uint32) if num_images < 2**32 else order


epoch_order = lru_cache(maxsize=2)(epoch_permutation)


@lru_cache(maxsize=2)
def mixture_order(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return which source each sample of a mixture's epoch comes from.

    Args:
        seed: Seed of the run.
        epoch: Number of the mixture's epoch.
        counts: Number of samples of each source in an epoch.

    Returns:
        The source of each sample, and how many samples of that source precede it in the epoch: (sum(counts),) integers
        each.
    """
    in_turn = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    sources = in_turn[np.argsort(_philox(seed, epoch, MIXTURE).random_raw(len(in_turn)), kind="stable")]
    ranks = np.empty(len(sources), dtype=np.int64)
    for source, count in enumerate(counts):
        ranks[sources == source] = np.arange(count)
    return sources, ranks


def buckets_at(seed: int, steps: Sequence[int] | np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return which bucket each of some steps has: (n,) integers.

    Multiples of the golden ratio, counted from a random start, fill [0, 1) more evenly than random numbers do (Weyl's
    sequence), so the number of steps of each bucket stays within a few steps of its share at any time.

    Args:
        seed: Seed of the run.
        steps: Numbers of n steps.
        weights: A positive number for each bucket.
    """
    numbers = np.asarray(steps, dtype=np.uint64) * GOLDEN_RATIO + _philox(seed, 0, BUCKET).random_raw(1)
    borders = np.cumsum(weights) / np.sum(weights)
    return np.searchsorted(borders[:-1], numbers / 2.0**64, side="right")


def block_order(seed: int, epoch: int, reader: int, block: int, size: int) -> np.ndarray:
    """Return the order in which a stream's reader yields a block of `size` images: (size,) integers."""
    return np.argsort(_philox(seed, epoch, BLOCK, reader, block).random_raw(size), kind="stable")


def spread(seed: int, size: int, number: int) -> np.ndarray:
    """Return at most `number` images that represent a source of `size` images.

    The source is cut into `number` stretches of equal length (to within one image), and one image is drawn from each.
    So the choice is even over the source's order, and over class folders, which follow one another in it; a regular
    stride could hit the same class again and again. No image is more than 1.5 times as likely as another.

    Args:
        seed: Seed of the choice.
        size: Number of images in the source.
        number: Number of images to choose.

    Returns:
        (min(size, number),) int64, ascending.
    """
    if number >= size or not number:
        return np.arange(min(size, number))
    if 2 * number > size:  # stretches of one and of two images would make some twice as likely: draw the others instead
        return np.delete(np.arange(size), spread(seed, size, size - number))
    borders = np.arange(number + 1) * size // number
    words = _philox(seed, size, SPREAD).random_raw(number)
    return borders[:-1] + (words % np.diff(borders).astype(np.uint64)).astype(np.int64)


def choice_facts(chosen: np.ndarray, size: int, seed: int, method: str = "spread") -> dict[str, Any]:
    """Return how a result describes a choice of images, JSON-ready.

    Args:
        chosen: (n,) integers, the chosen images.
        size: Number of images in the source.
        seed: Seed of the choice.
        method: Name of the method that chose them; "all" replaces it if all were chosen.
    """
    facts = {"method": "all" if len(chosen) == size else method, "number": len(chosen), "of": size}
    if len(chosen) == size:
        return facts
    return facts | {"seed": seed, "fingerprint": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()}


def posterior_noise(seed: int, numbers: Sequence[int], shape: Sequence[int], draw: int = 0) -> torch.Tensor:
    """Return standard normal noise for the posteriors of samples, independent of their crops.

    Args:
        seed: Seed of the run.
        numbers: Global numbers of N samples.
        shape: Shape of one latent.
        draw: Number of the draw, where several are taken from one posterior.

    Returns:
        (N, *shape) float32 on the CPU.
    """
    generators = (np.random.Generator(_philox(seed, number, NOISE, block=draw)) for number in numbers)
    noise = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in generators]
    return torch.from_numpy(np.stack(noise))


def gumbel_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Return standard Gumbel noise for the codes of samples: (N, *shape) float32 on the CPU.

    Args:
        seed: Seed of the run.
        numbers: Global numbers of N samples.
        shape: (codes, h, w).
    """
    generators = (np.random.Generator(_philox(seed, number, GUMBEL)) for number in numbers)
    waiting = np.stack([generator.standard_exponential(tuple(shape), dtype=np.float32) for generator in generators])
    # minus the logarithm of an exponential number; one that is rounded to 0 must not become infinite
    return torch.from_numpy(-np.log(np.maximum(waiting, np.float32(2.0**-26))))


def style_noise(seed: int, numbers: Sequence[int], size: int) -> torch.Tensor:
    """Return standard normal noise for the styles of samples: (N, size) float32 on the CPU."""
    generators = (np.random.Generator(_philox(seed, number, STYLE)) for number in numbers)
    return torch.from_numpy(np.stack([generator.standard_normal(size, dtype=np.float32) for generator in generators]))


def path_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what places N samples on a path from noise to image: normal numbers (N,), and normal noise (N, *shape)."""
    generators = [np.random.Generator(_philox(seed, number, PATH)) for number in numbers]
    places = np.array([generator.standard_normal() for generator in generators], dtype=np.float32)
    noise = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in generators]
    return torch.from_numpy(places), torch.from_numpy(np.stack(noise))


def decoder_generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """Return a generator on the CPU for each sample, with which a decoder that begins with noise draws it.

    Args:
        seed: Seed of the evaluation.
        numbers: Numbers of the samples.
    """
    # PyTorch's generator on a CPU uses 32 bits of its seed
    seeds = (int(_philox(seed, number, DECODING).random_raw()) >> 32 for number in numbers)
    return [torch.Generator().manual_seed(one) for one in seeds]


def augmentation_numbers(seed: int, numbers: Sequence[int], count: int) -> torch.Tensor:
    """Return `count` uniform numbers in [0, 1) per sample for the discriminator's augmentation: (N, count) float32."""
    generators = (np.random.Generator(_philox(seed, number, AUGMENT)) for number in numbers)
    return torch.from_numpy(np.stack([generator.random(count, dtype=np.float32) for generator in generators]))


def background_numbers(seed: int, numbers: Sequence[int], count: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1) for `count` colours per sample: (N, count, 3) float32."""
    generators = (np.random.Generator(_philox(seed, number, BACKGROUND)) for number in numbers)
    return torch.from_numpy(np.stack([generator.random((count, 3), dtype=np.float32) for generator in generators]))


def latent_noise(
    seed: int, numbers: Sequence[int], shape: Sequence[int], stream: int = LATENT_NOISE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise for the latents of N samples: levels (N,) uniform in [0, 1), and normal noise (N, *shape)."""
    generators = [np.random.Generator(_philox(seed, number, stream)) for number in numbers]
    levels = np.array([generator.random() for generator in generators], dtype=np.float32)
    noise = [generator.standard_normal(tuple(shape), dtype=np.float32) for generator in generators]
    return torch.from_numpy(levels), torch.from_numpy(np.stack(noise))


def kept_channels(seed: int, numbers: Sequence[int], least: int, channels: int) -> torch.Tensor:
    """Return how many leading latent channels of each sample are kept.

    Args:
        seed: Seed of the run.
        numbers: Global numbers of N samples.
        least: Smallest number of kept channels.
        channels: Number of channels of the latent.

    Returns:
        (N,) integers, uniform from `least` to `channels`, both included.
    """
    drawn = [np.random.Generator(_philox(seed, number, CHANNELS)).random() for number in numbers]
    return torch.tensor([least + int(value * (channels - least + 1)) for value in drawn])


def binary_images(seed: int, numbers: Sequence[int], images: torch.Tensor) -> torch.Tensor:
    """Binarise images at random, each pixel to 1 with probability (x + 1) / 2, else to -1.

    Args:
        seed: Seed of the run.
        numbers: Global numbers of the N samples.
        images: (N, C, H, W) float in [-1, 1]; pixels at -1 and 1 keep their value.

    Returns:
        (N, C, H, W) of -1.0 and 1.0, on the device of `images`.
    """
    generators = (np.random.Generator(_philox(seed, number, BINARY)) for number in numbers)
    drawn = np.stack([generator.random(tuple(images.shape[1:]), dtype=np.float32) for generator in generators])
    return torch.where(torch.from_numpy(drawn).to(images.device) < 0.5 * (images + 1.0), 1.0, -1.0)


def equivariance_numbers(seed: int, step: int) -> np.ndarray:
    """Return the four uniform numbers in [0, 1) that decide how a step's latents are scaled and rotated."""
    return np.random.Generator(_philox(seed, step, EQUIVARIANCE)).random(4)


def downsampling_number(seed: int, step: int) -> float:
    """Return the uniform number in [0, 1) that decides by how much a step's latents are downsampled."""
    return float(np.random.Generator(_philox(seed, step, DOWNSAMPLING)).random())


def replay_numbers(seed: int, numbers: Sequence[int]) -> torch.Tensor:
    """Return the uniform number in [0, 1) by which each sample's stored reconstruction is chosen: (N,) float32."""
    drawn = [np.random.Generator(_philox(seed, number, REPLAY)).random(dtype=np.float32) for number in numbers]
    return torch.tensor(drawn)


def neighbour_numbers(seed: int, numbers: Sequence[int]) -> torch.Tensor:
    """Return the uniform number in [0, 1) by which a neighbour of each image is drawn: (N,) float64."""
    drawn = [np.random.Generator(_philox(seed, number, NEIGHBOUR)).random() for number in numbers]
    return torch.tensor(drawn, dtype=torch.float64)


def rendering_generator(seed: int, number: int) -> np.random.Generator:
    """Return the generator that decides what stands in the rendered image `number`, and how."""
    return np.random.Generator(_philox(seed, number, RENDERING))


def replay_slot(seed: int, number: int, size: int) -> int:
    """Return which of `size` stored reconstructions the one with this number replaces."""
    return int(_philox(seed, number, REPLAY, reader=1).random_raw() % size)


def permutations(seed: int, step: int, count: int, dimensions: int) -> np.ndarray:
    """Return for each latent dimension an order of a step's `count` samples: (count, dimensions) int64."""
    words = _philox(seed, step, PERMUTATION).random_raw(count * dimensions).reshape(count, dimensions)
    return np.argsort(words, axis=0, kind="stable")


def _philox(seed: int, number: int, stream: int, reader: int = 0, block: int = 0) -> np.random.Philox:
    key = np.array([seed, number], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, block, reader, stream], dtype=np.uint64))


@dataclass(frozen=True)
class Share:
    """Which samples of each global batch belong to a rank."""

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a rank in a global batch."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    def numbers(self, step: int) -> list[int]:
        """Return the global numbers of the samples in the rank's micro-batch `step`, counted from the run's start."""
        batch, micro_step = divmod(step, self.micro_steps)
        first = batch * self.batch_size + (micro_step * self.world_size + self.rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))
