"""Loads training batches in one endless, seeded order of samples that does not depend on the number of processes.

Everything about a sample (which image, crop, flip, posterior noise) is a pure function of the seed and the sample's
global number. So the numbers of workers and processes do not change the samples, and resuming takes one integer.
Streams are the exception: see `Batch.stream_state` and docs/data.md.
"""

import atexit
import itertools
import math
import multiprocessing
import multiprocessing.process
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from latent_ae.config import UserError
from latent_ae.data.datasets import open_images
from latent_ae.data.images import Decoded, ImageError, decode, decode_scaled, reason_of, to_batch
from latent_ae.data.mixture import Candidate, Mixture
from latent_ae.data.rng import Share, buckets_at, crop_rng, epoch_order, posterior_noise
from latent_ae.data.settings import DataSettings
from latent_ae.data.shared_pixels import Sent, SharedPixels
from latent_ae.data.sources import Encoded, ImageSource, StreamReader, StreamSource, first_line
from latent_ae.data.transforms import random_crop
from latent_ae.text import printable

# the names that the train loop and eval import from here
__all__ = ["Batch", "ImageSource", "open_images", "posterior_noise", "stop_if_too_many_bad", "training_batches"]

# this many unreadable images in a row mean that the source is not what the user thinks
MAX_BAD_IN_A_ROW = 100
# a source of few images, like `photos`: every worker keeps the decoded pixels
KEPT_IMAGES, KEPT_BYTES_EACH = 16, 2**23
AHEAD = 2
"""Number of items that each worker prepares ahead."""
T = TypeVar("T")
WORKER_DIED = "DataLoader worker (pid"
_WORKERS: weakref.WeakSet[multiprocessing.process.BaseProcess] = weakref.WeakSet()


@dataclass(frozen=True)
class Batch:
    """One rank's micro-batch."""

    images: torch.Tensor
    """(N, C, H, W) float32 in [-1, 1]; in pinned memory where there is a GPU."""
    numbers: list[int]
    """Global number of each sample."""
    skipped: list[str]
    """`name: reason` of the unreadable images that were replaced."""
    num_replaced: int = 0
    """Number of samples whose image was replaced by another."""
    indices: Sequence[int] = ()
    """Number of each sample's image in the source; empty for a stream."""
    stream_state: dict[str, Any] | None = None
    """State with which `training_batches` of this rank resumes a stream after this micro-batch (JSON types)."""


