"""Sources of encoded images: by number, or as a stream. `images.decode` turns their images into pixels."""

import difflib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import datasets
import numpy as np

from latent_ae.config import UserError
from latent_ae.data.images import ImageError, kind_of, open_encoded, reason_of
from latent_ae.data.rng import block_order, choice_facts, epoch_order, spread
from latent_ae.data.settings import DataSettings
from latent_ae.text import printable

Encoded = bytes | Path
LOOKED_AT = 10
"""Number of first rows that are searched for a value to learn what a column of bytes holds."""


class StoredImages(Protocol):
    """Images by number, in a fixed order; small enough to be sent to workers."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Return a name by which a person finds image i."""

    def read(self, i: int) -> Encoded:
        """Return the bytes or the file of image i. Raises ImageError if a table's row holds no image."""

    def keys(self) -> np.ndarray:
        """Return one key per image, (N,) uint64, that stays the same when other images are added."""

    def subset(self, rows: np.ndarray) -> "StoredImages":
        """Return a source of the images with these numbers, (n,) integers, in this order."""


@dataclass(frozen=True)
class FolderSource:
    """Image files under `root`; `names` are relative paths as bytes, one array instead of a million objects."""

    root: Path
    names: np.ndarray
    others: Mapping[str, int] = field(default_factory=dict)
    """Number of files that were left out, because their names are not those of images, by extension."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        # a line break could forge lines of a log, and bytes that are no text do not fit into a table
        return printable(os.fsdecode(self.names[i]))

    def read(self, i: int) -> Path:
        return self.root / os.fsdecode(self.names[i])

    def keys(self) -> np.ndarray:
        digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in self.names.tolist())
        return np.frombuffer(digests, dtype="<u8")

    def subset(self, rows: np.ndarray) -> "FolderSource":
        return replace(self, names=self.names[rows])


@dataclass(frozen=True)
class TableSource:
    """Rows of a map-style dataset whose `column` holds encoded images."""

    dataset: datasets.Dataset
    column: str
    label: str
    rows: np.ndarray
    others: datasets.Dataset
    """The other columns."""

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return f"{self.label} row {self.rows[i]}"

    def read(self, i: int) -> Encoded:
        return encoded_image(self.dataset[int(self.rows[i])][self.column])

    def keys(self) -> np.ndarray:
        return np.random.Philox(key=0).random_raw(len(self.dataset))[self.rows]

    def subset(self, rows: np.ndarray) -> "TableSource":
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True)
class StreamSource:
    """A dataset that can only be read from its start, in files (shards) that go to different readers."""

    dataset: datasets.IterableDataset
    column: str
    label: str

    def check_readers(self, rank: int, world_size: int, workers: int, state: dict[str, Any] | None) -> None:
        """Raise UserError if some worker would get no file, or the state is from other numbers of readers.

        Args:
            rank: Number of this process.
            world_size: Number of processes.
            workers: Number of workers of each process.
            state: The `Batch.stream_state` from which the stream resumes, or None.
        """
        shards = self.dataset.num_shards
        if shards < workers * world_size:
            raise UserError(
                f"data.num_workers: {self.label} streams from {shards} file(s), but {world_size} process(es) with "
                f"{workers} worker(s) each need one per worker, {workers * world_size}; lower data.num_workers, "
                "split the files, or set data.streaming=false"
            )
        if state is None:
            return
        before = len(state["workers"])
        if (state["rank"], state["world_size"], before) != (rank, world_size, workers):
            raise UserError(
                f"data.streaming: the run streamed with {state['world_size']} process(es) of {before} worker(s), "
                f"now there are {world_size} of {workers}; a stream resumes only with the same numbers"
            )


ImageSource: TypeAlias = StoredImages | StreamSource


class StreamReader:
    """Endless iterator over the images of one reader of a stream: (name, function that returns the image).

    Each epoch puts the files into another order and deals them out to the readers. A reader takes the images of its
    files in blocks of `buffer_size` / 2 and yields each block shuffled, while it reads the next block one by one.
    `state_dict` holds where the current block began, so that a resumed reader yields the same images as one that never
    stopped.

    Args:
        source: The stream.
        seed: Seed of the order.
        buffer_size: Number of images held in memory to shuffle from.
        reader: Number of this reader.
        num_readers: Number of readers, over all processes.
        state: The `state_dict` from which to resume; None starts at the beginning.

    Raises:
        UserError: While iterating, if the reader's files hold no image or cannot be read.
    """

    def __init__(
        self, source: StreamSource, seed: int, buffer_size: int, reader: int, num_readers: int, state: dict | None
    ):
        self.source, self.seed, self.block_size = source, seed, max(1, buffer_size // 2)
        self.reader, self.num_readers = reader, num_readers
        self.state = state or {"epoch": 0, "file": 0, "row": 0, "block": 0, "offset": 0}
        self.images = self._images()

    def __iter__(self) -> "StreamReader":
        return self

    def __next__(self) -> tuple[str, Callable[[], Encoded]]:
        value = next(self.images)
        path = value.get("path") if isinstance(value, dict) else None
        return path or f"{self.source.label} (streamed)", partial(encoded_image, value)

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last image, JSON-ready."""
        return dict(self.state)

    def _images(self) -> Iterator[Any]:
        first = self.state
        for epoch in itertools.count(first["epoch"]):
            rows = self._rows(epoch, first["file"], first["row"])
            block, number, done = list(itertools.islice(rows, self.block_size)), first["block"], first["offset"]
            if not block:
                raise UserError(f"data.source: {self.source.label} streams no images to reader {self.reader}")
            while block:
                file, row = block[0][0]
                following: list[tuple[tuple[int, int], Any]] = []
                for offset, place in enumerate(block_order(self.seed, epoch, self.reader, number, len(block))):
                    following += itertools.islice(rows, 1)
                    if offset >= done:
                        position = {"epoch": epoch, "file": file, "row": row, "block": number, "offset": offset + 1}
                        self.state = position
                        yield block[place][1]
                block, number, done = following, number + 1, 0
            first = {"file": 0, "row": 0, "block": 0, "offset": 0}

    def _rows(self, epoch: int, first_file: int, first_row: int) -> Iterator[tuple[tuple[int, int], Any]]:
        """Yield ((file, row), value) of this reader's files in the epoch's order, from the given row on."""
        dataset = self.source.dataset
        shards = epoch_order(self.seed, epoch, dataset.num_shards)[self.reader :: self.num_readers]
        for file in range(first_file, len(shards)):
            skipped = first_row if file == first_file else 0
            shard = dataset.shard(dataset.num_shards, int(shards[file]), contiguous=False)
            # iter() instead of __iter__, which would deal the rows out to the DataLoader's workers again
            rows = _readable(shard.skip(skipped).iter(batch_size=1), self.source.label)
            for row, batch in enumerate(rows, start=skipped):
                yield (file, row), batch[self.source.column][0]


