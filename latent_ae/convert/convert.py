"""A first stage from one layout into another, written, read again and compared.

from latent_ae.convert.convert import convert_first_stage
convert_first_stage("ae.safetensors", "flux-vae", ConvertSettings(scaling_factor=0.3611, shift_factor=0.1159))
convert_first_stage("runs/mine", "vae.safetensors", to="ldm")
"""

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.convert import scaling
from latent_ae.convert.checkpoint import PICKLED, first_dtype, write_tensors
from latent_ae.convert.find import Found, find_first_stage
from latent_ae.convert.layout import Config, levels_of, to_ours, to_theirs
from latent_ae.convert.registry import LAYOUTS, WRITTEN
from latent_ae.convert.settings import ConvertSettings
from latent_ae.data.settings import without_section
from latent_ae.export.pipelines import refuse_misfit
from latent_ae.files import writing
from latent_ae.models.loading import PIPELINE_FOLDERS
from latent_ae.models.posterior import moments_of
from latent_ae.progress import now
from latent_ae.text import printable

SMALLEST_TEST_IMAGE_PX = 32


@dataclass(frozen=True)
class FirstStage:
    """A first stage under diffusers' names."""

    kind: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    layout: str
    """That it was read from; diffusers for a folder."""
    weights: str
    scaling: scaling.Scaling | None
    """As the checkpoint carries it."""
    original: Mapping[str, Tensor]
    """The tensors as they were read, under the original's names."""


def convert_first_stage(
    source: str | Path,
    out: str | Path,
    settings: ConvertSettings | None = None,
    *,
    to: str | None = None,
    encoder: str | Path | None = None,
    statistics: str | Path | None = None,
    measure: str | None = None,
    pipeline: Any = None,
) -> dict[str, Any]:
    """Converts a first stage and compares what was written with what was read.

    Args:
        source: A file of weights of a known layout, or a folder of diffusers (also a pipeline's or a run of ours).
        out: The folder to write, or with `to` the file; neither may exist, though an empty folder may.
        settings: What no shape tells.
        to: One of `WRITTEN`: the layout of the file to write. None writes a folder.
        encoder: File or folder that holds the encoder, where `source` holds the decoder alone.
        statistics: File of tensors mean and std (or var) by which latents are scaled.
        measure: Images to measure scaling and shift on, as DATA on the command line.
        pipeline: A family of pipelines of diffusers that must be able to use the result.

    Returns:
        What was written, JSON-ready; "max_abs_difference" holds that of all tensors and of a reconstruction of a test
        image in [-1, 1], which are 0 where every number arrived.

    Raises:
        UserError: Where the source is not known or not complete, no class of diffusers (or no file of the layout `to`)
            can hold it, the scaling is not known, or `out` exists or cannot be written.
    """
    settings, source, out = settings or ConvertSettings(), Path(source).expanduser(), Path(out).expanduser()
    _refuse_existing(out, to)
    if source.is_dir() and to is None:
        raise UserError(f"{source} is a folder already; name the layout of the file to write: --to {'|'.join(WRITTEN)}")
    if to is not None and (measure or statistics):
        raise UserError("a file of an original layout holds no scaling; leave --measure and --statistics out")
    now(f"reading {source}")
    given = None if encoder is None else Path(encoder).expanduser()
    stage = read_folder(source) if source.is_dir() else read_file(source, settings, given)
    model = build(stage, source)
    if to is None:
        found = _scaling(stage, model, settings, statistics, measure, source)
        model.register_to_config(**found.config)
        if pipeline is not None:
            refuse_misfit(pipeline, model.config, stage.kind)
        written, difference = [str(out)], _write_folder(model, stage, out)
        scaled_by = found.source
    else:
        if pipeline is not None:
            refuse_misfit(pipeline, model.config, stage.kind)
        written, difference = _write_file(model, stage, out, to, settings, given)
        scaled_by = None
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "from": stage.layout,
        "to": to or "diffusers",
        "class": stage.kind,
        "written": written,
        "weights": stage.weights,
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "dtype": str(first_dtype(stage.state)).removeprefix("torch."),
        "scaling": scaled_by,
        "config": config,
        "max_abs_difference": difference,
    }


