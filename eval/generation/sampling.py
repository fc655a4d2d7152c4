"""Samples a trained transformer through a stock pipeline, and measures distances between sets of images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler, ModelMixin
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.data.images import to_uint8
from latent_ae.data.rng import decoder_generators, spread
from latent_ae.metrics.distances import GROUPS, Gaussian, frechet_distance, frechet_of_features, jackknife_interval
from latent_ae.models.loading import FirstStage
from latent_ae.models.registry import scaling_of
from latent_ae_eval.features import FeatureNetwork
from latent_ae_eval.generation.settings import DiffusionSettings

GRID = 8
"""Number of images along each side of a picture."""
KINDS = ("samples", "reconstructions", "held_out")
"""Sets that are compared with training images."""
APART = 1_000_000
"""Difference of the generators' seeds for a sample between two consecutive seeds of the settings."""


class ImageSet(NamedTuple):
    """Features and a few pictures of a set of images."""

    size: int
    """Number of images N."""
    features: dict[str, np.ndarray]
    """(N, D) features by the name of the distance."""
    shown: Tensor
    """A few of the images, spread over all, (n, C, H, W) in [-1, 1]."""


def stock_pipeline(transformer: DiTTransformer2DModel, vae: nn.Module) -> DiTPipeline:
    """Return a DiTPipeline that samples a flow with second-order DPM-Solver++ (Lu et al. 2022) at even times."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline = DiTPipeline(transformer, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class StandInDecoder(ModelMixin, ConfigMixin):
    """Decodes for DiTPipeline with a first stage that it cannot use itself.

    Such a first stage takes videos, gives images in another range, scales latents by a mean and std of each channel, or
    begins with noise.
    """

    generators: Sequence[torch.Generator] | None = None
    """One for each latent of the next call, with which a decoder that begins with noise draws it."""

    def __init__(self, stage: FirstStage):
        super().__init__()
        assert stage.module is not None
        self.register_to_config(scaling_factor=1.0)  # for the pipeline, so that this class does the scaling
        self.module, self.stage = stage.module, stage

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Return the images, (N, C, H, W) in [-1, 1], of a diffusion model's latents, (N, c, h, w)."""
        return DecoderOutput(sample=self.stage.decode(scaling_of(self.stage.module).unscaled(latents), self.generators))


def generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """Return a generator for the noise of each sample, from the seed and the numbers of the samples."""
    # PyTorch's generator on a CPU uses 32 bits of its seed
    return [torch.Generator().manual_seed((seed * APART + number) % 2**32) for number in numbers]


def samples(pipeline: DiTPipeline, classes: Sequence[int], settings: DiffusionSettings) -> Iterator[Tensor]:
    """Yield batches of samples without guidance, (N, C, H, W) uint8 on the CPU.

    Sample i depends only on its class, the seed and i: its noise comes from a torch.Generator whose seed
    is 1,000,000 * seed + i, modulo 2 ** 32.

    Args:
        pipeline: The pipeline.
        classes: Class of each sample.
        settings: Number of images at a time, sampling steps and seed.
    """
    size, steps = settings.images_at_a_time, settings.chosen("sampling_steps")
    for first in range(0, len(classes), size):
        numbers = range(first, min(first + size, len(classes)))
        if isinstance(pipeline.vae, StandInDecoder):
            pipeline.vae.generators = decoder_generators(settings.seed, numbers)
        images = pipeline(
            [classes[number] for number in numbers],
            guidance_scale=1.0,
            generator=generators(settings.seed, numbers),
            num_inference_steps=steps,
            output_type="pt",
        ).images
        yield finite_pixels(2 * images.cpu() - 1)


def finite_pixels(images: Tensor) -> Tensor:
    """Return images in 8 bits, without those that are not finite, which would count as dark ones."""
    return to_uint8(images[images.isfinite().flatten(1).all(1)])


def left_out(samples: ImageSet, count: int) -> list[str]:
    """Return a note on those of `count` samples that are not finite, in a list; an empty list if all are."""
    missing = count - samples.size
    return [f"samples: {missing:,} are not finite and left out"] if missing else []


@torch.no_grad()
def image_set(
    batches: Iterable[Tensor], networks: dict[str, FeatureNetwork], size: int, progress: Callable[[int], object]
) -> ImageSet:
    """Compute the features of images, in one pass over the batches.

    Args:
        batches: (N, C, H, W) uint8 images.
        networks: Feature networks by the name of their distance.
        size: Expected number of all images.
        progress: Is called with the number of images of each batch.

    Raises:
        UserError: If there is no image.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in networks}
    chosen = set(spread(0, size, GRID**2).tolist())
    shown: list[Tensor] = []
    count, last = 0, torch.empty(0)
    for images in batches:
        if not len(images):
            continue
        for name, network in networks.items():
            parts[name].append(network(images).cpu())
        shown += [image for number, image in enumerate(images, start=count) if number in chosen]
        last = images[-1:]
        count += len(images)
        progress(len(images))
    if count < 2 and count < size:
        raise UserError(f"{count} of {size:,} images are finite: the model gives NaN or infinity")
    features = {name: torch.cat(batches_of_one).numpy() for name, batches_of_one in parts.items()}
    # so many may have been left out that none of the chosen ones is there
    return ImageSet(count, features, torch.stack(shown or list(last)).float() / 127.5 - 1)


def distances(sets: dict[str, ImageSet]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """Return the distances of each of KINDS to the set `reference`, and of reconstructions to their originals.

    Args:
        sets: The sets "reference", "held_out", "samples" and "reconstructions".

    Returns:
        Values and 95 % intervals by kind and name of the distance; values also hold the numbers of images.
    """
    pairs = {kind: (sets[kind], sets["reference"]) for kind in KINDS}
    pairs["reconstructions_of_originals"] = sets["reconstructions"], sets["held_out"]
    metrics: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    for kind, (a, b) in pairs.items():
        metrics[kind], intervals[kind] = {"n": a.size, "reference_images": b.size}, {}
        for name in a.features:
            metrics[kind][name], interval = distance(a.features[name], b.features[name])
            if interval is not None:
                intervals[kind][name] = interval
    return metrics, intervals


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, list[float] | None]:
    """Return the Fréchet distance of two independent sets, and its 95 % interval (a jackknife over both sets).

    Args:
        a: (N, D) features.
        b: (M, D) features.

    Returns:
        The distance, and [low, high] or None for fewer than 5 images per group.
    """
    value = frechet_of_features(a, b)
    if min(len(a), len(b)) < 5 * GROUPS:
        return value, None
    left_out = []
    if max(len(a), len(b)) * (GROUPS - 1) // GROUPS > a.shape[1]:
        parts = [[Gaussian.of(x[group::GROUPS]) for group in range(GROUPS)] for x in (a, b)]
        whole = [sum(groups[1:], groups[0]) for groups in parts]
        for group in range(GROUPS):
            moments = [(all_of_it - groups[group]).moments() for all_of_it, groups in zip(whole, parts, strict=True)]
            left_out.append(frechet_distance(*moments[0], *moments[1], quick=True))
    else:
        for group in range(GROUPS):
            left_out.append(frechet_of_features(*(np.delete(x, np.s_[group::GROUPS], 0) for x in (a, b))))
    return value, jackknife_interval(value, left_out)
