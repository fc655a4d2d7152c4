"""The scaling of latents, which no shape tells: given by the user, read from a file or measured, but never guessed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.convert.checkpoint import Tensors, read_tensors
from latent_ae.convert.known import published
from latent_ae.convert.settings import ConvertSettings
from latent_ae.data.held_out import Framing, HeldOutImages
from latent_ae.data.loader import open_images
from latent_ae.data.sources import part_of
from latent_ae.distributed import processes
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.models.posterior import draw
from latent_ae.models.registry import family_of
from latent_ae.progress import progress_bar

PLAYGROUND_SCALING = 0.5
"""Scaling factor of Playground 2.5 besides the statistics in its file (diffusers `loaders/single_file_utils.py`)."""
FLUX2_EPSILON = 1e-4
"""FLUX.2 adds it to the variance (black-forest-labs/flux2 `src/flux2/autoencoder.py`)."""
STD_EPSILON = 1e-5
"""RAE adds it to the variance (bytetriper/RAE `src/stage1/rae.py`)."""


KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class Scaling(NamedTuple):
    """The scaling that a diffusion model applies to latents."""

    config: dict[str, Any]
    """Its keys and values in the config."""
    source: str
    """Where it comes from, for results."""


def refuse_unusable(scaling: Scaling) -> None:
    """Raise UserError if a scaling would make latents zero, infinite or NaN, or turn their sign."""
    for key, value in scaling.config.items():
        numbers = torch.as_tensor([] if value is None else value).double()
        scales = key in ("scaling_factor", "latents_std")
        wrong = ~numbers.isfinite() | (scales & (numbers <= 0))
        if wrong.any():
            rule = "finite numbers above 0" if scales else "finite numbers"
            raise UserError(
                f"{key} has {float(numbers[wrong][0]):g} ({scaling.source}), which would destroy the latents: it takes "
                f"{rule} only"
            )


def apply(model: Any, scaling: Scaling) -> None:
    """Write a scaling into an instance's config, and into the buffers of a class that computes with it."""
    model.register_to_config(**scaling.config)
    for key in ("latents_mean", "latents_std"):
        if hasattr(model, f"_{key}") and scaling.config.get(key) is not None:
            setattr(model, f"_{key}", torch.tensor(scaling.config[key]))


def said(settings: ConvertSettings, model: Any) -> Scaling | None:
    """Return the scaling that the user gives; None if the user gives none.

    Args:
        settings: The settings, of which scaling_factor, shift_factor, latents_mean and latents_std are used.
        model: The model.

    Raises:
        UserError: If the class does not have one of the given keys, one of two keys that belong together is missing, or
            both a scaling of all channels and one of each channel are given.
    """
    keys, kind = model.config, type(model).__name__
    words = {key: getattr(settings, key) for key in KEYS}
    words = {
        key: list(value) if isinstance(value, tuple) else value for key, value in words.items() if value is not None
    }
    if not words:
        return None
    unknown = [key for key, value in words.items() if key not in keys and not (key == "shift_factor" and value == 0)]
    if unknown:
        has = "the statistics in its batch norm" if kind == "AutoencoderKLFlux2" else "no such key in its config"
        raise UserError(f"{unknown[0]}: {kind} has {has}; leave it out")
    words = {key: value for key, value in words.items() if key in keys}
    if ("latents_mean" in words) != ("latents_std" in words):
        raise UserError("latents_mean and latents_std belong together; give both")
    per_channel = "latents_mean" in words
    if per_channel and len(words) > 2:
        raise UserError(
            "latents_mean and latents_std stand in place of scaling_factor and shift_factor; leave one of the two out"
        )
    if not per_channel and "scaling_factor" not in words:
        raise UserError("shift_factor belongs to a scaling_factor; give both")
    if not per_channel and "shift_factor" in keys and "shift_factor" not in words:
        raise UserError("scaling_factor is given without shift_factor; give both, shift_factor=0 where there is none")
    if per_channel:
        _check_channels(words, family_of(model).latent_channels(keys))
        if "encoder_type" in keys:  # an RAE has statistics of (C, H, W)
            words = {key: [[[number]] for number in value] for key, value in words.items()}
        words = {"scaling_factor": 1.0, **({"shift_factor": 0.0} if "shift_factor" in keys else {}), **words}
    return Scaling(words, "as said")


