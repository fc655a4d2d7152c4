"""The tables of docs/linear-start.md."""

from typing import Any

from benchmarks.machine import where


def fresh_table(result: dict[str, Any]) -> str:
    names = list(next(iter(result["shapes"].values())))
    lines = [
        f"{result['held_out_images']} held-out images of {result['data']}, 128 px; {where(result)}.",
        "",
        "| before training: PSNR, LPIPS | " + " | ".join(names) + " |",
        "|---" + "|---:" * len(names) + "|",
    ]
    for shape, row in result["shapes"].items():
        lines.append(f"| {shape} | " + " | ".join(f"{v['psnr']:.2f}, {v['lpips']:.3f}" for v in row.values()) + " |")
    return "\n".join(lines)


def widths_table(result: dict[str, Any]) -> str:
    """Held-out quality of the averaged weights, and PSNR of the weights themselves, after so many crops."""
    rows = result["rows"]
    due = sorted({int(point["crops"]) for points in rows.values() for point in points})
    lines = [
        f"`{result['base']}`; {result['held_out_images']} held-out crops of {result['data']}; {where(result)}.",
        "",
        f"| PSNR (of the weights, not averaged), LPIPS after so many crops | {' | '.join(f'{one:,}' for one in due)} |",
        "|---|" + "---:|" * len(due),
    ]
    for name, points in rows.items():
        cells = {int(p["crops"]): f"{p['psnr']:.2f} ({p['psnr_raw']:.2f}), {p['lpips']:.3f}" for p in points}
        lines.append(f"| {name} | {' | '.join(cells.get(one, '') for one in due)} |")
    return "\n".join(lines)


def starts_table(result: dict[str, Any]) -> str:
    """Held-out quality of the linear and the default start by images seen, and the search of the default's rate."""
    lines = [f"`{result['base']}`; {result['held_out_images']} held-out crops of {result['data']}; {where(result)}."]
    for length in result["lengths"]:
        seeds = len(length["curves"]["linear"])
        lines += [
            "",
            f"{length['steps']} steps, `{length['gan']}`"
            + (f"; means over {seeds} seeds, and the smallest and the largest:" if seeds > 1 else ":"),
            "",
            "| start | images | minutes | PSNR (dB) | LPIPS | Fréchet distance (VGG16) |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for start, curves in length["curves"].items():
            for of_seeds in zip(*curves.values(), strict=True):
                minutes = sum(point["minutes"] for point in of_seeds) / seeds
                cells = [start, f"{of_seeds[0]['images']:,.0f}", f"{minutes:.0f}"]
                for key, digits in (("psnr", 2), ("lpips_vgg", 3), ("frechet_vgg16", 1)):
                    values = [point[key] for point in of_seeds]
                    mean = f"{sum(values) / seeds:.{digits}f}"
                    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if seeds > 1 else ""
                    cells.append(mean + spread)
                lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"The default start at several learning rates, {result['search_steps']} steps without a GAN:",
        "",
        "| learning rate | PSNR (dB) | LPIPS | Fréchet distance (VGG16) |",
        "|---|---:|---:|---:|",
    ]
    for rate, points in result["search"].items():
        last = points[-1]
        lines.append(f"| {rate} | {last['psnr']:.2f} | {last['lpips_vgg']:.3f} | {last['frechet_vgg16']:.1f} |")
    return "\n".join(lines)


MAKERS = {
    "tried-fresh": fresh_table,
    "widths": widths_table,
    "starts": starts_table,
}
"""By the beginning of a result's name, the longer one first."""