def read_file(path: Path, settings: ConvertSettings, encoder: Path | None = None) -> FirstStage:
    """The first stage in a file of weights, under diffusers' names. Raises UserError."""
    found = find_first_stage(path, ema=settings.ema, prefix=settings.prefix)
    found = _completed(found, path, encoder)
    layout = LAYOUTS[found.layout]
    state, unknown = to_ours(found.tensors, layout.rules(None), levels_of(found.tensors))
    if unknown:
        raise UserError(
            f"{path} has the names of {found.layout} ({layout.title}), and {_some(unknown)} besides, for which "
            f"{layout.kind} has no place: it is a variant that cannot be converted"
        )
    words = {key: value for key, value in settings.model_dump().items() if value is not None}
    try:
        config = layout.infer(state, words)
    except KeyError as error:
        raise UserError(
            f"{path} is not complete: it has the names of {found.layout}, but nothing like {error}"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    kept = scaling.kept(found.beside, found.tensors)
    if kept is None and layout.fixed_scaling is not None:
        kept = scaling.Scaling(dict(layout.fixed_scaling), f"{found.layout} has it by design")
    return FirstStage(layout.kind, config, state, found.layout, found.weights, kept, found.tensors)


def _completed(found: Found, path: Path, encoder: Path | None) -> Found:
    """With the encoder of another file, where the first holds the decoder alone. Raises UserError."""
    layout = LAYOUTS[found.layout]
    if found.half("encoder") and found.half("decoder"):
        if encoder is not None:
            raise UserError(f"--encoder: {path} has an encoder of its own; leave it out")
        return found
    if not found.half("decoder"):
        raise UserError(f"{path} holds an encoder alone; give the file of its decoder, and this one with --encoder")
    if encoder is None:
        raise UserError(f"{path} holds a decoder alone: {layout.decoder_alone}")
    other = find_first_stage(encoder)
    if not other.half("encoder"):
        raise UserError(f"--encoder: {encoder} holds no encoder")
    if LAYOUTS[other.layout].anchor != layout.anchor:
        raise UserError(f"--encoder: {encoder} is of layout {other.layout}, {path} of {found.layout}")
    # the bn of FLUX.2 is the encoder's; a decoder without quant convolutions does not tell its layout
    rest = {name: tensor for name, tensor in other.tensors.items() if not name.startswith(("decoder.", "post_quant"))}
    name = other.layout if other.layout == "flux2" else found.layout
    return found._replace(layout=name, tensors={**rest, **found.tensors})


def read_folder(folder: Path) -> FirstStage:
    """The first stage in a folder of diffusers, a pipeline's or a run's. Raises UserError."""
    places = [folder, folder / "export", *(folder / name for name in PIPELINE_FOLDERS)]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is None:
        raise UserError(
            f"{folder} has no config.json, nor a subfolder export or {', '.join(PIPELINE_FOLDERS)} with one"
        )
    kind = str(diffusers.AutoencoderKL.load_config(place).get("_class_name"))
    cls = _class(kind)
    try:
        dtype = first_dtype(None, place)
        model = cls.from_pretrained(place, local_files_only=True, torch_dtype=dtype)
    except Exception as error:  # diffusers raises many kinds for a missing, truncated or foreign file
        raise UserError(f"cannot load {place}: {' '.join(str(error).split())[:400]}") from error
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return FirstStage(kind, config, state, "diffusers", "as stored", None, state)


def _class(kind: str) -> Any:
    found = getattr(diffusers, kind, None)
    if found is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {kind}; a newer one may have it")
    return found


def build(stage: FirstStage, source: Path) -> nn.Module:
    """An instance of the class with these weights, in evaluation mode, on the CPU.

    Raises UserError, with the names, where weights are missing or of another shape.
    """
    with torch.device("meta"):  # no memory, no random numbers drawn
        model = _class(stage.kind).from_config(stage.config)
    wanted, state = model.state_dict(), dict(stage.state)
    for name in wanted:
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.tensor(0))
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    other = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for what, names in (("lacks", missing), ("has no place for", extra), ("has of another shape", other)):
        if names:
            raise UserError(
                f"{source} does not make a whole {stage.kind}: under diffusers' names it {what} {_some(names)}"
                if what != "has no place for"
                else f"{source}: a {stage.kind} of this shape {what} {_some(names)}"
            )
    if any(name not in wanted for name, _ in model.named_buffers()):  # those are made by the class, and in no file
        model = _class(stage.kind).from_config(stage.config)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _scaling(
    stage: FirstStage,
    model: nn.Module,
    settings: ConvertSettings,
    statistics: str | Path | None,
    measure: str | None,
    source: Path,
) -> scaling.Scaling:
    """From the one place that says it; a UserError where none does, or two do."""
    layout = LAYOUTS[stage.layout]
    said = scaling.said(settings, model.config, stage.kind)
    if sum(given is not None for given in (said, statistics, measure)) > 1:
        raise UserError("scaling is given twice: take one of scaling_factor=..., --statistics and --measure")
    if said is not None:
        return said
    if statistics is not None:
        return scaling.read_statistics(Path(statistics).expanduser(), model.config)
    if measure is not None:
        try:
            found = scaling.measured(_float32(model), measure, layout.factor(stage.config), settings)
        except UserError as error:  # the settings have other names here than in training
            raise UserError(without_section(str(error))) from error
        return scaling.measured_scaling(found, model.config, measure)
    if stage.scaling is None:
        raise UserError(scaling.question(stage.layout, stage.config, layout.factor(stage.config), source))
    return stage.scaling


