"""The tables of docs/losses.md."""

from typing import Any

from benchmarks.machine import where


def gan_weight_table(result: dict[str, Any]) -> str:
    """Each contestant's held-out metrics, seed after seed."""
    columns = {"PSNR (dB)": ("psnr", 2), "LPIPS": ("lpips", 3), "Fréchet, VGG16": ("frechet_vgg16", 0)}
    lines = [
        f"{result['held_out_images']} held-out crops of {result['crop_px']} px of {result['data']}; "
        f"`{result['base']}`, {result['steps_of_each_part']} steps of {result['batch']} crops in each part; "
        f"{where(result)}.",
        "",
        f"| | {' | '.join(columns)} | adversarial gradient, relative | adaptive weight | accuracy |",
        "|---|" + "---:|" * (len(columns) + 3),
    ]
    first = {f"first part, {name}": runs for name, runs in result["first_part"].items()}
    for name, runs in [*first.items(), *((name, one["by_seed"]) for name, one in result["contestants"].items())]:
        each = [runs[seed] for seed in sorted(runs)]
        cells = [", ".join(f"{run[key]:.{digits}f}" for run in each) for key, digits in columns.values()]
        for key in ("mean_gradient_ratio", "mean_adaptive_weight", "mean_accuracy"):
            values = [run[key] for run in each if key in run]
            cells.append(f"{sum(values) / len(values):.2g}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_runs_table(result: dict[str, Any]) -> str:
    """Each row's figures, seed after seed."""
    columns = {"PSNR (dB)": ("psnr", 2), "SSIM": ("ssim", 3), "LPIPS": ("lpips_vgg", 3)}
    columns |= {"Fréchet, VGG16": ("frechet_vgg16", 1), "processor time (s)": ("processor_seconds", 0)}
    seeds = ", ".join(str(run["seed"]) for run in next(iter(result["rows"].values()))["runs"])
    lines = [
        f"50 photographs of {result['held_out']}, 256 px; seeds {seeds}; {where(result)}.",
        "",
        f"| | words | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for name, row in result["rows"].items():
        cells = [", ".join(f"{run[key]:.{digits}f}" for run in row["runs"]) for key, digits in columns.values()]
        lines.append(f"| {name} | {row['settings'] and '`' + row['settings'] + '`'} | {' | '.join(cells)} |")
    return "\n".join(lines)


MAKERS = {
    "gan-weight": gan_weight_table,
    "short-runs": short_runs_table,
}
"""By the beginning of a result's name, the longer one first."""
