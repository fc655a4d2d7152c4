"""Several sources of images as one, `data.mixture`: which source each sample comes from, and which of its images.

As for one source, everything about a sample is a pure function of the seed and its global number (data/rng.py).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal, TypeAlias

import numpy as np

from latent_ae.config import UserError
from latent_ae.data.rng import epoch_permutation, mixture_order
from latent_ae.data.settings import DataSettings, MixedSource, TrainingData
from latent_ae.data.sources import Encoded, StoredImages, StreamSource

Candidate: TypeAlias = tuple[int, str, Callable[[], Encoded], DataSettings]
"""An image that a sample may be cut from: its number in all that is read (-1 in a stream), its name, what reads it, and
the settings of its source."""
WEIGHTED_EPOCH = 10_000
"""Number of samples after which sources with weights have been taken exactly in proportion to them."""


@dataclass(frozen=True)
class Mixture:
    """Images of several sources, numbered through; each is read and framed by the settings of its own source."""

    sources: tuple[StoredImages, ...]
    settings: tuple[DataSettings, ...]
    """The section `data` as it holds for each source."""
    labels: tuple[str, ...]
    """What the log and messages call each source."""
    counts: tuple[int, ...]
    """Samples of each source in an epoch of the mixture."""
    rows: np.ndarray
    """(n,) numbers of the images that belong to it."""
    orders: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict, compare=False)
    """The newest epoch of each source that was asked for, and its order, by number of the source."""

    @cached_property
    def starts(self) -> np.ndarray:
        """The number of each source's first image."""
        return np.cumsum([0, *map(len, self.sources)])[:-1]

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, i: int) -> tuple[int, int]:
        """Return the source of image i, and its number in that source."""
        row = int(self.rows[i])
        source = int(np.searchsorted(self.starts, row, side="right")) - 1
        return source, row - int(self.starts[source])

    def name(self, i: int) -> str:
        """Return the name of image i behind that of its source."""
        source, row = self.place(i)
        return self._named(source, row)

    def read(self, i: int) -> Encoded:
        """Return the bytes or the file of image i. Raises ImageError if a table's row holds no image."""
        source, row = self.place(i)
        return self.sources[source].read(row)

    def keys(self) -> np.ndarray:
        """Return one key per image, (n,) uint64."""
        return np.concatenate([source.keys() for source in self.sources])[self.rows]

    def subset(self, rows: np.ndarray) -> "Mixture":
        """Return a mixture of the images with these numbers, (n,) integers, in this order."""
        return replace(self, rows=self.rows[rows])

    def settings_of(self, i: int) -> DataSettings:
        """Return the section `data` as it holds for image i."""
        return self.settings[self.place(i)[0]]

    def candidates(self, seed: int, number: int) -> Iterator[Candidate]:
        """Yield the image of the sample `number`, and those that follow in its source's epoch."""
        source, own_number = self.sample(seed, number)
        images, settings = self.sources[source], self.settings[source]
        epoch, position = divmod(own_number, len(images))
        if self.orders.get(source, (-1,))[0] != epoch:
            self.orders[source] = epoch, epoch_permutation(seed, epoch, len(images), source)
        order = self.orders[source][1]
        for offset in range(len(images)):
            row = int(order[(position + offset) % len(images)])
            yield int(self.starts[source]) + row, self._named(source, row), partial(images.read, row), settings

    def sample(self, seed: int, number: int) -> tuple[int, int]:
        """Return the source of the sample `number`, and how many samples of that source precede it."""
        epoch, position = divmod(number, sum(self.counts))
        sources, ranks = mixture_order(seed, epoch, self.counts)
        source = int(sources[position])
        return source, epoch * self.counts[source] + int(ranks[position])

    def samples_before(self, seed: int, number: int) -> list[int]:
        """Return how many of the first `number` samples come from each source."""
        epochs, position = divmod(number, sum(self.counts))
        sources, _ = mixture_order(seed, epochs, self.counts)
        begun = np.bincount(sources[:position], minlength=len(self.counts))
        return [epochs * count + int(more) for count, more in zip(self.counts, begun, strict=True)]

    def _named(self, source: int, row: int) -> str:
        return f"{self.labels[source]}: {self.sources[source].name(row)}"


def open_mixture(
    settings: TrainingData,
    part: Literal["train", "held_out", "all"],
    open_source: Callable[[DataSettings, Literal["train", "held_out", "all"]], StoredImages | StreamSource],
) -> Mixture:
    """Open a part of each source, by the rules that hold for one source.

    Args:
        settings: The section `data` of the settings, with a mixture.
        part: "train", "held_out" or "all".
        open_source: Opens the part of one source.

    Raises:
        UserError: If a source cannot be opened; the message names its place in the mixture.
    """
    own, sources, labels = list[DataSettings](), list[StoredImages](), list[str]()
    for number, one in enumerate(settings.sources()):
        label = one.source
        if part == "held_out" and one.eval_source is not None:
            if any((other.eval_source, other.eval_split) == (one.eval_source, one.eval_split) for other in own):
                continue  # that of the section, which sources share
            label = one.eval_source
        try:
            images = open_source(one, part)
        except UserError as error:
            raise UserError(re.sub(r"^data\.", f"data.mixture[{number}].", str(error))) from error
        assert not isinstance(images, StreamSource), "refused by the settings"
        if not len(images):
            raise UserError(f"data.mixture[{number}].source: {one.source} holds no images")
        own.append(one)
        sources.append(images)
        labels.append(label if label not in labels else f"{label} ({number + 1})")
    sizes = [len(images) for images in sources]
    counts = samples_per_epoch(settings.mixture, sizes) if part == "train" else tuple(sizes)
    return Mixture(tuple(sources), tuple(own), tuple(labels), counts, np.arange(sum(sizes)))


def samples_per_epoch(parts: Sequence[MixedSource], sizes: Sequence[int]) -> tuple[int, ...]:
    """Return how many samples an epoch of the mixture takes from each source.

    Args:
        parts: The sources, with weights or repeats.
        sizes: Number of images of each.
    """
    if parts[0].weight is None:
        return tuple(max(1, round(part.repeats * size)) for part, size in zip(parts, sizes, strict=True))
    weights = np.array([part.weight for part in parts], dtype=float)
    exact = weights / weights.sum() * WEIGHTED_EPOCH
    counts = np.maximum(1, np.floor(exact).astype(int))
    # the largest remainders are rounded up (Hamilton's method)
    for source in np.argsort(np.floor(exact) - exact, kind="stable")[: max(0, WEIGHTED_EPOCH - int(counts.sum()))]:
        counts[source] += 1
    return tuple(int(count) for count in counts)


def with_more_of(source: StoredImages, rows: np.ndarray, share: float, settings: DataSettings, label: str) -> Mixture:
    """Return a source's images, with a share of the samples from some of them alone.

    Args:
        source: The images.
        rows: (n,) numbers of the images that are taken more often; in the mixture they are a second time behind all.
        share: Share of the samples, 0 to 1, that are taken from these; the others are taken from all images.
        settings: The section `data` of the settings.
        label: What the log calls the samples of these images.
    """
    parts = [MixedSource(source=settings.source, weight=weight) for weight in (1 - share, share)]
    sources = source, source.subset(rows)
    return Mixture(
        sources,
        (settings, settings),
        ("all", label),
        samples_per_epoch(parts, [len(source), len(rows)]),
        np.arange(len(source) + len(rows)),
    )
