"""Rewrites the tables in docs/ from benchmarks/results.

python -m benchmarks.tables
"""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
NAMES = (
    "performance",
    "losses",
    "multi-gpu",
    "linear-start",
    "encode",
    "export",
    "diffusion",
    "family",
    "data",
    "recipes",
    "cost",
)
PAGES = [DOCS / f"{name}.md" for name in NAMES]


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


def render(page: str) -> str:
    """The page with each `<!-- table: NAME -->` ... `<!-- end -->` filled from results/NAME.json."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        kind: Callable[[dict[str, Any]], str] = next(make for key, make in MAKERS.items() if name.startswith(key))
        return f"<!-- table: {name} -->\n{kind(result)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


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


def processes_table(result: dict[str, Any]) -> str:
    lines = [f"{where(result)}.", "", "| | s per update |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {seconds:.2f} |" for name, seconds in result["seconds_per_update"].items()])


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


def encode_table(result: dict[str, Any]) -> str:
    rates = result["latents_per_second"]
    lines = [
        f"{where(result)}.",
        "",
        "| | images/s, best round | images per processor second | bytes per image | PSNR of reconstructions (dB) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in result["writing"].values():
        for who, precision in (("plain loop", "fp32"), ("ours", "fp16")):
            lines.append(
                f"| {row['images']} images of {row['side_px']} px, {who} | {row[who]['images_per_second']:.1f} "
                f"| {row[who]['images_per_cpu_second']:.1f} "
                f"| {row[who]['bytes_per_image']:,} | {row['psnr'][precision]:.4f} |"
            )
    lines += ["", "| read in batches of 256 | latents/s |", "|---|---:|"]
    return "\n".join(lines + [f"| {name} | {rate:,} |" for name, rate in rates.items()])


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


def family_table(result: dict[str, Any]) -> str:
    kinds = ("CIFAR-10, 20,000 images to train on", "BSDS500's 200 photographs to train on")
    parts: dict[int, dict[str, Any]] = {0: {}, 1: {}}
    for name, row in result["members"].items():
        parts[int(row["photos"])][name] = row
    lines = [f"`{result['recipe']}`; {where(result)}."]
    for number, members in parts.items():
        if not members:
            continue
        size, images = result["sizes"][number], next(iter(members.values()))["images"]
        lines += [
            "",
            f"{kinds[number]}, {result['steps']} steps of {size['batch']} at {size['px']} px; {images:,} held out:",
            "",
            "| | parameters (M) | latent | PSNR (dB) | SSIM | LPIPS (VGG) | Fréchet (VGG16) | training, images per "
            "processor second | decoding |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in members.items():
            found, speed = row["metrics"]["mode"], row["speed"]
            cells = [name, f"{row['parameters'] / 1e6:.2f}", " x ".join(map(str, row["latent_shape"]))]
            cells += [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['lpips_vgg']:.3f}"]
            cells += [f"{found['frechet_vgg16']:.1f}", f"{speed['training']:.0f}", f"{speed['decoding']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    for name, row in result["members"].items():
        if (codes := row.get("codebook")) is not None:
            lines += [
                "",
                f"{name}: the held-out images use {codes['used']:,} of {codes['codes']:,} codes, perplexity "
                f"{codes['perplexity']:.0f}.",
            ]
    lines += [
        "",
        "| beside the AutoencoderKL's scaled latents (variance {:.2f}) | squared distance of its own "
        "| PSNR of its images of them (dB) | LPIPS (VGG) |",
        "|---|---:|---:|---:|",
    ]
    for name, row in result["members"].items():
        if (found := row.get("beside_the_teacher")) is not None:
            lines[-2] = lines[-2].format(found["teacher_latent_variance"])
            lines.append(f"| {name} | {found['latent_mse']:.3f} | {found['psnr']:.2f} | {found['lpips_vgg']:.3f} |")
    return "\n".join(lines)


def likelihood_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['data']}, {result['steps']} steps of {result['batch_size']}, {result['images']} test images, "
        f"{result['samples']} samples; 95 % intervals over the images; {where(result)}.",
        "",
        "| | bits per dimension | ELBO | distortion | rate | nats per latent number | scale | PSNR (dB) "
        "| processor time (s) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["runs"].items():
        bits = {key: values["bits_per_dimension"] for key, values in row["metrics"].items()}
        low, high = bits["importance_bound"]["interval"]
        cells = [f"{bits['importance_bound']['mean']:.3f} ({low:.2f} to {high:.2f})"]
        cells += [f"{bits[key]['mean']:.3f}" for key in ("elbo", "distortion", "rate")]
        cells.append(f"{row['metrics']['rate']['nats_per_image']['mean'] / row['latent_dimensions']:.2f}")
        scale = row["likelihood"]["scale"]
        cells += ["" if scale is None else f"{scale:.3f}", f"{row['psnr']:.2f}", f"{row['processor_seconds']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def hierarchical_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['data']}; steps of {result['batch']} images; {where(result)}.",
        "",
        "| steps | latents | parameters | processor time (s) | bits per dimension | reconstruction | KL by level |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for row in result["contestants"]:
        levels = ", ".join(
            f"{side} px: {part:.3f}" for side, part in zip(row["level_sides"], row["levels"], strict=True)
        )
        low, high = row["bits"]["interval"]
        bits = f"{row['bits']['mean']:.3f} ({low:.3f} to {high:.3f})"
        seconds = row["processor_seconds"]
        cells = [f"{row['steps']:,}", row["name"], f"{row['parameters']:,}", f"{seconds:.0f}", bits]
        lines.append(f"| {' | '.join(cells)} | {row['reconstruction']:.3f} | {levels} |")
    return "\n".join(lines)


def priors_table(result: dict[str, Any]) -> str:
    recipe = result["priors"]["flow matching"]["recipe"]
    gained, count = result["gained_by_the_flow"], next(iter(result["priors"].values()))["metrics"]["samples"]["n"]
    lines = [
        f"{result['data']}, {result['steps']} steps of {result['batch']} for each first stage; the flow prior has "
        f"{recipe['parameters'] / 1e6:.1f} M parameters and {recipe['steps']:,} steps of {recipe['batch_size']}; "
        f"{where(result)}.",
        "",
        f"| Fréchet distance to images trained on, VGG16's features, {count:,} images | |",
        "|---|---:|",
    ]
    for name, row in result["priors"].items():
        value, (low, high) = (row[key]["samples"]["frechet_vgg16"] for key in ("metrics", "intervals"))
        lines.append(f"| samples, {name} | {value:.1f} ({low:.1f} to {high:.1f}) |")
    metrics = next(iter(result["priors"].values()))["metrics"]
    lines += [
        f"| reconstructions of held-out images | {metrics['reconstructions']['frechet_vgg16']:.1f} |",
        f"| held-out images | {metrics['held_out']['frechet_vgg16']:.1f} |",
        "",
        f"| bits per dimension of {result['held_out_images']} held-out images | parameters | ELBO | of it the rate "
        f"| bound of {result['draws']} draws |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["bits_per_dimension"].items():
        cells = [f"{row[key][0]:.3f}" for key in ("elbo", "rate", "importance_bound")]
        lines.append(f"| {name.replace('-', ' ')} | {result['parameters'][name]:,} | {' | '.join(cells)} |")
    cells = [
        f"{value:+.3f} ({low:+.3f} to {high:+.3f})" for value, low, high in (gained["elbo"], gained["importance_bound"])
    ]
    lines.append(f"| saved by the flow, 95 % interval over the images | | {cells[0]} | | {cells[1]} |")
    return "\n".join(lines)


def disentangle_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['data']}; {result['steps']} steps of {result['batch_size']}; {where(result)}.",
        "",
        "| | MIG of samples, mean | each seed | MIG of means | active | PSNR (dB) | reconstruction (nats) | KL (nats) "
        "| total correlation (nats): Gaussian, discriminator |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["rows"].items():
        runs = row["runs"]

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        def each(values: Sequence[float], digits: int) -> str:
            return "; ".join(f"{value:.{digits}f}" for value in values)

        samples = [run["mig"]["sample"] for run in runs]
        estimates = [run["total_correlation"] for run in runs if run["total_correlation"] is not None]
        total = f"{mean([run['gaussian_total_correlation'] for run in runs]):.2f}"
        cells = [
            f"**{mean(samples):.3f}**",
            each(samples, 3),
            each([run["mig"]["mean"] for run in runs], 3),
            each([run["active_dimensions"] for run in runs], 0),
            f"{mean([run['psnr'] for run in runs]):.2f}",
            f"{mean([run['reconstruction_nats'] for run in runs]):.1f}",
            f"{mean([run['kl_nats'] for run in runs]):.2f}",
            f"{total}, {mean(estimates):.2f}" if estimates else total,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def collapse_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['data']}, {result['steps']} steps of {result['batch_size']}; {result['images']} held-out images; "
        f"{where(result)}.",
        "",
        "| cure | settings | bits per dimension | KL (nats per image) | active channels at the end | PSNR (dB) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, row in result["runs"].items():
        bits, rate = row["bits_per_dimension"], row["rate_nats_per_image"]
        settings = ", ".join(f"`{word}`" for word in row["settings"])
        (low, high), active = bits["interval"], row["active_channels"][-1][1]
        lines.append(
            f"| {name} | {settings} | {bits['mean']:.3f} ({low:.3f} to {high:.3f}) | {rate['mean']:.2f} "
            f"| {active:.0%} | {row['psnr']:.2f} |"
        )
    return "\n".join(lines)


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


def buckets_table(result: dict[str, Any]) -> str:
    """What crops of one size and of several make of a first stage, measured at one size."""
    side = result["crop_px"]
    framings = {
        "cut_from_the_whole": f"{side} px cut from the whole",
        "resized_first": f"resized to {side} px",
    }
    lines = [
        f"`{result['base']}`, seed 0 alone; {where(result)}.",
        "",
        f"| crops | pixels (M) | {' | '.join(framings.values())} |",
        "|---|---:|" + "---:|" * len(framings),
    ]
    for name, run in result["runs"].items():
        cells = [f"{run[key]['psnr']:.2f} dB, LPIPS {run[key]['lpips_vgg']:.3f}" for key in framings]
        lines.append(f"| {name} | {run['pixels'] / 1e6:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}; "
        f"`{result['command']}`"
    )


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


def step_memory_table(result: dict[str, Any]) -> str:
    """Computed memory of a training step beside what a process took."""
    lines = [f"{where(result)}.", "", "| | computed (MB) | measured (MB) | ratio |", "|---|---:|---:|---:|"]
    return "\n".join(
        lines
        + [
            f"| {name} | {row['computed_mb']:,.0f} | {row['measured_mb']:,.0f} | {row['computed_over_measured']:.2f} |"
            for name, row in result["rows"].items()
        ]
    )


def recipes_table(result: dict[str, Any]) -> str:
    """The full-size recipes, a row for each of their phases."""
    lines = [
        f"| recipe, phase | shape | px | steps | batch | memory (GB), images | most images in {result['gpu_gb']} GB "
        "| TFLOP a step | published | measured with |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in result["rows"]:
        name, phase = row["recipe"], row["phase"]
        last = [other for other in result["rows"] if other["recipe"] == name][-1]
        target, how = result["targets"].get(name, ("", "")) if row is last else ("", "")
        lines.append(
            f"| `{name}`{f', {phase}' if phase else ''} "
            f"| f{row['factor']}, {row['latent_channels']} channels, {row['parameters'] / 1e6:.0f} M "
            f"| {row['resolution']} | {row['steps']:,} | {row['batch_size']} "
            f"| {row['peak_gb']:.1f}, {row['micro_batch']} in {row['precision']} | {row['largest_micro_batch']} "
            f"| {row['tflops_per_image'] * row['batch_size']:,.0f} | {target} "
            f"| {f'`{how}`' if how.startswith('protocol') else how} |"
        )
    return "\n".join(lines)


def cost_model_table(result: dict[str, Any]) -> str:
    """Modelled against measured time and memory of a step, by resolution, batch, width and processes."""
    rates = result["rates"]
    lines = [
        f"`{result['base']}`, on crops of 64 px, batch 4, width 32 where nothing else is said; {where(result)}. "
        f"Fitted: A {rates['gflops']:.0f} GFLOP/s, B {rates['activations_gb_per_s']:.2f} GB/s, "
        f"C {rates['weights_gb_per_s']:.2f} GB/s, and {rates['memory_of_process_mb']:.0f} MB that a process takes for "
        "itself.",
        "",
        "| | measured (s) | modelled (s) | error | measured (MB) | modelled (MB) | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["points"].items():
        late = row["modelled_s"] / row["measured_s"] - 1
        memory = row["computed_mb"] + rates["memory_of_process_mb"]
        lines.append(
            f"| {name} | {row['measured_s']:.2f} | {row['modelled_s']:.2f} | {late:+.0%} | {row['measured_mb']:,.0f} "
            f"| {memory:,.0f} | {memory / row['measured_mb'] - 1:+.0%} |"
        )
    for count, row in result["processes"].items():
        name = f"processes {count}, batch {result['process_batch']}"
        late = row["modelled_s"] / row["measured_s"] - 1
        lines.append(f"| {name} | {row['measured_s']:.2f} | {row['modelled_s']:.2f} | {late:+.0%} | | | |")
    return "\n".join(lines)


def cost_gpus_table(result: dict[str, Any]) -> str:
    """What the cost model says of many GPUs."""
    lines = [
        f"`{result['recipe']}` on {result['gpu'].upper()}s, computed and not measured: {result['utilisation']:.0%} of "
        f"the peak, {result['nvlink'] / 1e9:.0f} GB/s within a machine of {result['node']} GPUs and "
        f"{result['network'] / 1e9:.0f} GB/s between machines for each GPU, checkpoints written at "
        f"{result['disk'] / 1e9:.0f} GB/s, {result['loader_per_core']:.0f} images/s for each core of the loader; "
        f"`{result['command']}`.",
        "",
        "| GPUs | batch, images per GPU | compute (ms) | sum of gradients (ms), not hidden | checkpoints (ms) "
        "| images/s | loader cores per GPU |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for count, row in result["rows"].items():
        lines.append(
            f"| {int(count):,} | {row['batch']:,}, {row['images_per_gpu']} | {row['compute_ms']:.0f} "
            f"| {row['all_reduce_ms']:.1f}, {row['waiting_ms']:.1f} | {row['checkpoint_ms']:.1f} "
            f"| {row['images_per_second']:,.0f} | {row['loader_cores_per_gpu']:.2f} |"
        )
    return "\n".join(lines)


def starts_table(result: dict[str, Any]) -> str:
    """Held-out quality of the linear and the default start by images seen, and the search of the default's rate."""
    lines = [
        f"`{result['base']}`, {result['steps']} steps, `{result['gan']}`; {result['held_out_images']} held-out crops "
        f"of {result['data']}; {where(result)}.",
        "",
        "| start, seed | images | PSNR (dB) | LPIPS | Fréchet distance (VGG16) |",
        "|---|---:|---:|---:|---:|",
    ]
    curves = {f"{start}, {seed}": points for start, of in result["curves"].items() for seed, points in of.items()}
    curves |= {f"default at {rate}, no GAN": points[-1:] for rate, points in result["search"].items()}
    for name, points in curves.items():
        for point in points:
            lines.append(
                f"| {name} | {point['images']:,.0f} | {point['psnr']:.2f} | {point['lpips_vgg']:.3f} "
                f"| {point['frechet_vgg16']:.1f} |"
            )
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
        cells = [str(row["steps"]), f"{row['images_per_processor_second']:.2f}", f"{row['peak_memory_gb']:.1f}"]
        cells += [f"{row['processor_seconds_to_first_step']:.0f}", f"{own['psnr']:.2f}", f"{own['ssim']:.3f}"]
        cells += [f"{own['lpips']:.3f}", f"{other['psnr']:.2f}, {other['ssim']:.3f}, {other['lpips']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| target | at least as good as | PSNR | LPIPS |", "|---|---|---|---|"]
    for row in result["target"]:
        better = row["at_least_as_good"]["latent_ae"]
        cells = ["yes" if better[key] else "no" for key in ("psnr", "lpips")]
        lines.append(f"| {row['ours']} | {row['rival']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# by the beginning of a result's name, the longer one first
MAKERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tried-fresh": fresh_table,
    "tried-cost": cost_table,
    "tried": tried_table,
    "widths": widths_table,
    "step-memory": step_memory_table,
    "step": step_table,
    "loader": loader_table,
    "time-to-quality": quality_table,
    "processes": processes_table,
    "diffusion": diffusion_table,
    "ifid": ifid_table,
    "likelihood": likelihood_table,
    "evaluate-memory": evaluate_memory_table,  # before the other, whose name it begins with
    "evaluate": evaluate_table,
    "encode": encode_table,
    "tiling": tiling_table,
    "family": family_table,
    "hierarchical": hierarchical_table,
    "priors": priors_table,
    "disentangle": disentangle_table,
    "collapse": collapse_table,
    "bf16-posterior": posterior_table,
    "adam-eps": eps_table,
    "gan-weight": gan_weight_table,
    "buckets": buckets_table,
    "recipes": recipes_table,
    "cost-model": cost_model_table,
    "cost-gpus": cost_gpus_table,
    "starts": starts_table,
    "against": against_table,
}


if __name__ == "__main__":
    main()
