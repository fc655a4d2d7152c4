"""Several processes as one: their device, and mistakes that all of them end with together."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from latent_ae.config import UserError

Device = Literal["auto", "cpu", "cuda"]
PATIENCE = timedelta(hours=3)
T = TypeVar("T")


def processes(device: Device) -> tuple[PartialState, torch.device]:
    """The distributed state (of one process, when nothing launched several) and this process's device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but PyTorch sees no GPU here; set device=cpu")
    # PartialState alone overlooks the launcher's choice of the CPU, and would take every process for the only one
    on_cpu = device == "cpu" or not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    # one process sums up while the others wait, and may have to do so for many images
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return state, torch.device("cpu") if on_cpu else state.device


def on_main(state: PartialState, work: Callable[[], T]) -> T:
    """What `work` gives on the main process, on every process; so is a UserError that it raises there."""
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [work()]
        except UserError as error:
            answer = [error]
    broadcast_object_list(answer)
    return _checked(answer)[0]


def together(work: Callable[[], T]) -> list[T]:
    """What `work` gave on each process, in their order; the first UserError is raised on all of them.

    A full disk on one machine must not leave the others waiting.
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
