"""Feeds micro-batches to the device and reports unreadable images."""

import math
import sys
from collections.abc import Callable, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin

from latent_ae.arithmetic import training_memory_format
from latent_ae.config import UserError
from latent_ae.data.labels import PROBE_SEED, few_labels, numbered_classes
from latent_ae.data.loader import Batch as LoadedBatch
from latent_ae.data.loader import ImageSource, posterior_noise, stop_if_too_many_bad, training_batches
from latent_ae.data.mixture import with_more_of
from latent_ae.data.settings import DataSettings
from latent_ae.data.sources import StreamSource
from latent_ae.latents.pairs import LatentPairs, open_pairs
from latent_ae.models.build import channels_of, factor_of, latent_channels_of
from latent_ae.objectives.base import Batch, Objective

from .agreement import gathered, hosts
from .build import place_of_weights
from .checkpoint import Checkpoint
from .log import Log
from .settings import TrainSettings
from .step import TrainStep


class BadFiles:
    """Collects unreadable images and read errors of all processes; `settle` reports them after each step."""

    def __init__(self, accelerator: Accelerator, settings: DataSettings, source: ImageSource, log: Log):
        self.accelerator, self.settings, self.log = accelerator, settings, log
        self.num_images = len(source) if isinstance(source, Sized) else None
        self.num_read = self.num_bad = 0
        self.named = dict[str, None]()
        """`name: reason` of all processes, in the order in which they were reported."""
        self.new, self.new_bad = list[str](), 0
        self.failure: UserError | None = None
        # processes communicate through the CPU, so that nothing waits for a GPU
        self.hosts = hosts()

    def note(self, batch: LoadedBatch) -> None:
        """Count a micro-batch of this process."""
        self.num_read += len(batch.numbers) * self.accelerator.num_processes
        self.new += batch.skipped
        self.new_bad += batch.num_replaced

    def fail(self, error: UserError) -> None:
        """Record that this process cannot read any further. It continues to the next `settle`, where all stop."""
        self.failure = error

    def settle(self, step: int) -> None:
        """Name new unreadable files on stderr and in log.jsonl. Every process calls this once per step.

        Raises:
            UserError: On every process, if one of them failed, or too many files of all were unreadable.
        """
        trouble = torch.tensor(bool(self.new or self.failure), dtype=torch.int)
        if self.hosts is not None:
            torch.distributed.all_reduce(trouble, torch.distributed.ReduceOp.MAX, group=self.hosts.group)
        if trouble:
            self._report(step)
        if self.num_bad:
            stop_if_too_many_bad(
                self.num_bad,
                self.num_read,
                list(self.named),
                num_images=self.num_images,
                max_bad_fraction=self.settings.max_bad_fraction,
            )

    def _report(self, step: int) -> None:
        reports = gathered((self.new, self.new_bad, str(self.failure) if self.failure else ""))
        self.new, self.new_bad = [], 0
        lines = dict.fromkeys(line for skipped, _, _ in reports for line in skipped if line not in self.named)
        self.num_bad += sum(num_bad for _, num_bad, _ in reports)
        for line in lines:
            self.log.say(f"skipped {line}")
        if lines:
            self.log.write("unreadable", step, {"files": list(lines), "samples_so_far": self.num_bad})
        self.named |= lines
        for _, _, failure in reports:
            if failure:
                raise UserError(failure)


def stream_state_of(checkpoint: Checkpoint | None, accelerator: Accelerator) -> dict[str, Any] | None:
    """Return the position of this process's stream at the checkpoint; None for stored images, which need none.

    Raises:
        UserError: If the checkpoint was written by another number of processes.
    """
    states = checkpoint.state()["stream_states"] if checkpoint is not None else [None]
    if len(states) != accelerator.num_processes and states[0] is not None:
        raise UserError(
            f"data.streaming: the checkpoint was written by {len(states)} process(es) and now there are "
            f"{accelerator.num_processes}; a stream resumes only with the same number"
        )
    return states[accelerator.process_index] if states[0] is not None else None


class Labels(NamedTuple):
    """The labels that training sees."""

    of_images: np.ndarray
    """(N,) int64 classes of the images of a source, -1 where they are unknown or hidden."""
    names: list[str]
    """Names of the classes."""


def labelled_images(settings: TrainSettings, source: ImageSource, held_out: ImageSource) -> tuple[ImageSource, Labels]:
    """Return the training images, of which a share of the samples is labelled, and their labels.

    Raises:
        UserError: If there are no labels, too few of a class, or another number of classes than the settings say.
    """
    own = settings.semi_supervised
    assert not isinstance(source, StreamSource) and not isinstance(held_out, StreamSource)  # refused by the settings
    try:
        found = numbered_classes(source, held_out, own.label_column)
        if found is None:
            raise UserError(
                f"classes: {settings.data.title} has no labels: give a table with a column of classes, or a "
                "folder of images with a folder for each class"
            )
        if len(found.names) != own.classes:
            has = f"{settings.data.title} has {len(found.names)}: {', '.join(found.names)}"
            raise UserError(f"classes: {own.classes}, and {has[:300]}")
        labels = found.labels[0]
        if own.labels_per_class is not None:
            shown = few_labels(labels, found.names, [own.labels_per_class], PROBE_SEED, own.draw)[0]
            kept = np.full_like(labels, -1)
            kept[shown] = labels[shown]
            labels = kept
    except UserError as error:
        message = (
            str(error)
            .replace("test_fraction", "data.eval_fraction")
            .replace("; lower labels_per_class", "; lower semi_supervised.labels_per_class")
        )
        raise UserError(f"semi_supervised.{message}") from error
    rows = np.flatnonzero(labels >= 0)
    if missing := [name for number, name in enumerate(found.names) if not (labels == number).any()]:
        raise UserError(
            f"semi_supervised.classes: no training image of {settings.data.title} has class {missing[0]}, which "
            "held-out images have"
        )
    if own.share and len(rows) < len(labels):
        source = with_more_of(source, rows, own.share, settings.data, "labelled")
        labels = np.concatenate([labels, labels[rows]])
    return source, Labels(labels, found.names)


