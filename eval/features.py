"""Features of images for distances between sets: the networks, features joined from shards, Fréchet distances."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
from latent_ae.metrics.labels import distance_names
from latent_ae.pretrained.image_features import Kind, image_features
from latent_ae.pretrained.inception import FEATURES, InceptionFeatures
from latent_ae.pretrained.lpips import LPIPS, TRUNKS
from latent_ae.pretrained.weights import briefly
from latent_ae_eval.settings import FeatureSettings
from latent_ae_eval.storage import FeatureFile, WorkFolder

Features = Callable[[Tensor], Tensor]
"""Returns features, (N, D) float32, of (N, C, H, W) uint8 images."""
BLOCK = 1024
"""Number of feature vectors in memory at a time."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features of images are compared."""

    features: Features
    dimensions: int
    """Number of features D."""
    name: str
    """`inception`, `dinov2` or `clip` if its distances are those of published numbers; else another name."""
    sha256: str = ""
    """Checksum of the weights; empty for networks of which there is only one."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features, (N, D) float32, of (N, C, H, W) uint8 images."""
        return self.features(images)


def inception_network(network: InceptionFeatures, device: torch.device) -> FeatureNetwork:
    """Return Inception on a device; of other weights than the published ones, the name holds the checksum."""
    network = network.to(device, memory_format=torch.channels_last)
    name = "inception" if network.is_published else f"inception_{network.sha256[:8]}"
    return FeatureNetwork(_on(device, network), FEATURES, name, network.sha256)


def folder_networks(names: Sequence[str], settings: FeatureSettings, device: torch.device) -> dict[str, FeatureNetwork]:
    """Return DINOv2 and CLIP on a device, as far as `names` has them, by `dinov2` and `clip`.

    Of another size than the published one, the name of the features holds the checksum of the weights.

    Raises:
        UserError: If transformers is missing, or a folder holds no such network.
    """
    folders: dict[Kind, str | None] = {"dinov2": settings.dinov2_model, "clip": settings.clip_model}
    networks: dict[str, FeatureNetwork] = {}
    for kind, folder in folders.items():
        if kind in names:
            network = image_features(kind, str(folder)).to(device)
            name = kind if network.is_published else f"{kind}_{network.sha256[:8]}"
            networks[kind] = FeatureNetwork(_on(device, network), network.dimensions, name, network.sha256)
    return networks


def feature_networks(
    names: Sequence[str], device: torch.device, settings: FeatureSettings
) -> tuple[dict[str, FeatureNetwork], list[str]]:
    """Return the feature networks by the name of their Fréchet distance, and notes on missing ones.

    Args:
        names: Features of the setting `frechet`; only Inception's distance is called `fid`.
        device: Where the networks run.
        settings: Name the folders of DINOv2 and CLIP.

    Raises:
        UserError: If no network is available, or a folder holds none.
    """
    found = []
    notes = []
    if "vgg16" in names:
        trunk = LPIPS("vgg").to(device)

        def vgg16(images: Tensor) -> Tensor:
            return trunk.compare(images.to(device).float() / 127.5 - 1, [])[1][0]

        found.append(FeatureNetwork(vgg16, TRUNKS["vgg"].features, "vgg16"))
    found += folder_networks(names, settings, device).values()
    if "inception" in names:
        try:
            found.append(inception_network(InceptionFeatures(), device))
        except UserError as error:
            notes.append(f"FID is missing: {briefly(error)}")
            if not found:
                raise
    return {distance_names(network.name)[0]: network for network in found}, notes


def digests(networks: Mapping[str, FeatureNetwork]) -> dict[str, str]:
    """Return the checksum of the weights of each network, as results record it."""
    return {name: network.sha256 for name, network in networks.items()}


def _on(device: torch.device, network: Features) -> Features:
    return lambda images: network(images.to(device))


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
