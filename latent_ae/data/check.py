"""latent-ae data check: reads every image once, as training would, and reports what it finds and would skip."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from latent_ae.config import UserError
from latent_ae.data.images import ImageError, kind_of
from latent_ae.data.loader import WorkerDied, decode_to_crop, loaded, open_images, training_crop, worker_place
from latent_ae.data.settings import DataSettings
from latent_ae.data.sources import (
    Encoded,
    FolderSource,
    ImageSource,
    StreamSource,
    digest_of,
    encoded_image,
    stream_values,
)
from latent_ae.progress import progress_bar
from latent_ae.text import printable

SHOWN = 20
"""Number of skipped files and groups of duplicates named on stderr; the JSON has all of them."""

CHANNELS = re.compile(r"an array of shape \(\d+, \d+, (\d+)\) \(HWC\), but (\d+) channels are expected$")
"""The message with which images.decode refuses an array with a wrong number of channels."""


@dataclass(frozen=True)
class Checked:
    """What was learned about one image."""

    name: str
    kind: str = ""
    """Format and mode, such as "JPEG RGB"."""
    size: tuple[int, int] = (0, 0)
    """Width and height in px, after the rotation of its EXIF tag."""
    digest: str = ""
    """Digest of the stored bytes."""
    reason: str = ""
    """Why training would skip it; empty for a readable image."""


@dataclass
class _Images(IterableDataset):
    """The work of one worker: every n-th image from `first` to before `end`, for n workers."""

    source: ImageSource
    settings: DataSettings
    channels: int
    first: int = 0
    end: int = 0

    def __iter__(self) -> Iterator[Checked]:
        worker, workers = worker_place()
        if isinstance(self.source, StreamSource):
            for name, value in stream_values(self.source):
                yield self._checked(name, partial(encoded_image, value))
        else:
            for index in range(self.first + worker, self.end, workers):
                yield self._checked(self.source.name(index), partial(self.source.read, index))

    def _checked(self, name: str, read: Callable[[], Encoded]) -> Checked:
        kind = digest = ""
        try:
            encoded = read()
            digest = digest_of(encoded)
            with contextlib.suppress(ImageError):  # the reason reported is the one that training would give
                kind = kind_of(encoded)
            image = decode_to_crop(encoded, self.settings, self.channels)
            for size in self.settings.crop_sizes:
                training_crop(image, self.settings, np.random.default_rng(0), size)  # refuses some images' sizes
            return Checked(name, kind, image.size[::-1], digest)
        except ImageError as error:
            return Checked(name, kind, digest=digest, reason=str(error))


def _checked_images(source: ImageSource, settings: DataSettings, channels: int) -> Iterator[Checked]:
    """Check every image, in order. An image that kills its reader is identified and reported."""
    if isinstance(source, StreamSource):
        yield from loaded(_Images(source, settings, channels), 0)
        return
    first, alone = 0, False
    while first < len(source):
        # after a worker's death images are read one by one, so the one that does not come back is the culprit
        end = first + 3 * settings.num_workers if alone else len(source)
        images = _Images(source, settings, channels, first, min(end, len(source)))
        try:
            for checked in loaded(images, 1 if alone else settings.num_workers, ahead=1 if alone else 2):
                first += 1
                yield checked
            alone = False
        except WorkerDied:
            if alone:
                yield Checked(
                    source.name(first), reason="it kills the process that reads it (a crash, or out of memory)"
                )
                first += 1
            alone = True


def check(data: str, settings: DataSettings, *, channels: int = 3, progress: bool = False) -> dict[str, Any]:
    """Read every image of a split once and report what training would find.

    Args:
        data: `photos`, a folder of images, Parquet or WebDataset files, or a hub id.
        settings: The split, resolution, workers and limits; its `source` is replaced by `data`.
        channels: Channels of the model's images.
        progress: Show a progress bar.

    Returns:
        Counts, sizes (px), skipped files with reasons, and duplicates, JSON-ready.

    Raises:
        UserError: If there is no such data or it holds no image.
    """
    settings = settings.model_copy(update={"source": data})
    source = open_images(settings, "all")
    total = None if isinstance(source, StreamSource) else len(source)
    kinds: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    sizes, skipped = [], []
    with progress_bar("check", total, "image", disable=not progress) as bar:
        for checked in _checked_images(source, settings, channels):
            bar.update(1)
            kinds[checked.kind or "unknown"] += 1
            if checked.digest:
                names.setdefault(checked.digest, []).append(checked.name)
            if checked.reason:
                skipped.append(f"{printable(checked.name)}: {printable(checked.reason)}")
            else:
                sizes.append(checked.size)
    count = sum(kinds.values())
    if not count:
        raise UserError(f"{data}: it holds no images")
    duplicates = sorted(group for group in names.values() if len(group) > 1)
    return {
        "location": data,
        "split": settings.split,
        "num_images": count,
        "num_readable": len(sizes),
        "skipped": sorted(skipped),
        "skipped_fraction": len(skipped) / count,
        "max_bad_fraction": settings.max_bad_fraction,
        "kinds": dict(kinds.most_common()),
        "other_files": dict(source.others) if isinstance(source, FolderSource) else {},
        "shorter_side_px": _spread([min(size) for size in sizes]),
        "longer_side_px": _spread([max(size) for size in sizes]),
        "smaller_than_resolution": sum(_is_enlarged(size, settings) for size in sizes),
        "resolution": settings.resolution,
        "buckets": [bucket.title for bucket in settings.buckets],
        "duplicates": duplicates,
        "num_superfluous": sum(len(group) - 1 for group in duplicates),
    }


def _is_enlarged(size: tuple[int, int], settings: DataSettings) -> bool:
    """Return whether an image of this width and height is too small for one of the training crops."""
    return any(size[0] < width or size[1] < height for height, width in settings.crop_sizes)


def _spread(values: Sequence[int]) -> dict[str, int]:
    if not values:
        return {}
    return {name: int(np.percentile(values, q)) for name, q in (("min", 0), ("median", 50), ("max", 100))}


def wrong_channels(skipped: Sequence[str]) -> Counter[tuple[int, int]]:
    """Count the skipped arrays whose number of channels is not the model's.

    Args:
        skipped: Lines `name: reason`, as `check` returns them.

    Returns:
        Number of arrays by (channels that they have, channels that are expected).
    """
    matches = (CHANNELS.search(line) for line in skipped)
    return Counter((int(match[1]), int(match[2])) for match in matches if match)


def channel_lines(wrong: Counter[tuple[int, int]]) -> list[str]:
    """Return a line for each wrong number of channels that says what to do about such arrays."""
    return [
        f"{count:,} arrays have {has} channels and {expected} are expected: give channels={has}; training then takes "
        f"model.in_channels={has} model.out_channels={has}{' loss.perceptual=0' if has not in (1, 3) else ''}"
        for (has, expected), count in wrong.most_common()
    ]


def summary(result: dict[str, Any]) -> str:
    """Return a result of `check` as text for a terminal."""
    shorter, lines = result["shorter_side_px"], []
    readable = f"{result['num_readable']:,} of {result['num_images']:,} images can be read"
    lines.append(f"{readable} (split {result['split']}, if it has splits)")
    lines.append("kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in result["kinds"].items()))
    if result["other_files"]:
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in result["other_files"].items())
        lines.append(f"left out, because their names are not those of images: {others}")
    if shorter:
        lines.append(f"shorter side: {shorter['min']} to {shorter['max']} px, median {shorter['median']}")
    if result["smaller_than_resolution"]:
        crops = f"data.resolution {result['resolution']}"
        if result["buckets"]:
            crops = f"one of data.buckets, {', '.join(result['buckets'])},"
        lines.append(
            f"{result['smaller_than_resolution']:,} are smaller than {crops} and would be enlarged: blurred images "
            "teach blur"
        )
    if result["skipped"]:
        relation = "more" if result["skipped_fraction"] > result["max_bad_fraction"] else "no more"
        lines.append(
            f"{len(result['skipped']):,} would be skipped ({result['skipped_fraction']:.2%}, {relation} than "
            f"data.max_bad_fraction allows):"
        )
        wrong = wrong_channels(result["skipped"])
        lines += [f"  {line}" for line in channel_lines(wrong)]
        lines += [f"  {line}" for line in result["skipped"] if not CHANNELS.search(line)][:SHOWN]
    if result["duplicates"]:
        lines.append(f"{result['num_superfluous']:,} are the same as another, byte for byte:")
        lines += [
            f"  {' = '.join(group[:4])}{' ...' if len(group) > 4 else ''}" for group in result["duplicates"][:SHOWN]
        ]
    return "\n".join(lines)
