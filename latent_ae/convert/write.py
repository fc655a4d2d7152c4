"""Writes a first stage as a diffusers folder or as files of a layout, reads it again and compares."""

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.convert import scaling
from latent_ae.convert.checkpoint import write_tensors
from latent_ae.convert.find import find_first_stage
from latent_ae.convert.layout import Layout, levels_of, to_ours, to_theirs
from latent_ae.convert.read import FirstStage, build, class_of, infer, read_folder, some
from latent_ae.convert.registry import LAYOUTS, WRITTEN
from latent_ae.files import writing
from latent_ae.models.posterior import moments_of
from latent_ae.models.registry import family_of
from latent_ae.progress import now

SMALLEST_TEST_IMAGE_PX = 32
STATISTICS = "_statistics"
"""End of the name of the file of latent statistics, which is written beside the layout's files if there are any."""
NO_EFFECT = (*scaling.KEYS, "sample_size", "force_upcast", "latent_magnitude", "latent_shift", "lookup_from_codebook")
"""Keys of a config that do not change what encoder and decoder compute."""


def write_folder(model: Any, stage: FirstStage, out: Path) -> dict[str, float]:
    """Write a diffusers folder, read it with the stock class and compare.

    Args:
        model: The built first stage, with its scaling in the config.
        stage: The first stage as it was read.
        out: The folder.

    Returns:
        The differences from `compared`.

    Raises:
        UserError: If the folder cannot be written, or the model does not run.
    """
    layout = LAYOUTS[stage.layout]
    now(f"writing {out} and reading it again with diffusers' {stage.kind}")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            fresh = Path(scratch) / "folder"
            model.save_pretrained(fresh, safe_serialization=True)
            for file in fresh.glob("*.safetensors"):
                file.chmod((fresh / "config.json").stat().st_mode)  # safetensors writes for the owner's eyes only
            written = theirs(layout, read_folder(fresh).state, model)
            stock = class_of(stage.kind).from_pretrained(fresh, local_files_only=True, torch_dtype=torch.float32)
            difference = compared(stage.original, written, model, stock, layout)
            os.replace(fresh, out)
    return difference


def write_files(model: Any, stage: FirstStage, out: Path, to: str) -> tuple[list[str], dict[str, float]]:
    """Write the files of a layout, read them and compare.

    Args:
        model: The built first stage.
        stage: The first stage as it was read.
        out: Name of the file; a layout of several files adds to it.
        to: Name of the layout.

    Returns:
        Names of the files, and the differences from `compared`.

    Raises:
        UserError: If the layout cannot hold the model, or a file exists or cannot be written.
    """
    layout = LAYOUTS[to]
    if layout.kind != stage.kind:
        fitting = [name for name in WRITTEN if LAYOUTS[name].kind == stage.kind]
        advice = f"give --to {' or --to '.join(fitting)}" if fitting else "no layout here holds it"
        raise UserError(f"--to {to} is a layout of {layout.kind}, and this first stage is of {stage.kind}: {advice}")
    if reason := layout.misfit(model):
        raise UserError(f"--to {to}: {reason}")
    tensors = theirs(layout, stage.state, model)
    told = as_told(layout, tensors, model, stage, to)
    now(f"writing {out} and reading it again")
    names = [out.with_stem(out.stem + end) for end in layout.files]
    statistics = scaling.statistics_of(model.config)
    beside = [out.with_stem(out.stem + STATISTICS)] if statistics else []
    for path in (*names, *beside):
        if path.exists():
            raise UserError(f"{path} exists; give a new name, so that nothing is overwritten")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            found = dict(tensors)
            for path, begin in zip(names, layout.files.values(), strict=True):
                part = {key: value for key, value in tensors.items() if key.startswith(begin)}
                stripped = {key.removeprefix(begin): value for key, value in part.items()}
                write_tensors(Path(scratch) / path.name, stripped, layout.wrapper)
                found = {key: value for key, value in found.items() if key not in part}
                found |= find_first_stage(Path(scratch) / path.name).tensors
            state, _ = to_ours(found, layout.rules(None), levels_of(found))
            again = build(replace(told, state=state), out)
            difference = compared(layout.prepare(tensors), found, model, again, layout)
            for path in beside:
                write_tensors(Path(scratch) / path.name, statistics, None)
            for path in (*names, *beside):
                os.replace(Path(scratch) / path.name, path)
    return [str(path) for path in (*names, *beside)], difference


