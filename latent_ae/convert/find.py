"""The first stage in a file of weights: under which prefix it is, of which layout, and with which of two sets."""

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
"""Names by which a file of one half is known whose names say not which half it is."""
BESIDE = re.compile(
    r"(?:loss|discriminator|perceptual_loss|lpips|foundation_model|linear_proj|model_ema)\..*"
    r"|logvar|colorize|edm_mean|edm_std"
)
"""What trainers keep beside a first stage."""


class Found(NamedTuple):
    """The first stage in a file."""

    layout: str
    tensors: dict[str, Tensor]
    """Under the original's names, without prefix."""
    beside: Tensors
    """All that the file holds, under its own names."""
    weights: str
    """averaged or raw where the file has both, else as stored."""

    def half(self, side: str) -> bool:
        """Whether the encoder or the decoder is there."""
        return any(name.startswith(f"{side}.") for name in self.tensors)


def find_first_stage(path: Path, *, ema: bool | None = None, prefix: str | None = None) -> Found:
    """The first stage that a file holds.

    Args:
        path: A file of `read_tensors`.
        ema: Averaged weights (true) or raw ones (false) where the file has both; null takes them as the original's
            own code does.
        prefix: What stands before the names, where the file holds several first stages.

    Raises:
        UserError: Where there is none, several, or it is of a layout that is not known.
    """
    beside, weights = read_tensors(path, ema)
    keys = _halves({_plain(name): name for name in beside})
    shadows = _shadows(keys)
    if shadows:
        averaged = bool(ema) or not _candidates(keys)
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
    return Found(candidates[begin], dict(LAYOUTS[candidates[begin]].prepare(tensors)), beside, weights)


def _plain(name: str) -> str:
    """A name without what torch.compile and DDP put into it, and ComfyUI before it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module")).replace("taesd_", "", 1)


def _halves(keys: dict[str, str]) -> dict[str, str]:
    """The names, where they are those of one half alone, with that half's name before them."""
    half = next((half for name, half in BARE.items() if name in keys), "")
    return {half + name: key for name, key in keys.items()}


def _candidates(names: Iterable[str]) -> dict[str, str]:
    """Prefix -> layout of each first stage among the names."""
    candidates: dict[str, str] = {}
    for key, layout in LAYOUTS.items():
        matches = [re.fullmatch(rf"((?:.*\.)?){layout.anchor}", name) for name in names]
        for begin in sorted({match[1] for match in matches if match}):
            inside = frozenset(name.removeprefix(begin) for name in names if name.startswith(begin))
            if begin not in candidates and layout.recognise(inside):
                candidates[begin] = key
    return candidates


def _shadows(keys: dict[str, str]) -> dict[str, str]:
    """Averaged weights of latent-diffusion's LitEma, whose names have lost their dots, under the names they had."""
    dotless = {name.removeprefix("model_ema."): key for name, key in keys.items() if name.startswith("model_ema.")}
    if not dotless:
        return {}
    table = [rule.theirs for layout in LAYOUTS.values() for rule in layout.rules(None)]
    shadows = dict[str, str]()
    for template in dict.fromkeys(name for name in table if "." in name and "{rest}" not in name):
        pattern = compiled(template.replace(".", ""))
        matches = ((pattern.fullmatch(name), key) for name, key in dotless.items())
        shadows |= {template.format(**match.groupdict()): key for match, key in matches if match}
    return shadows


def _refusal(path: Path, names: Iterable[str], prefix: str | None) -> str:
    """Why a file cannot be converted, as far as its names tell."""
    some = ", ".join(printable(name) for name in sorted(names)[:4])
    where = "" if prefix is None else f" under the prefix {printable(prefix)!r}"
    return (
        f"{path} holds no first stage of a known layout{where}: its names begin {some}. Known are {', '.join(LAYOUTS)} "
        "(latent-ae convert --help says whose files these are)"
    )
