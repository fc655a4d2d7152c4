"""What the pipelines of diffusers require of a first stage and read from its config, and checks against it.

The facts come from the source of diffusers 0.42; a test compares `reads` with the installed source. docs/export.md
shows them as a table. This module imports nothing heavy.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from latent_ae.config import UserError

PipelineName = Literal["sd", "sdxl", "sd3", "flux", "dit"]
PUBLISHED_FACTOR = 8
"""Downsampling factor of every published model of these families."""
SHAPE = ("latent_channels", "in_channels", "out_channels")
"""Keys of a config that are known before any latent is measured."""
NOTABLE_SHIFT = 0.1
"""A mean of the latents above this many of their standard deviations is worth a warning if it is not subtracted."""


class Pipeline(NamedTuple):
    """A family of diffusers pipelines."""

    title: str
    classes: tuple[str, ...]
    """Pipeline classes of diffusers, text- or class-to-image first, then image-to-image where there is one."""
    latent_channels: int
    """Latent channels of its denoiser."""
    reads: frozenset[str]
    """The keys among scaling_factor, shift_factor, latents_mean, latents_std and force_upcast that it reads."""
    patch: int
    """Side of the patches, in latent px, into which latents are packed (Flux) or embedded (SD3, DiT)."""
    multiple_px: int = 1
    """Number of image px of which each side must also be a multiple, whatever the downsampling factor."""


SCALE = frozenset({"scaling_factor"})
SHIFT = SCALE | {"shift_factor"}
PIPELINES: Mapping[str, Pipeline] = {
    "sd": Pipeline(
        "Stable Diffusion 1 and 2", ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"), 4, SCALE, 1, 8
    ),
    "sdxl": Pipeline(
        "Stable Diffusion XL",
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        4,
        SCALE | {"latents_mean", "latents_std", "force_upcast"},
        1,
        8,
    ),
    "sd3": Pipeline(
        "Stable Diffusion 3", ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"), 16, SHIFT, 2
    ),
    "flux": Pipeline("Flux.1", ("FluxPipeline", "FluxImg2ImgPipeline"), 16, SHIFT, 2),
    "dit": Pipeline("DiT", ("DiTPipeline",), 4, SCALE, 2),
}


def misfits(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return why the pipelines of a family cannot use a first stage, and what to change; empty if they can.

    Args:
        name: A key of PIPELINES.
        config: Config of an AutoencoderKL. Keys that it lacks, besides the channels, are not checked.
    """
    pipeline, problems = PIPELINES[name], []
    if config["latent_channels"] != pipeline.latent_channels:
        hard = ", and SDXL's code unpacks latents_mean as 4" if name == "sdxl" else ""
        problems.append(
            f"latent_channels is {config['latent_channels']}, its denoisers take {pipeline.latent_channels}{hard}: "
            f"train with model.latent_channels={pipeline.latent_channels}, or name no pipeline if the denoiser is your "
            "own"
        )
    for key in ("in_channels", "out_channels"):
        if config[key] != 3:
            problems.append(f"{key} is {config[key]}, pipelines give and expect RGB images: train with model.{key}=3")
    if "shift_factor" in pipeline.reads and config.get("shift_factor", 0.0) is None:
        problems.append("shift_factor is null, and the pipeline subtracts it: set it, to 0.0 for no shift")
    if "scaling_factor" in config and not (config["scaling_factor"] or 0) > 0:
        problems.append(f"scaling_factor is {config['scaling_factor']}, and the pipeline divides by it: set it above 0")
    for_channels = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    unread = [key for key in for_channels if key not in pipeline.reads]
    if unread:
        problems.append(
            f"{' and '.join(unread)} are set, which the pipeline does not read: it would apply scaling_factor "
            f"{config.get('scaling_factor')} to latents that are scaled otherwise; leave them null"
        )
    elif len(for_channels) == 1:
        problems.append(
            f"{for_channels[0]} is set alone; the pipeline applies both latents_mean and latents_std, or none"
        )
    for key in for_channels:
        if len(config[key]) != config["latent_channels"]:
            problems.append(f"{key} has {len(config[key])} values for {config['latent_channels']} latent channels")
    return problems


def refuse_misfit(name: str, config: Mapping[str, Any], kind: str = "AutoencoderKL") -> None:
    """Raise UserError if the pipelines of a family cannot use a first stage, with all `misfits`.

    Args:
        name: A key of PIPELINES.
        config: Config of the first stage.
        kind: Its diffusers class. Any other than AutoencoderKL is refused too, because its fit is not known here.
    """
    if kind != "AutoencoderKL":
        raise UserError(f"only an AutoencoderKL can be checked against {name}'s pipelines, not a {kind}: name none")
    if problems := misfits(name, config):
        classes = " and ".join(PIPELINES[name].classes)
        raise UserError(f"this first stage does not fit {name} ({classes}):\n  " + "\n  ".join(problems))


def remarks(name: str, config: Mapping[str, Any], mean: float, std: float) -> list[str]:
    """Return what is not ideal about a first stage that fits a family of pipelines, as sentences.

    Args:
        name: A key of PIPELINES.
        config: Config of an AutoencoderKL.
        mean: Mean of all its raw latents.
        std: Their standard deviation.
    """
    pipeline, sentences = PIPELINES[name], []
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if factor != PUBLISHED_FACTOR:
        sentences.append(
            f"the factor is {factor}; published {pipeline.title} denoisers know latents of 1/{PUBLISHED_FACTOR}, so "
            "this one needs a denoiser of its own, and the pipeline's default image size changes"
        )
    per_channel = config.get("latents_mean") is not None
    if "shift_factor" not in pipeline.reads and not per_channel and abs(mean) > NOTABLE_SHIFT * std:
        cure = "; --latents-mean-std makes this pipeline subtract it" if "latents_mean" in pipeline.reads else ""
        sentences.append(
            f"the latents' mean is {mean / std:.2f} of their standard deviation, and this pipeline subtracts no "
            f"shift_factor: the denoiser sees it{cure}"
        )
    if config.get("force_upcast") and "force_upcast" not in pipeline.reads:
        sentences.append(
            "force_upcast is true and this pipeline does not read it: in float16 give it a first stage in float32"
        )
    if config.get("force_upcast") and "force_upcast" in pipeline.reads and not config.get("use_post_quant_conv", True):
        sentences.append(
            "force_upcast is true and there is no post_quant_conv, whose dtype this pipeline asks for in float16: it "
            "fails there; load the first stage in float32 or bfloat16"
        )
    size, multiple = config.get("sample_size"), math.lcm(factor * pipeline.patch, pipeline.multiple_px)
    if isinstance(size, int) and size % multiple:
        sentences.append(
            f"sample_size {size} is no multiple of {multiple}, which the pipeline needs with this factor: images of "
            "that size are cut or refused"
        )
    return sentences
