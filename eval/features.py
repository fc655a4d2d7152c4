"""Features of images for Fréchet distances: the networks, features joined from shards, the distance of two sets."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.metrics.distances import (
    GROUPS,
    Gaussian,
    frechet_distance,
    frechet_of_features,
    jackknife_interval,
)
from latent_ae.pretrained.inception import InceptionFeatures
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.pretrained.weights import briefly
from latent_ae_eval.storage import FeatureFile, WorkFolder

Features = Callable[[Tensor], Tensor]
"""Returns features, (N, D) float32, of (N, C, H, W) uint8 images."""
BLOCK = 1024
"""Number of feature vectors in memory at a time."""


def feature_networks(names: Sequence[str], device: torch.device) -> tuple[dict[str, Features], list[str]]:
    """Return the feature networks by the name of their distance, and notes on missing ones.

    Args:
        names: `vgg16`, `inception` or both; only Inception's distance is called `fid`.
        device: Where the networks run.

    Raises:
        UserError: If no network is available.
    """
    networks: dict[str, Features] = {}
    notes = []
    if "vgg16" in names:
        trunk = LPIPS("vgg").to(device)

        def vgg16(images: Tensor) -> Tensor:
            return trunk.compare(images.to(device).float() / 127.5 - 1, [])[1][0].cpu()

        networks["frechet_vgg16"] = vgg16
    if "inception" in names:
        try:
            network = InceptionFeatures().to(device, memory_format=torch.channels_last)
            networks["fid"] = lambda images: network(images.to(device)).cpu()
        except UserError as error:
            notes.append(f"FID is missing: {briefly(error)}")
            if not networks:
                raise
    return networks, notes


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
