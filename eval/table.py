"""What a command shows on a terminal: a line for each figure, and below them what must not be overlooked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from latent_ae.text import printable

VALUE = 2
"""Which column stands right."""


class Row(NamedTuple):
    """A figure."""

    name: str
    value: str
    interval: str = ""
    of: str = ""
    """What it is a figure of where there are several: a kind of latent, a set of images, a path."""
    remark: str = ""


def aligned(rows: Sequence[Row], interval: str = "95 % interval") -> str:
    """The rows in columns; a column that all of them leave empty is left out, a name is said once. `interval` is what
    the intervals are."""
    cells = [["", "", "", interval, ""]] if any(row.interval for row in rows) else []
    for before, row in zip([None, *rows], rows, strict=False):
        repeated = before is not None and row.of and before.name == row.name
        cells.append(["" if repeated else row.name, row.of, row.value, row.interval, row.remark])
    cells = [[printable(text) for text in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        parts = [
            text.rjust(width) if position == VALUE else text.ljust(width)
            for position, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(part for part, width in zip(parts, widths, strict=True) if width).rstrip())
    return "\n".join(lines)


def to_look_at(findings: Iterable[Mapping[str, Any]], marks: Mapping[str, str]) -> list[str]:
    """A line for each finding that is not fine, under its mark."""
    return [f"{marks[one['state']]}: {one['name']}. {one['text']}" for one in findings if one["state"] != "fine"]
