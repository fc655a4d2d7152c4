"""The record `Layout`, which describes how a repository stores a first stage, and the renaming of tensors by its rules.

A rule is a pair of templates for a name in the repository and in diffusers. It is applied in both directions, so no
name is written twice. In a template `{i}`, `{j}` and `{s}` are numbers that both sides share; `{u}` counts levels from
the other end; `{n}` is one less in diffusers; `{leaf}` is a parameter of a layer (weight, running_mean, ...); `{rest}`
is anything.
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
    """A template of the original and the corresponding templates of diffusers."""

    theirs: str
    ours: tuple[str, ...]
    """Several if the original's tensor is a concatenation of theirs along the first axis."""
    linear: bool = False
    """Whether the weight is (O, I) in diffusers and that of a convolution, (O, I, 1, 1), in the original."""


def rules(theirs: str, ours: str, layers: Iterable[tuple[str, str]], linear: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Return a rule for each layer of a block.

    Args:
        theirs: Template of the block in the original.
        ours: Template of the block in diffusers.
        layers: Names of each layer in the original and in diffusers.
        linear: Original names of layers that are convolutions there and linear in diffusers.
    """
    return tuple(
        Rule(f"{theirs}.{name}.{{leaf}}", (f"{ours}.{own}.{{leaf}}",), name in set(linear)) for name, own in layers
    )


@dataclass(frozen=True)
class Layout:
    """How a repository stores a first stage, and the class of diffusers that has its architecture."""

    title: str
    """Whose files these are, for the docs and the help."""
    kind: str
    """Class of diffusers."""
    anchor: str
    """Regular expression of a name in files of this layout; whatever precedes it is the prefix of all names."""
    recognise: Callable[[frozenset[str]], bool]
    """Returns whether names, without the prefix, are those of this layout."""
    rules: Callable[[Config | None], tuple[Rule, ...]]
    """Takes a config and returns the rules that give each diffusers name one original name; None gives all rules."""
    infer: Callable[["Tensors", Config], dict[str, Any]]
    """Takes tensors by diffusers' names and the settings; returns a config without scaling. Raises UserError."""
    factor: Callable[[Config], int]
    """Takes a diffusers config and returns the image px per latent px along one side."""
    prepare: Callable[["Tensors"], "Tensors"] = lambda tensors: tensors
    """Turns tensors of a variant of the layout into those that `rules` covers."""
    complete: Callable[["Tensors", Any], "Tensors"] = lambda tensors, model: tensors
    """Takes tensors and the model; adds tensors that the original's code requires and diffusers does not store."""
    told: Callable[[Iterable[str]], dict[str, Any]] = lambda names: {}
    """Takes the original's names and returns what they tell and no shape does, for `infer`."""
    facts: Callable[[Config], dict[str, Any]] = lambda config: {}
    """Takes a diffusers config and returns what names or config files of the original tell, for `infer`."""
    misfit: Callable[[Any], str] = lambda model: ""
    """Takes the model and returns why the original's code cannot hold it; an empty string if it can."""
    wrapper: str | None = None
    """Key under which the original's code finds the tensors in a pickled file; None if they are at the top."""
    fixed_scaling: Config | None = None
    """Scaling that the architecture defines, so that the user need not give it."""
    files: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    """For each file, by the end of its name: the prefix of the tensors that it holds, which the file leaves out."""
    decoder_alone: str = "give the file of its encoder with --encoder FILE"
    """The advice in the message about a file that holds only a decoder."""
    read_encoder: Callable[[Path], tuple["Tensors", dict[str, Any]]] | None = None
    """Reads an encoder that is not stored in the layout; returns its tensors and facts for `infer`."""


LEVEL = r"(?:encoder\.(?:down|conv_blocks)|decoder\.(?:up|conv_blocks))"


def levels_of(names: Iterable[str], pattern: str = LEVEL) -> int:
    """Return the number of resolutions in tensors' names.

    Args:
        names: The names.
        pattern: Regular expression of everything before the dot and the number of a level.
    """
    found = [re.match(rf"{pattern}\.(\d+)\.", name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


@functools.cache
def compiled(template: str) -> re.Pattern[str]:
    """Return a regular expression of the names that match a template, with its fields as groups."""
    text = re.escape(template)
    for name, expression in FIELDS.items():
        text = text.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>{expression})")
    return re.compile(text)


def _renamed(name: str, template: str, target: str, levels: int, step: int) -> str | None:
    """Return `name` renamed from `template` to `target`; None if it does not match `template`."""
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
    """Rename tensors from the original's names to those of diffusers.

    Args:
        tensors: The tensors by the original's names, without prefix.
        table: The layout's rules.
        levels: Number of resolutions, for `{u}`.

    Returns:
        The tensors by diffusers' names, and the names that match no rule.
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
    """Rename tensors from diffusers' names to those of the original: the inverse of `to_ours`.

    Args:
        state: The tensors by diffusers' names.
        table: The layout's rules for the config.
        levels: Number of resolutions, for `{u}`.

    Returns:
        The tensors by the original's names, and the names that match no rule.
    """
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