def stored_latents(
    settings: TrainSettings, accelerator: Accelerator, source: ImageSource, autoencoder: ModelMixin
) -> LatentPairs | None:
    """Return the stored latents of the training images, on which the decoder trains; None if images are encoded.

    Raises:
        UserError: If there are none, or they are not those of init_from.
    """
    if settings.decoder.latents is None:
        return None
    pairs = open_pairs(
        settings.decoder.latents,
        source,
        settings.data,
        scalings=autoencoder.encoder.scalings,
        name=place_of_weights(str(settings.init_from)),
        seed=settings.seed,
    )
    assert not isinstance(source, StreamSource)  # it was refused
    if accelerator.is_main_process and len(pairs.images) < len(source):
        missing = f"{len(source) - len(pairs.images):,} of {len(source):,}"
        print(f"decoder.latents: {missing} images have no latent and are left out", file=sys.stderr)
    return pairs


class Feed:
    """Iterates over micro-batches on the device, without end, and counts unreadable files in `bad_files`.

    Args:
        step: The training step that is fed; its objectives draw random tensors for the samples.
        source: The training images.
        log: Where unreadable files are named.
        first_step: The step to begin with.
        stream_state: Position of this process's stream at that step; None for stored images.
        pairs: The stored latents of `source` that are decoded; None encodes the images.
        labels: The labels of `source`, if an objective needs them.

    Raises:
        UserError: If the batch cannot be split, or there are no images.
    """

    def __init__(
        self,
        step: TrainStep,
        source: ImageSource,
        log: Log,
        first_step: int,
        stream_state: dict[str, Any] | None,
        pairs: LatentPairs | None = None,
        labels: Labels | None = None,
    ):
        self.pairs, self.labels = pairs, labels
        self.settings, self.objectives = step.settings, list(step.objectives.values())
        settings, accelerator, autoencoder = step.settings, step.accelerator, step.bare_reconstructor.autoencoder
        self.channels, self.device = channels_of(autoencoder), accelerator.device
        self.factor, self.latent_channels = factor_of(autoencoder), latent_channels_of(autoencoder)
        self.bad_files = BadFiles(accelerator, settings.data, source, log)
        self.stream_state: dict[str, Any] | None = None
        self.batches = training_batches(
            source,
            settings.data,
            channels=self.channels,
            seed=settings.seed,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            first_batch=first_step,
            stream_state=stream_state,
            crop=pairs.crop if pairs is not None else None,
        )

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self.batches)
        except (UserError, StopIteration) as error:
            # the other processes are in this step, too: it is finished on gray images, then all stop without saving
            if isinstance(error, UserError):
                self.bad_files.fail(error)
            batch = self.gray()
        self.bad_files.note(batch)
        self.stream_state = batch.stream_state
        return self.on_device(batch)

    def close(self) -> None:
        """Stop the workers."""
        self.batches.close()

    def gray(self) -> LoadedBatch:
        """Return a micro-batch of gray images of the largest size, which needs no file."""
        size = self.settings.micro_batch
        height, width = max(self.settings.data.crop_sizes, key=math.prod)
        images = torch.zeros(size, self.channels, height, width)
        return LoadedBatch(images, list(range(size)), [], indices=[0] * size)

    def on_device(self, batch: LoadedBatch) -> Batch:
        """Return a loaded micro-batch on the device, with the random tensors of its samples."""
        images = batch.images.to(self.device, memory_format=training_memory_format(self.device), non_blocking=True)
        height, width = (side // self.factor for side in images.shape[2:])
        noise = posterior_noise(self.settings.seed, batch.numbers, (self.latent_channels, height, width))
        drawn = drawn_batch(images, self._sent(noise), batch.numbers, self.objectives, self._sent)
        if self.labels is not None:
            drawn = drawn._replace(labels=self._sent(torch.from_numpy(self.labels.of_images[list(batch.indices)])))
        if self.pairs is None:
            return drawn
        return drawn._replace(decode=self._sent(self.pairs.latents(batch.indices, batch.numbers, noise)))

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        # from pinned memory, so that the host does not wait for the copy
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)


def drawn_batch(
    images: torch.Tensor,
    noise: torch.Tensor,
    numbers: Sequence[int],
    objectives: Sequence[Objective[Any]],
    send: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Batch:
    """Return a micro-batch with the random tensors that objectives draw for its samples.

    Args:
        images: (N, C, H, W) float32 in [-1, 1], on the device.
        noise: (N, c, h, w) standard normal noise, on the device.
        numbers: Global numbers of the samples.
        objectives: The objectives in use.
        send: Moves a CPU tensor to the device.
    """
    draws = {one.name: tuple(map(send, one.draw(numbers, noise.shape[1:]))) for one in objectives}
    return Batch(images, images, noise, numbers, draws, full_size=images[0].numel())
