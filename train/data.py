"""Micro-batches on the device, and what could not be read on the way."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from accelerate import Accelerator

from latent_ae.arithmetic import training_memory_format
from latent_ae.config import UserError
from latent_ae.data.loader import Batch as LoadedBatch
from latent_ae.data.loader import ImageSource, posterior_noise, stop_if_too_many_bad, training_batches
from latent_ae.data.settings import DataSettings
from latent_ae.models.build import channels_of, factor_of, latent_channels_of
from latent_ae.objectives.base import Batch, Objective

from .agreement import gathered, hosts
from .checkpoint import Checkpoint
from .log import Log
from .step import TrainStep


class BadFiles:
    """What `note` and `fail` were told since the last `settle`, and what was met before."""

    def __init__(self, accelerator: Accelerator, settings: DataSettings, source: ImageSource, log: Log):
        self.accelerator, self.settings, self.log = accelerator, settings, log
        self.num_images = len(source) if isinstance(source, Sized) else None
        self.num_read = self.num_bad = 0
        self.named = dict[str, None]()
        """Those of all processes, in the order in which they were met."""
        self.new, self.new_bad = list[str](), 0
        self.failure: UserError | None = None
        # hosts agree among themselves: nobody waits for a GPU
        self.hosts = hosts()

    def note(self, batch: LoadedBatch) -> None:
        """Counts a micro-batch of this process."""
        self.num_read += len(batch.numbers) * self.accelerator.num_processes
        self.new += batch.skipped
        self.new_bad += batch.num_replaced

    def fail(self, error: UserError) -> None:
        """This process can read no further. It goes on to the next `settle`, where all stop."""
        self.failure = error

    def settle(self, step: int) -> None:
        """Called by every process once per step: names what is new, in log.jsonl too.

        Raises UserError, on every process, when one of them failed or too many of all their files were unreadable.
        """
        trouble = torch.tensor(bool(self.new or self.failure), dtype=torch.int)
        if self.hosts is not None:
            torch.distributed.all_reduce(trouble, torch.distributed.ReduceOp.MAX, group=self.hosts.group)
        if trouble:
            self._tell(step)
        if self.num_bad:
            stop_if_too_many_bad(
                self.num_bad,
                self.num_read,
                list(self.named),
                num_images=self.num_images,
                max_bad_fraction=self.settings.max_bad_fraction,
            )

    def _tell(self, step: int) -> None:
        told = gathered((self.new, self.new_bad, str(self.failure) if self.failure else ""))
        self.new, self.new_bad = [], 0
        lines = dict.fromkeys(line for skipped, _, _ in told for line in skipped if line not in self.named)
        self.num_bad += sum(num_bad for _, num_bad, _ in told)
        for line in lines:
            self.log.say(f"skipped {line}")
        if lines:
            self.log.write("unreadable", step, {"files": list(lines), "samples_so_far": self.num_bad})
        self.named |= lines
        for _, _, failure in told:
            if failure:
                raise UserError(failure)


def stream_state_of(checkpoint: Checkpoint | None, accelerator: Accelerator) -> dict[str, Any] | None:
    """Where this process's stream stood at the checkpoint; None for stored images, which need no state."""
    states = checkpoint.state()["stream_states"] if checkpoint is not None else [None]
    if len(states) != accelerator.num_processes and states[0] is not None:
        raise UserError(
            f"data.streaming: the checkpoint was written by {len(states)} process(es) and now there are "
            f"{accelerator.num_processes}; a stream goes on only with the same number"
        )
    return states[accelerator.process_index] if states[0] is not None else None


class Feed:
    """The loader's batches as micro-batches on the device; counts the unreadable files met.

    Args:
        step: What is fed; its objectives draw for the samples, its rank decides on the share of each batch.
        source: The training images.
        log: Where unreadable files are named.
        first_step: The step to begin with.
        stream_state: Where this process's stream stands then; None for stored images.
    """

    def __init__(
        self, step: TrainStep, source: ImageSource, log: Log, first_step: int, stream_state: dict[str, Any] | None
    ):
        self.settings, self.objectives = step.settings, list(step.objectives.values())
        settings, accelerator, autoencoder = step.settings, step.accelerator, step.bare_reconstructor.autoencoder
        self.channels, self.device = channels_of(autoencoder), accelerator.device
        side = settings.data.resolution // factor_of(autoencoder)
        self.latent_shape = (latent_channels_of(autoencoder), side, side)
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
        )

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self.batches)
        except (UserError, StopIteration) as error:
            # the others are in this step too: it is finished on gray images, then all stop, and nothing is saved
            if isinstance(error, UserError):
                self.bad_files.fail(error)
            batch = self.gray()
        self.bad_files.note(batch)
        self.stream_state = batch.stream_state
        return self.on_device(batch)

    def gray(self) -> LoadedBatch:
        """Images that need no file."""
        size = self.settings.micro_batch
        shape = (size, self.channels, *(2 * [self.settings.data.resolution]))
        return LoadedBatch(torch.zeros(shape), list(range(size)), [])

    def on_device(self, batch: LoadedBatch) -> Batch:
        """With all that is drawn for its samples."""
        images = batch.images.to(self.device, memory_format=training_memory_format(self.device), non_blocking=True)
        noise = self._sent(posterior_noise(self.settings.seed, batch.numbers, self.latent_shape))
        return drawn_batch(images, noise, batch.numbers, self.objectives, self._sent)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        # from pinned memory, or the host would wait for the copy
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)


def drawn_batch(
    images: torch.Tensor,
    noise: torch.Tensor,
    numbers: Sequence[int],
    objectives: Sequence[Objective[Any]],
    send: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Batch:
    """A micro-batch of images and noise on the device, with what the objectives draw for it, `send` there."""
    draws = {one.name: tuple(map(send, one.draw(numbers, noise.shape[1:]))) for one in objectives}
    return Batch(images, images, noise, numbers, draws, full_size=images[0].numel())