def kept(beside: Tensors, tensors: Mapping[str, Tensor]) -> Scaling | None:
    """Return the scaling that a checkpoint holds; None if it holds none.

    Args:
        beside: All tensors of the file.
        tensors: The tensors of the first stage.

    Raises:
        UserError: If the statistics of a batch norm would destroy latents.
    """
    if "bn.running_mean" in tensors and "bn.running_var" in tensors:
        source = "the batch norm in the file"
        std = (tensors["bn.running_var"].double() + FLUX2_EPSILON).sqrt()
        refuse_unusable(Scaling({"latents_mean": tensors["bn.running_mean"], "latents_std": std}, source))
        return Scaling({}, source)
    if "edm_mean" in beside and "edm_std" in beside:
        mean, std = (beside[name].float().flatten().tolist() for name in ("edm_mean", "edm_std"))
        config = {"latents_mean": mean, "latents_std": std, "scaling_factor": PLAYGROUND_SCALING, "shift_factor": None}
        return Scaling(config, "edm_mean and edm_std in the file")
    # latent-diffusion has this buffer where it has scaled by the deviation of a batch (`scale_by_std`, `ddpm.py`)
    if "scale_factor" in beside and any(name.startswith("first_stage_model.") for name in beside):
        factor = beside["scale_factor"]
        if factor.numel() == 1:
            return Scaling({"scaling_factor": float(factor), "shift_factor": 0.0}, "scale_factor in the file")
    return None


def read_statistics(path: Path, keys: Mapping[str, Any]) -> Scaling:
    """Read the scaling in a file of statistics: mean and std or var, per channel (VA-VAE) or per latent value (RAE).

    Args:
        path: File of tensors.
        keys: Config of the model.

    Raises:
        UserError: If the file holds no such tensors, or the model's config has no keys for them.
    """
    tensors, _ = read_tensors(path)
    spread = next((name for name in ("std", "var") if name in tensors), None)
    if "mean" not in tensors or spread is None:
        raise UserError(f"{path} holds {', '.join(list(tensors)[:4])}; statistics are mean and std, or mean and var")
    if "latents_mean" not in keys:
        raise UserError("--statistics: this class of first stage has no place for a mean per channel")
    mean, std = tensors["mean"].float(), tensors[spread].float()
    # RAE divides by sqrt(var + 1e-5), and AutoencoderRAE by std + 1e-5
    per_place = "encoder_type" in keys
    epsilon = STD_EPSILON if per_place else 0.0
    std = (std + epsilon).sqrt() - epsilon if spread == "var" else std
    if not per_place:
        mean, std = mean.flatten(), std.flatten()
    config: dict[str, Any] = {"latents_mean": mean.tolist(), "latents_std": std.tolist(), "scaling_factor": 1.0}
    if per_place and (mean.ndim != 3 or len(mean) != keys["encoder_hidden_size"] or std.shape != mean.shape):
        raise UserError(
            f"{path} has a mean of the shape {tuple(mean.shape)}; an RAE with latents of {keys['encoder_hidden_size']} "
            "channels needs (channels, height, width)"
        )
    if not per_place:
        _check_channels(config, int(keys["latent_channels"]))
    return Scaling(config | ({"shift_factor": 0.0} if "shift_factor" in keys else {}), f"statistics in {path.name}")


