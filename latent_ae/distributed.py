"""Several processes as one: their device, results from one for all, and errors that end all of them together."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env, parse_flag_from_env

from latent_ae.config import UserError

Device = Literal["auto", "cpu", "cuda"]
PATIENCE = timedelta(hours=3)
"""Time for which processes wait for each other."""
PROCESS_COUNTS = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
"""Environment variables in which the launchers of accelerate, PyTorch and MPI state the number of processes."""
T = TypeVar("T")


def refuse_several_processes(command: str) -> None:
    """Raise UserError if several processes were launched for a command that runs on one."""
    launched = get_int_from_env(PROCESS_COUNTS, 1)
    if launched > 1:
        raise UserError(
            f"{command} runs on one process, and {launched} were launched; "
            f"start it without accelerate launch: latent-ae {command} ..."
        )


def processes(device: Device) -> tuple[PartialState, torch.device]:
    """Return the distributed state (of one process, if none were launched) and this process's device.

    Raises:
        UserError: If `device` is cuda and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but PyTorch sees no GPU here; set device=cpu")
    # PartialState alone overlooks that the launcher chose the CPU, and would take every process for the only one
    on_cpu = device == "cpu" or not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    # one process summarises while the others wait, which takes long for many images
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return state, torch.device("cpu") if on_cpu else state.device


def on_main(state: PartialState, work: Callable[[], T]) -> T:
    """Run `work` on the main process and return its result on every process.

    Raises:
        UserError: On every process, if `work` raises it.
    """
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [work()]
        except UserError as error:
            answer = [error]
    broadcast_object_list(answer)
    return _checked(answer)[0]


def together(work: Callable[[], T]) -> list[T]:
    """Run `work` on every process and return all results, in the order of the processes.

    Raises:
        UserError: On every process, if `work` raises it on one: a full disk on one machine must not leave the others
            waiting.
    """
    answer: Any
    try:
        answer = work()
    except UserError as error:
        answer = error
    return _checked(gather_object([answer]))


def _checked(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, UserError):
            raise answer
    return answers