def part_of(source: ImageSource, number: int | None, seed: int) -> tuple[ImageSource, dict[str, Any]]:
    """Return at most `number` images of a source, spread over it by `seed` (see `rng.spread`), and facts on the choice.

    A stream cannot be spread: its first images are taken.

    Args:
        source: The images.
        number: Largest number of images; None takes all.
        seed: Seed of the choice.

    Returns:
        The part of the source, and how a result describes the choice, JSON-ready.
    """
    if isinstance(source, StreamSource):
        if number is None:
            return source, {"method": "all", "number": None, "of": None}
        return replace(source, dataset=source.dataset.take(number)), {"method": "first", "number": number, "of": None}
    chosen = spread(seed, len(source), len(source) if number is None else number)
    return source.subset(chosen), choice_facts(chosen, len(source), seed)


def stream_values(source: StreamSource) -> Iterator[tuple[str, Any]]:
    """Yield (name, value of the image column) of every row, in order. Raises UserError if a file cannot be read."""
    for index, row in enumerate(_readable(source.dataset, source.label)):
        yield f"{source.label} row {index}", row[source.column]


def _readable(rows: Iterable[Any], label: str) -> Iterator[Any]:
    """Yield the rows; an error of a damaged file becomes a UserError."""
    try:
        yield from rows
    except Exception as error:  # each format and each file system raises its own kinds of errors
        raise UserError(
            f"data.source: {label} cannot be read to its end: {first_line(error)}; is one of its files cut off?"
        ) from error


