"""A trained transformer as a stock pipeline, its samples, and how far sets of images are from each other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler, ModelMixin
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.data.images import to_uint8
from latent_ae.data.rng import spread
from latent_ae.metrics.distances import GROUPS, Gaussian, frechet_distance, frechet_of_features, jackknife_interval
from latent_ae.models.loading import FirstStage
from latent_ae.models.registry import scaling_of
from latent_ae.pretrained.inception import InceptionFeatures
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.pretrained.weights import briefly
from latent_ae_eval.generation.settings import DiffusionSettings

Features = Callable[[Tensor], Tensor]
"""uint8 NCHW images -> (N, D) float32."""
GRID = 8
"""Images along each side of a picture that shows some."""
KINDS = ("samples", "reconstructions", "held_out")
"""Sets that are compared with images trained on."""
APART = 1_000_000
"""Between the generators' seeds of equal samples of neighbouring seeds."""


class ImageSet(NamedTuple):
    """Images as they are compared."""

    size: int
    features: dict[str, np.ndarray]
    """(N, D) by the name of the distance."""
    shown: Tensor
    """A few of the images, spread over all, NCHW in [-1, 1]."""


def stock_pipeline(transformer: DiTTransformer2DModel, vae: nn.Module) -> DiTPipeline:
    """A DiTPipeline that samples a flow: second-order DPM-Solver++ (Lu et al. 2022) at evenly spaced times."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline = DiTPipeline(transformer, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class StandInDecoder(ModelMixin, ConfigMixin):
    """Decodes for DiTPipeline where it could not itself: videos, other ranges, a mean and deviation of each channel."""

    def __init__(self, stage: FirstStage):
        super().__init__()
        assert stage.module is not None
        self.register_to_config(scaling_factor=1.0)  # the pipeline's, which leaves the scaling to this class
        self.module, self.stage = stage.module, stage

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Images, NCHW in [-1, 1], of latents as a diffusion model is fed them."""
        return DecoderOutput(sample=self.stage.decode(scaling_of(self.stage.module).unscaled(latents)))


def generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """One for the noise of each sample."""
    # PyTorch's generator on a CPU heeds 32 bits of its seed
    return [torch.Generator().manual_seed((seed * APART + number) % 2**32) for number in numbers]


def samples(pipeline: DiTPipeline, classes: Sequence[int], settings: DiffusionSettings) -> Iterator[Tensor]:
    """Batches of samples without guidance, uint8 NCHW on the CPU; sample i depends on its class,
    the seed and i: its noise is that of torch.Generator().manual_seed(1,000,000 seed + i)."""
    size, steps = settings.images_at_a_time, settings.chosen("sampling_steps")
    for first in range(0, len(classes), size):
        numbers = range(first, min(first + size, len(classes)))
        made = pipeline(
            [classes[number] for number in numbers],
            guidance_scale=1.0,
            generator=generators(settings.seed, numbers),
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
            notes.append(f"FID is missing: {briefly(error)}")
            if not found:
                raise
    return found, notes


@torch.no_grad()
def image_set(
    batches: Iterable[Tensor], networks: dict[str, Features], size: int, progress: Callable[[int], object]
) -> ImageSet:
    """Sees each batch of uint8 NCHW images once; `size` of all are expected."""
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    wanted = set(spread(0, size, GRID**2).tolist())
    shown: list[Tensor] = []
    seen = 0
    for images in batches:
        for name, network in networks.items():
            found[name].append(network(images))
        shown += [image for number, image in enumerate(images, start=seen) if number in wanted]
        seen += len(images)
        progress(len(images))
    features = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    return ImageSet(seen, features, torch.stack(shown).float() / 127.5 - 1)


def distances(sets: dict[str, ImageSet]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """Distances of each of KINDS to the set `reference`, and of reconstructions to their originals; values and
    intervals."""
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
