"""The tables of docs/experiments.md."""

import statistics
from typing import Any

from benchmarks.machine import where


def quality_table(result: dict[str, Any]) -> str:
    bicubic, seeds = result["bicubic"], list(next(iter(result["curves"].values())))
    points = range(len(next(iter(result["curves"].values()))[seeds[0]]))
    lines = [
        f"{result['held_out_images']} held-out crops of {result['held_out_px']} px of {result['data']}; trained on "
        f"crops of {result['crop_px']} px, batch {result['batch']}, seeds {', '.join(seeds)}; bicubic /4: "
        f"{bicubic['psnr']:.2f} dB, LPIPS {bicubic['lpips']:.3f}; {where(result)}.",
        "",
        f"| PSNR, LPIPS, means over the seeds | {' | '.join(f'{point}/{points[-1]}' for point in points)} "
        "| end, raw weights | end, LPIPS of each seed |",
        "|---" + "|---:" * (len(points) + 2) + "|",
    ]
    for name, runs in result["curves"].items():

        def over_seeds(point: int, key: str, digits: int, runs: dict[str, Any] = runs) -> str:
            return f"{statistics.mean(curve[point][key] for curve in runs.values()):.{digits}f}"

        cells = [f"{over_seeds(point, 'psnr', 2)}, {over_seeds(point, 'lpips', 3)}" for point in points]
        cells.append(f"{over_seeds(-1, 'psnr_raw', 2)}, {over_seeds(-1, 'lpips_raw', 3)}")
        cells.append("; ".join(f"{curve[-1]['lpips']:.3f}" for curve in runs.values()))
        used = f"{over_seeds(-1, 'seconds', 0)} s, {over_seeds(-1, 'images', 0)} crops"
        lines.append(f"| {name} ({used}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def tried_table(result: dict[str, Any]) -> str:
    rows = result["curves"]
    counts = [point["images"] for point in next(iter(rows.values()))["points"]]
    bicubic = ", ".join(f"/{n} {v['psnr']:.2f} dB, {v['lpips']:.3f}" for n, v in result["bicubic"].items())
    lines = [
        f"`{result['base']}`; {result['held_out_images']} held-out images of {result['data']} (bicubic {bicubic}); "
        f"{where(result)}.",
        "",
        "| PSNR, LPIPS after so many crops | " + " | ".join(f"{count:,.0f}" for count in counts) + " |",
        "|---" + "|---:" * len(counts) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{point['psnr']:.2f}, {point['lpips']:.3f}" for point in row["points"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(result: dict[str, Any]) -> str:
    lines = [f"{where(result)}.", "", "| | s per update |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {row['median_s']:.3f} |" for name, row in result["contestants"].items()])


def posterior_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['images']} crops of {result['crop_px']} px of {result['held_out']}; {where(result)}.",
        "",
        f"| under autocast | {' | '.join(str(number) for number in range(len(result['std'])))} | decoder's entry |",
        "|---|" + "---:|" * (len(result["std"]) + 1),
    ]
    for name, errors in result["mean"].items():
        entered = result["entered"].get(name)
        cells = [*(f"{error:.2f}" for error in errors), "" if entered is None else f"{entered:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def eps_table(result: dict[str, Any]) -> str:
    every = list(result["eps"])
    lines = [
        f"{result['held_out_images']} held-out crops of {result['data']}; `quickstart {' '.join(result['settings'])}`, "
        f"seeds {', '.join(str(run['seed']) for run in result['eps'][every[0]])}; {where(result)}.",
        "",
        f"| eps | {' | '.join(f'below 10 x {eps}' for eps in every)} | an unused channel's step | PSNR (dB) | LPIPS "
        "| `grad_norm` | steps clipped |",
        "|---|" + "---:|" * (len(every) + 5),
    ]
    for eps, runs in result["eps"].items():
        shares = [", ".join(f"{net[other]:.3%}" for net in runs[0]["share_below"].values()) for other in every]
        low = min(run["grad_norm"][0] for run in runs)
        high = max(run["grad_norm"][1] for run in runs)
        cells = [
            *shares,
            f"{runs[0]['unused_channel']['step_over_lr']:.3f} lr",
            ", ".join(f"{run['psnr']:.2f}" for run in runs),
            ", ".join(f"{run['lpips']:.3f}" for run in runs),
            f"{low:.0f} to {high:.0f}",
            f"{sum(run['clipped'] for run in runs) / len(runs):.0%}",
        ]
        lines.append(f"| {eps} | {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {
    "tried-cost": cost_table,
    "tried": tried_table,
    "time-to-quality": quality_table,
    "bf16-posterior": posterior_table,
    "adam-eps": eps_table,
}
"""By the beginning of a result's name, the longer one first."""
