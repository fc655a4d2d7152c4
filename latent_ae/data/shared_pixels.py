"""Hands pixels from the workers of a loader to the process that started them, through memory that both see.

Through a pipe pixels are copied four times. The memory is anonymous: it has no name, needs no /dev/shm, and goes away
with the processes. A worker that was not forked does not see it and sends its pixels through the pipe, as it does with
pixels that do not fit.
"""

import math
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np


class Place(NamedTuple):
    """Where an image lies in the memory."""

    start: int
    """Number of its first byte."""
    shape: tuple[int, ...]
    """Channels, height and width."""
    type: str
    """NumPy's name of its type."""


Sent: TypeAlias = Place | np.ndarray
"""What goes through the pipe: the place of an image, or the image."""


class SharedPixels:
    """Memory for the images of each worker's newest items, used in turn.

    Args:
        workers: Number of workers.
        items: Number of items of a worker that must stay intact: those prepared ahead, and the one that is being read.
        images: Number of images in an item.
        size: Largest number of bytes of an image.
    """

    def __init__(self, workers: int, items: int, images: int, size: int) -> None:
        self.items, self.images, self.size = items, images, size
        try:
            self.memory: mmap.mmap | None = mmap.mmap(-1, workers * items * images * size)
        except (OSError, OverflowError, ValueError):  # too little memory for that many at once
            self.memory = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memory": None}  # only a fork sees it

    def put(self, worker: int, item: int, image: int, pixels: np.ndarray) -> Sent:
        """Copy an image, (H, W, C), into its place and return what is sent for it.

        Args:
            worker: Number of the worker.
            item: How many items of this worker came before.
            image: Number of the image in the item.
            pixels: The image.
        """
        if self.memory is None or pixels.nbytes > self.size:
            return pixels.copy()  # not a view, which would keep a much larger array
        planes = pixels.transpose(2, 0, 1)  # the order of a tensor, so that this is the only copy
        start = ((worker * self.items + item % self.items) * self.images + image) * self.size
        place = Place(start, planes.shape, pixels.dtype.str)
        self._planes(place)[:] = planes
        return place

    def get(self, sent: Sequence[Sent]) -> list[np.ndarray]:
        """Return the images of an item, (H, W, C) each; they stay until the worker has made `items` more."""
        return [self._planes(one).transpose(1, 2, 0) if isinstance(one, Place) else one for one in sent]

    def _planes(self, place: Place) -> np.ndarray:
        assert self.memory is not None
        return np.frombuffer(self.memory, place.type, math.prod(place.shape), place.start).reshape(place.shape)
