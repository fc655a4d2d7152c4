"""Summarises finished shards: one table, means with intervals, and distances between sets of features."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from latent_ae.config import Bands
from latent_ae.data.rng import spread
from latent_ae.metrics.distances import (
    GROUPS,
    RELIABLE_IMAGES,
    jackknife_interval,
    kernel_distance,
    mmd_without_groups,
)
from latent_ae.metrics.labels import METRICS, SHIFT
from latent_ae.metrics.similarity import FEWEST, bootstrap_interval, missing_reason
from latent_ae_eval.features import frechet
from latent_ae_eval.storage import FeatureFile

WHOLE_SET = 4000
"""Largest number of images from which the interval of KID is computed."""
Note = Callable[[str], None]


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
