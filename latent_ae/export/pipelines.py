"""The requirements of diffusers' pipelines on a first stage and its config, and checks of them.

The facts come from the source of diffusers 0.42; a test compares `reads` with the installed source. docs/export.md
shows them as a table. This module imports nothing heavy until a model is checked.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from latent_ae.config import UserError
from latent_ae.models.settings import Kind

PipelineName = Literal[
    "sd",
    "sdxl",
    "sd3",
    "flux",
    "dit",
    "flux2",
    "sana",
    "qwenimage",
    "z_image",
    "wan",
    "pixart",
    "hunyuanimage",
    "lumina2",
    "kandinsky",
]
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Keys of a config that are not known before latents are measured, unless latents keep their scaling."""
NOTABLE_SHIFT = 0.1
"""A mean of the latents above this many of their standard deviations is worth a warning if it is not subtracted."""
NOTABLE_STD = 2.0
"""A standard deviation above this, or below its inverse, is worth a warning if the pipeline does not divide by it."""


class Shape(NamedTuple):
    """The numbers of a first stage on which its denoiser depends."""

    latent_channels: int
    in_channels: int
    """Channels of the images."""
    out_channels: int
    """Channels of the reconstructions."""
    factor: int
    """Image px per latent px along one side."""


def _each_side(patch: int, multiple_px: int = 1) -> Callable[[int], int]:
    """Return `multiple` of a Pipeline whose sides are multiples of `patch` latent px and of `multiple_px` image px."""
    return lambda factor: math.lcm(factor * patch, multiple_px)


class Pipeline(NamedTuple):
    """A family of diffusers pipelines."""

    title: str
    classes: tuple[str, ...]
    """Pipeline classes of diffusers, text- or class-to-image first, then image-to-image where there is one."""
    published: Mapping[int, int]
    """Downsampling factors of the published first stages, by their latent channels, which its denoisers take."""
    reads: frozenset[str]
    """The keys among SCALING and force_upcast that it reads, and `bn` if it reads the model's batch norm."""
    multiple: Callable[[int], int]
    """Takes the downsampling factor and returns the number of image px of which each side must be a multiple."""
    kind: str = "AutoencoderKL"
    """Class of its first stage, a key of the registry's FAMILIES."""
    refusal: Callable[[Shape, Mapping[str, Any]], str | None] = lambda shape, config: None
    """Takes shape and config of a first stage and returns what else stops its pipelines, and what to do; or None."""


def _factor_is_8(shape: Shape, config: Mapping[str, Any]) -> str | None:
    if shape.factor == 8:
        return None
    return f"the downsampling factor is {shape.factor}, and its code takes 8 for granted: give the model four levels"


def _patches_are_of_2(shape: Shape, config: Mapping[str, Any]) -> str | None:
    patch = tuple(config.get("patch_size", (2, 2)))
    return None if patch == (2, 2) else f"patch_size is {list(patch)}, and its code packs 2 x 2 latents: set [2, 2]"


def _factor_is_stated(shape: Shape, config: Mapping[str, Any]) -> str | None:
    stated = config.get("scale_factor_spatial", shape.factor)
    if stated == shape.factor:
        return None
    return f"scale_factor_spatial is {stated}, and the model downsamples by {shape.factor}: set it to that"


ALIKE = {"AutoencoderKL": ("AsymmetricAutoencoderKL",)}
"""Classes that pipelines take in place of their own, because they call and read both alike."""
SCALE = frozenset({"scaling_factor"})
SHIFT = SCALE | {"shift_factor"}
CHANNELS = frozenset({"latents_mean", "latents_std"})
PIPELINES: Mapping[str, Pipeline] = {
    "sd": Pipeline(
        "Stable Diffusion 1 and 2",
        ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        {4: 8},
        SCALE,
        _each_side(1, 8),
    ),
    "sdxl": Pipeline(
        "Stable Diffusion XL",
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        {4: 8},
        SCALE | CHANNELS | {"force_upcast"},
        _each_side(1, 8),
    ),
    "sd3": Pipeline(
        "Stable Diffusion 3",
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        {16: 8},
        SHIFT,
        _each_side(2),
    ),
    "flux": Pipeline("Flux.1", ("FluxPipeline", "FluxImg2ImgPipeline"), {16: 8}, SHIFT, _each_side(2)),
    "dit": Pipeline("DiT", ("DiTPipeline",), {4: 8}, SCALE, _each_side(2)),
    "flux2": Pipeline(
        "Flux.2",
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        {32: 8},
        frozenset({"bn"}),
        _each_side(2),
        "AutoencoderKLFlux2",
        _patches_are_of_2,
    ),
    "sana": Pipeline("Sana", ("SanaPipeline",), {32: 32}, SCALE, _each_side(1, 32), "AutoencoderDC"),
    "qwenimage": Pipeline(
        "Qwen-Image",
        ("QwenImagePipeline", "QwenImageImg2ImgPipeline"),
        {16: 8},
        CHANNELS,
        _each_side(2),
        "AutoencoderKLQwenImage",
    ),
    "z_image": Pipeline("Z-Image", ("ZImagePipeline", "ZImageImg2ImgPipeline"), {16: 8}, SHIFT, _each_side(2)),
    # still images are videos of one frame
    "wan": Pipeline(
        "Wan 2.1 and 2.2",
        ("WanPipeline",),
        {16: 8, 48: 16},
        CHANNELS,
        _each_side(2, 16),
        "AutoencoderKLWan",
        _factor_is_stated,
    ),
    "pixart": Pipeline("PixArt", ("PixArtAlphaPipeline", "PixArtSigmaPipeline"), {4: 8}, SCALE, _each_side(2, 8)),
    "hunyuanimage": Pipeline(
        "HunyuanImage 2.1", ("HunyuanImagePipeline",), {64: 32}, SCALE, _each_side(1), "AutoencoderKLHunyuanImage"
    ),
    "lumina2": Pipeline("Lumina 2", ("Lumina2Pipeline",), {16: 8}, SHIFT, _each_side(2), refusal=_factor_is_8),
    # the number of latent px along a side is a multiple of the factor itself
    "kandinsky": Pipeline(
        "Kandinsky 2.2",
        ("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline"),
        {4: 8},
        frozenset(),
        lambda factor: factor**2,
        "VQModel",
    ),
}


