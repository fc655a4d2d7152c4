"""The tables of docs/multi-gpu.md."""

from typing import Any

from benchmarks.machine import where


def processes_table(result: dict[str, Any]) -> str:
    lines = [f"{where(result)}.", "", "| | s per update |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {seconds:.2f} |" for name, seconds in result["seconds_per_update"].items()])


MAKERS = {
    "processes": processes_table,
}
"""By the beginning of a result's name, the longer one first."""
