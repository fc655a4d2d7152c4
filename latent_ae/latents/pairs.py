"""Pairs of an image and its stored latent, on which a decoder trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.held_out import Framing
from latent_ae.data.rng import mirrored
from latent_ae.data.settings import DataSettings
from latent_ae.data.sources import Encoded, ImageSource, StoredImages, StreamSource, TableSource, digest_of
from latent_ae.data.transforms import center_crop, resize_shorter
from latent_ae.latents.cache import LatentCache, open_latents
from latent_ae.models.family import LatentScaling


def image_id(source: StoredImages, index: int) -> str:
    """Return the `id` of an image in a cache: the number of its row in a table, or the name of its file."""
    if isinstance(source, TableSource):
        return str(source.rows[index])
    # file names may hold bytes that are no valid UTF-8
    return source.name(index).encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class UnchangedImages:
    """Images that are refused if their bytes are not those that were encoded."""

    source: StoredImages
    digests: np.ndarray
    """Digest of each, (N,) bytes in hexadecimal."""

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        """Return a name by which a person finds image i."""
        return self.source.name(i)

    def read(self, i: int) -> Encoded:
        """Return the bytes or the file of image i.

        Raises:
            UserError: If they have changed.
            ImageError: If they cannot be read.
        """
        encoded = self.source.read(i)
        if digest_of(encoded) != self.digests[i].decode():
            raise UserError(
                f"decoder.latents: {self.name(i)} is not the image that was encoded: encode again, into a new folder"
            )
        return encoded

    def keys(self) -> np.ndarray:
        """Return one key per image, (N,) uint64, that stays the same when other images are added."""
        return self.source.keys()

    def subset(self, rows: np.ndarray) -> "UnchangedImages":
        """Return a source of the images with these numbers, (n,) integers, in this order."""
        return UnchangedImages(self.source.subset(rows), self.digests[rows])


@dataclass(frozen=True)
class LatentPairs:
    """Images with their stored latents. Build it with `open_pairs`."""

    cache: LatentCache
    rows: np.ndarray
    """Row in the cache of each image, (N,) integers."""
    images: UnchangedImages
    framing: Framing
    seed: int
    flip: bool
    scaling: LatentScaling
    """How the decoder takes the stored latents, which are raw."""

    @property
    def crop(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """A function from decoded pixels and the sample's number to its crop, which holds no latents."""
        return partial(crop_for_latent, framing=self.framing, seed=self.seed, flip=self.flip)

    def latents(self, indices: Sequence[int], numbers: Sequence[int], noise: Tensor) -> Tensor:
        """Return latents to decode: scaled samples of the posterior, or those of a deterministic first stage.

        Args:
            indices: N numbers of images.
            numbers: N global numbers of the samples.
            noise: (N, c, h, w) standard normal, on the CPU.

        Returns:
            (N, c, h, w) float32 on the CPU.
        """
        flips = [self.flip and mirrored(self.seed, number) for number in numbers]
        raw = self.cache.batch(self.rows[list(indices)], flips, noise if self.cache.has_posterior else None)
        return self.scaling.scaled(raw)


def crop_for_latent(array: np.ndarray, number: int, framing: Framing, seed: int, flip: bool) -> np.ndarray:
    """Return the part of an image that its latent encodes, mirrored if the sample is.

    Args:
        array: (H, W, C) decoded pixels.
        number: Global number of the sample.
        framing: How the image was framed when it was encoded.
        seed: Seed of the run.
        flip: Whether half of the samples are mirrored.

    Returns:
        (side, side, C), of the array's type unless the framing resamples to floats.
    """
    if framing.resize_px is not None:
        array = resize_shorter(array, framing.resize_px, framing.resample)
    array = center_crop(array, framing.crop_px, nearest=framing.nearest)
    return array[:, ::-1] if flip and mirrored(seed, number) else array


def open_pairs(
    folder: str,
    source: ImageSource,
    settings: DataSettings,
    *,
    scalings: Mapping[str, LatentScaling],
    name: str,
    seed: int,
) -> LatentPairs:
    """Open a cache of latents for the training images of a run.

    Args:
        folder: The folder that `latent-ae encode` wrote.
        source: The training images. Those that the cache lacks, because they were unreadable, are left out.
        settings: The section `data` of the settings.
        scalings: How the decoder takes latents, by the digests of the first stages that may have made them
            (`FirstStage.encoder_sha256`; caches without it have `FirstStage.sha256`).
        name: What messages call the first stage whose decoder trains.
        seed: Seed of the run.

    Raises:
        UserError: If the cache is not there or unfinished, was made by another first stage, or has other images,
            another resolution or background, or no mirrored images.
    """
    cache = open_latents(folder)
    manifest, framing = cache.manifest, Framing(**cache.manifest["framing"])
    made_from = manifest["made_from"]
    scaling = scalings.get(made_from.get("encoder") or "", scalings.get(made_from["model"]))
    if scaling is None:
        raise UserError(
            f"decoder.latents: {folder} holds latents of another encoder or scaling, that of "
            f"{manifest['model'].get('location')} ({manifest['model'].get('weights')}), and the run starts from "
            f"{name}: encode the images with that"
        )
    for key, stored in (("resolution", framing.crop_px), ("resize_px", framing.resize_px)):
        if getattr(settings, key) not in (stored, None):
            raise UserError(
                f"data.{key}: {getattr(settings, key)}, and the images in {folder} were encoded with {stored}: use that"
            )
    background = made_from["settings"].get("background", list(settings.background))
    if background != list(settings.background):
        raise UserError(
            f"data.background: {list(settings.background)}, and the images in {folder} were encoded on {background}: "
            "use that"
        )
    if settings.flip and not cache.has_flips:
        raise UserError(f"data.flip: {folder} has no latents of mirrored images: set it to false")
    if isinstance(source, StreamSource):
        raise UserError(
            "data.streaming: stored latents belong to images by number, which a stream has not: set it to false"
        )
    columns = cache.dataset.data  # datasets would decode the columns row by row
    rows = {identity: row for row, identity in enumerate(columns.column("id").to_pylist())}
    found = np.array([rows.get(image_id(source, index), -1) for index in range(len(source))], dtype=np.int64)
    there = np.flatnonzero(found >= 0)
    if not len(there):
        raise UserError(
            f"decoder.latents: {folder} holds none of the {len(source)} training images of {settings.source} (it was "
            f"made from {manifest['data'].get('location')}, part={manifest['data'].get('part')}): encode those, with "
            "part=all or part=train"
        )
    digests = np.array(columns.column("digest").to_pylist(), dtype="S32")[found[there]]
    images = UnchangedImages(source.subset(there), digests)
    return LatentPairs(cache, found[there], images, framing, seed, settings.flip, scaling)
