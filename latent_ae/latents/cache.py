"""Reads the latents that `latent-ae encode` wrote, to train a diffusion model on them.

cache = open_latents("latents/imagenet")
z = cache.scaled(cache.batch([0, 5, 9], noise=torch.randn(3, *cache.shape)))   # unit variance
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.latents.parquet import DATA, MANIFEST, STORED, read_manifest
from latent_ae.models.family import LatentScaling


def open_latents(folder: str | Path) -> "LatentCache":
    """Open a finished cache of latents that `latent-ae encode` wrote.

    Args:
        folder: The folder with manifest.json; `~` is expanded.

    Returns:
        The latents, mapped from the files and not held in memory.

    Raises:
        UserError: If the folder holds no latents, they are unfinished, or files are missing or damaged.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no latents (no {MANIFEST}, from {Path.cwd()}); `latent-ae encode` writes them")
    if not manifest["complete"]:
        raise UserError(f"{folder}: the latents are unfinished; run the same `latent-ae encode` again")
    files = sorted((folder / DATA).glob("*.parquet"))
    if len(files) != manifest["files"]:
        raise UserError(f"{folder}: {len(files)} of {manifest['files']} files are there; copy or encode it again")
    try:
        dataset = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # whatever datasets raises here is about the files
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"{folder}: the latents cannot be read: {reason}") from error
    if len(dataset) != manifest["data"]["num_images"]:
        raise UserError(f"{folder}: {len(dataset)} of {manifest['data']['num_images']} latents are there; encode again")
    for name in ("mean", "logvar", "mean_flip", "logvar_flip"):
        column = dataset.features.get(name)
        if column is None and name != "mean":
            continue
        shape = tuple(manifest["latent"]["shape"])
        if not isinstance(column, datasets.Array3D) or column.shape != shape or column.dtype not in STORED.values():
            raise UserError(f"{folder}: the column {name} does not hold the latents of {MANIFEST}; encode again")
    return LatentCache(folder, manifest, dataset)


class LatentCache:
    """Latents by image number, mapped from the files and not held in memory; returned by `open_latents`.

    `dataset` has the columns id, digest, label, mean, logvar, mean_flip and logvar_flip; columns that do not apply are
    absent. `manifest` is the content of manifest.json.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], dataset: datasets.Dataset):
        self.folder, self.manifest, self.dataset = folder, manifest, dataset

    def __reduce__(self) -> Any:  # a worker opens the files itself
        return open_latents, (self.folder,)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.manifest["latent"]["shape"]
        return channels, height, width

    @property
    def has_posterior(self) -> bool:
        """Whether the cache holds log-variances, so that latents can be sampled from the posterior."""
        return "logvar" in self.dataset.column_names

    @property
    def has_flips(self) -> bool:
        """Whether the cache holds the latents of the mirrored images too."""
        return "mean_flip" in self.dataset.column_names

    @property
    def scaling_factor(self) -> float:
        """The scaling factor in the model's config; 1.0 if it has none."""
        return float(self.manifest["latent"]["scaling_factor"])

    @property
    def shift_factor(self) -> float:
        """The shift factor in the model's config; 0.0 if it has none."""
        return float(self.manifest["latent"]["shift_factor"])

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Class of each image, (N,) int64, -1 where it is unknown; None if the images have no classes."""
        if "label" not in self.dataset.column_names:
            return None
        # a copy: Arrow's memory is read-only, and torch.from_numpy warns about that
        return self.dataset.data.column("label").to_numpy().astype(np.int64)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes; None if there are no classes or they only have numbers."""
        return self.manifest["labels"] and self.manifest["labels"]["names"]

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if the images have none."""
        if self.labels is None:
            return 0
        return len(self.class_names) if self.class_names else int(self.labels.max(initial=-1)) + 1

    def batch(
        self,
        numbers: Sequence[int] | np.ndarray | Tensor,
        flips: Sequence[bool] | np.ndarray | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return raw latents of some images; `scaled` turns them into latents of unit variance.

        Args:
            numbers: N image numbers, from 0 to len(self) - 1.
            flips: N bools, True for the latent of the mirrored image; None takes no mirrored image.
            noise: (N, C, h, w) standard normal noise, which draws a sample of each posterior; None returns the means.

        Returns:
            (N, C, h, w) float32 on the CPU.

        Raises:
            ValueError: If a number is out of range, the numbers of flips and images differ, or the cache holds no flips
                or no posterior.
        """
        rows = np.asarray(numbers, dtype=np.int64)
        mirrored = np.zeros(len(rows), dtype=bool) if flips is None else np.asarray(flips, dtype=bool)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise ValueError(f"numbers from {rows.min()} to {rows.max()}; there are {len(self)} latents")
        if mirrored.shape != rows.shape:
            raise ValueError(f"{len(mirrored)} flips for {len(rows)} numbers")
        if mirrored.any() and not self.has_flips:
            raise ValueError("these latents were encoded with flips=false")
        mean = self._values("mean", rows, mirrored)
        if noise is None:
            return mean
        if not self.has_posterior:
            raise ValueError(f"{self.manifest['model']['class']} has no posterior to sample from; leave out noise")
        return mean + torch.exp(0.5 * self._values("logvar", rows, mirrored)) * noise

    def scaled(self, latents: Tensor) -> Tensor:
        """Return (latents - shift_factor) * scaling_factor: the input of a diffusion model.

        If the model's config has latents_mean and latents_std, this is (latents - latents_mean) * scaling_factor /
        latents_std, as in the pipelines of SDXL.

        Args:
            latents: (N, C, h, w) raw latents.
        """
        return self.scaling.scaled(latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return raw latents from scaled ones: the inverse of `scaled`, and the input of the decoder."""
        return self.scaling.unscaled(latents)

    @property
    def scaling(self) -> LatentScaling:
        """The scaling that diffusion models of the model's class apply to its latents."""
        latent = self.manifest["latent"]
        return LatentScaling(self.scaling_factor, self.shift_factor, latent.get("mean"), latent.get("std"))

    def _values(self, name: str, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
        values = np.empty((len(rows), *self.shape), dtype=np.float32)
        for column, selected in ((name, ~mirrored), (f"{name}_flip", mirrored)):
            if not selected.any():
                continue
            firsts, chunks = self._chunks[column]
            places = np.flatnonzero(selected)
            which = np.searchsorted(firsts, rows[places], side="right") - 1
            for number in np.unique(which):
                here = places[which == number]
                values[here] = chunks[number][rows[here] - firsts[number]]
        return torch.from_numpy(values)

    @cached_property
    def _chunks(self) -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
        """For each column the first row of each chunk of the mapped file, and the chunks, without a copy."""
        columns = {}
        for name in ("mean", "logvar", "mean_flip", "logvar_flip"):
            if name in self.dataset.column_names:
                pieces = [_as_array(chunk, self.shape) for chunk in self.dataset.data.column(name).chunks if len(chunk)]
                sizes = [len(piece) for piece in pieces]
                columns[name] = (np.cumsum([0, *sizes[:-1]]), pieces)
        return columns


def _as_array(chunk: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a chunk of a column as an array, (N, *shape), without a copy."""
    values = chunk.storage
    for _ in shape:
        values = values.flatten()
    array: np.ndarray = values.to_numpy(zero_copy_only=True).reshape(len(chunk), *shape)
    return array
