"""What a layout is: how a repository names the tensors of a first stage, beside how diffusers names them.

A rule is a pair of templates that is read in both directions, so no name is written twice. In a template
`{i}`, `{j}` and `{s}` are numbers that both sides share; `{u}` counts levels from the other end; `{n}` is one less in
diffusers; `{leaf}` is a parameter of a layer (weight, running_mean, ...); `{rest}` is anything.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]
FIELDS = {"i": r"\d+", "j": r"\d+", "s": r"\d+", "u": r"\d+", "n": r"\d+", "leaf": r"\w+", "rest": r".+"}


@dataclass(frozen=True)
class Rule:
    """One template of the original and those of diffusers that stand for it."""

    theirs: str
    ours: tuple[str, ...]
    """More than one where the original's tensor is theirs joined along the first axis."""
    linear: bool = False
    """The weight is (O, I) in diffusers and a convolution (O, I, 1, 1) in the original."""


def rules(theirs: str, ours: str, layers: Iterable[tuple[str, str]], linear: Iterable[str] = ()) -> tuple[Rule, ...]:
    """A rule for each of the `layers` (theirs, ours) of a block; those named in `linear` (theirs) change shape."""
    return tuple(
        Rule(f"{theirs}.{name}.{{leaf}}", (f"{ours}.{own}.{{leaf}}",), name in set(linear)) for name, own in layers
    )


@dataclass(frozen=True)
class Layout:
    """A repository's way to store a first stage, and the class of diffusers that has its architecture."""

    title: str
    """Whose files these are, as the docs and the help say it."""
    kind: str
    """Class of diffusers."""
    anchor: str
    """Regular expression of a name that a file of this layout has; what stands before it is the file's prefix."""
    recognise: Callable[[frozenset[str]], bool]
    """Whether these names, without the prefix, are those of this layout."""
    rules: Callable[[Config | None], tuple[Rule, ...]]
    """Those for a config of diffusers, by which one name of theirs belongs to each of ours; None gives all."""
    infer: Callable[["Tensors", Config], dict[str, Any]]
    """(tensors under diffusers' names, what the user said) -> config without scaling. Raises UserError."""
    factor: Callable[[Config], int]
    """Image px per latent px along one side."""
    prepare: Callable[["Tensors"], "Tensors"] = lambda tensors: tensors
    """Brings variants of the layout to the one that `rules` knows."""
    complete: Callable[["Tensors", Any], "Tensors"] = lambda tensors, model: tensors
    """Adds what the original's code insists on finding and diffusers does not store; (tensors, model) -> tensors."""
    misfit: Callable[[Any], str] = lambda model: ""
    """Why the original's code has no place for this instance of diffusers' class; empty where it has."""
    wrapper: str | None = None
    """Key of a pickled file under which the original's code looks for the tensors."""
    fixed_scaling: Config | None = None
    """Scaling that the architecture itself defines, so that nobody is asked."""
    files: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    """Ends of the names of its files -> what begins the names of the tensors in each, and is not written."""
    decoder_alone: str = "give the file of its encoder with --encoder FILE"
    """What a file of a decoder alone needs, for the message."""
    read_encoder: Callable[[Path], tuple["Tensors", dict[str, Any]]] | None = None
    """Reads an encoder that is not stored in the layout: its tensors, and what `infer` is told of it."""


LEVEL = r"(?:encoder\.(?:down|conv_blocks)|decoder\.(?:up|conv_blocks))"


def levels_of(names: Iterable[str], pattern: str = LEVEL) -> int:
    """Number of resolutions that the original's names tell of; `pattern` is what stands before a level's number."""
    found = [re.match(rf"{pattern}\.(\d+)\.", name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


@functools.cache
def compiled(template: str) -> re.Pattern[str]:
    """The names that a template stands for, its fields as groups."""
    text = re.escape(template)
    for name, expression in FIELDS.items():
        text = text.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})")
    return re.compile(text)


def _renamed(name: str, template: str, target: str, levels: int, step: int) -> str | None:
    """`name` after the template `target`, or None where it is not one of `template`."""
    match = compiled(template).fullmatch(name)
    if match is None:
        return None
    values: dict[str, str | int] = dict(match.groupdict())
    if "u" in values:
        values["u"] = levels - 1 - int(values["u"])
    if "n" in values:
        values["n"] = int(values["n"]) + step
    return target.format(**values)


def to_ours(tensors: "Tensors", table: Iterable[Rule], levels: int) -> tuple[dict[str, "Tensor"], list[str]]:
    """Tensors under the names of diffusers.

    Args:
        tensors: Under the original's names, without prefix.
        table: The layout's rules.
        levels: Number of resolutions, from whose other end `{u}` counts.

    Returns:
        The tensors, and the names that no rule knows.
    """
    table, state, unknown = tuple(table), dict[str, "Tensor"](), list[str]()
    for name, tensor in tensors.items():
        for rule in table:
            names = [_renamed(name, rule.theirs, target, levels, -1) for target in rule.ours]
            if None in names or (len(names) > 1 and (not tensor.ndim or tensor.shape[0] % len(names))):
                continue
            if rule.linear and name.endswith("weight"):
                if tensor.ndim < 2 or tensor.shape[2:].numel() != 1:
                    continue
                tensor = tensor.flatten(1)
            parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)
            state.update(zip(map(str, names), parts, strict=True))
            break
        else:
            unknown.append(name)
    return state, unknown


def to_theirs(state: "Tensors", table: Iterable[Rule], levels: int) -> tuple[dict[str, "Tensor"], list[str]]:
    """Tensors under the original's names: `to_ours` the other way, with the same arguments and results."""
    import torch

    parts, unknown = dict[str, dict[int, "Tensor"]](), list[str]()
    places = [(rule, position) for rule in table for position in range(len(rule.ours))]
    for name, tensor in state.items():
        for rule, position in places:
            target = _renamed(name, rule.ours[position], rule.theirs, levels, 1)
            if target is not None:
                changed = rule.linear and name.endswith("weight")
                parts.setdefault(target, {})[position] = tensor[:, :, None, None] if changed else tensor
                break
        else:
            unknown.append(name)
    joined = {name: [found[place] for place in sorted(found)] for name, found in parts.items()}
    return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in joined.items()}, unknown
