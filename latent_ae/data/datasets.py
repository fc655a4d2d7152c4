"""Opens the images that settings name (demo photographs, a folder, table files or a hub id) and finds their splits."""

import fnmatch
import functools
import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
from huggingface_hub.utils import logging as hub_logging

from latent_ae.config import UserError, looks_like_path
from latent_ae.data.images import reason_of
from latent_ae.data.mixture import open_mixture
from latent_ae.data.settings import DataSettings, TrainingData
from latent_ae.data.sources import FolderSource, ImageSource, StreamSource, first_line, load_table

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
UNREADABLE = {
    *(".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jpe", ".jxl", ".nef", ".orf"),
    *(".psd", ".raw", ".svg", ".tga"),
}
"""Extensions of pictures that are not read."""
NO_EXTENSION = "no extension"
TABLE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
HELD_OUT_SPLITS = ("validation", "test")
SIZES = tuple(10**power for power in range(10))
"""Numbers of rows that a split may have."""
# the colour photographs in scikit-image's wheel. Three natural scenes that share nothing with the others are held out
# (motorcycle_left and _right are one scene); the others have sides of 500 px or more and are trained on
PHOTOS = {
    "train": (
        "astronaut.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
    ),
    "validation": ("chelsea.png", "coffee.png", "rocket.jpg"),
}


class _Library:
    """A location and the names of its splits, possibly none. `key` is the setting that names it."""

    def __init__(self, key: str, location: str, splits: Sequence[str]):
        self.key, self.location, self.splits = key, location, splits

    def open(self, split: str | None) -> ImageSource:
        raise NotImplementedError

    def find_split(self, requested: str, key: str) -> str | None:
        """Return this location's name of a split; None for `train` where there are no splits."""
        if not self.splits and requested == "train":
            return None
        return self.own_name(requested, requested, key)

    def own_name(self, name: str, requested: str, key: str) -> str:
        """Return this location's name of one split, which is part of what was `requested`."""
        for split in self.splits:
            if name == split or SPLIT_NAMES.get(name) == SPLIT_NAMES.get(split, split):
                return split
        has = f"it has: {', '.join(self.splits)}" if self.splits else "it has none (no folders train/ and val/)"
        raise UserError(f"data.{key}: {self.location} has no split {requested!r}; {has}")

    def held_out_split(self, trained: str | None = None) -> str | None:
        """Return the name of the validation or else the test split, unless it is part of `trained`; or None."""
        splits = {SPLIT_NAMES.get(split, split): split for split in self.splits if split not in self.parts(trained)}
        return next((splits[name] for name in HELD_OUT_SPLITS if name in splits), None)

    def parts(self, split: str | None) -> set[str]:
        """Return the names of the splits of which a split consists, wholly or partly."""
        return set() if split is None else {split}

    def overlap(self, one: str, other: str) -> bool:
        """Return whether two splits may have images in common."""
        return one == other


class _Photos(_Library):
    def open(self, split: str | None) -> FolderSource:
        spec = find_spec("skimage")  # finds the folder without importing it
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"data.{self.key}: photos needs scikit-image; pip install scikit-image, or give a folder")
        root = Path(spec.submodule_search_locations[0]) / "data"
        names = PHOTOS[split] if split else tuple(name for part in PHOTOS.values() for name in part)
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise UserError(f"data.{self.key}: photos: {root} lacks {', '.join(missing)}; reinstall scikit-image")
        return FolderSource(root, _as_array(names))


