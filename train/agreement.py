"""An error on one process stops all of them, with the same message, printed once.

Processes wait for each other here through gloo, in a separate group: NCCL ends a run whose processes reach a collective
ten minutes apart, and one process alone may export, save or download for longer than that.
"""

import os
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed import ProcessGroup

from latent_ae.config import ToldElsewhere, UserError
from latent_ae.distributed import PATIENCE
from latent_ae.files import disk_trouble

SECONDS_TO_DIE = 2.0
"""Time for which a process may still be listed after its connections are gone."""
T = TypeVar("T")


class Hosts(NamedTuple):
    """The processes of a run as the operating system knows them."""

    group: ProcessGroup
    """For collectives of CPU tensors, which wait up to PATIENCE for a process."""
    places: list[tuple[str, int]]
    """Host name and process id of each rank."""


_hosts: WeakKeyDictionary[ProcessGroup, Hosts] = WeakKeyDictionary()


def hosts() -> Hosts | None:
    """Return the hosts of all processes, or None if there is one process. All processes must make the first call."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    world = torch.distributed.group.WORLD
    assert world is not None
    if world not in _hosts:
        group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        places: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(places, (socket.gethostname(), os.getpid()), group=group)
        _hosts[world] = Hosts(group, places)
    return _hosts[world]


def gathered(value: T) -> list[T]:
    """Return the `value` of each process, in the order of their ranks. Every process calls this."""
    if (among := hosts()) is None:
        return [value]
    values: list[Any] = [None] * len(among.places)
    torch.distributed.all_gather_object(values, value, group=among.group)
    return values


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process and return its result on every process.

    Raises:
        UserError: On all processes, if `work` raises it.
    """
    value = None
    with Agreed(accelerator):
        if accelerator.is_main_process:
            value = work()
    return gathered(value)[0]  # type: ignore[return-value]


class Agreed:
    """A `with` block that all processes enter and that fails on all of them if it fails on one.

    A UserError, or an OSError about a disk or folder, on any process becomes a UserError on all of them at the end of
    the block. The block must not wait for other processes, because a failed one would not come. Any other exception is
    a bug, keeps its traceback and ends its process; the launcher ends the others.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        reason = str(error) if isinstance(error, UserError) else None
        if isinstance(error, OSError) and disk_trouble(error):
            reason = f"{error.filename or 'a file'}: {error.strerror}"
        if error is not None and reason is None:
            return
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if processes == 1:
            return
        reasons = gathered(reason)
        failed = [number for number, text in enumerate(reasons) if text is not None]
        if not failed:
            return
        # an error that is the same on every process needs no number of a process
        alike = len(failed) == processes and len(set(reasons)) == 1
        message = reasons[failed[0]] if alike or failed[0] == 0 else f"process {failed[0]}: {reasons[failed[0]]}"
        raise (UserError if rank == 0 else ToldElsewhere)(message) from error


def lost_process() -> str:
    """Return a message that names the process that has ended, as far as this machine knows, after a lost connection."""
    if (among := next(iter(_hosts.values()), None)) is None:  # it ended before the processes exchanged their hosts
        return "another process of this run has ended: its output says why"
    here, deadline = socket.gethostname(), time.monotonic() + SECONDS_TO_DIE
    while True:
        gone = [rank for rank, (host, pid) in enumerate(among.places) if host == here and not _lives(pid)]
        if gone or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    others = sorted({host for host, _ in among.places} - {here})
    if gone:
        who = " and ".join(f"process {rank} (pid {among.places[rank][1]} on {here})" for rank in gone)
    else:
        who = f"a process on another machine ({', '.join(others)})" if others else "a process of this run"
    return f"{who} has ended: its output says why. If it printed nothing, it was killed, perhaps for lack of memory"


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop_on_drift(accelerator: Accelerator, done: int, networks: list[nn.Module]) -> None:
    """Raise UserError on all processes if weights, or buffers of the first network, differ. Every process calls this.

    A checksum of their bits is compared. Equal gradients give equal weights, so a difference means that a
    process missed an update or a device computes wrongly: from then on the processes would train different models.

    Args:
        accelerator: Connects the processes.
        done: Number of updates made, for the message.
        networks: The networks to compare.
    """
    if accelerator.num_processes == 1:
        return
    parameters = [parameter.detach() for network in networks for parameter in network.parameters()]
    parameters += [buffer for buffer in networks[0].buffers() if buffer.dtype == torch.float32]
    sums = torch.stack([weight.contiguous().view(torch.int32).sum(dtype=torch.int64) for weight in parameters])
    # weighted, so that two exchanged weights change the checksum
    checksum = (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()
    everywhere = accelerator.gather(checksum[None]).tolist()
    others = [rank for rank, value in enumerate(everywhere) if value != everywhere[0]]
    if others:
        raise UserError(
            f"after step {done:,} the weights of process {', '.join(map(str, others))} differ from those of process 0: "
            "an update was missed, or a device computes wrongly. Check the machines; the last checkpoint was written "
            "by process 0, compare its validation with the ones before"
        )
