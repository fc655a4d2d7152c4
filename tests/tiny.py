"""A training step on networks small enough for a test, but real ones."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from latent_ae.data.loader import crop_size_at
from latent_ae.models.build import facts_of
from latent_ae.models.registry import family_of
from latent_ae.models.run_checkpoint import MANIFEST
from latent_ae.objectives import GAN as GAN_OBJECTIVE
from latent_ae.objectives import CodeRelaxation, FlowMatching, Reconstruction, SemiSupervised
from latent_ae.objectives.base import Batch, Objective
from latent_ae_train.build import compile_blocks, starting_autoencoder
from latent_ae_train.data import drawn_batch
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


def build_step(
    settings: TrainSettings, perceptual: nn.Module | None = None, more: Sequence[Objective[Any]] = ()
) -> TrainStep:
    """The step on a fresh model; equal settings give equal weights, on every process. `more`: further objectives."""
    accelerator = Accelerator(cpu=True)
    autoencoder = starting_autoencoder(settings)
    run = settings.facts(facts_of(autoencoder))
    objectives = list(more)
    for kind in reversed(settings.objectives):
        own = settings.section_of(kind)
        given = kind is Reconstruction  # its LPIPS is the test's
        built = kind(own, run, perceptual) if given else kind.build(own, run, autoencoder, accelerator.device)
        objectives.insert(0, built)
    for one in more:
        one.run = run
    ema = Ema(autoencoder, settings.ema.decay) if settings.ema.decay else None
    if run.compiles_on(accelerator.device):
        compile_blocks(autoencoder)
    return TrainStep(settings, accelerator, autoencoder, objectives, ema)


def adversary_of(step: TrainStep, name: str = "gan") -> nn.Module | None:
    """The network that an objective trains against the autoencoder, if there is such an objective."""
    return step.bare_adversaries.get(name)


def global_batch(
    step: int, settings: TrainSettings, latent: Sequence[int] = LATENT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and noise of a step, a function of its number; with buckets of the step's size."""
    generator = torch.Generator().manual_seed(1000 + step)
    height, width = crop_size_at(settings.data, settings.seed, step) if settings.data.buckets else (SIDE, SIDE)
    smooth = torch.randn(settings.batch_size, settings.model.in_channels, height // 4, width // 4, generator=generator)
    images = nn.functional.interpolate(smooth, size=(height, width), mode="bicubic").clamp(-1, 1)
    grid = (latent[0], height * latent[1] // SIDE, width * latent[2] // SIDE)
    return images, torch.randn(settings.batch_size, *grid, generator=generator)


def micro_batches(step: int, settings: TrainSettings, rank: int = 0, latent: Sequence[int] = LATENT) -> Iterator[Batch]:
    """This rank's share of the global batch, cut as the loader cuts it."""
    images, noise = global_batch(step, settings, latent)
    for index in range(settings.accumulation):
        first = (index * settings.processes + rank) * settings.micro_batch
        rows, number = slice(first, first + settings.micro_batch), step * settings.batch_size + first
        numbers = range(number, number + settings.micro_batch)
        batch = drawn_batch(images[rows], noise[rows], numbers, drawing(settings))
        if (classes := settings.semi_supervised.classes) is not None:
            batch = batch._replace(labels=torch.tensor([number % (classes + 1) - 1 for number in numbers]))
        yield batch


def drawing(settings: TrainSettings) -> list[Objective[Any]]:
    """The objectives that draw for samples; they need no networks for that."""
    run, model = settings.facts(), settings.model
    codes = model.config["num_vq_embeddings"] if model.kind == "DiscreteVAE" else 0
    flow = starting_autoencoder(settings) if settings.init_from is not None and not settings.decoder.latents else None
    if flow is not None and not family_of(flow).flow_matching:
        flow = None
    more: dict[type[Objective[Any]], list[Any]] = {
        **{GAN_OBJECTIVE: [nn.Identity()], CodeRelaxation: [codes], SemiSupervised: [nn.Identity()]},
        FlowMatching: [flow],
    }
    kinds = [kind for kind in settings.objectives if kind.draw is not Objective.draw]
    return [kind(settings.section_of(kind), run, *more.get(kind, [])) for kind in kinds]


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
