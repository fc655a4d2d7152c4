"""The pieces of an unfinished evaluation on disk: a killed one goes on from them, on any number of processes.

A shard is a block of neighbouring images. Its file holds a row per image (as JSON), what was skipped, and the features
of its images; it appears whole or not at all.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latent_ae.files import writing
from latent_ae.pretrained.weight_files import tensors_sha256
from latent_ae.pretrained.weights import cache_folder

WHOLE, SMALL, LARGE, MANY_IMAGES = 4, 16, 64, 2048


class Shard(NamedTuple):
    """What was measured of a block of images."""

    rows: list[dict[str, Any]]
    skipped: list[str]
    features: dict[str, Tensor]
    """By name, e.g. inception.mode: float32 (rows, D)."""


def shard_size(num_images: int | None, whole_images: bool) -> int:
    """Images per shard, which are in memory together: a function of the data alone."""
    if whole_images:
        return WHOLE
    return LARGE if num_images is None or num_images >= MANY_IMAGES else SMALL


class WorkFolder:
    """The shards of one evaluation, in files that carry its token: those of another one are never taken for its own.

    `key`: all that the numbers depend on; None for an evaluation that cannot be gone on from.
    """

    def __init__(self, folder: Path, key: dict[str, Any] | None):
        self.folder = folder
        text = json.dumps(key, sort_keys=True) if key is not None else uuid.uuid4().hex
        self.token = hashlib.sha256(text.encode()).hexdigest()[:16]

    def begin(self) -> int:
        """Called by one process, alone on the folder: removes others' shards, counts those that are left."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_files(lambda path: not path.name.startswith(f"shard-{self.token}-"))
        return len(self.done())

    def done(self) -> frozenset[int]:
        """Numbers of the finished shards; broken files (of a machine that lost power) are removed."""
        numbers = set()
        for path in sorted(self.folder.glob(f"shard-{self.token}-*.safetensors")):
            number = int(path.stem.rpartition("-")[2])
            try:
                self.read(number)
                numbers.add(number)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)
        return frozenset(numbers)

    def write(self, number: int, shard: Shard) -> None:
        notes = {"rows": json.dumps(shard.rows), "skipped": json.dumps(shard.skipped)}
        with writing(self._path(number), "The finished shards stay; free space, then run the same command again"):
            _save(shard.features, self._path(number), notes)

    def read(self, number: int) -> Shard:
        """Raises ValueError and others when the file is not as it was written."""
        features, notes = _load(self._path(number))
        return Shard(json.loads(notes["rows"]), json.loads(notes["skipped"]), features)

    def remove(self) -> None:
        """Removes what the evaluation wrote, and the folder if nothing else is in it."""
        self._remove_files(lambda path: True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _remove_files(self, unwanted: Callable[[Path], bool]) -> None:
        for pattern in ("shard-*.safetensors", ".shard-*.part", "*.f32"):
            for path in self.folder.glob(pattern):
                if unwanted(path):
                    path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{self.token}-{number:06d}.safetensors"


class ReferenceCache:
    """Inception's features of originals, kept from one evaluation to the next.

    The key is the content of a shard's files and all that makes features of them, so a changed file misses.
    """

    def __init__(self, framing: dict[str, Any]):
        self.framing = json.dumps(framing, sort_keys=True)
        self.folder = cache_folder() / "references"

    def find(self, digests: list[str]) -> Tensor | None:
        """Features (N, D) of the shard whose files have these digests."""
        path = self._path(digests)
        try:
            features = _load(path)[0]["features"] if path.is_file() else None
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        return features if features is not None and len(features) == len(digests) else None

    def keep(self, digests: list[str], features: Tensor) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _save({"features": features}, self._path(digests), {})
        except (OSError, SafetensorError):  # a cache that cannot be written only costs time
            return

    def _path(self, digests: list[str]) -> Path:
        key = hashlib.sha256("\n".join([self.framing, *digests]).encode()).hexdigest()
        return self.folder / f"{key[:40]}.safetensors"


class FeatureFile:
    """Feature vectors in a file of float32, so that any number of them takes no memory."""

    def __init__(self, path: Path):
        self.path, self.count, self.dimensions = path, 0, 0

    def append(self, features: np.ndarray) -> None:
        """(N, D) float32."""
        self.dimensions = features.shape[1]
        with self.path.open("ab") as stream:
            stream.write(np.ascontiguousarray(features, dtype=np.float32).tobytes())
        self.count += len(features)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), D): those rows, in their order."""
        size = 4 * self.dimensions
        found = np.empty((len(rows), self.dimensions), dtype=np.float32)
        with self.path.open("rb", buffering=0) as stream:
            for position, row in enumerate(rows):
                stream.seek(int(row) * size)
                found[position] = np.frombuffer(stream.read(size), dtype=np.float32)
        return found


def _save(tensors: dict[str, Tensor], path: Path, notes: dict[str, str]) -> None:
    """Whole or not at all, with a checksum of the tensors and notes."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, part, notes | {"sha256": _checksum(stored, notes)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `_save` wrote. Raises ValueError for another checksum."""
    with safe_open(path, framework="pt") as file:
        notes = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    if notes.pop("sha256", None) != _checksum(tensors, notes):
        raise ValueError(f"{path}: another checksum than it was written with")
    return tensors, notes


def _checksum(tensors: dict[str, Tensor], notes: dict[str, str]) -> str:
    return tensors_sha256(tensors) + hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
