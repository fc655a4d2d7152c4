"""How a command that measures or encodes ends: its result on stdout, from one process."""

import json
from collections.abc import Callable
from typing import Any

from latent_ae.config import UserError


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2)


def print_result(
    compute: Callable[[], dict[str, Any]], batch_size: int, as_text: Callable[[dict[str, Any]], str] = as_json
) -> int:
    """Prints the result of `compute`, as the text that `as_text` makes of it, from the main process.

    Returns the exit code. Raises UserError when the device's memory is too small for `batch_size`.
    """
    import torch
    from accelerate import PartialState

    try:
        result = compute()
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"out of memory with batch_size {batch_size}: lower batch_size or the images' size ({first_line})"
        ) from error
    if PartialState().is_main_process:
        print(as_text(result))
    PartialState().destroy_process_group()
    return 0
