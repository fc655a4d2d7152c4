"""Progress of long jobs on stderr."""

import sys

from tqdm import tqdm


def progress_bar(what: str | None, total: int | None, unit: str, *, initial: int = 0, disable: bool = False) -> tqdm:
    """Return a progress bar on stderr; if stderr is not a terminal it prints a line every 15 seconds at most.

    Args:
        what: Name of the task; None shows none.
        total: Number of units; None if unknown.
        unit: Name of a unit.
        initial: Number of units that are done already.
        disable: Show nothing.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        unit=unit,
        disable=disable,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        dynamic_ncols=True,
        smoothing=0.1,
    )


def now(what: str) -> None:
    """Print the name of a task that begins now and takes seconds."""
    print(f"{what} ...", file=sys.stderr, flush=True)
