"""Held-out images: each once, in the same order and with the same pixels every time, split over processes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset

from latent_ae.config import UserError
from latent_ae.data.images import ImageError, to_tensor
from latent_ae.data.loader import decode_for, loaded, worker_place
from latent_ae.data.mixture import Mixture
from latent_ae.data.settings import DataSettings
from latent_ae.data.sources import Encoded, ImageSource, StreamSource, digest_of, encoded_image, stream_values
from latent_ae.data.transforms import Resample, center_crop, resize_shorter
from latent_ae.text import printable


class Framing(NamedTuple):
    """How an image is resized and cropped at its centre."""

    resize_px: int | None = None
    """Shorter side to which it is resized first, px; None keeps its size."""
    crop_px: int | None = None
    """Side of the square crop, px; None takes the largest sides that are multiples of `multiple_of`."""
    resample: Resample = "adm"
    """Resampling method, see `transforms.resize_shorter`."""
    nearest: bool = False
    """Rounding of odd margins, see `transforms.center_crop`."""


@dataclass(frozen=True)
class HeldOutImage:
    """One image, or the reason why it is unreadable."""

    index: int
    name: str
    image: torch.Tensor | None
    """(C, H, W) float32 in [-1, 1]; None if it is unreadable."""
    reason: str = ""
    """Why it is unreadable."""
    digest: str = ""
    """Digest of the file's bytes; without a `crop_px` also the height and width of the image, because models of other
    downsampling factors then see other parts of it."""
    enlarged: bool = False
    """Whether it was smaller than the crop or `resize_px`."""


class Part(NamedTuple):
    """Which images belong to a process: blocks of neighbours, dealt out in turn, without the finished blocks."""

    rank: int = 0
    world_size: int = 1
    block: int = 1
    """Images per block."""
    done: frozenset[int] = frozenset()
    """Numbers of the finished blocks."""

    def holds(self, index: int) -> bool:
        """Return whether the image belongs to this process and its block is not finished."""
        block = index // self.block
        return block % self.world_size == self.rank and block not in self.done


def held_out_images(
    source: ImageSource,
    settings: DataSettings,
    *,
    channels: int,
    crop_px: int | None,
    multiple_of: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> "HeldOutImages":
    """Return this rank's images of `source` (index % world_size == rank), resized and cropped at the centre.

    Args:
        source: The images.
        settings: Decoding, workers, and the `resize_px` to which the shorter side is resized first.
        channels: Channels of the images, as `images.decode` makes them.
        crop_px: Side of the square crop, px; None takes the largest sides that are multiples of `multiple_of`.
        multiple_of: Number of px of which sides must be a multiple: the model's downsampling factor.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        UserError: If `crop_px` is not a multiple of `multiple_of`.
    """
    framing = Framing(settings.resize_px, crop_px)
    return HeldOutImages(source, settings, channels, framing, multiple_of, Part(rank, world_size))


@dataclass
class HeldOutImages:
    """Iterates over (index, name, (C, H, W) float32 in [-1, 1]), the same way every time; `items` yields more facts.

    After an iteration `skipped` holds `name: reason` of the unreadable images, and `num_read` is the number of all.

    Raises:
        UserError: If a crop is not a multiple of `multiple_of`; and at the end of an iteration if no image was
            readable. The latter is checked with one process only: of several each sees only its own images, so the
            caller must check.
    """

    source: ImageSource
    settings: DataSettings
    channels: int
    framing: Framing
    multiple_of: int = 1
    part: Part = Part()
    skipped: list[str] = field(default_factory=list)
    num_read: int = 0

    def __post_init__(self) -> None:
        crop_px = self.framing.crop_px
        if crop_px is not None and crop_px % self.multiple_of:
            raise UserError(f"a crop of {crop_px} px: the model needs a multiple of {self.multiple_of}")

    def __iter__(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        self.skipped, self.num_read = [], 0
        for item in self.items():
            self.num_read += 1
            if item.image is None:
                self.skipped.append(f"{printable(item.name)}: {printable(item.reason)}")
            else:
                yield item.index, item.name, item.image
        if self.skipped and self.num_read == len(self.skipped) and self.part.world_size == 1:
            raise UserError(f"none of the {len(self.skipped)} held-out images is readable; {self.skipped[0]}")

    def items(self) -> Iterator[HeldOutImage]:
        """Yield this process's images in the order of their indices, including the unreadable ones."""
        workers = 0  # the workers of a stream would each read other files, and the images' indices would be lost
        if not isinstance(self.source, StreamSource):
            # starting a worker takes longer than reading a few images
            workers = min(self.settings.num_workers, len(self.source) // (16 * self.part.world_size))
        for item, pixels in loaded(_Middles(self), workers):
            yield item if pixels is None else replace(item, image=to_tensor(pixels))


@dataclass
class _Middles(IterableDataset):
    """The work of one worker of HeldOutImages. Pixels are sent as decoded, next to the item that will hold them."""

    images: HeldOutImages

    def __iter__(self) -> Iterator[tuple[HeldOutImage, np.ndarray | None]]:
        images, framing = self.images, self.images.framing
        mixture = images.source if isinstance(images.source, Mixture) else None
        for index, name, read in self._stored():
            digest, settings = "", images.settings
            if mixture is not None:
                settings = mixture.settings_of(index)
                framing = images.framing._replace(resize_px=settings.resize_px)
            try:
                encoded = read()
                digest = digest_of(encoded)
                array = decode_for(encoded, settings, images.channels)
                enlarged = min(array.shape[:2]) < (framing.resize_px or framing.crop_px or images.multiple_of)
                if framing.resize_px is not None:
                    array = resize_shorter(array, framing.resize_px, framing.resample)
                array = center_crop(array, framing.crop_px, images.multiple_of, nearest=framing.nearest)
                if framing.crop_px is None:
                    digest += f"-{array.shape[0]}x{array.shape[1]}"
                yield HeldOutImage(index, name, None, digest=digest, enlarged=enlarged), array
            except ImageError as error:
                yield HeldOutImage(index, name, None, str(error), digest), None

    def _stored(self) -> Iterator[tuple[int, str, Callable[[], Encoded]]]:
        source, part = self.images.source, self.images.part
        if isinstance(source, StreamSource):
            for index, (name, value) in enumerate(stream_values(source)):
                if part.holds(index):
                    yield index, name, partial(encoded_image, value)
        else:
            worker, workers = worker_place()
            mine = (index for index in range(len(source)) if part.holds(index))
            for index in itertools.islice(mine, worker, None, workers):
                yield index, source.name(index), partial(source.read, index)
