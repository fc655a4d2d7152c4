"""The tables of docs/performance.md."""

import statistics
from typing import Any

from benchmarks.machine import where


def step_table(result: dict[str, Any]) -> str:
    shape, peak, rows = result["shape"], result["matmul_peak_gflops"], result["contestants"]
    baseline = next(iter(rows))  # latent-diffusion's, where it was measured
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, {shape['side_px']} px, batch {shape['batch']}; "
        f"matrix-product peak {', '.join(f'{value:.0f} GFLOP/s {name}' for name, value in peak.items())}; "
        f"{result['machine']['cpu_capability']}, {where(result)}.",
        "",
        f"| | images/s | against ({baseline[0]}), fp32 | TFLOP | share of peak | memory (GB) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['images_per_second']:.3g} | {rows[baseline]['median_s'] / row['median_s']:.2f}x "
            f"| {row['tflop']:.2f} | {row['share_of_matmul_peak']:.0%} | {row['peak_memory_gb']:.1f} |"
        )
    return "\n".join(lines)


def loader_table(result: dict[str, Any]) -> str:
    lines = [f"{where(result)}.", "", "| source | images/s | images per processor second |", "|---|---:|---:|"]
    busy = result["images_per_processor_second"]
    rates = result["images_per_second"].items()
    return "\n".join(lines + [f"| {name} | {rate:.0f} | {busy[name]:.0f} |" for name, rate in rates])


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


def evaluate_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['images']} images of 256 px ({result['fid_images']} in the FID part), {result['rounds']} round(s), "
        f"{result['parameters'] / 1e6:.1f} M parameters; {where(result)}.",
        "",
        "| | images/s, best round | images per processor second | speed-up by the clock | of the pass "
        "| by processor time | peak memory (GB) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["contestants"].items():
        lines.append(
            f"| {name} | {row['images_per_second']:.2f} | {row['images_per_cpu_second']:.2f} "
            f"| {row['speedup']:.2f}x | {row['speedup_of_pass']:.2f}x | {row['speedup_by_cpu_time']:.2f}x "
            f"| {row['peak_memory_gb']:.1f} |"
        )
    return "\n".join(lines)


def evaluate_memory_table(result: dict[str, Any]) -> str:
    lines = [f"{where(result)}.", "", "| | images | peak memory (GB) |", "|---|---:|---:|"]
    return "\n".join(
        lines + [f"| {row['part']} | {row['images']:,} | {row['peak_memory_gb']:.2f} |" for row in result["runs"]]
    )


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


def against_table(result: dict[str, Any]) -> str:
    """Other programs and ours after the same time, and whether ours has their quality in a part of it."""
    lines = [
        f"{result['tiles']:,} tiles of {result['tile_px']} px of {result['data']}; {result['held_out_images']} crops "
        f"of {result['crop_px']} px of {result['held_out']}; {result['minutes']:g} minutes for each rival; "
        f"{where(result)}.",
        "",
        "| | steps | images/s | memory (GB) | processor seconds to the first step | PSNR (dB) | SSIM | LPIPS "
        "| by torchmetrics and lpips |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = sorted(result["entries"].items(), key=lambda item: item[0].rpartition(", ")[2])
    for name, row in rows:
        if "failed" in row:
            lines.append(f"| {name} | failed |" + " |" * 7)
            continue
        own, other = row["latent_ae"], row["independent"]
        cells = [str(row["steps"]), "", "", ""]
        if row["steps"]:
            cells[1:3] = [f"{row['images_per_processor_second']:.2f}", f"{row['peak_memory_gb']:.1f}"]
            cells[3] = f"{row['processor_seconds_to_first_step']:.0f}"
        cells += [f"{own['psnr']:.2f}", f"{own['ssim']:.3f}"]
        cells += [f"{own['lpips']:.3f}", f"{other['psnr']:.2f}, {other['ssim']:.3f}, {other['lpips']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| target | at least as good as | PSNR | LPIPS |", "|---|---|---|---|"]
    for row in result["target"]:
        better = row["at_least_as_good"]["latent_ae"]
        cells = ["yes" if better[key] else "no" for key in ("psnr", "lpips")]
        lines.append(f"| {row['ours']} | {row['rival']} | {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {
    "tried-cost": cost_table,
    "tried": tried_table,
    "step": step_table,
    "loader": loader_table,
    "time-to-quality": quality_table,
    "evaluate-memory": evaluate_memory_table,
    "evaluate": evaluate_table,
    "bf16-posterior": posterior_table,
    "adam-eps": eps_table,
    "against": against_table,
}
"""By the beginning of a result's name, the longer one first."""
