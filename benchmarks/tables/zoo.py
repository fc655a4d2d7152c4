"""The tables of docs/zoo.md."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.machine import where

COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "PSNR (dB) ↑": ("{:.2f}", lambda row: row["psnr"]),
    "SSIM ↑": ("{:.3f}", lambda row: row["ssim"]),
    "LPIPS ↓": ("{:.3f}", lambda row: row["lpips_vgg"]),
    "Fréchet (VGG16) ↓": ("{:.1f}", lambda row: row["frechet_vgg16"]),
    "midpoints ↓": ("{:.1f}", lambda row: row.get("midpoints")),
    "text ↑": ("{:.3f}", lambda row: row["text"]["ned_reconstruction"] if "text" in row else None),
    "effective rank": ("{:.2f}", lambda row: row.get("effective_rank")),
    "KL (nats per value)": ("{:.2f}", lambda row: row.get("kl_nats_per_dim")),
    "training (min)": ("{:.1f}", lambda row: row["processor_seconds"] / 60),
    "memory (GB)": ("{:.1f}", lambda row: row["peak_gb"]),
}


def zoo_table(result: dict[str, Any]) -> str:
    """A table for each size of the measured images: a row for each recipe, means and standard deviations of seeds."""
    lines = [f"Photographs of {result['held_out']}; {where(result)}."]
    for size in dict.fromkeys(row["measured"] for row in result["rows"].values()):
        rows = {recipe: row for recipe, row in result["rows"].items() if row["measured"] == size}
        columns = {
            name: column for name, column in COLUMNS.items() if any(_values(row, column[1]) for row in rows.values())
        }
        about = ["factor", "latent (bits per pixel)", "parameters (M)", "images seen", "seeds"]
        heads = [*about, "encode, decode (ms)", *columns]
        lines += ["", f"Measured on {'whole images' if size == 'whole' else f'images of {size}'}:", ""]
        lines += [f"| `latent-ae train` | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
        for recipe, row in rows.items():
            first = next(iter(row["seeds"].values()))
            cells = [f"{row['factor']}", f"{first['bits_per_pixel']:.3g}", f"{row['parameters'] / 1e6:.2f}"]
            cells += [f"{row['images']:,}", f"{len(row['seeds'])}", f"{row['encode_ms']:.0f}, {row['decode_ms']:.0f}"]
            cells += [_cell(_values(row, value), form) for form, value in columns.values()]
            lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _values(row: dict[str, Any], value: Callable[[dict[str, Any]], float | None]) -> list[float]:
    return [found for seed in row["seeds"].values() if (found := value(seed)) is not None]


def _cell(values: list[float], form: str) -> str:
    if not values:
        return "–"
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


MAKERS = {"zoo": zoo_table}
"""By the beginning of a result's name, the longer one first."""
