"""Reads a first stage from a file of any known layout or from a diffusers folder, and builds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.convert import scaling
from latent_ae.convert.checkpoint import read_tensors
from latent_ae.convert.find import Found, find_first_stage
from latent_ae.convert.layout import levels_of, to_ours
from latent_ae.convert.ldm import present_attention
from latent_ae.convert.registry import LAYOUTS
from latent_ae.convert.settings import ConvertSettings
from latent_ae.files import read_mapping
from latent_ae.models.loading import FROM_CONFIG, PIPELINE_FOLDERS
from latent_ae.text import printable

WEIGHTS = "diffusion_pytorch_model"
"""Begin of the names of diffusers' files of weights."""
SHAPES = ("sample_size", "norm_num_groups", "decoder_num_attention_heads")
"""Settings of a config that no tensor's shape tells."""


@dataclass(frozen=True)
class FirstStage:
    """A first stage with diffusers' names."""

    kind: str
    """Class of diffusers."""
    config: dict[str, Any]
    state: dict[str, Tensor]
    layout: str
    """Layout of the file from which it was read; "diffusers" for a folder."""
    weights: str
    """Which weights they are: averaged (all or some) or raw if there were both, else as stored."""
    kept: scaling.Scaling | None = None
    """The scaling that the checkpoint carries."""
    original: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors as they were read, by the original's names."""


def read_first_stage(path: Path, settings: ConvertSettings, encoder: Path | None = None) -> FirstStage:
    """Read the first stage in a file of weights or a folder.

    Args:
        path: A file, a diffusers folder, a pipeline's folder or a run of this project.
        settings: The facts that no shape tells, and which weights to take.
        encoder: File or folder of the encoder, if the file holds only the decoder.

    Raises:
        UserError: If there is no first stage, a part of it is missing, or diffusers has no class for it.
    """
    if path.is_dir():
        for key in ("ema", "prefix", *SHAPES):
            if getattr(settings, key) is not None:
                raise UserError(f"{key}: a folder of diffusers says this itself; leave it out")
        if encoder is not None:
            raise UserError(f"--encoder: {path} is a folder of diffusers and has its own; leave it out")
        return read_folder(path)
    found, facts = _completed(find_first_stage(path, ema=settings.ema, prefix=settings.prefix), path, encoder)
    layout = LAYOUTS[found.layout]
    _refuse_integers(path, found.tensors)
    state, unknown = to_ours(found.tensors, layout.rules(None), levels_of(found.tensors))
    if unknown:
        raise UserError(
            f"{path} has the names of {found.layout} ({layout.title}), and {some(unknown)} besides, for which "
            f"{layout.kind} has no place: it is a variant that cannot be converted"
        )
    words = settings.model_dump(exclude_none=True) | facts | layout.told(found.tensors)
    config = infer(found.layout, state, words, str(path))
    for key in SHAPES:
        if getattr(settings, key) is not None and key not in config:
            raise UserError(f"{key}: {layout.kind} has no such key; leave it out")
    kept = scaling.kept(found.beside, found.tensors)
    if kept is None and layout.fixed_scaling is not None:
        kept = scaling.Scaling(dict(layout.fixed_scaling), f"{found.layout} has it by design")
    return FirstStage(layout.kind, config, state, found.layout, found.weights, kept, found.tensors)