def training_batches(
    source: ImageSource,
    settings: DataSettings,
    *,
    channels: int,
    seed: int,
    batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    first_batch: int = 0,
    stream_state: dict[str, Any] | None = None,
    crop: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> Generator[Batch, None, None]:
    """Yield this rank's micro-batches, without end; `close()` stops the workers.

    Global batch b holds the samples b * batch_size ... (b + 1) * batch_size - 1, and micro-step m of rank r the
    `micro_batch_size` samples from b * batch_size + (m * world_size + r) * micro_batch_size on. An unreadable image is
    replaced by the next readable one of the epoch. All samples of a global batch have one size, which with buckets is a
    function of the seed and b. The global random state is left alone.

    Args:
        source: The images.
        settings: Decoding, crop, flip and workers.
        channels: Channels of the images, as `images.decode` makes them.
        seed: Seed of the order, crops and flips.
        batch_size: Samples of a global batch, over all processes.
        micro_batch_size: Samples of a micro-batch; batch_size must be a multiple of micro_batch_size * world_size.
        rank: Number of this process.
        world_size: Number of processes.
        first_batch: The global batch to begin with.
        stream_state: The `Batch.stream_state` after which a stream resumes; None starts from its beginning.
        crop: Takes decoded pixels, (H, W, C), and the sample's number, and returns its crop; it is sent to workers.
            None crops at random as the settings say.

    Raises:
        UserError: If the sizes do not divide, the source is empty, or a stream has too few files; while iterating if
            too many images in a row are unreadable or a worker dies.
    """
    share = Share(batch_size, micro_batch_size, rank, world_size)
    if batch_size % (micro_batch_size * world_size):
        parts = f"micro_batch_size {micro_batch_size} x {world_size} processes"
        raise UserError(f"batch_size: {batch_size} is not a multiple of {parts}")
    if streams := isinstance(source, StreamSource):
        source.check_readers(rank, world_size, max(1, settings.num_workers), stream_state)
    elif len(source) == 0:
        raise UserError(f"data.source: {settings.source} holds no images")
    states = stream_state["workers"] if stream_state and streams else [None] * max(1, settings.num_workers)
    crops = _Crops(source, settings, channels, seed, share, first_batch * share.micro_steps, states, crop)
    return _received(crops, streams)


def stop_if_too_many_bad(
    num_bad: int, num_read: int, examples: Sequence[str], *, num_images: int | None, max_bad_fraction: float
) -> None:
    """Raise UserError if more than `max_bad_fraction` of the samples met an unreadable image.

    Nothing is checked before 100 samples, or one epoch of a smaller source.

    Args:
        num_bad: Number of samples with an unreadable image.
        num_read: Number of samples read so far.
        examples: `name: reason` of unreadable images, of which the first five are shown.
        num_images: Size of the source; None for a stream.
        max_bad_fraction: Largest accepted fraction, 0 to 1.
    """
    if num_read >= min(100, num_images or 100) and num_bad > max_bad_fraction * num_read:
        shown = "".join(f"\n  {example}" for example in dict.fromkeys(examples[:5]))
        raise UserError(
            f"data.max_bad_fraction: {num_bad} of the first {num_read} images were unreadable, more than "
            f"{max_bad_fraction:.2%}; mend or remove them, or raise it. For example:{shown}"
        )


@dataclass
class _Crops(IterableDataset):
    """The work of one worker: every n-th micro-batch, for n workers, or a UserError.

    Yields (crops HWC or where they lie in `shared`, numbers, indices, skipped, num_replaced, stream state).
    """

    source: ImageSource
    settings: DataSettings
    channels: int
    seed: int
    share: Share
    first_step: int
    states: Sequence[dict[str, Any] | None]
    crop: Callable[[np.ndarray, int], np.ndarray] | None = None
    kept: dict[tuple[str, tuple[int, int, int]], Decoded] = field(default_factory=dict)
    shared: SharedPixels | None = None
    """Where workers put the crops; None without workers."""

    def __iter__(self) -> Iterator[Any]:
        worker, workers = worker_place()
        stream = None
        if isinstance(self.source, StreamSource):
            turn = (self.first_step + worker) % workers  # a resumed stream goes on with the reader whose turn it is
            reader, readers = self.share.rank * workers + turn, self.share.world_size * workers
            buffer_size, state = self.settings.shuffle_buffer, self.states[turn]
            stream = StreamReader(self.source, self.seed, buffer_size, reader, readers, state)
        try:
            for count, step in enumerate(itertools.count(self.first_step + worker, workers)):
                numbers, skipped, num_replaced = self.share.numbers(step), list[str](), 0
                size = crop_size_at(self.settings, self.seed, numbers[0] // self.share.batch_size)
                crops, indices = list[Sent](), list[int]()
                for place, number in enumerate(numbers):
                    candidates = self._of_stream(stream) if stream else self._candidates(number)
                    index, crop, bad = self._crop(number, size, candidates)
                    # copied at once: a view would keep the whole image until the batch is complete
                    crops.append(self.shared.put(worker, count, place, crop) if self.shared else crop.copy())
                    indices.append(index)
                    skipped += bad
                    num_replaced += bool(bad)
                yield (
                    crops,
                    numbers,
                    [] if stream else indices,
                    skipped,
                    num_replaced,
                    stream.state_dict() if stream else None,
                )
        except UserError as error:
            yield error  # an error raised in a worker would arrive wrapped in a traceback

    def _of_stream(self, stream: StreamReader) -> Iterator[Candidate]:
        return ((-1, name, read, self.settings) for name, read in stream)

    def _candidates(self, number: int) -> Iterator[Candidate]:
        """Yield the sample's image and those that follow in its epoch, with the settings of their source."""
        assert not isinstance(self.source, StreamSource)
        if isinstance(self.source, Mixture):
            yield from self.source.candidates(self.seed, number)
            return
        epoch, position = divmod(number, len(self.source))
        order = epoch_order(self.seed, epoch, len(self.source))
        for offset in range(len(order)):
            i = int(order[(position + offset) % len(order)])
            yield i, self.source.name(i), partial(self.source.read, i), self.settings

    def _crop(
        self, number: int, size: tuple[int, int], candidates: Iterator[Candidate]
    ) -> tuple[int, np.ndarray, list[str]]:
        """Return the number of the sample's image, its crop, and `name: reason` of unreadable images before it."""
        bad, settings = list[str](), self.settings
        for index, name, read, settings in itertools.islice(candidates, MAX_BAD_IN_A_ROW):
            try:
                image = self._decoded(name, read, settings)
                if self.crop is not None:
                    return index, self.crop(image.pixels, number), bad
                return index, training_crop(image, settings, crop_rng(self.seed, number), size), bad
            except ImageError as error:
                bad.append(f"{printable(name)}: {printable(str(error))}")
        shown = "".join(f"\n  {line}" for line in bad[:5])
        raise UserError(f"data.source: {len(bad)} images in a row of {settings.source} are unreadable:{shown}")

    def _decoded(self, name: str, read: Callable[[], Encoded], settings: DataSettings) -> Decoded:
        key = (name, settings.background)
        if key in self.kept:
            return self.kept[key]
        image = decode_to_crop(read(), settings, self.channels)
        few = not isinstance(self.source, StreamSource) and len(self.source) <= KEPT_IMAGES
        if few and image.pixels.nbytes <= KEPT_BYTES_EACH:
            self.kept[key] = image
        return image


def decode_for(encoded: Encoded, settings: DataSettings, channels: int) -> np.ndarray:
    """Decode an image in full size, (H, W, channels). Raises ImageError if it is unreadable."""
    return decode(encoded, channels=channels, background=settings.background, max_pixels=settings.max_pixels)


def decode_to_crop(encoded: Encoded, settings: DataSettings, channels: int) -> Decoded:
    """Decode an image from which training crops are cut, smaller than it is if the settings allow that.

    Raises:
        ImageError: If it is unreadable.
    """
    return decode_scaled(
        encoded,
        channels=channels,
        background=settings.background,
        max_pixels=settings.max_pixels,
        shorter_px=settings.resize_px if settings.scaled_decoding else None,
    )


def crop_size_at(settings: DataSettings, seed: int, step: int) -> tuple[int, int]:
    """Return height and width of the training crops of a step, px: those of its bucket, if there are buckets."""
    weights = [bucket.weight for bucket in settings.buckets]
    return settings.crop_sizes[int(buckets_at(seed, [step], weights)[0]) if weights else 0]


def training_crop(
    image: Decoded, settings: DataSettings, rng: np.random.Generator, size: tuple[int, int]
) -> np.ndarray:
    """Return a random crop as the settings say, (height, width, C).

    Args:
        image: What `decode_to_crop` returns.
        settings: The section `data` of the settings.
        rng: Decides position, flip and, with data.scale, the side in the image.
        size: Height and width, px.

    Raises:
        ImageError: If the image is too elongated to be enlarged.
    """
    return random_crop(image.pixels, size, settings.resize_px, settings.flip, rng, settings.scale, image.size)


def worker_place() -> tuple[int, int]:
    """Return the number of this data loader worker and the number of all; (0, 1) outside of a worker."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _received(crops: _Crops, is_stream: bool) -> Generator[Batch, None, None]:
    """Yield the micro-batches of the workers in turn.

    Pixels are sent as they were decoded, because uint8 is a quarter of the size of floats.
    """
    states, shared = list(crops.states), None
    if crops.settings.num_workers:
        size = crops.channels * max(map(math.prod, crops.settings.crop_sizes))
        shared = SharedPixels(crops.settings.num_workers, AHEAD + 1, crops.share.micro_batch_size, size)
        crops.shared = shared
    for count, item in enumerate(loaded(crops, crops.settings.num_workers)):
        if isinstance(item, UserError):
            raise item
        sent, numbers, indices, skipped, num_replaced, states[(crops.first_step + count) % len(states)] = item
        # the worker reuses the memory as soon as its next items are asked for, and this copies the pixels
        images = to_batch(sent if shared is None else shared.get(sent), pin_memory=torch.cuda.is_available())
        state = None
        if is_stream:
            state = {"rank": crops.share.rank, "world_size": crops.share.world_size, "workers": list(states)}
        yield Batch(images, numbers, skipped, num_replaced, indices, state)


def loaded(dataset: IterableDataset, num_workers: int, ahead: int = AHEAD) -> Iterator[Any]:
    """Yield the items of `dataset` from its workers in turn, worker 0 first.

    Args:
        dataset: A dataset whose iterator asks `worker_place` for its share.
        num_workers: Number of worker processes; 0 iterates in this process.
        ahead: Number of items that each worker prepares ahead.

    Raises:
        UserError: If the workers cannot be started.
        WorkerDied: If one is killed.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # without it the loader draws a seed from the global generator
        prefetch_factor=ahead if num_workers else None,
    )
    in_main_thread = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    handler = signal.getsignal(signal.SIGCHLD) if in_main_thread else None
    try:
        multiprocessing.Lock()  # fails here first, because torch's half-started workers would print a traceback
        others = set(multiprocessing.active_children())
        items = iter(loader)
        _WORKERS.update(set(multiprocessing.active_children()) - others)
        if in_main_thread:
            # torch's handler would raise wherever the program is, not where the dead worker's item is awaited
            signal.signal(signal.SIGCHLD, handler)
    except OSError as error:
        raise UserError(
            f"data.num_workers: {num_workers} reading processes cannot be started: {reason_of(error)}. They need a few "
            "bytes of /dev/shm each (docker run --shm-size), memory and free process ids; or set data.num_workers=0"
        ) from error
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if WORKER_DIED not in str(error):
                raise
            raise WorkerDied(
                f"data.num_workers: a process that reads images died ({first_line(error).strip()}). Too little memory "
                "is the usual cause: lower data.num_workers or data.max_pixels; or an image crashes its decoder: "
                "`latent-ae data check` finds and names it"
            ) from error
        yield item


class WorkerDied(UserError):
    """A process that reads images was killed."""


def _unchanged(item: T) -> T:
    return item


@atexit.register
def _end_workers() -> None:
    """End the workers of iterators that are still alive when the program ends, which would otherwise wait for them.

    Python ends such processes by one SIGTERM, and the workers heed only the second.
    """
    for worker in list(_WORKERS):
        if worker.is_alive():
            worker.kill()


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C and a scheduler's signals go to every process of the job; the main process stops the workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # a second SIGTERM ends the worker: that is how a hanging worker is removed
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
