"""The tables of docs/export.md."""

from typing import Any

from benchmarks.machine import where


def tiling_table(result: dict[str, Any]) -> str:
    lines = [
        f"{where(result)}.",
        "",
        "| decoded | processor time (s) | memory (GB) | PSNR against whole (dB) | largest difference | mean at seams "
        "| mean elsewhere |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [f"{row['side_px']} px, {row['way']}", f"{row['cpu_s']:.1f}", f"{row['memory_gb']:.2f}"]
        for key, digits in (("psnr", 1), ("max_abs", 4), ("mean_abs_at_seams", 5), ("mean_abs_elsewhere", 5)):
            cells.append(f"{row[key]:.{digits}f}" if key in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {
    "tiling": tiling_table,
}
"""By the beginning of a result's name, the longer one first."""
