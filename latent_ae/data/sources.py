"""What a source of images is: encoded images by number, or a stream of them. `images.decode` makes pixels of them."""

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
"""Rows among which there is one that says what a column of bytes holds."""


class StoredImages(Protocol):
    """Images by number, in a fixed order; small enough to be sent to workers."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a person can find image i by."""

    def read(self, i: int) -> Encoded:
        """Image i as it is stored. Raises ImageError where a table's row holds none."""

    def keys(self) -> np.ndarray:
        """One uint64 per image that stays the same when other images are added."""

    def subset(self, rows: np.ndarray) -> "StoredImages": ...


@dataclass(frozen=True)
class FolderSource:
    """Image files under `root`; `names` are relative paths as bytes, one array instead of a million objects."""

    root: Path
    names: np.ndarray
    others: Mapping[str, int] = field(default_factory=dict)
    """By extension: how many files beside them have no name of an image, and are left out."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        # a line break would forge lines of a log, and what is no text fits into no table
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
        """Raises UserError when some worker would get no file, or `Batch.stream_state` is of other readers."""
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
                f"now there are {world_size} of {workers}; a stream goes on only with the same numbers"
            )


ImageSource: TypeAlias = StoredImages | StreamSource


class StreamReader:
    """Endless iterator over (name, function that gives the encoded image): what reader `reader` of many sees.

    Each epoch puts the files into another order and deals them out to the readers; a reader takes the images of its
    files in blocks of half a `buffer_size`, each shuffled, while it reads the next block one by one. `state_dict`
    knows where the present block began, so that going on from it gives the same images as never having stopped.
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
        """Position behind the last image given."""
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
        """((file, row), value) of this reader's files in the epoch's order, from the given place on."""
        dataset = self.source.dataset
        shards = epoch_order(self.seed, epoch, dataset.num_shards)[self.reader :: self.num_readers]
        for file in range(first_file, len(shards)):
            skipped = first_row if file == first_file else 0
            shard = dataset.shard(dataset.num_shards, int(shards[file]), contiguous=False)
            # iter() instead of __iter__, which would deal the rows out to the DataLoader's workers once more
            rows = _readable(shard.skip(skipped).iter(batch_size=1), self.source.label)
            for row, batch in enumerate(rows, start=skipped):
                yield (file, row), batch[self.source.column][0]


def part_of(source: ImageSource, number: int | None, seed: int) -> tuple[ImageSource, dict[str, Any]]:
    """At most `number` images of a source (None: all of them), and what a result says of the choice, JSON-ready.

    They are spread over the source by `seed` (see rng.spread). A stream has no numbers: it gives its first ones.
    """
    if isinstance(source, StreamSource):
        if number is None:
            return source, {"method": "all", "number": None, "of": None}
        return replace(source, dataset=source.dataset.take(number)), {"method": "first", "number": number, "of": None}
    chosen = spread(seed, len(source), len(source) if number is None else number)
    return source.subset(chosen), choice_facts(chosen, len(source), seed)


def stream_values(source: StreamSource) -> Iterator[tuple[str, Any]]:
    """(name, value of the image column) of every row, in order. Raises UserError."""
    for index, row in enumerate(_readable(source.dataset, source.label)):
        yield f"{source.label} row {index}", row[source.column]


def _readable(rows: Iterable[Any], label: str) -> Iterator[Any]:
    """The rows; what a damaged file raises under way as a UserError."""
    try:
        yield from rows
    except Exception as error:  # each format and each file system has kinds of its own
        raise UserError(
            f"data.source: {label} cannot be read to its end: {first_line(error)}; is one of its files cut off?"
        ) from error


def encoded_image(value: Any) -> Encoded:
    """A row's image: bytes, or the `{bytes, path}` of an undecoded datasets.Image."""
    if isinstance(value, dict):
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    if not isinstance(value, (bytes, Path)):
        raise ImageError("the row holds no image")
    return value


def digest_of(encoded: Encoded) -> str:
    """Digest of the bytes as they are stored: blake2b, 16 bytes in hex. Raises ImageError."""
    digest = hashlib.blake2b(digest_size=16)
    with open_encoded(encoded) as stream:
        try:
            while piece := stream.read(1 << 20):  # in pieces: an array's file may be larger than the memory
                digest.update(piece)
        except OSError as error:
            raise ImageError(reason_of(error)) from None
    return digest.hexdigest()


def source_stamp(source: ImageSource) -> Any:
    """Changes when files are added, removed or written to; None for streams, which are not looked at beforehand."""
    if isinstance(source, StreamSource):
        return None
    digest = hashlib.sha256()
    if isinstance(source, FolderSource):
        for i in range(len(source)):
            try:
                state = os.stat(source.read(i))
                facts: tuple[int, ...] = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
            except OSError:  # a dangling link, a file that is gone by now
                facts = ()
            digest.update(os.fsencode(source.name(i)) + f"\0{facts}\0".encode())
    elif isinstance(source, TableSource):
        digest.update(f"{source.dataset._fingerprint} {source.column}".encode())
        digest.update(source.rows.tobytes())
    return digest.hexdigest()


def fingerprint(digests: Iterable[str]) -> str:
    """Over the contents of images (`digest_of` each), in their order; not where they lie or what they are called."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def load_table(key: str, label: str, settings: DataSettings, path: str, **options: Any) -> TableSource | StreamSource:
    """`datasets.load_dataset` of a hub id or packaged format, its images left undecoded. Raises UserError.

    `key` is the setting that named the data, `label` what to call it in messages.
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


def _image_column(dataset: datasets.Dataset | datasets.IterableDataset, wanted: str, label: str) -> str:
    """The column `wanted`; where that is the default and there is none, the table's only one with images.

    Raises UserError naming the columns when neither is there.
    """
    features = dataset.features or {}
    if wanted in features:
        return wanted
    pictures = [name for name, feature in features.items() if _holds_images(dataset, name, feature)]
    if len(pictures) == 1 and wanted == DataSettings.model_fields["image_column"].default:
        return pictures[0]
    near = pictures or difflib.get_close_matches(wanted, list(features), n=1, cutoff=0.3)
    hint = f"; set {' or '.join(f'data.image_column={name}' for name in near)}" if near else ""
    raise UserError(f"data.image_column: {label} has no column {wanted!r}; it has: {', '.join(features)}{hint}")


def _may_hold_images(feature: Any) -> bool:
    """A type of bytes, or that of an image that has lost its name on the way."""
    return "binary" in getattr(feature, "dtype", "") or (isinstance(feature, dict) and "bytes" in feature)


def _holds_images(dataset: datasets.Dataset | datasets.IterableDataset, name: str, feature: Any) -> bool:
    """A column of images by its type, or one of bytes whose first value is an image."""
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
    return (str(error).strip() or type(error).__name__).splitlines()[0]
