"""Tables for a terminal: a line for each number, and below them important findings."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from latent_ae.text import printable

VALUE = 2
"""The column that is aligned right."""


class Row(NamedTuple):
    """A line of a table."""

    name: str
    value: str
    interval: str = ""
    of: str = ""
    """What was measured, if there are several: a kind of latent, a set of images, a path."""
    remark: str = ""


def aligned(rows: Sequence[Row], interval: str = "95 % interval") -> str:
    """Return rows in aligned columns. Columns without text are left out, and a repeated name is shown once.

    Args:
        rows: The rows.
        interval: Heading of the intervals.
    """
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
    """Return a line for each finding that is not fine, which begins with the mark of its state.

    Args:
        findings: Findings with `state`, `name` and `text`.
        marks: Words for each state.
    """
    return [f"{marks[one['state']]}: {one['name']}. {one['text']}" for one in findings if one["state"] != "fine"]
