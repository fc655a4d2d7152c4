"""Summarises finished shards: one table, means with intervals, and distances between sets of features."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from latent_ae.config import Bands
from latent_ae.data.rng import spread
from latent_ae.metrics.distances import (
    GROUPS,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    NEIGHBOURS,
    gaussian_distance,
    jackknife_interval,
    kernel_distance,
    mmd_without_groups,
    precision_recall,
)
from latent_ae.metrics.labels import METRICS, PRECISION, RECALL, SHIFT, distance_names
from latent_ae.metrics.similarity import FEWEST, bootstrap_interval, missing_reason
from latent_ae_eval.features import frechet
from latent_ae_eval.storage import FeatureFile

WHOLE_SET = 4000
"""Largest number of images from which the interval of KID, or of precision and recall, is computed."""
BY_LPIPS = ("vgg16", "alexnet")
"""Features that LPIPS gives; they have no kernel distance."""
Note = Callable[[str], None]
Estimate = tuple[float, list[float] | None]
"""A value and its 95 % interval, [low, high]; None with fewer than 5 images per group of the jackknife."""


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


def kernel(a: FeatureFile, b: FeatureFile, subset_size: int = KID_SUBSET_SIZE) -> Estimate:
    """Return KID of two files with equally many rows, and its 95 % interval.

    The interval is None with fewer than 5 images per group of the jackknife. Its width has two parts, whose squares
    add: that of a jackknife of the distance of up to WHOLE_SET images, spread over the file, in which each
    reconstruction is left out together with its original; and that of the mean over random subsets, in which originals
    and reconstructions are of different images.

    Args:
        a: Features of originals.
        b: Features of their reconstructions.
        subset_size: Images per random subset.
    """
    value, deviation = kernel_distance(a.rows, b.rows, a.count, subset_size=subset_size, paired=True)
    if a.count < 5 * GROUPS:
        return value, None
    rows = spread(0, a.count, WHOLE_SET)
    low, high = jackknife_interval(value, mmd_without_groups(a.rows(rows), b.rows(rows), GROUPS))
    half = math.hypot(0.5 * (high - low), 1.96 * deviation / math.sqrt(KID_SUBSETS))
    return value, [value - half, value + half]


def gaussian(a: FeatureFile, b: FeatureFile) -> Estimate:
    """Return CMMD of two files with equally many rows, which are in memory meanwhile, and its 95 % interval."""
    groups = GROUPS if a.count >= 5 * GROUPS else 1
    value, left_out = gaussian_distance(a.block(0, a.count), b.block(0, b.count), groups)
    return value, jackknife_interval(value, left_out) if left_out else None


def precision_and_recall(a: FeatureFile, b: FeatureFile) -> tuple[Estimate, Estimate]:
    """Return precision and recall of two files with equally many rows, which are in memory meanwhile, with intervals.

    The width of the intervals is that of a jackknife of up to WHOLE_SET images, spread over the file. They end at 0 and
    1.
    """
    values = precision_recall(a.block(0, a.count), b.block(0, b.count))
    if a.count < 5 * GROUPS:
        return (values[0], None), (values[1], None)
    rows = spread(0, a.count, WHOLE_SET)
    x, y = a.rows(rows), b.rows(rows)
    left_out = [precision_recall(*(np.delete(z, np.s_[group::GROUPS], 0) for z in (x, y))) for group in range(GROUPS)]
    intervals = [jackknife_interval(values[i], [pair[i] for pair in left_out]) for i in (0, 1)]
    precision, recall = ([max(0.0, low), min(1.0, high)] for low, high in intervals)
    return (values[0], precision), (values[1], recall)


def unseen_reason(network: str, channels: int, bands: Bands) -> str:
    """Return in words why a network of the setting `frechet` sees none of the images, or an empty text if it does.

    Args:
        network: The network.
        channels: Channels of the images.
        bands: Groups of channels over which LPIPS is a mean; () takes whole images, and four channels for RGBA.
    """
    if bands:
        return f"{network} sees one picture of an image, and bands makes groups of its channels"
    if channels not in (1, 3, 4):
        return f"{network} sees 1 or 3 channels, and the images have {channels}"
    return ""


def distances(
    files: dict[str, FeatureFile],
    kind: str,
    network: str,
    name: str,
    note: Note,
    *,
    images: int,
    with_recall: bool = False,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the distances between originals and one kind of reconstruction in a network's features.

    Args:
        files: Features by `network.kind`.
        kind: The kind of reconstruction.
        network: The network.
        name: Name of its features, see `labels.distance_names`.
        note: Is called with a sentence if a distance is missing or unreliable.
        images: Number of images; those too small for the network, or with a reconstruction that is not finite, lack
            features.
        with_recall: Also measure precision and recall.

    Returns:
        Values and 95 % intervals, [low, high], by name.
    """
    frechet_name, kernel_name = distance_names(name)
    a, b = files.get(f"{network}.input"), files.get(f"{network}.{kind}")
    if a is not None and 1 < a.count < images:
        note(f"{frechet_name}: of {a.count:,} of {images:,} images, because the others have no features")
    if a is None or b is None or a.count < 2:
        note(f"{frechet_name}: fewer than two images have {network}'s features")
        return {}, {}
    if a.count < a.dimensions:
        note(
            f"{frechet_name}: N = {a.count:,} is under {a.dimensions:,}: biased upwards, and not to be "
            "compared with values at another N"
        )
    found = {frechet_name: frechet(a, b)}
    if network not in BY_LPIPS:
        found[kernel_name] = (gaussian if network == "clip" else kernel)(a, b)
    if with_recall and a.count > NEIGHBOURS:
        found[f"{PRECISION}{name}"], found[f"{RECALL}{name}"] = precision_and_recall(a, b)
    elif with_recall:
        note(f"{PRECISION}{name}, {RECALL}{name}: N = {a.count} is too few, {NEIGHBOURS + 1} images are needed")
    values = {key: value for key, (value, _) in found.items()}
    return values, {key: interval for key, (_, interval) in found.items() if interval is not None}