def as_told(layout: Layout, tensors: Mapping[str, Tensor], model: Any, stage: FirstStage, to: str) -> FirstStage:
    """Return the first stage with the config that a reader of the layout's files takes from them alone.

    Args:
        layout: The layout.
        tensors: Tensors by the original's names, as they will be written.
        model: The built first stage.
        stage: The first stage as it was read.
        to: Name of the layout.

    Raises:
        UserError: If the files do not tell a fact on which the model's numbers depend, so that the original's code
            would make another model of them.
    """
    names = {**tensors, **layout.prepare(tensors)}
    state, _ = to_ours(names, layout.rules(None), levels_of(names))
    inferred = infer(to, state, layout.facts(model.config), f"--to {to}: what would be written")
    kept = {key: model.config[key] for key in NO_EFFECT if key in model.config}
    told = replace(stage, config=inferred | kept, layout=to)
    other: Any = build(told, Path("what would be written"))
    keys = [key for key in model.config if as_list(other.config.get(key)) != as_list(model.config[key])]
    keys = [key for key in keys if not key.startswith("_")]
    if keys and not alike(model, other, layout):
        facts = ", ".join(f"{key} {model.config[key]}, which becomes {other.config.get(key)}" for key in keys)
        raise UserError(
            f"--to {to}: its files have no place for what makes this model another than those of its repository, whose "
            f"code would give other images: {facts}. Keep the folder of diffusers"
        )
    return told


def alike(one: nn.Module, other: nn.Module, layout: Layout) -> bool:
    """Return whether two models with the same weights have the same layers and make the same reconstruction."""
    first, second = (reconstruction(in_float32(model), layout) for model in (one, other))
    return str(one) == str(other) and torch.equal(first, second)  # the text has the settings of all layers


def as_list(value: Any) -> Any:
    """Return a value of a config with lists in place of tuples."""
    return [as_list(item) for item in value] if isinstance(value, (list, tuple)) else value


def theirs(layout: Layout, state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return tensors by the original's names, including those that only the original's code requires.

    Args:
        layout: The layout.
        state: Tensors by diffusers' names.
        model: The built first stage.

    Raises:
        UserError: If the layout has no name for a tensor.
    """
    tensors, unknown = to_theirs(state, layout.rules(model.config), len(model.config.get("block_out_channels") or ()))
    if unknown:
        raise UserError(f"{layout.title}: there is no place for {some(unknown)}")
    return dict(layout.complete(tensors, model))


def compared(
    read: Mapping[str, Tensor], written: Mapping[str, Tensor], model: nn.Module, again: nn.Module, layout: Layout
) -> dict[str, float]:
    """Return the largest absolute differences of tensors and of the reconstructions of a test image.

    Args:
        read: Tensors as they were read, by the original's names.
        written: Tensors as they were written, by the same names.
        model: The first stage before it was written.
        again: The first stage after it was written and read.
        layout: The layout of the names.

    Raises:
        RuntimeError: If a tensor is missing or has another shape or dtype, which is not the user's mistake.
        UserError: If a model does not run, or its reconstruction is not finite.
    """
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()}
    lost = [name for name, tensor in read.items() if kinds.get(name) != (tensor.shape, tensor.dtype)]
    if lost:
        raise RuntimeError(f"what was written lacks, or has in another shape or dtype, {some(lost)}")
    changed = [name for name, tensor in read.items() if not torch.equal(written[name], tensor)]
    tensors = [float((written[name].double() - read[name].double()).abs().max()) for name in changed]
    first, second = (reconstruction(in_float32(module), layout) for module in (model, again))
    return {"tensors": max(tensors, default=0.0), "reconstruction": float((first - second).abs().max())}


@torch.no_grad()
def reconstruction(model: nn.Module, layout: Layout) -> Tensor:
    """Return the reconstruction of a test image whose upper half is smooth and whose lower half is noise.

    Returns:
        (1, C, H, W), nominally in [-1, 1].

    Raises:
        UserError: If the model does not run, or its reconstruction is not finite.
    """
    config = model.config
    family = family_of(model)
    side = family.side(config) or max(SMALLEST_TEST_IMAGE_PX, 2 * layout.factor(config))
    channels = family.channels(config)
    ramp = torch.linspace(-1, 1, side)
    noise = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = torch.where(ramp[:, None] < 0, (ramp[:, None] + ramp) / 2, noise)[None]
    try:
        with float32_arithmetic(repeatable=True):
            mean, _ = moments_of(model, image)
            decoded: Tensor = family.decode(model, mean)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the weights make a {type(model).__name__} that does not run: {reason}") from error
    if not decoded.isfinite().all():
        raise UserError("the first stage gives NaN or infinity for a test image: its weights have diverged")
    return decoded


def in_float32(model: nn.Module) -> nn.Module:
    """Return the model if it is float32, else a float32 copy; the model itself does not change."""
    if all(tensor.dtype == torch.float32 for tensor in model.state_dict().values() if tensor.is_floating_point()):
        return model
    return copy.deepcopy(model).float()
