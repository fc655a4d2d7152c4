"""A trained transformer as a stock pipeline, its samples, and how far sets of images are from each other."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.features import InceptionFeatures
from latent_ae.frechet import GROUPS, Gaussian, frechet_distance, frechet_of_features, jackknife_interval
from latent_ae.images import to_uint8
from latent_ae.perceptual import LPIPS

from .config import DiffusionSettings

Features = Callable[[Tensor], Tensor]
"""uint8 NCHW images -> (N, D) float32."""
APART = 1_000_000
"""Between the generators' seeds of equal samples of neighbouring seeds."""


def stock_pipeline(transformer: DiTTransformer2DModel, vae: nn.Module) -> DiTPipeline:
    """A DiTPipeline that samples a flow: second-order DPM-Solver++ (Lu et al. 2022) at evenly spaced times."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline = DiTPipeline(transformer, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(pipeline: DiTPipeline, classes: Sequence[int], settings: DiffusionSettings) -> Iterator[Tensor]:
    """Batches of samples without guidance, uint8 NCHW on the CPU; sample i depends on its class,
    the seed and i: its noise is that of torch.Generator().manual_seed(1,000,000 seed + i)."""
    size, steps = settings.images_at_a_time, settings.chosen("sampling_steps")
    for first in range(0, len(classes), size):
        numbers = range(first, min(first + size, len(classes)))
        # PyTorch's generator on a CPU heeds 32 bits of its seed
        seeds = [(settings.seed * APART + number) % 2**32 for number in numbers]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = pipeline(
            [classes[number] for number in numbers],
            guidance_scale=1.0,
            generator=generators,
            num_inference_steps=steps,
            output_type="pt",
        ).images
        yield to_uint8(2 * made.cpu() - 1)


def feature_networks(settings: DiffusionSettings, device: torch.device) -> tuple[dict[str, Features], list[str]]:
    """By the name of the distance that is measured in them; and what is missing and why."""
    found: dict[str, Features] = {}
    notes = []
    if "vgg16" in settings.chosen("frechet"):
        trunk = LPIPS("vgg").to(device)

        def vgg16(images: Tensor) -> Tensor:
            return trunk.compare(images.to(device).float() / 127.5 - 1, [])[1][0].cpu()

        found["frechet_vgg16"] = vgg16
    if "inception" in settings.chosen("frechet"):
        try:
            network = InceptionFeatures().to(device, memory_format=torch.channels_last)
            found["fid"] = lambda images: network(images.to(device)).cpu()
        except UserError as error:
            notes.append(f"FID is missing: {error}")
            if not found:
                raise
    return found, notes


@torch.no_grad()
def features_of(images: Tensor, network: Features, size: int) -> np.ndarray:
    """(N, D) of uint8 NCHW images, `size` at a time."""
    return torch.cat([network(part) for part in images.split(size)]).numpy()


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, list[float] | None]:
    """Fréchet distance of (N, D) and (M, D) features of two independent sets, and its 95 % interval.

    The interval is a jackknife's over both sets; None for fewer than 5 images per group.
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