def shape_of(kind: str, config: Mapping[str, Any]) -> Shape:
    """Return the shape of a first stage.

    Args:
        kind: A key of the registry's FAMILIES.
        config: A whole config of that class.
    """
    from diffusers.configuration_utils import FrozenDict

    from latent_ae.models.registry import FAMILIES

    family, keys = FAMILIES[kind], FrozenDict(config)  # the registry reads keys as attributes, too
    channels = family.channels(keys)
    return Shape(family.latent_channels(keys), channels, family.out_channels(keys) or channels, family.factor(keys))


def before_measuring(config: Mapping[str, Any], *, keep_scaling: bool, latents_mean_std: bool) -> dict[str, Any]:
    """Return the part of an export's config that is known before the latents are measured, for `misfits`.

    Args:
        config: Config of the trained model.
        keep_scaling: Whether the export keeps the scaling of this config.
        latents_mean_std: Whether the export writes the mean and standard deviation of each channel.
    """
    known = dict(config)
    if keep_scaling:
        return known | ({"shift_factor": known["shift_factor"] or 0.0} if "shift_factor" in known else {})
    known = {key: value for key, value in known.items() if key not in SCALING}
    if latents_mean_std:
        count = int(config.get("latent_channels") or config.get("z_dim") or 0)
        known |= dict.fromkeys(CHANNELS, [1.0] * count)
    return known


def kind_misfit(name: str, kind: str) -> str | None:
    """Return why the pipelines of a family do not take a class of first stages; None if they do.

    Args:
        name: A key of PIPELINES.
        kind: Name of the class.
    """
    taken = {other: (pipeline.kind, *ALIKE.get(pipeline.kind, ())) for other, pipeline in PIPELINES.items()}
    if kind in taken[name]:
        return None
    others = [other for other, kinds in taken.items() if kind in kinds]
    fits = f"it may fit {', '.join(others)}" if others else "no family known here takes one, so name none"
    return f"its pipelines take the class {PIPELINES[name].kind}, not {kind}: {fits}"


def shape_misfits(name: str, shape: Shape, config: Mapping[str, Any] | None = None) -> list[str]:
    """Return why the shape of a first stage of the right class does not suit a family, and what to change.

    Args:
        name: A key of PIPELINES.
        shape: Shape of the first stage.
        config: Config of the first stage; None if only the shape is known.
    """
    pipeline, problems = PIPELINES[name], []
    if shape.latent_channels not in pipeline.published:
        takes = " or ".join(map(str, pipeline.published))
        hard = ", and SDXL's code unpacks latents_mean as 4" if name == "sdxl" else ""
        problems.append(
            f"latent_channels is {shape.latent_channels}, its denoisers take {takes}{hard}: "
            f"{_cure(pipeline.kind, 'latent_channels', takes)}, or name no pipeline if the denoiser is your own"
        )
    for key in ("in_channels", "out_channels"):
        if (count := getattr(shape, key)) != 3:
            cure = _cure(pipeline.kind, key, "3")
            problems.append(f"{key} is {count}, pipelines give and expect RGB images: {cure}")
    if reason := pipeline.refusal(shape, config or {}):
        problems.append(reason)
    return problems


def _cure(kind: str, key: str, value: str) -> str:
    """Return how to get another value of a config key; only some classes train from fresh weights."""
    if kind not in get_args(Kind):
        return f"begin with a model of {value}"
    if kind == "VQModel" and key == "latent_channels":
        key = "vq_embed_dim"  # the channels of its codes, where it is set
    return f"train with model.{'' if kind == 'AutoencoderKL' else 'config.'}{key}={value}"