def infer(name: str, state: Mapping[str, Tensor], facts: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the config that tensors tell.

    Args:
        name: Name of the layout.
        state: Tensors by diffusers' names.
        facts: What no shape tells.
        source: Where the tensors come from, for messages.

    Raises:
        UserError: If no model of the layout has such tensors.
    """
    try:
        return LAYOUTS[name].infer(state, facts)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except KeyError as error:
        raise UserError(f"{source} is not complete: of the layout {name} it lacks {error}") from None
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:  # from tensors of other dimensions
        raise UserError(f"{source} has tensors of shapes that {name} does not have: {error}") from None


def _completed(found: Found, path: Path, encoder: Path | None) -> tuple[Found, dict[str, Any]]:
    """Return a first stage with the encoder from another file if its own holds only the decoder, and facts about it.

    Raises:
        UserError: If a half is missing, given twice, or belongs to another layout.
    """
    layout = LAYOUTS[found.layout]
    if found.half("encoder") and found.half("decoder"):
        if encoder is not None:
            raise UserError(f"--encoder: {path} has an encoder of its own; leave it out")
        return found, {}
    if not found.half("decoder"):
        raise UserError(f"{path} holds an encoder alone; give the file of its decoder, and this one with --encoder")
    if encoder is None:
        raise UserError(f"{path} holds a decoder alone: {layout.decoder_alone}")
    if layout.read_encoder is not None:
        tensors, facts = layout.read_encoder(encoder)
        return found._replace(tensors={**tensors, **found.tensors}), facts
    if encoder.is_dir():
        raise UserError(
            f"--encoder: {encoder} is a folder, and the encoder is taken from a file; give the file that this writes: "
            f"latent-ae convert {encoder} whole.safetensors --to {found.layout}"
        )
    other = find_first_stage(encoder)
    if not other.half("encoder"):
        raise UserError(f"--encoder: {encoder} holds no encoder")
    if LAYOUTS[other.layout].anchor != layout.anchor:
        raise UserError(f"--encoder: {encoder} is of the layout {other.layout}, and {path} of {found.layout}")
    rest = {name: tensor for name, tensor in other.tensors.items() if not name.startswith(("decoder.", "post_quant"))}
    # a decoder without quant convolutions does not tell its layout, but FLUX.2's statistics are beside the encoder
    name = other.layout if other.layout == "flux2" else found.layout
    return found._replace(layout=name, tensors={**rest, **found.tensors}), {}


def read_folder(folder: Path) -> FirstStage:
    """Read the first stage in a diffusers folder, a pipeline's folder or a run.

    Raises:
        UserError: If the folder has no first stage of a class that a layout covers, or it cannot be read.
    """
    places = [folder, folder / "export", *(folder / name for name in PIPELINE_FOLDERS)]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    if place is None:
        raise UserError(f"{folder} has no config.json, nor have export or {', '.join(PIPELINE_FOLDERS)} in it")
    kinds = dict.fromkeys(layout.kind for layout in LAYOUTS.values())
    try:
        facts = diffusers.AutoencoderKL.load_config(place)
        kind = str(facts.get("_class_name"))
    except Exception as error:  # diffusers raises many kinds for a missing, truncated or foreign file
        raise UserError(f"cannot load {place}: {' '.join(str(error).split())[:400]}") from error
    if kind not in kinds:
        raise UserError(f"{place} holds the class {kind}; layouts of originals are known of {', '.join(kinds)}")
    # not from_pretrained: it gives all tensors one dtype, and makes up those that are missing
    state = present_attention(_stored(place))
    _refuse_integers(place, state)
    config = {key: value for key, value in facts.items() if not key.startswith("_")}
    stage = FirstStage(kind, config, state, "diffusers", "as stored", original=state)
    with torch.device("meta"):
        whole = _instance(stage).config  # with the defaults of the class
    return replace(stage, config={key: value for key, value in whole.items() if not key.startswith("_")})


def _stored(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a diffusers folder in their dtypes, from the files that `from_pretrained` would load.

    Raises:
        UserError: If the folder has no weights or several variants of them, or they cannot be read.
    """
    names = ("safetensors.index.json", "safetensors", "bin.index.json", "bin")
    paths = [folder / f"{WEIGHTS}.{name}" for name in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        variants = sorted(folder.glob(f"{WEIGHTS}.*.safetensors")) or sorted(folder.glob(f"{WEIGHTS}.*.bin"))
        if len(variants) != 1:
            has = f"only the variants {', '.join(path.name for path in variants)}" if variants else "no weights"
            raise UserError(f"{folder} has {has}; put one file there under the name {WEIGHTS}.safetensors")
        path = variants[0]
    if not path.name.endswith(".index.json"):
        return dict(read_tensors(path)[0])
    places = read_mapping(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path} has no weight_map that gives the file of each tensor: it is damaged")
    files = {name: read_tensors(folder / Path(name).name)[0] for name in dict.fromkeys(places.values())}
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def _refuse_integers(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if a tensor holds anything but floating-point numbers, the counters of batch norms excepted."""
    wrong = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    wrong = [name for name in wrong if not name.endswith("num_batches_tracked")]
    if wrong:
        dtype = str(tensors[wrong[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{source} has {dtype} numbers in {some(wrong)}: quantised weights cannot be converted; take the file of "
            "float32, float16 or bfloat16 from which they were made"
        )


def class_of(kind: str) -> Any:
    """Return a class of diffusers by its name.

    Raises:
        UserError: If the installed diffusers does not have it.
    """
    found = getattr(diffusers, kind, None)
    if found is None:
        raise UserError(f"diffusers {diffusers.__version__} has no class {kind}; a newer one may have it")
    return found


def build(stage: FirstStage, source: Path) -> nn.Module:
    """Build an instance of the class with the weights in their dtypes, in evaluation mode, on the CPU.

    Args:
        stage: The first stage.
        source: File or folder from which it was read, for messages.

    Raises:
        UserError: If weights are missing, unknown or of another shape, with their names.
    """
    with torch.device("meta"):  # no memory, no random numbers drawn
        model = _instance(stage)
    wanted, state = model.state_dict(), dict(stage.state)
    made = [name for name, _ in model.named_buffers() if name not in state or name not in wanted]
    if made:
        model = _instance(stage)
        for name, buffer in model.named_buffers():
            if name in wanted and FROM_CONFIG.fullmatch(name):
                state.setdefault(name, buffer)
            given = state.pop(name, None) if name not in wanted else None
            if given is not None and not _same_buffer(given, buffer):
                raise UserError(
                    f"{source} has another {name} than diffusers' {stage.kind} makes for this size and does not store, "
                    "so its images would be others"
                )
    misshapen = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for what, names in (
        ("lacks", [name for name in wanted if name not in state]),
        ("has what the class has no place for:", [name for name in state if name not in wanted]),
        ("has tensors of another shape:", misshapen),
    ):
        if names:
            raise UserError(f"{source} does not make a {stage.kind}: under diffusers' names it {what} {some(names)}")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _same_buffer(stored: Tensor, made: Tensor) -> bool:
    """Return whether a stored buffer is one that a class makes, up to the rounding of the stored dtype."""
    tolerance = max(1e-4, torch.finfo(stored.dtype).eps)
    return stored.shape == made.shape and torch.allclose(stored.float(), made.float(), rtol=0, atol=tolerance)


def _instance(stage: FirstStage) -> Any:
    try:
        return class_of(stage.kind).from_config(stage.config)
    except (
        Exception
    ) as error:  # each class checks its config in its own way, and the version of transformers may not fit
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"diffusers {diffusers.__version__} cannot build this {stage.kind}: {reason}") from error


def some(names: list[str]) -> str:
    """Return names for a message: the first four, and the number of the others."""
    shown = ", ".join(printable(name) for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