class _Files(_Library):
    """A folder of images, or one or many table files."""

    def __init__(self, key: str, path: Path, settings: DataSettings):
        is_folder = path.is_dir()
        self.root, self.settings = path if is_folder else path.parent, settings
        try:
            files = sorted(_walk(path)) if is_folder else [path.name]
        except OSError as error:  # going on without a folder would silently leave out its images
            raise UserError(f"data.{key}: cannot list {error.filename or path}: {reason_of(error)}") from None
        others, kinds = Counter[str](), dict[str, list[str]]()
        for name in files:
            suffix = _suffix(name)
            kind = "image" if suffix in IMAGE_SUFFIXES else TABLE_KINDS.get(suffix)
            if kind is None:
                others[suffix or NO_EXTENSION] += 1
            else:
                kinds.setdefault(kind, []).append(name)
        self.others = dict(others.most_common())
        if not is_folder and "image" in kinds:
            raise UserError(f"data.{key}: {path} is a single image; give the folder that it is in")
        if not kinds:
            shown = ", ".join(sorted(others)[:8]) or "nothing"
            raise UserError(
                f"data.{key}: {path} holds no images (it holds: {shown}); give a folder with "
                f"{' '.join(IMAGE_SUFFIXES)} files, or {' '.join(TABLE_KINDS)} files"
            )
        # a table beside images describes them
        self.kind = "image" if "image" in kinds else max(kinds, key=lambda kind: len(kinds[kind]))
        if self.kind != "image" and len(kinds) > 1:
            raise UserError(f"data.{key}: {path} mixes {' and '.join(sorted(kinds))} files; give one kind")
        if self.kind == "image" and settings.streaming and key == "source":
            raise UserError(f"data.streaming: {path} is read file by file anyway; set data.streaming=false")
        self.groups: dict[str | None, list[str]] = {None: kinds[self.kind]}
        for name in kinds[self.kind] if is_folder else ():
            if (split := _split_of(name, self.kind)) is not None:
                self.groups.setdefault(split, []).append(name)
        # `train` or `test` alone may be a class of things; side by side they are splits
        splits = [split for split in self.groups if split]
        super().__init__(key, str(path), splits if "train" in splits and len(splits) > 1 else ())
        left_out = [f"{count:,} {suffix}" for suffix, count in others.most_common() if suffix in UNREADABLE]
        left_out += [f"{count:,} without an extension" for suffix, count in others.items() if suffix == NO_EXTENSION]
        outside = len(kinds[self.kind]) - sum(len(self.groups[split]) for split in self.splits)
        if self.splits and outside:
            left_out.append(f"{outside:,} outside of {' and '.join(sorted(splits))}")
        if left_out:
            _say_once(f"{path}: these files are left out: {', '.join(left_out)}")

    def open(self, split: str | None) -> ImageSource:
        names = self.groups[split]
        if self.kind == "image":
            return FolderSource(self.root, _as_array(names), self.others)
        for name in names:
            if _suffix(name) == ".tar" and not _tar_is_whole(self.root / name):
                # datasets would silently read what is left of it
                raise UserError(f"data.{self.key}: {self.root / name} is cut off: it does not end as a tar file does")
        # datasets reads paths as glob patterns
        files = [glob.escape(str((self.root / name).absolute())) for name in names]
        data_files = {"train": files}
        return load_table(self.key, self.location, self.settings, self.kind, data_files=data_files, split="train")


class _Hub(_Library):
    """A dataset of the hub, whose splits may be slices and sums, as in train[:90%] and train+validation."""

    def __init__(self, key: str, location: str, settings: DataSettings):
        self.settings = settings
        _say_once(f"{location} is no file or folder here: asking the Hugging Face hub for it")
        try:
            with _quiet_hub():
                builder = datasets.load_dataset_builder(location, revision=settings.revision)
        except Exception as error:  # network, permission, a dataset that needs a script, ...
            raise UserError(
                f"data.{key}: {location} is neither a file or folder here nor a hub dataset within reach "
                f"({first_line(error)})"
            ) from error
        known = builder.info.splits or {}
        self.sizes = {str(name): split.num_examples for name, split in known.items() if split.num_examples}
        # without a list of splits, those that the names of files tell are objects of datasets
        super().__init__(key, location, [str(name) for name in known or builder.config.data_files or ()])

    def find_split(self, requested: str, key: str) -> str | None:
        if not self.splits and requested == "train":
            return None
        found = []
        for part in requested.split("+"):
            name, bracket, slice_ = part.strip().partition("[")
            found.append(self.own_name(name, requested, key) + bracket + slice_)
        return "+".join(found)

    def parts(self, split: str | None) -> set[str]:
        return {part.partition("[")[0] for part in split.split("+")} if split is not None else set()

    def overlap(self, one: str, other: str) -> bool:
        if not (shared := self.parts(one) & self.parts(other)) or one == other:
            return bool(shared)
        for size in SIZES:  # where the number of rows is not known, any may be the true one
            lengths = {name: self.sizes.get(name, size) for name in self.parts(one) | self.parts(other)}
            try:
                first, second = (datasets.ReadInstruction.from_spec(each).to_absolute(lengths) for each in (one, other))
            except (AssertionError, ValueError):  # fewer rows than the slices speak of
                continue
            pairs = ((a, b) for a in first for b in second if a.splitname == b.splitname)
            if any(max(a.from_, b.from_) < min(a.to, b.to) for a, b in pairs):
                return True
        return False

    def open(self, split: str | None) -> ImageSource:
        split = split or (self.splits[0] if self.splits else "train")
        revision = self.settings.revision
        return load_table(self.key, self.location, self.settings, self.location, split=split, revision=revision)


