"""Ends a run on SIGTERM, SIGINT or SIGUSR1 at the next step, on all processes together, with a checkpoint."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from .agreement import hosts

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the run is unfinished, and the same command resumes it."""
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Stopped(Exception):
    """The run ended on a signal, and its checkpoint is written."""


class StopSignals:
    """A `with` block in which the signals are recorded instead of ending the process; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self.interrupted = False
        self.before: dict[int, Any] = {}
        # processes communicate through the CPU, so that nothing waits for a GPU
        self.hosts = hosts()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows only this one to set handlers
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nstopping after this step; interrupt again to stop at once", file=sys.stderr, flush=True)
        self.received = number

    def wanted(self) -> str | None:
        """Return the name of a signal that any process has received, or None; every process calls this."""
        number = self.received
        if self.hosts is not None:
            highest = torch.tensor([number])
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self.hosts.group)
            number = int(highest)
        return signal.Signals(number).name if number else None
