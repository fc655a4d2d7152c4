"""The setting `train`, which selects the parameters to train by groups or by patterns of names."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from latent_ae.models.family import SIDES

FIXED_PARTS: dict[str, tuple[str, ...]] = {
    "all": (),
    "decoder": (*SIDES["encoder"], *SIDES["codebook"], *SIDES["flow"]),
    "encoder": SIDES["decoder"],
}
"""The modules that are not trained, by the named group."""
EMPTY = "names nothing that would learn: give all, decoder, encoder or patterns of names"


def read_parts(value: Any) -> Any:
    """Return a value of `train` in its normal form: a named group, or a tuple of patterns and groups.

    Args:
        value: The value from YAML or the command line; one that is no string or list is returned unchanged.

    Raises:
        ValueError: If the list or one of its words is empty, or a string is a list that YAML could not read.
    """
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(EMPTY)
        if value.startswith("["):
            raise ValueError("is not a list: put a pattern that begins with * in quotes, as in train='[\"*.bias\"]'")
        return value if value in FIXED_PARTS else (value,)
    if not isinstance(value, (list, tuple)):
        return value
    if not value or not all(str(word).strip() for word in value):
        raise ValueError(EMPTY)
    if "all" in value:
        return "all"
    return value[0] if len(value) == 1 and value[0] in FIXED_PARTS else tuple(value)


def trained_names(train: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names of the parameters that the setting `train` selects.

    Args:
        train: A group or pattern, or several.
        names: Names of all parameters.

    Returns:
        Those selected, in the order of `names`.
    """
    words = (train,) if isinstance(train, str) else train
    return [name for name in names if any(_selects(word, name) for word in words)]


def side_of(trained: Sequence[str]) -> Literal["all", "decoder", "encoder"]:
    """Return the side of the autoencoder to which all trained parameters belong; otherwise "all"."""
    if trained and all(_selects("decoder", name) for name in trained):
        return "decoder"
    if trained and all(_selects("encoder", name) for name in trained):
        return "encoder"
    return "all"


def unmatched(train: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """Return a sentence for each pattern that selects no parameter, with the names that were probably meant.

    Args:
        train: A group or pattern, or several; only several are checked.
        names: Names of all parameters.
    """
    patterns = () if isinstance(train, str) else train
    return [
        f"{pattern} matches no parameter of this autoencoder: {_suggestion(pattern, names)}"
        for pattern in patterns
        if not any(_selects(pattern, name) for name in names)
    ]


def collapsed(trained: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names of the largest modules whose parameters are all trained, and of the other trained parameters.

    Args:
        trained: Names of the trained parameters.
        names: Names of all parameters.
    """
    fixed = {prefix for name in set(names) - set(trained) for prefix in _prefixes(name)}
    whole = (next(prefix for prefix in _prefixes(name) if prefix not in fixed) for name in trained)
    return list(dict.fromkeys(whole))


def _selects(word: str, name: str) -> bool:
    """Return whether a group or pattern selects a parameter, by its name or by the name of a module that holds it."""
    if word in FIXED_PARTS:
        return name.split(".")[0] not in FIXED_PARTS[word]
    return any(fnmatchcase(prefix, word) for prefix in _prefixes(name))


def _prefixes(name: str) -> list[str]:
    """Return the names of the modules that hold a parameter, the outermost first, and then its own name."""
    pieces = name.split(".")
    return [".".join(pieces[:count]) for count in range(1, len(pieces) + 1)]


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    paths = dict.fromkeys(prefix for name in names for prefix in _prefixes(name))
    word = pattern.strip("*.?")
    # a word without a dot is one piece of a name, or a group
    known = paths if "." in word else dict.fromkeys([*FIXED_PARTS, *(path.split(".")[-1] for path in paths)])
    if close := difflib.get_close_matches(word, list(known), n=3):
        return f"did you mean {' or '.join(close)}?"
    modules = dict.fromkeys(prefix for name in names for prefix in _prefixes(name)[:-1] if prefix.count(".") < 2)
    return f"its modules are {', '.join(modules)}"