def encoded_image(value: Any) -> Encoded:
    """Return the image in a row's value: bytes, or the `{bytes, path}` of an undecoded datasets.Image.

    Raises:
        ImageError: If the value holds no image.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    if not isinstance(value, (bytes, Path)):
        raise ImageError("the row holds no image")
    return value


def digest_of(encoded: Encoded) -> str:
    """Return the digest of the stored bytes: blake2b of 16 bytes, in hexadecimal.

    Raises:
        ImageError: If the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open_encoded(encoded) as stream:
        try:
            while piece := stream.read(1 << 20):  # in pieces, because an array's file may be larger than the memory
                digest.update(piece)
        except OSError as error:
            raise ImageError(reason_of(error)) from None
    return digest.hexdigest()


def source_stamp(source: ImageSource) -> Any:
    """Return a value that changes when files are added, removed or written to; None for a stream."""
    if isinstance(source, StreamSource):
        return None
    digest = hashlib.sha256()
    if isinstance(source, FolderSource):
        for i in range(len(source)):
            try:
                state = os.stat(source.read(i))
                # not when its owner, permissions or links changed, which leave the picture as it is
                facts: tuple[int, ...] = (state.st_size, state.st_mtime_ns)
            except OSError:  # a dangling link, a file that is gone by now
                facts = ()
            digest.update(os.fsencode(source.name(i)) + f"\0{facts}\0".encode())
    elif isinstance(source, TableSource):
        digest.update(f"{source.dataset._fingerprint} {source.column}".encode())
        digest.update(source.rows.tobytes())
    return digest.hexdigest()


def fingerprint(digests: Iterable[str]) -> str:
    """Return a digest over the contents of images (`digest_of` each) in their order, whatever their names."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def load_table(key: str, label: str, settings: DataSettings, path: str, **options: Any) -> TableSource | StreamSource:
    """Open a hub id or table files with `datasets.load_dataset`; the images stay encoded.

    Args:
        key: The setting that names the data, for messages.
        label: What messages call the data.
        settings: The image column, and whether to stream.
        path: A hub id, or a packaged format such as "parquet".
        **options: More arguments of `load_dataset`.

    Raises:
        UserError: If the data cannot be read, or there is no column of images.
    """
    try:
        dataset = datasets.load_dataset(path, streaming=settings.streaming, **options)
    except Exception as error:  # whatever datasets raises here is about the user's files
        raise UserError(f"data.{key}: {label} cannot be read as {path}: {first_line(error)}") from error
    features = dataset.features or {}
    column = _image_column(dataset, settings.image_column, label)
    feature = features[column]
    if isinstance(feature, datasets.Image):
        # bytes stay as they are until images.decode sees them
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    elif not _may_hold_images(feature):
        raise UserError(f"data.image_column: {column!r} of {label} holds {feature}, not images or their bytes")
    images = dataset.select_columns([column])
    if settings.streaming:
        return StreamSource(images, column, label)
    return TableSource(images, column, label, np.arange(len(images)), dataset.remove_columns(column))


def _image_column(dataset: datasets.Dataset | datasets.IterableDataset, requested: str, label: str) -> str:
    """Return the requested column; if that is the default and missing, the table's only column of images.

    Raises UserError that names the columns if there is neither.
    """
    features = dataset.features or {}
    if requested in features:
        return requested
    pictures = [name for name, feature in features.items() if _holds_images(dataset, name, feature)]
    if len(pictures) == 1 and requested == DataSettings.model_fields["image_column"].default:
        return pictures[0]
    near = pictures or difflib.get_close_matches(requested, list(features), n=1, cutoff=0.3)
    hint = f"; set {' or '.join(f'data.image_column={name}' for name in near)}" if near else ""
    raise UserError(f"data.image_column: {label} has no column {requested!r}; it has: {', '.join(features)}{hint}")


def _may_hold_images(feature: Any) -> bool:
    """Return whether the type is one of bytes, or the structure of an image feature that lost its type."""
    return "binary" in getattr(feature, "dtype", "") or (isinstance(feature, dict) and "bytes" in feature)


def _holds_images(dataset: datasets.Dataset | datasets.IterableDataset, name: str, feature: Any) -> bool:
    """Return whether the column is one of images by its type, or holds bytes whose first value is an image."""
    if isinstance(feature, datasets.Image):
        return True
    if not _may_hold_images(feature):
        return False
    values = (row[name] for row in itertools.islice(dataset.select_columns([name]), LOOKED_AT))
    try:
        kind_of(encoded_image(next(value for value in values if value is not None)))
    except (ImageError, StopIteration):
        return False
    except Exception as error:  # a damaged file
        raise UserError(f"data.image_column: {name!r} cannot be read: {first_line(error)}") from error
    return True


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
