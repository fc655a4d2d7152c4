"""Files of an unfinished evaluation, from which it resumes after a kill, on any number of processes.

A shard is a block of neighbouring images. Its file holds a row per image (as JSON), the skipped images, and the
features of its images; a kill leaves a whole file or none.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.distributed import on_main
from latent_ae.files import writing
from latent_ae.only_writer import only_writer
from latent_ae.pretrained.weight_files import tensors_sha256
from latent_ae.pretrained.weights import cache_folder

WHOLE, SMALL, LARGE, MANY_IMAGES = 4, 16, 64, 2048


class Shard(NamedTuple):
    """The measurements of a block of images."""

    rows: list[dict[str, Any]]
    """Metrics of each image, JSON-ready."""
    skipped: list[str]
    """`name: reason` of each unreadable image."""
    features: dict[str, Tensor]
    """Features by name, e.g. inception.mode: (rows, D) float32."""


def shard_size(num_images: int | None, whole_images: bool) -> int:
    """Return the number of images per shard, which are in memory together; it depends on the data alone.

    Args:
        num_images: Number of images; None for a stream.
        whole_images: Whether images keep their size, so that they may be large.
    """
    if whole_images:
        return WHOLE
    return LARGE if num_images is None or num_images >= MANY_IMAGES else SMALL


ONCE = "once"
"""Beginning of the token of an evaluation that cannot be resumed."""


class WorkFolder:
    """The shards of one evaluation, in files named by its token, so that those of another one are never used.

    Args:
        folder: The folder of the files.
        key: Everything that the numbers depend on, JSON-ready; None for an evaluation that cannot be resumed.
    """

    def __init__(self, folder: Path, key: dict[str, Any] | None):
        self.folder = folder
        known = json.dumps(key, sort_keys=True)
        self.token = hashlib.sha256(known.encode()).hexdigest()[:16] if key is not None else f"{ONCE}{uuid.uuid4().hex}"

    def begin(self) -> int:
        """Remove what a killed evaluation was writing or cannot resume; return the number of finished shards.

        Those of other evaluations stay, for a trial must not cost the work of an hour. One process calls this while no
        other uses the folder. Raises UserError if the folder cannot be written.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for pattern in (".shard-*.part", "*.f32", f"shard-{ONCE}*"):
                self._remove_files(pattern)
            if others := sum(not path.name.startswith(f"shard-{self.token}-") for path in self.folder.glob("shard-*")):
                print(
                    f"{self.folder} keeps {others} finished parts of an evaluation with other settings or versions; "
                    "the same command as then resumes it, or remove them",
                    file=sys.stderr,
                )
        return len(self.done())

    def done(self) -> frozenset[int]:
        """Return the numbers of the finished shards; broken files (after a power failure) are removed."""
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
        """Write a shard; a kill leaves the whole file or none. Raises UserError if it cannot be written."""
        notes = {"rows": json.dumps(shard.rows), "skipped": json.dumps(shard.skipped)}
        with writing(self._path(number), "The finished shards stay; free space, then run the same command again"):
            _save(shard.features, self._path(number), notes)

    def read(self, number: int) -> Shard:
        """Read a shard. Raises ValueError, or another error, if the file is not as it was written."""
        features, notes = _load(self._path(number))
        return Shard(json.loads(notes["rows"]), json.loads(notes["skipped"]), features)

    def remove(self) -> None:
        """Remove the evaluation's files, and the folder if nothing else is in it."""
        for pattern in (f"shard-{self.token}-*.safetensors", f".shard-{self.token}-*.part", f"{self.token}-*.f32"):
            self._remove_files(pattern)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _remove_files(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{self.token}-{number:06d}.safetensors"


def opened_work(
    stack: ExitStack, out: str | Path | None, keys: Mapping[str, dict[str, Any] | None], state: PartialState
) -> dict[str, tuple[WorkFolder, frozenset[int]]]:
    """Open the folders of an evaluation's shards, the same on all processes, and lock them until `stack` ends.

    Args:
        stack: Holds the lock, or the temporary folder.
        out: The folder of --out, in which they are; None takes a temporary one.
        keys: The key of each part of the evaluation, see `WorkFolder`, by the name of its folder; an evaluation of one
            part has an empty name.
        state: The processes.

    Returns:
        The folders with the numbers of their finished shards, by name.

    Raises:
        UserError: If the folder cannot be written, another evaluation uses it, or a process does not see it.
    """

    def begin() -> dict[str, tuple[WorkFolder, frozenset[int]]]:
        try:
            if out is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latent-ae-")))
            else:
                refusal = f"--out: another evaluation is writing into {out}; wait for it, or give another folder"
                stack.enter_context(only_writer(Path(out) / ".evaluation.lock", refusal))
                folder = Path(out) / "unfinished"
            works = {}
            for name, key in keys.items():
                work = WorkFolder(folder / name, key)
                if count := work.begin():
                    print(f"resuming from {count} finished parts in {work.folder}", file=sys.stderr)
                works[name] = work, work.done()
            return works
        except OSError as error:
            raise UserError(f"--out: cannot write into {out}: {error}") from error

    works = on_main(state, begin)
    for work, _ in works.values():
        if not work.folder.is_dir():
            raise UserError(f"--out: this process does not see {work.folder}; give a folder that all machines share")
    return works


class ReferenceCache:
    """A cache on disk of Inception features of original images, which several evaluations share.

    The key is the content of a shard's files and everything that the features depend on, so a changed file has none.

    Args:
        framing: Everything besides the files that the features depend on, JSON-ready.
    """

    def __init__(self, framing: dict[str, Any]):
        self.framing = json.dumps(framing, sort_keys=True)
        self.folder = cache_folder() / "references"

    def find(self, digests: list[str]) -> Tensor | None:
        """Return the features, (N, D) float32, of the N files with these digests, or None."""
        path = self._path(digests)
        try:
            features = _load(path)[0]["features"] if path.is_file() else None
        except (SafetensorError, OSError, ValueError, KeyError):
            return None
        return features if features is not None and len(features) == len(digests) else None

    def keep(self, digests: list[str], features: Tensor) -> None:
        """Store the features, (N, D), of the N files with these digests; a failure to write is ignored."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _save({"features": features}, self._path(digests), {})
        except (OSError, SafetensorError):  # a cache that cannot be written only costs time
            return

    def _path(self, digests: list[str]) -> Path:
        key = hashlib.sha256("\n".join([self.framing, *digests]).encode()).hexdigest()
        return self.folder / f"{key[:40]}.safetensors"


class FeatureFile:
    """Feature vectors in a file of float32 numbers, so that any number of them takes no memory."""

    def __init__(self, path: Path):
        self.path, self.count, self.dimensions = path, 0, 0

    def append(self, features: np.ndarray) -> None:
        """Append features, (N, D) float32. Raises OSError if the file cannot be written."""
        self.dimensions = features.shape[1]
        with self.path.open("ab") as stream:
            stream.write(np.ascontiguousarray(features, dtype=np.float32).tobytes())
        self.count += len(features)

    def block(self, first: int, count: int) -> np.ndarray:
        """Return the features of `count` neighbouring rows, from `first` on (fewer at the end): (n, D) float32."""
        size = max(0, min(count, self.count - first)) * self.dimensions
        flat = np.fromfile(self.path, dtype=np.float32, count=size, offset=4 * self.dimensions * first)
        return flat.reshape(-1, self.dimensions)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the features of the row numbers `rows`, in their order: (len(rows), D) float32."""
        size = 4 * self.dimensions
        features = np.empty((len(rows), self.dimensions), dtype=np.float32)
        with self.path.open("rb", buffering=0) as stream:
            for position, row in enumerate(rows):
                stream.seek(int(row) * size)
                features[position] = np.frombuffer(stream.read(size), dtype=np.float32)
        return features


def _save(tensors: dict[str, Tensor], path: Path, notes: dict[str, str]) -> None:
    """Write tensors and notes with their checksum; a kill leaves the whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, part, notes | {"sha256": _checksum(stored, notes)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `_save` wrote. Raises ValueError if the checksum differs."""
    with safe_open(path, framework="pt") as file:
        notes = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
    if notes.pop("sha256", None) != _checksum(tensors, notes):
        raise ValueError(f"{path}: its content does not match its checksum")
    return tensors, notes


def _checksum(tensors: dict[str, Tensor], notes: dict[str, str]) -> str:
    return tensors_sha256(tensors) + hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
