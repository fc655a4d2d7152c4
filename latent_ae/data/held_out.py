"""Held-out images: each once, in the same order and with the same pixels every time, shared out over processes."""

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
from latent_ae.data.settings import DataSettings
from latent_ae.data.sources import Encoded, ImageSource, StreamSource, digest_of, encoded_image, stream_values
from latent_ae.data.transforms import Resample, center_crop, resize_shorter
from latent_ae.text import printable


class Framing(NamedTuple):
    """How an image is resized and cut from the middle."""

    resize_px: int | None = None
    """Shorter side it is resized to first; None keeps its size."""
    crop_px: int | None = None
    """Side of the square; None takes the largest sides that `multiple_of` divides."""
    resample: Resample = "adm"
    nearest: bool = False
    """See transforms.center_crop."""


@dataclass(frozen=True)
class HeldOutImage:
    """One image, or why there is none."""

    index: int
    name: str
    image: torch.Tensor | None
    """CHW float32 in [-1, 1]."""
    reason: str = ""
    digest: str = ""
    """Digest of the file's bytes."""
    enlarged: bool = False
    """It was smaller than the crop."""


class Part(NamedTuple):
    """Which images are a process's: blocks of neighbours, dealt out in turn, without those that are done."""

    rank: int = 0
    world_size: int = 1
    block: int = 1
    done: frozenset[int] = frozenset()

    def holds(self, index: int) -> bool:
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
    """This rank's images (index % world_size == rank) of `source`, cut from the middle: see HeldOutImages.

    Each is resized to `settings.resize_px` where that is set, then cropped to `crop_px`, or with None to the largest
    sides that `multiple_of` divides.
    """
    framing = Framing(settings.resize_px, crop_px)
    return HeldOutImages(source, settings, channels, framing, multiple_of, Part(rank, world_size))


@dataclass
class HeldOutImages:
    """Iterates over (index, name, CHW float32 in [-1, 1]), in the same order and with the same pixels every time.

    After an iteration `skipped` holds `name: reason` of the unreadable images, and `num_read` counts all. Raises
    UserError if there is only one process and all were; of many processes each sees its own images, so the caller must
    judge. `items` gives more.
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
        """This part's images in the order of their indices, unreadable ones included."""
        workers = 0  # those of a stream would each see other files, and their images lose their index
        if not isinstance(self.source, StreamSource):
            # a worker costs more to start than a few images take
            workers = min(self.settings.num_workers, len(self.source) // (16 * self.part.world_size))
        for item, pixels in loaded(_Middles(self), workers):
            yield item if pixels is None else replace(item, image=to_tensor(pixels))


@dataclass
class _Middles(IterableDataset):
    """What a worker of HeldOutImages does. Pixels travel as they were decoded, beside the item that will hold them."""

    images: HeldOutImages

    def __iter__(self) -> Iterator[tuple[HeldOutImage, np.ndarray | None]]:
        images, framing = self.images, self.images.framing
        for index, name, read in self._stored():
            digest = ""
            try:
                encoded = read()
                digest = digest_of(encoded)
                array = decode_for(encoded, images.settings, images.channels)
                enlarged = min(array.shape[:2]) < (framing.resize_px or framing.crop_px or images.multiple_of)
                if framing.resize_px is not None:
                    array = resize_shorter(array, framing.resize_px, framing.resample)
                array = center_crop(array, framing.crop_px, images.multiple_of, nearest=framing.nearest)
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
