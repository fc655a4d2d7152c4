"""Hands pixels from the workers of a loader to the process that started them, through memory that both see.

A pipe copies each batch four times. The memory is anonymous: it has no name, needs no /dev/shm, and goes away with the
processes. A worker that was not forked does not see it and sends its pixels through the pipe, as it does with pixels
that do not fit.
"""

import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np


class Place(NamedTuple):
    """Where an image lies in the memory."""

    start: int
    """Number of its first byte."""
    shape: tuple[int, int, int]
    """Channels, height and width."""
    type: str
    """NumPy's name of its type."""


Sent: TypeAlias = Sequence[Place] | Sequence[np.ndarray]
"""What goes through the pipe: the places of an item's images, or the images."""


class SharedPixels:
    """Memory for the newest items of each worker, used in turn.

    Args:
        workers: Number of workers.
        items: Number of items of a worker that must stay intact: those prepared ahead, and the one that is being read.
        size: Largest number of bytes of an item.
    """

    def __init__(self, workers: int, items: int, size: int) -> None:
        self.items, self.size = items, size
        try:
            self.memory: mmap.mmap | None = mmap.mmap(-1, workers * items * size)
        except (OSError, OverflowError, ValueError):  # too little memory for that many at once
            self.memory = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memory": None}  # only a fork sees it

    def put(self, worker: int, count: int, arrays: Sequence[np.ndarray]) -> Sent:
        """Store the images of a worker's item `count`, (H, W, C) each, and return what is sent for them."""
        if self.memory is None or sum(array.nbytes for array in arrays) > self.size:
            return arrays
        start, places = (worker * self.items + count % self.items) * self.size, list[Place]()
        for array in arrays:
            planes = array.transpose(2, 0, 1)  # the order that a tensor needs, so that it is made in the one copy
            places.append(Place(start, planes.shape, array.dtype.str))
            self._planes(places[-1])[:] = planes
            start += array.nbytes
        return places

    def get(self, sent: Sent) -> list[np.ndarray]:
        """Return the images of an item, (H, W, C) each, as they are until the worker's item after `items` others."""
        return [self._planes(one).transpose(1, 2, 0) if isinstance(one, Place) else one for one in sent]

    def _planes(self, place: Place) -> np.ndarray:
        assert self.memory is not None
        count = place.shape[0] * place.shape[1] * place.shape[2]
        return np.frombuffer(self.memory, place.type, count, place.start).reshape(place.shape)