def _write_folder(model: Any, stage: FirstStage, out: Path) -> dict[str, float]:
    layout = LAYOUTS[stage.layout]
    now(f"writing {out} and reading it again with diffusers' {stage.kind}")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            fresh = Path(scratch) / "folder"
            model.save_pretrained(fresh, safe_serialization=True)
            for file in fresh.glob("*.safetensors"):
                file.chmod((fresh / "config.json").stat().st_mode)  # safetensors writes for the owner's eyes only
            again = read_folder(fresh)
            back, _ = to_theirs(again.state, layout.rules(again.config), _levels(again.config))
            difference = compared(stage.original, back, model, build(again, fresh), layout.factor(stage.config))
            os.replace(fresh, out)
    return difference


def _write_file(
    model: nn.Module, stage: FirstStage, out: Path, to: str, settings: ConvertSettings, encoder: Path | None
) -> tuple[list[str], dict[str, float]]:
    layout = LAYOUTS[to]
    if layout.kind != stage.kind:
        fitting = [name for name in WRITTEN if LAYOUTS[name].kind == stage.kind]
        advice = f"give --to {' or --to '.join(fitting)}" if fitting else "no layout here holds it"
        raise UserError(f"--to {to} is a layout of {layout.kind}, and this is a {stage.kind}: {advice}")
    if reason := layout.misfit(model.config):
        raise UserError(f"--to {to}: {reason}")
    tensors, unknown = to_theirs(stage.state, layout.rules(model.config), _levels(model.config))
    if unknown:
        raise UserError(f"--to {to}: the layout has no place for {_some(unknown)}")
    now(f"writing {out} and reading it again")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            path = Path(scratch) / out.name
            write_tensors(path, tensors, layout.wrapper)
            found = find_first_stage(path)
            state, _ = to_ours(found.tensors, layout.rules(None), levels_of(found.tensors))
            again = FirstStage(stage.kind, stage.config, state, to, "", None, found.tensors)
            difference = compared(stage.state, state, model, build(again, path), layout.factor(stage.config))
            os.replace(path, out)
    return [str(out)], difference


def compared(
    read: Mapping[str, Tensor], written: Mapping[str, Tensor], model: nn.Module, again: nn.Module, factor: int
) -> dict[str, float]:
    """Largest absolute differences of tensors of equal names and of the reconstructions of a test image.

    Raises RuntimeError where a tensor did not arrive at all: that is no mistake of the user's.
    """
    lost = [name for name, tensor in read.items() if name not in written or written[name].shape != tensor.shape]
    if lost:
        raise RuntimeError(f"what was written lacks {_some(lost)}")
    changed = [name for name, tensor in read.items() if not torch.equal(written[name], tensor)]
    tensors = [float((written[name].double() - read[name].double()).abs().max()) for name in changed]
    first, second = (reconstruction(_float32(module), factor) for module in (model, again))
    return {"tensors": max(tensors, default=0.0), "reconstruction": float((first - second).abs().max())}


@torch.no_grad()
def reconstruction(model: nn.Module, factor: int) -> Tensor:
    """What an instance makes of a test image of smooth and rough parts: 1 x C x H x W, nominally in [-1, 1]."""
    config = model.config
    side = int(config.get("encoder_input_size") or max(SMALLEST_TEST_IMAGE_PX, 2 * factor))
    channels = int(config.get("in_channels") or config.get("num_channels") or 3)
    ramp = torch.linspace(-1, 1, side)
    noise = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = torch.where(ramp[:, None] < 0, (ramp[:, None] + ramp) / 2, noise)[None]
    with float32_arithmetic(repeatable=True):
        mean, _ = moments_of(model, image)
        decoded: Tensor = model.decode(mean).sample
    return decoded


def _float32(model: nn.Module) -> nn.Module:
    """The model, or a copy where it is of another type: the one given stays as it is."""
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).float()


def _levels(config: Config) -> int:
    return len(config.get("block_out_channels") or ())


def _some(names: list[str]) -> str:
    """Names for a message: the first few, and how many there are."""
    shown = ", ".join(printable(name) for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _refuse_existing(out: Path, to: str | None) -> None:
    if to is None and out.suffix in (".safetensors", *PICKLED):
        layouts = "|".join(WRITTEN)
        raise UserError(f"{out} is the name of a file: give a new folder, or the layout of the file, --to {layouts}")
    if to is not None and out.suffix not in (".safetensors", *PICKLED):
        raise UserError(f"{out}: the file that --to {to} writes ends in .safetensors, or in {', '.join(PICKLED)}")
    if out.is_file() or (out.is_dir() and (to is not None or any(out.iterdir()))):
        raise UserError(f"{out} exists; give a new name, so that nothing is overwritten")
