"""The tables of docs/performance.md."""

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
    "step": step_table,
    "loader": loader_table,
    "evaluate-memory": evaluate_memory_table,
    "evaluate": evaluate_table,
    "against": against_table,
}
"""By the beginning of a result's name, the longer one first."""