def misfits(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return why the pipelines of a family cannot use a first stage, and what to change; empty if they can.

    Args:
        name: A key of PIPELINES.
        config: Config of a first stage of the family's class. Keys of SCALING that it lacks are not checked.
    """
    pipeline = PIPELINES[name]
    shape = shape_of(pipeline.kind, config)
    problems = shape_misfits(name, shape, config)
    if "shift_factor" in pipeline.reads and config.get("shift_factor", 0.0) is None:
        problems.append("shift_factor is null, and the pipeline subtracts it: set it, to 0.0 for no shift")
    if "scaling_factor" in pipeline.reads and "scaling_factor" in config and not (config["scaling_factor"] or 0) > 0:
        problems.append(f"scaling_factor is {config['scaling_factor']}, and the pipeline divides by it: set it above 0")
    for_channels = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    unread = [key for key in for_channels if key not in pipeline.reads]
    missing = [key for key in ("latents_mean", "latents_std") if key in config and config[key] is None]
    if unread:
        problems.append(
            f"{' and '.join(unread)} are set, which the pipeline does not read: it would apply scaling_factor "
            f"{config.get('scaling_factor')} to latents that are scaled otherwise; leave them null"
        )
    elif pipeline.reads == CHANNELS and missing:
        problems.append(f"{' and '.join(missing)} are null, and the pipeline applies them: set them for each channel")
    elif len(for_channels) == 1:
        problems.append(
            f"{for_channels[0]} is set alone; the pipeline applies both latents_mean and latents_std, or none"
        )
    for key in for_channels:
        if len(config[key]) != shape.latent_channels:
            problems.append(f"{key} has {len(config[key])} values for {shape.latent_channels} latent channels")
    return problems


def refuse_misfit(name: str, config: Mapping[str, Any], kind: str = "AutoencoderKL") -> None:
    """Raise UserError if the pipelines of a family cannot use a first stage, with all reasons.

    Args:
        name: A key of PIPELINES.
        config: Config of the first stage, as `misfits` takes it.
        kind: Diffusers class of the first stage.
    """
    wrong_kind = kind_misfit(name, kind)
    problems = misfits(name, config) if wrong_kind is None else [wrong_kind]
    if wrong_kind is None and kind == "AsymmetricAutoencoderKL":
        problems += _unstated_shift(PIPELINES[name], config)
    if problems:
        classes = " and ".join(PIPELINES[name].classes)
        raise UserError(f"this first stage does not fit {name} ({classes}):\n  " + "\n  ".join(problems))


def _unstated_shift(pipeline: Pipeline, config: Mapping[str, Any]) -> list[str]:
    """Return why an AsymmetricAutoencoderKL fails in a pipeline that asks for a shift, which its class lacks."""
    if "shift_factor" not in pipeline.reads or "shift_factor" in config:
        return []
    return [
        "AsymmetricAutoencoderKL has no shift_factor of its own, and the pipeline subtracts one: only a new decoder "
        "(decoder.*) for an AutoencoderKL's latents states that model's"
    ]


def remarks(name: str, config: Mapping[str, Any], mean: float, std: float) -> list[str]:
    """Return sentences on what is not ideal about a first stage that fits a family of pipelines.

    Args:
        name: A key of PIPELINES.
        config: Config of a first stage of the family's class.
        mean: Mean of all raw latents.
        std: Standard deviation of all raw latents.
    """
    pipeline, sentences = PIPELINES[name], []
    shape = shape_of(pipeline.kind, config)
    factor, published = shape.factor, pipeline.published[shape.latent_channels]
    if factor != published:
        sentences.append(
            f"the factor is {factor}; published {pipeline.title} denoisers know latents of 1/{published}, so "
            "this one needs a denoiser of its own, and the pipeline's default image size changes"
        )
    per_channel = config.get("latents_mean") is not None or "bn" in pipeline.reads
    if "shift_factor" not in pipeline.reads and not per_channel and abs(mean) > NOTABLE_SHIFT * std:
        cure = "; --latents-mean-std makes this pipeline subtract it" if "latents_mean" in pipeline.reads else ""
        sentences.append(
            f"the latents' mean is {mean / std:.2f} of their standard deviation, and this pipeline subtracts no "
            f"shift_factor: the denoiser sees it{cure}"
        )
    if not pipeline.reads and not 1 / NOTABLE_STD <= std <= NOTABLE_STD:
        sentences.append(
            f"the latents' standard deviation is {std:.3g}, and this pipeline scales nothing: the denoiser sees it, "
            "and a published one knows latents of other values"
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
    size, multiple = config.get("sample_size"), pipeline.multiple(factor)
    if isinstance(size, int) and size % multiple:
        sentences.append(
            f"sample_size {size} is no multiple of {multiple}, which the pipeline needs with this factor: images of "
            "that size are cut, enlarged or refused"
        )
    return sentences
