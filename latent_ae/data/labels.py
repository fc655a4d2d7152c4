"""Finds the class of each image of a source."""

import os
from typing import NamedTuple

import datasets
import numpy as np

from latent_ae.config import UserError
from latent_ae.data.sources import FolderSource, StoredImages, TableSource

FOLDER_NAMES = "names of folders"


class Classes(NamedTuple):
    """Classes of the images of a source, in its order."""

    labels: np.ndarray
    """(N,) int64; -1 where a table has no value."""
    names: list[str] | None
    """Names of the classes 0, 1, ...; None if a table holds numbers only."""
    column: str
    """The column that they come from, or FOLDER_NAMES."""


def find_classes(source: StoredImages, whole: StoredImages, column: str | None) -> Classes | None:
    """Return the classes of the images of `source`, or None if they have none.

    With `auto`, a table has the classes of its column `label` if that holds classes or integers. Image files have the
    names of their folders, sorted (the convention of ImageFolder), if there are two or more.

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
        return _of_table(source, column)
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


def _of_table(source: TableSource, column: str) -> Classes | None:
    features = source.others.features
    name = "label" if column == "auto" else column
    feature = features.get(name)
    is_class = isinstance(feature, datasets.ClassLabel)
    if not is_class and not (isinstance(feature, datasets.Value) and "int" in feature.dtype):
        if column == "auto":
            return None
        has = ", ".join(features) or "no others"
        problem = f"holds {feature}, not classes or integers" if feature else f"is not there; besides images: {has}"
        raise UserError(f"label_column: {name} of {source.label} {problem}")
    values = source.others.data.column(name).combine_chunks().fill_null(-1) if len(source.others) else []
    labels = np.asarray(values, dtype=np.int64)[source.rows]
    return Classes(labels, list(feature.names) if is_class else None, name)
