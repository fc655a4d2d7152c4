"""The tables of docs/diffusion.md."""

import statistics
from typing import Any

from benchmarks.machine import where


def diffusion_table(result: dict[str, Any]) -> str:
    seeds = result["seeds"]
    each = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    lines = [
        f"{result['data']}, {result['first_stage_steps']} steps of {result['first_stage_batch']} for each first stage, "
        f"{result['recipe']['steps']:,} of {result['recipe']['batch_size']} for each diffusion model "
        f"({result['recipe']['parameters'] / 1e6:.1f} M parameters), {each}, {result['recipe']['samples']:,} samples; "
        f"{where(result)}.",
        "",
        "| first stage | PSNR (dB) | KL (nats per value) | reconstructions | held-out | samples | relative loss |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["first_stages"].items():
        cells = [
            "; ".join(f"{value:.1f} ({low:.1f} to {high:.1f})" for value, (low, high) in row["samples"]),
            "; ".join(f"{value:.3f}" for value in row["relative_loss"]),
        ]
        floors = f"{row['reconstructions']:.1f} | {row['held_out']:.1f}"
        lines.append(f"| {name} | {row['psnr']:.2f} | {row['kl']:.2f} | {floors} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ifid_table(result: dict[str, Any]) -> str:
    budget, seeds, rows = result["diffusion"], result["seeds"], result["first_stages"]
    figures, found = result["figures"], result["correlations"]
    lines = [
        f"{result['data']}, {result['first_stage_steps']} steps of {result['first_stage_batch']} for each first stage, "
        f"{budget['steps']:,} of {budget['batch_size']} for each diffusion model, seeds {', '.join(map(str, seeds))}, "
        f"{budget['samples']:,} samples; Fréchet distances in VGG16's features; {where(result)}.",
        "",
        f"| first stage | samples | {' | '.join(figures.values())} |",
        "|---" + "|---:" * (len(figures) + 1) + "|",
    ]
    # the best samples first
    for name, row in sorted(rows.items(), key=lambda item: statistics.mean(item[1]["samples"])):
        samples = "; ".join(f"{value:.1f}" for value in row["samples"])
        lines.append(f"| {name} | {samples} | {' | '.join(f'{row[key]:.3g}' for key in figures)} |")

    def rho(key: str) -> str:
        value = found.get(key, {}).get("rho")
        return "–" if value is None else f"{value:.2f} (p = {found[key]['p']:.2g})".replace("-", "−")

    cells = [rho("another seed"), *map(rho, figures)]
    return "\n".join([*lines, f"| **rank correlation with the samples** | {' | '.join(cells)} |"])


MAKERS = {
    "diffusion": diffusion_table,
    "ifid": ifid_table,
}
"""By the beginning of a result's name, the longer one first."""
