"""What a long job says on stderr while it works."""

import sys

from tqdm import tqdm


def progress_bar(what: str | None, total: int | None, unit: str, *, initial: int = 0, disable: bool = False) -> tqdm:
    """A progress bar named `what` over `total` units (None: unknown); in a file it grows by a line every 15 seconds."""
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
    """Names what begins now and takes seconds."""
    print(f"{what} ...", file=sys.stderr, flush=True)
