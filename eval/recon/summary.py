"""Summarises finished shards: one table, means with intervals, and distances between sets of features."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from latent_ae.config import Bands
from latent_ae.data.rng import spread
from latent_ae.metrics.distances import (
    GROUPS,
    RELIABLE_IMAGES,
    Gaussian,
    frechet_distance,
    frechet_of_features,
    jackknife_interval,
    kernel_distance,
    mmd_without_groups,
)
from latent_ae.metrics.labels import METRICS, SHIFT
from latent_ae.metrics.similarity import FEWEST, bootstrap_interval, missing_reason
from latent_ae_eval.storage import FeatureFile, WorkFolder

BLOCK = 1024
"""Number of feature vectors in memory at a time."""
WHOLE_SET = 4000
"""Largest number of images from which the interval of KID is computed."""
Note = Callable[[str], None]


def collect(work: WorkFolder, numbers: Iterable[int]) -> tuple[pa.Table, list[str], dict[str, FeatureFile]]:
    """Join the shards: all rows by index, the skipped images, and each kind's features in the same order, in a file.

    Images that are too small for a network, or have a reconstruction that is not finite, are missing in its files.

    Args:
        work: The shards.
        numbers: Numbers of the shards.

    Returns:
        The table, `name: reason` of the skipped images, and the files by name of the features.

    Raises:
        OSError: If a file cannot be written.
    """
    tables, skipped, files = [], [], dict[str, FeatureFile]()
    for number in sorted(numbers):
        shard = work.read(number)
        skipped += shard.skipped
        if not shard.rows:
            continue
        order = np.argsort([row["index"] for row in shard.rows])
        tables.append(pa.Table.from_pylist([shard.rows[i] for i in order]))
        for network in sorted({name.split(".")[0] for name in shard.features}):
            parts = {name: part.numpy() for name, part in shard.features.items() if name.startswith(f"{network}.")}
            known = np.all([np.isfinite(part).all(1) for part in parts.values()], axis=0)
            for name, part in parts.items():
                file = files.setdefault(name, FeatureFile(work.folder / f"{work.token}-{name}.f32"))
                file.append(part[order][known[order]])
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({}), sorted(skipped), files


def means(
    table: pa.Table, kind: str, note: Note, seed: int, bands: Bands = ()
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return each metric's mean over the images that have it, and its 95 % bootstrap interval.

    Args:
        table: A row per image.
        kind: The kind of reconstruction, prefix of the columns.
        note: Is called with a sentence on images that lack a metric.
        seed: Seed of the bootstrap.
        bands: Groups of channels over which LPIPS is a mean; () took whole images.

    Returns:
        `n` and the means (None if no image has the metric), and [low, high] by metric.
    """
    summary: dict[str, Any] = {"n": table.num_rows}
    intervals: dict[str, list[float]] = {}
    shifts = [name.removeprefix(f"{kind}_") for name in table.column_names if name.startswith(f"{kind}_{SHIFT}")]
    for key in (*METRICS, *shifts):
        name = f"{kind}_{key}"
        if name not in table.column_names:
            continue
        column = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
        known = np.isfinite(column)
        if not known.any() and key == "ms_ssim":  # all images are small, and nobody expects MS-SSIM of those
            continue
        summary[key] = float(np.mean(column[known])) if known.any() else None
        if known.sum() >= FEWEST:
            intervals[key] = bootstrap_interval(column[known], seed)
        if not known.all():
            row = table.slice(int(np.argmin(known)), 1).to_pylist()[0]
            note(f"{name}: {(~known).sum()} of {len(known)} images left out, {missing_reason(key, row, bands)}")
    return summary, intervals


def frechet(a: FeatureFile, b: FeatureFile) -> tuple[float, list[float] | None]:
    """Return the Fréchet distance of two files with equally many rows, and its 95 % interval.

    The interval is None with fewer than 5 images per group of the jackknife.
    """
    count = a.count
    groups = [np.arange(group, count, GROUPS) for group in range(GROUPS)] if count >= 5 * GROUPS else []
    if count <= a.dimensions:
        x, y = (file.rows(np.arange(count)) for file in (a, b))
        value = frechet_of_features(x, y)
        left_out = [frechet_of_features(np.delete(x, rows, 0), np.delete(y, rows, 0)) for rows in groups]
    else:
        everything = tuple(_gaussian(file, np.arange(count)) for file in (a, b))
        value = _between(everything)
        left_out = []
        for rows in groups:
            pair = tuple(whole - _gaussian(file, rows) for whole, file in zip(everything, (a, b), strict=True))
            left_out.append(_between(pair, quick=True))
    return value, jackknife_interval(value, left_out) if groups else None


def _between(pair: Sequence[Gaussian], *, quick: bool = False) -> float:
    return frechet_distance(*pair[0].moments(), *pair[1].moments(), quick=quick)


def _gaussian(file: FeatureFile, rows: np.ndarray) -> Gaussian:
    total = Gaussian.of(np.zeros((0, file.dimensions)))
    for first in range(0, len(rows), BLOCK):
        total += Gaussian.of(file.rows(rows[first : first + BLOCK]))
    return total


def kernel(a: FeatureFile, b: FeatureFile) -> tuple[float, list[float] | None]:
    """Return KID of two files with equally many rows, and its 95 % interval.

    The interval is None with fewer than 5 images per group of the jackknife. Its width is that of a jackknife of the
    distance of up to WHOLE_SET images, spread over the file: each reconstruction is left out together with its
    original, and because the two resemble each other the interval is narrow.
    """
    value, _ = kernel_distance(a.rows, b.rows, a.count)
    if a.count < 5 * GROUPS:
        return value, None
    rows = spread(0, a.count, WHOLE_SET)
    return value, jackknife_interval(value, mmd_without_groups(a.rows(rows), b.rows(rows), GROUPS))


def unseen_reason(network: str, channels: int, bands: Bands) -> str:
    """Return in words why a network of the setting `frechet` sees none of the images, or an empty text if it does.

    Args:
        network: The network.
        channels: Channels of the images.
        bands: Groups of channels over which LPIPS is a mean; () takes whole images, and four channels for RGBA.
    """
    if bands and (network != "inception" or channels not in (1, 3)):
        return f"{network} sees one picture of an image, and bands makes groups of its channels"
    if channels not in (1, 3, 4):
        return f"{network} sees 1 or 3 channels, and the images have {channels}"
    return ""


def distances(
    files: dict[str, FeatureFile], kind: str, network: str, names: tuple[str, str | None], note: Note
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the distances between originals and one kind of reconstruction in a network's features.

    Args:
        files: Features by `network.kind`.
        kind: The kind of reconstruction.
        network: The network.
        names: Names of the Fréchet distance and of the kernel distance (None measures none).
        note: Is called with a sentence if a distance is missing or unreliable.

    Returns:
        Values and 95 % intervals, [low, high], by name.
    """
    a, b = files.get(f"{network}.input"), files.get(f"{network}.{kind}")
    if a is None or b is None or a.count < 2:
        note(f"{names[0]}: fewer than two images have {network}'s features")
        return {}, {}
    if a.count < RELIABLE_IMAGES and network == "inception":
        note(
            f"{names[0]}: N = {a.count:,} is under {RELIABLE_IMAGES:,}: biased upwards, and not to be "
            "compared with values at another N"
        )
    values: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for name, measure in zip(names, (frechet, kernel), strict=True):
        if name is not None:
            values[name], interval = measure(a, b)
            if interval is not None:
                intervals[name] = interval
    return values, intervals
