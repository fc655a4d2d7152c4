"""SIGTERM, SIGINT and SIGUSR1 end a run at the next step, on all processes together, with a checkpoint."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from .agreement import hosts

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: not done, the same command goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """The run ended on a signal, its checkpoint is written."""


class StopSignals:
    """While entered, the signals are noted instead of ending the process; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self.interrupted = False
        self.before: dict[int, Any] = {}
        # hosts agree among themselves: nobody waits for a GPU
        self.hosts = hosts()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows no other to set handlers
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
            print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)
        self.received = number

    def wanted(self) -> str | None:
        """Name of the signal that any process has received; the same on all of them, which all call this."""
        number = self.received
        if self.hosts is not None:
            highest = torch.tensor([number])
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self.hosts.group)
            number = int(highest)
        return signal.Signals(number).name if number else None