def statistics_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a config's statistics as `read_statistics` reads them: mean and std, or mean and var for an RAE.

    Returns:
        The tensors by name; empty if the config has no statistics.
    """
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return {}
    mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
    if "encoder_type" in config:
        return {"mean": mean, "var": (std + STD_EPSILON).square() - STD_EPSILON}
    return {"mean": mean.view(1, -1, 1, 1), "std": std.view(1, -1, 1, 1)}


@torch.no_grad()
def measured(model: nn.Module, data: str, factor: int, settings: ConvertSettings) -> LatentStatistics:
    """Measure statistics of images' latents, which are sampled if there is a posterior.

    Args:
        model: An instance of the class, in evaluation mode.
        data: Location of the images, like DATA on the command line.
        factor: Image px per latent px along one side.
        settings: How images are read, and how many.

    Raises:
        UserError: If images cannot be read, or the model does not take their size.
    """
    _, device = processes(settings.device)
    source, _ = part_of(open_images(settings.data(data), "all"), settings.limit, settings.seed)
    family = family_of(model)
    side, channels = family.side(model.config), family.channels(model.config)
    if side and "resolution" in settings.model_fields_set and settings.resolution != side:
        raise UserError(f"resolution: this {type(model).__name__} takes images of {side} px only; leave it out")
    side = side or settings.resolution
    framing = Framing(resize_px=side, crop_px=side)
    images = HeldOutImages(source, settings.data(data), channels, framing, factor)
    statistics, generator, batch = LatentStatistics(), torch.Generator().manual_seed(settings.seed), list[Tensor]()
    model = model.to(device)

    def take() -> None:
        drawn = draw(model, torch.stack(batch).to(device), None)
        noise = torch.randn(drawn.latent.shape, generator=generator).to(device)
        scale = 0.0 if drawn.logvar is None else torch.exp(0.5 * drawn.logvar)
        statistics.update(drawn.mean + scale * noise)
        batch.clear()

    with float32_arithmetic(), progress_bar("latent statistics", settings.limit, "img") as bar:
        for _, _, image in images:
            batch.append(image)
            if len(batch) == settings.batch_size:
                take()
            bar.update(1)
        if batch:
            take()
    model.to("cpu")
    return statistics


def measured_scaling(statistics: LatentStatistics, keys: Mapping[str, Any], data: str) -> Scaling:
    """Return measured statistics as the scaling in a model's config.

    Args:
        statistics: Statistics of the latents.
        keys: Config of the model.
        data: Location of the images, for results.

    Raises:
        UserError: If the statistics are not finite, or all latents are equal.
    """
    source = f"measured on {data}"
    if "encoder_type" in keys:
        mean, std = ([[[value]] for value in values] for values in (statistics.channel_mean, statistics.channel_std))
        return Scaling({"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0}, source)
    config = {"scaling_factor": statistics.scaling_factor, "shift_factor": statistics.shift_factor}
    return Scaling({key: value for key, value in config.items() if key in keys}, source)


def question(layout: str, config: Mapping[str, Any], factor: int, path: Path) -> str:
    """Return the message about an unknown scaling, with the published scaling of models of the same shape.

    Args:
        layout: A key of LAYOUTS.
        config: Config of the model.
        factor: Image px per latent px along one side.
        path: File of the model.
    """
    channels = int(config.get("latent_channels") or 0)
    lines = [f"  {row.model}: {row.words}" for row in published(layout, factor, channels)]
    told = ["Published for this shape (another model may have it, too, with other latents):", *lines] if lines else []
    if "num_vq_embeddings" in config:
        told = ["A model that reads the numbers of codes, a transformer, scales nothing: scaling_factor=1."]
    return "\n".join(
        [
            f"{path} does not say how its latents are scaled, and a wrong scaling looks like a bad diffusion model. "
            "Give scaling_factor=... (with shift_factor=... where the class has it), --statistics FILE with the mean "
            "and std of each channel, or --measure DATA.",
            *told,
        ]
    )


def _check_channels(config: Mapping[str, Any], channels: int) -> None:
    for key in ("latents_mean", "latents_std"):
        if len(config[key]) != channels:
            raise UserError(f"{key} has {len(config[key])} values for {channels} latent channels")