@functools.cache  # training and held-out images often come from the same location
def _say_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Suppress the hub client's warnings on each retry without a network: the final error says it once."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def _library(settings: DataSettings, key: Literal["source", "eval_source"]) -> _Library:
    location = settings.source if key == "source" else str(settings.eval_source)
    if location == "photos":
        if settings.streaming and key == "source":
            raise UserError("data.streaming: photos are files on this disk; set data.streaming=false")
        if Path(location).exists():
            _say_once("photos are those that scikit-image ships; for the folder of this name here write ./photos")
        return _Photos(key, location, tuple(PHOTOS))
    path = Path(location).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"data.{key}: {location!r} cannot be opened: {reason_of(error)}") from None
    else:
        return _Files(key, path, settings)
    if looks_like_path(location) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location):
        raise UserError(f"data.{key}: no such file or folder: {location} (from {Path.cwd()})")
    return _Hub(key, location, settings)


def open_images(settings: DataSettings, part: Literal["train", "held_out", "all"]) -> ImageSource:
    """Open the training images, the held-out images, or a whole split.

    The held-out images are `eval_source`; else the source's `eval_split`; else its validation or test split if it has
    one; else `eval_fraction` of its images, which training then never sees.

    A mixture holds that part of each of its sources.

    Args:
        settings: The section `data` of the settings.
        part: "train", "held_out", or "all" for the whole `split` (for `photos`: all photographs).

    Raises:
        UserError: If there is no such location or split, it holds no images, or none can be held out.
    """
    if isinstance(settings, TrainingData) and settings.mixture:
        return open_mixture(settings, part, open_images)
    if part == "held_out" and settings.eval_source is not None:
        library = _library(settings, "eval_source")
        if settings.eval_split is not None:
            return library.open(library.find_split(settings.eval_split, "eval_split"))
        return library.open(library.held_out_split())
    library = _library(settings, "source")
    if part == "all" and settings.source == "photos":
        return library.open(None)
    split = library.find_split(settings.split, "split")
    if part == "all" or (part == "train" and settings.eval_source is not None):
        return library.open(split)
    held_out_split = library.held_out_split(split)
    if settings.eval_split is not None:
        held_out_split = library.find_split(settings.eval_split, "eval_split")
        if split is not None and held_out_split is not None and library.overlap(split, held_out_split):
            raise UserError(
                f"data.eval_split: {settings.eval_split} has images of data.split {settings.split}; hold out another "
                "split, or another part of it"
            )
    if held_out_split is not None and held_out_split != split:
        return library.open(split if part == "train" else held_out_split)
    return _fraction(library.open(split), settings, part)


def _fraction(source: ImageSource, settings: DataSettings, part: Literal["train", "held_out"]) -> ImageSource:
    if isinstance(source, StreamSource):
        raise UserError(
            f"data.eval_fraction: {settings.source} is streamed and has no validation or test split, so no images "
            "can be held out of it; set data.eval_source or data.eval_split, or data.streaming=false"
        )
    count = max(1, round(len(source) * settings.eval_fraction))
    if count >= len(source):
        raise UserError(
            f"data.source: {settings.source} holds {len(source)} image(s), too few to hold out {count} "
            f"(data.eval_fraction={settings.eval_fraction}); add images or set data.eval_source"
        )
    # chosen by key, not by position: images added later move few others between the parts
    ranked = np.argsort(source.keys(), kind="stable")
    return source.subset(np.sort(ranked[:count] if part == "held_out" else ranked[count:]))


def _walk(root: Path) -> Iterator[str]:
    """Yield the relative paths of all files but hidden ones; links are followed, but no folder is entered twice.

    Folders inside that trainings or evaluations wrote are left out, with their pictures, and so is what the library
    datasets keeps beside a saved dataset.

    Raises OSError for a folder that cannot be listed.
    """
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        if folder != str(root) and _is_own(files):
            subfolders.clear()
            _say_once(f"{folder}: left out, because latent-ae wrote this folder")
            continue
        if "state.json" in files:
            files = [name for name in files if not fnmatch.fnmatch(name, "cache-*.arrow")]
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "lost+found")
        relative = os.path.relpath(folder, root)
        yield from (os.path.normpath(os.path.join(relative, name)) for name in files if not name.startswith("."))


def _is_own(files: Sequence[str]) -> bool:
    """Return whether a folder with these files is that of a training or of an evaluation."""
    evaluation = "result.json" in files and any(name.endswith(".html") for name in files)
    return {"config.yaml", "log.jsonl"} <= set(files) or evaluation


def _raise(error: OSError) -> None:
    raise error


def _tar_is_whole(path: Path) -> bool:
    """Return whether the file ends in the block of zeros that marks an archive's end (POSIX pax)."""
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 512))
        tail = stream.read()
    return len(tail) == 512 and not any(tail)


def _split_of(name: str, kind: str) -> str | None:
    """Return the split that a relative path names: its topmost folder; for tables also a file name like test-00001."""
    *folders, file = name.split(os.sep)
    words = folders[:1] if kind == "image" else [*folders, re.split(r"[^a-z]", file.lower())[0]]
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _as_array(names: Sequence[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])
