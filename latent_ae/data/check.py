"""latent-ae data check: reads every image once, as training would, and says what is there and what would be skipped."""

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
from latent_ae.data.loader import WorkerDied, decode_for, loaded, open_images, training_crop, worker_place
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
"""Skipped files and groups of duplicates that are named on stderr; the JSON has all."""

CHANNELS = re.compile(r"an array of shape \(\d+, \d+, (\d+)\) \(HWC\), but (\d+) channels are expected$")
"""How images.decode refuses an array of other channels than the model's."""


@dataclass(frozen=True)
class Seen:
    """One image."""

    name: str
    kind: str = ""
    """Format and mode, like JPEG RGB."""
    size: tuple[int, int] = (0, 0)
    """Width and height, px, upright."""
    digest: str = ""
    reason: str = ""
    """Why it would be skipped; empty for a good one."""


@dataclass
class _Images(IterableDataset):
    """What a worker does: every workers-th image from `first` on, up to `end`."""

    source: ImageSource
    settings: DataSettings
    channels: int
    first: int = 0
    end: int = 0

    def __iter__(self) -> Iterator[Seen]:
        worker, workers = worker_place()
        if isinstance(self.source, StreamSource):
            for name, value in stream_values(self.source):
                yield self._seen(name, partial(encoded_image, value))
        else:
            for index in range(self.first + worker, self.end, workers):
                yield self._seen(self.source.name(index), partial(self.source.read, index))

    def _seen(self, name: str, read: Callable[[], Encoded]) -> Seen:
        kind = digest = ""
        try:
            encoded = read()
            digest = digest_of(encoded)
            with contextlib.suppress(ImageError):  # training's reason counts
                kind = kind_of(encoded)
            pixels = decode_for(encoded, self.settings, self.channels)
            training_crop(pixels, self.settings, np.random.default_rng(0))  # refuses some sizes
            return Seen(name, kind, (pixels.shape[1], pixels.shape[0]), digest)
        except ImageError as error:
            return Seen(name, kind, digest=digest, reason=str(error))


def _seen_images(source: ImageSource, settings: DataSettings, channels: int) -> Iterator[Seen]:
    """Every image, in order. One that kills its reader is found and named."""
    if isinstance(source, StreamSource):
        yield from loaded(_Images(source, settings, channels), 0)
        return
    first, alone = 0, False
    while first < len(source):
        # after a death one by one, a single image on the way: the one that does not come back is it
        end = first + 3 * settings.num_workers if alone else len(source)
        images = _Images(source, settings, channels, first, min(end, len(source)))
        try:
            for seen in loaded(images, 1 if alone else settings.num_workers, ahead=1 if alone else 2):
                first += 1
                yield seen
            alone = False
        except WorkerDied:
            if alone:
                yield Seen(source.name(first), reason="it kills the process that reads it (a crash, or out of memory)")
                first += 1
            alone = True


def check(data: str, settings: DataSettings, *, channels: int = 3, progress: bool = False) -> dict[str, Any]:
    """Reads `settings.split` of `data` once, with `settings.num_workers` workers; returns the findings, JSON-ready.

    Raises UserError when there is no such data or no image in it.
    """
    settings = settings.model_copy(update={"source": data})
    source = open_images(settings, "all")
    total = None if isinstance(source, StreamSource) else len(source)
    kinds: Counter[str] = Counter()
    names: dict[str, list[str]] = {}
    sizes, skipped = [], []
    with progress_bar("check", total, "image", disable=not progress) as bar:
        for seen in _seen_images(source, settings, channels):
            bar.update(1)
            kinds[seen.kind or "unknown"] += 1
            if seen.digest:
                names.setdefault(seen.digest, []).append(seen.name)
            if seen.reason:
                skipped.append(f"{printable(seen.name)}: {printable(seen.reason)}")
            else:
                sizes.append(seen.size)
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
        "smaller_than_resolution": sum(min(size) < settings.resolution for size in sizes),
        "resolution": settings.resolution,
        "duplicates": duplicates,
        "num_superfluous": sum(len(group) - 1 for group in duplicates),
    }


def _spread(values: Sequence[int]) -> dict[str, int]:
    if not values:
        return {}
    return {name: int(np.percentile(values, q)) for name, q in (("min", 0), ("median", 50), ("max", 100))}


def wrong_channels(skipped: Sequence[str]) -> Counter[tuple[int, int]]:
    """How many skipped files are arrays of other channels than the model's, from the lines on them: {(has, expected):
    count}."""
    matches = (CHANNELS.search(line) for line in skipped)
    return Counter((int(match[1]), int(match[2])) for match in matches if match)


def channel_lines(wrong: Counter[tuple[int, int]]) -> list[str]:
    """What to do about arrays of other channels, one line for each number of them."""
    return [
        f"{count:,} arrays have {has} channels and {expected} are expected: give channels={has}; training then takes "
        f"model.in_channels={has} model.out_channels={has}{' loss.perceptual=0' if has not in (1, 3) else ''}"
        for (has, expected), count in wrong.most_common()
    ]


def summary(found: dict[str, Any]) -> str:
    """The findings for a person."""
    shorter, lines = found["shorter_side_px"], []
    readable = f"{found['num_readable']:,} of {found['num_images']:,} images can be read"
    lines.append(f"{readable} (split {found['split']}, if it has splits)")
    lines.append("kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in found["kinds"].items()))
    if found["other_files"]:
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in found["other_files"].items())
        lines.append(f"left out, their names are not those of images: {others}")
    if shorter:
        lines.append(f"shorter side: {shorter['min']} to {shorter['max']} px, median {shorter['median']}")
    if found["smaller_than_resolution"]:
        lines.append(
            f"{found['smaller_than_resolution']:,} are smaller than data.resolution {found['resolution']} and would be "
            "enlarged: blurred images teach blur"
        )
    if found["skipped"]:
        verdict = "more" if found["skipped_fraction"] > found["max_bad_fraction"] else "no more"
        lines.append(
            f"{len(found['skipped']):,} would be skipped ({found['skipped_fraction']:.2%}, {verdict} than "
            f"data.max_bad_fraction allows):"
        )
        wrong = wrong_channels(found["skipped"])
        lines += [f"  {line}" for line in channel_lines(wrong)]
        lines += [f"  {line}" for line in found["skipped"] if not CHANNELS.search(line)][:SHOWN]
    if found["duplicates"]:
        lines.append(f"{found['num_superfluous']:,} are the same as another, byte for byte:")
        lines += [
            f"  {' = '.join(group[:4])}{' ...' if len(group) > 4 else ''}" for group in found["duplicates"][:SHOWN]
        ]
    return "\n".join(lines)
