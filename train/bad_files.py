"""Unreadable files: all processes count, name and judge them together, so that none is left waiting for another."""

from collections.abc import Sized

import torch
from accelerate import Accelerator

from latent_ae.config import UserError
from latent_ae.data.loader import Batch, ImageSource, stop_if_too_many_bad
from latent_ae.data.settings import DataSettings

from .agreement import gathered, hosts
from .log import Log


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

    def note(self, batch: Batch) -> None:
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
