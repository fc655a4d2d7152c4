"""Finds the class of each image of a source, and chooses few labelled images."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np

from latent_ae.config import UserError
from latent_ae.data.sources import FolderSource, StoredImages, TableSource

FOLDER_NAMES = "names of folders"
AUTO = ("label", "cls")
"""Columns in which `auto` looks for classes."""
PROBE_SEED = 0
"""Seed of the choices of labels; the default of `latent-ae eval probe`, too."""


class Classes(NamedTuple):
    """Classes of the images of a source, in its order."""

    labels: np.ndarray
    """(N,) int64; -1 where a table has no value; other numbers below 0 mean no class, too."""
    names: list[str] | None
    """Names of the classes 0, 1, ...; None if a table holds numbers only."""
    column: str
    """The column that they come from, or FOLDER_NAMES."""


def find_classes(source: StoredImages, whole: StoredImages, column: str | None) -> Classes | None:
    """Return the classes of the images of `source`, or None if they have none.

    With `auto`, a table has the classes of its column `label`, or else `cls` (WebDataset), if that holds classes,
    integers, or names that repeat. Names are numbered in the order of their letters. Image files have the names of
    their folders, sorted (the convention of ImageFolder), if there are two or more.

    Args:
        source: The images.
        whole: The source of which `source` is a part; its classes determine the numbers.
        column: A column of the table, "auto", or None for no classes.

    Raises:
        UserError: If the column is missing or holds something else.
    """
    if column is None:
        return None
    if isinstance(source, TableSource):
        return _of_table(source, whole, column)
    assert isinstance(source, FolderSource) and isinstance(whole, FolderSource)
    if column != "auto":
        raise UserError(f"label_column: {column} is a column, but this is a folder of images; use auto or null")
    folders, all_folders = _folders(source), _folders(whole)
    names = sorted({*folders, *all_folders})
    if len(names) < 2 or "" in names:  # "": an image that is in no folder
        return None
    numbers = {name: number for number, name in enumerate(names)}
    return Classes(np.array([numbers[name] for name in folders], dtype=np.int64), names, FOLDER_NAMES)


def _folders(source: FolderSource) -> list[str]:
    return [os.path.basename(os.path.dirname(source.name(i))) for i in range(len(source))]


def _of_table(source: TableSource, whole: StoredImages, column: str) -> Classes | None:
    features = source.others.features
    kinds = {
        name: feature.dtype
        for name, feature in features.items()
        if isinstance(feature, (datasets.Value, datasets.ClassLabel)) and re.search("int|string", feature.dtype)
    }
    name = next((name for name in AUTO if name in kinds), AUTO[0]) if column == "auto" else column
    feature, kind = features.get(name), kinds.get(name, "")
    if "string" in kind:
        return _of_names(source, whole, name, column == "auto")
    if "int" not in kind:
        if column == "auto":
            return None
        has = ", ".join(features) or "no others"
        problem = (
            f"holds {feature}, not classes, integers or names" if feature else f"is not there; besides images: {has}"
        )
        raise UserError(f"label_column: {name} of {source.label} {problem}")
    values = source.others.data.column(name).combine_chunks().fill_null(-1) if len(source.others) else []
    labels = np.asarray(values, dtype=np.int64)[source.rows]
    return Classes(labels, list(feature.names) if isinstance(feature, datasets.ClassLabel) else None, name)


def _of_names(source: TableSource, whole: StoredImages, name: str, auto: bool) -> Classes | None:
    """Return classes that a column tells by name; with `auto` None for texts that hardly repeat, such as captions."""
    own = source.others.data.column(name)
    more = whole.others if isinstance(whole, TableSource) and name in whole.others.features else source.others
    names = sorted({*own.unique().to_pylist(), *more.data.column(name).unique().to_pylist()} - {None})
    if auto and len(names) > max(2, max(len(own), len(more)) // 2):
        return None
    numbers = {text: number for number, text in enumerate(names)} | {None: -1}
    every = np.array([numbers[text] for text in own.to_pylist()], dtype=np.int64)
    return Classes(every[source.rows], names, name)


class Numbered(NamedTuple):
    """Classes of the images of two parts of a source, numbered from 0 without gaps."""

    labels: tuple[np.ndarray, np.ndarray]
    """(N,) int64 for each part; -1 where an image has none."""
    names: list[str]
    """Names of the classes."""
    column: str
    """Where they come from, as in `Classes`."""


def numbered_classes(first: StoredImages, second: StoredImages, column: str) -> Numbered | None:
    """Return the classes of two parts of a source, or None if one of them has none.

    Raises:
        UserError: If the column is missing or holds something else.
    """
    parts = find_classes(first, second, column), find_classes(second, first, column)
    if parts[0] is None or parts[1] is None:
        return None
    known = np.unique(np.concatenate([parts[0].labels, parts[1].labels]))
    known = known[known >= 0]
    numbers = [np.where(part.labels >= 0, np.searchsorted(known, part.labels), -1) for part in parts if part]
    names = parts[0].names
    return Numbered(
        (numbers[0], numbers[1]),
        [names[k] if names else str(k) for k in known.tolist()],
        parts[0].column,
    )


def few_labels(
    labels: np.ndarray, names: Sequence[str], sizes: Sequence[int], seed: int, number: int
) -> list[np.ndarray]:
    """Choose so many labelled images of each class at random; smaller choices are parts of larger ones.

    Args:
        labels: (N,) integers from 0 on, -1 where an image has no label.
        names: Names of the classes.
        sizes: Numbers of images of each class, ascending.
        seed: Seed of the choice.
        number: Number of the choice, from 0.

    Returns:
        Numbers of the images for each of the sizes, class after class.

    Raises:
        UserError: If a class has fewer images.
    """
    rng, orders = np.random.default_rng([seed, number]), list[np.ndarray]()
    for label, name in enumerate(names):
        rows = np.flatnonzero(labels == label)
        if len(rows) < sizes[-1]:
            raise UserError(
                f"labels_per_class: class {name} has {len(rows)} training images, fewer than {sizes[-1]}; "
                "lower labels_per_class, or test_fraction if that holds images back"
            )
        orders.append(rng.permutation(rows))
    return [np.concatenate([order[:size] for order in orders]) for size in sizes]
