"""What diffusers' pipelines require of a first stage and what they read of its config: data, and a check by it.

Read from the source of diffusers 0.42; a test holds `reads` against the source that is installed. docs/export.md shows
the same as a table. Nothing heavy is imported here.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from latent_ae.config import UserError

PipelineName = Literal["sd", "sdxl", "sd3", "flux", "dit"]
PUBLISHED_FACTOR = 8
"""Image px per latent px of every published model of these families."""
SHAPE = ("latent_channels", "in_channels", "out_channels")
"""Keys of a config that are known before any latent is measured."""
NOTABLE_SHIFT = 0.1
"""Mean of the latents, in their standard deviations, from which on leaving it in is worth a warning."""


class Pipeline(NamedTuple):
    """A family of pipelines."""

    title: str
    classes: tuple[str, ...]
    """Pipeline classes of diffusers, text- or class-to-image first, then image-to-image where there is one."""
    latent_channels: int
    """That its denoiser takes."""
    reads: frozenset[str]
    """Those of scaling_factor, shift_factor, latents_mean, latents_std and force_upcast that it reads."""
    patch: int
    """Latents are cut to a multiple of so many px: packed (Flux) or embedded (SD3, DiT) as patches of that side."""
    multiple_px: int = 1
    """Sides that it accepts besides, whatever the factor."""


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
    """Why the pipelines of family `name` cannot use a first stage with this AutoencoderKL config, and what to change.

    Empty when they can. A key that `config` lacks is not looked at.
    """
    pipeline, found = PIPELINES[name], []
    if config["latent_channels"] != pipeline.latent_channels:
        hard = ", and SDXL's code unpacks latents_mean as 4" if name == "sdxl" else ""
        found.append(
            f"latent_channels is {config['latent_channels']}, its denoisers take {pipeline.latent_channels}{hard}: "
            f"train with model.latent_channels={pipeline.latent_channels}, or name no pipeline if the denoiser is your "
            "own"
        )
    for key in ("in_channels", "out_channels"):
        if config[key] != 3:
            found.append(f"{key} is {config[key]}, pipelines give and expect RGB images: train with model.{key}=3")
    if "shift_factor" in pipeline.reads and config.get("shift_factor", 0.0) is None:
        found.append("shift_factor is null, and the pipeline subtracts it: set it, 0.0 where no shift is wanted")
    if "scaling_factor" in config and not (config["scaling_factor"] or 0) > 0:
        found.append(f"scaling_factor is {config['scaling_factor']}, and the pipeline divides by it: set it above 0")
    for_channels = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    unread = [key for key in for_channels if key not in pipeline.reads]
    if unread:
        found.append(
            f"{' and '.join(unread)} are set, which the pipeline does not read: it would apply scaling_factor "
            f"{config.get('scaling_factor')} to latents that are scaled otherwise; leave them null"
        )
    elif len(for_channels) == 1:
        found.append(f"{for_channels[0]} is set alone; the pipeline applies both latents_mean and latents_std, or none")
    for key in for_channels:
        if len(config[key]) != config["latent_channels"]:
            found.append(f"{key} has {len(config[key])} values for {config['latent_channels']} latent channels")
    return found


def refuse_misfit(name: str, config: Mapping[str, Any], kind: str = "AutoencoderKL") -> None:
    """Raises UserError with all `misfits`, or for another class of first stage, which is not known here."""
    if kind != "AutoencoderKL":
        raise UserError(f"whether a {kind} fits {name}'s pipelines is not known here, only of AutoencoderKL: name none")
    if found := misfits(name, config):
        classes = " and ".join(PIPELINES[name].classes)
        raise UserError(f"this first stage does not fit {name} ({classes}):\n  " + "\n  ".join(found))


def remarks(name: str, config: Mapping[str, Any], mean: float, std: float) -> list[str]:
    """What is not ideal about a first stage that fits, as sentences. `mean`, `std`: of all its raw latents."""
    pipeline, found = PIPELINES[name], []
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if factor != PUBLISHED_FACTOR:
        found.append(
            f"the factor is {factor}; published {pipeline.title} denoisers know latents of 1/{PUBLISHED_FACTOR}, so "
            "this one needs a denoiser of its own, and the pipeline's default image size becomes another"
        )
    per_channel = config.get("latents_mean") is not None
    if "shift_factor" not in pipeline.reads and not per_channel and abs(mean) > NOTABLE_SHIFT * std:
        cure = "; --latents-mean-std makes this pipeline subtract it" if "latents_mean" in pipeline.reads else ""
        found.append(
            f"the latents' mean is {mean / std:.2f} of their standard deviation, and this pipeline subtracts no "
            f"shift_factor: the denoiser sees it{cure}"
        )
    if config.get("force_upcast") and "force_upcast" not in pipeline.reads:
        found.append(
            "force_upcast is true and this pipeline does not read it: in float16 give it a first stage in float32"
        )
    if config.get("force_upcast") and "force_upcast" in pipeline.reads and not config.get("use_post_quant_conv", True):
        found.append(
            "force_upcast is true and there is no post_quant_conv, whose dtype this pipeline asks for in float16: it "
            "fails there; load the first stage in float32 or bfloat16"
        )
    size, multiple = config.get("sample_size"), math.lcm(factor * pipeline.patch, pipeline.multiple_px)
    if isinstance(size, int) and size % multiple:
        found.append(
            f"sample_size {size} is no multiple of {multiple}, which the pipeline needs with this factor: images of "
            "that size are cut or refused"
        )
    return found
