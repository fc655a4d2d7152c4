"""Finds the first stage in a file of weights: its prefix, its layout, and averaged or raw weights."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from latent_ae.config import UserError
from latent_ae.convert.checkpoint import Tensors, read_tensors
from latent_ae.convert.layout import compiled
from latent_ae.convert.registry import LAYOUTS
from latent_ae.text import printable

PREFERRED = ("first_stage_model.", "", "vae.", "model.")
"""Prefixes of a first stage, the likeliest first."""
BARE = {
    "up.0.block.0.conv1.weight": "decoder.",
    "down.0.block.0.conv1.weight": "encoder.",
    "decoder_embed.weight": "decoder.",
    "0.weight": "encoder.",
    "1.weight": "decoder.",
}
"""Names that identify a half whose tensors do not have its name as a prefix, and the prefix to add."""
BESIDE = re.compile(
    r"(?:loss|discriminator|perceptual_loss|lpips|foundation_model|linear_proj|model_ema)\..*"
    r"|logvar|colorize|edm_mean|edm_std"
)
"""Names of tensors that trainers keep beside a first stage."""


class Found(NamedTuple):
    """The first stage in a file."""

    layout: str
    tensors: dict[str, Tensor]
    """Its tensors by the original's names, without prefix."""
    beside: Tensors
    """All tensors of the file, by their names there."""
    weights: str
    """Which weights they are: averaged (all or some) or raw if the file has both, else as stored."""

    def half(self, side: str) -> bool:
        """Return whether it has the half `side`, encoder or decoder."""
        return any(name.startswith(f"{side}.") for name in self.tensors)


def find_first_stage(path: Path, *, ema: bool | None = None, prefix: str | None = None) -> Found:
    """Return the first stage in a file.

    Args:
        path: A file that `read_tensors` reads.
        ema: Whether to take averaged (True) or raw (False) weights if the file has both; None takes those that the
            original code loads.
        prefix: Prefix of the tensors' names, which chooses one of several first stages.

    Raises:
        UserError: If the file cannot be read, holds no first stage of a known layout, or holds several.
    """
    beside, weights = read_tensors(path, ema)
    keys = _halves({_plain(name): name for name in beside})
    shadows = _shadows(keys)
    averaged = bool(shadows) and (bool(ema) or not _candidates(keys))
    if shadows:
        keys = {**keys, **shadows} if averaged else keys
        weights = "averaged" if averaged else "raw"
    elif ema is not None and weights == "as stored":
        raise UserError(f"ema: {path} holds one set of weights only; leave ema out")
    candidates = _candidates(keys)
    if prefix is not None:
        candidates = {begin: layout for begin, layout in candidates.items() if begin == prefix}
    if not candidates:
        raise UserError(_refusal(path, keys, prefix))
    known = [begin for begin in PREFERRED if begin in candidates]
    if not known and len(candidates) > 1:
        several = ", ".join(f"prefix={printable(begin)}" for begin in candidates)
        raise UserError(f"{path} holds several first stages; give one of: {several}")
    begin = (known or list(candidates))[0]
    inside = {name.removeprefix(begin): key for name, key in keys.items() if name.startswith(begin)}
    tensors = {name: beside[key] for name, key in inside.items() if not BESIDE.fullmatch(name)}
    count = sum(inside[name] in shadows.values() for name in tensors)
    if ema and averaged and not count:
        raise UserError(f"ema: {path} holds no averages of the first stage {printable(begin)!r}; leave ema out")
    if averaged and count < len(tensors):
        weights = f"averaged where the file has an average ({count} of {len(tensors)} tensors)"
    return Found(candidates[begin], dict(LAYOUTS[candidates[begin]].prepare(tensors)), beside, weights)


def _plain(name: str) -> str:
    """Return a name without the parts that torch.compile, DDP and ComfyUI add."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module")).replace("taesd_", "", 1)


def _halves(keys: dict[str, str]) -> dict[str, str]:
    """Return the names; if they are those of one half without its prefix, add the prefix."""
    half = next((half for name, half in BARE.items() if name in keys), "")
    return {half + name: key for name, key in keys.items()}


def _candidates(names: Iterable[str]) -> dict[str, str]:
    """Return the layout of each first stage among the names, by its prefix."""
    candidates: dict[str, str] = {}
    for key, layout in LAYOUTS.items():
        matches = [re.fullmatch(rf"((?:.*\.)?){layout.anchor}", name) for name in names]
        for begin in sorted({match[1] for match in matches if match}):
            inside = frozenset(name.removeprefix(begin) for name in names if name.startswith(begin))
            if begin not in candidates and layout.recognise(inside):
                candidates[begin] = key
    return candidates


def _shadows(keys: dict[str, str]) -> dict[str, str]:
    """Return the keys of averaged weights of latent-diffusion's LitEma, which removes dots, by the full names."""
    inside = ((re.fullmatch(r"((?:.*\.)?)model_ema\.(.+)", name), key) for name, key in keys.items())
    found = [(match[1], match[2], key) for match, key in inside if match]
    if not found:
        return {}
    table = [rule.theirs for layout in LAYOUTS.values() for rule in layout.rules(None)]
    shadows = dict[str, str]()
    for template in dict.fromkeys(name for name in table if "." in name and "{rest}" not in name):
        pattern = compiled(template.replace(".", ""))
        matches = ((pattern.fullmatch(dotless), prefix, key) for prefix, dotless, key in found)
        shadows |= {prefix + template.format(**match.groupdict()): key for match, prefix, key in matches if match}
    return shadows


def _refusal(path: Path, names: Iterable[str], prefix: str | None) -> str:
    """Return the message about a file whose names match no known layout."""
    if any(re.fullmatch(r"(?:.*\.)?encoder\.(?:down_blocks\.0\.(?:resnets\.)?|layers\.)0\..+", name) for name in names):
        return (
            f"{path} has the names of a class of diffusers, which cannot be told without its config.json: put that "
            "beside the file, name the file diffusion_pytorch_model.safetensors, and give the folder"
        )
    some = ", ".join(printable(name) for name in sorted(names)[:4])
    where = "" if prefix is None else f" under the prefix {printable(prefix)!r}"
    return (
        f"{path} holds no first stage of a known layout{where}: its names begin {some}. Known are {', '.join(LAYOUTS)} "
        "(latent-ae convert --help says whose files these are)"
    )
