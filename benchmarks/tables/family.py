"""The tables of docs/family.md."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.machine import where
from benchmarks.tables import half_width


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


def deep_vae_table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['data']}; bits per dimension are the bound of {result['samples']} samples; {where(result)}.",
        "",
        "| | parameters | steps of 16 | skipped | processor time (s) | held out | bits per dimension | ELBO "
        "| reconstruction | KL by level |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        low, high = row["bits"]["interval"]
        cells = [row["name"], f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['skipped']:,}"]
        cells += [f"{row['processor_seconds']:,.0f}", f"{row['held_out']:,}"]
        cells += [
            f"{row['bits']['mean']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['elbo']:.3f}",
            f"{row['reconstruction']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {', '.join(f'{level:.2f}' for level in row['levels'])} |")
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


def flow_decoder_table(result: dict[str, Any]) -> str:
    """Figures of each decoder with their intervals, by its steps from noise."""
    columns = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3), "lpips_vgg": ("LPIPS", 3)}
    columns["frechet_vgg16"] = ("Fréchet distance (VGG16)", 1)
    lines = [
        f"First stage: `quickstart {result['first']}`; {result['data']}, `{result['evaluation']}`, 95 % intervals; "
        f"{where(result)}.",
        "",
        f"| decoder | parameters | processor seconds | steps from noise "
        f"| {' | '.join(title for title, _ in columns.values())} |",
        f"|---|---:|---:|---:|{'---:|' * len(columns)}",
    ]
    for name, row in result["rows"].items():
        for steps, figures in row["figures"].items():
            cells = []
            for key, (_, digits) in columns.items():
                value, interval = figures[key]
                spread = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
                cells.append(f"{value:.{digits}f}{spread}")
            lines.append(
                f"| {name} | {row['decoder_parameters']:,} | {row['processor_seconds']:,.0f} | {steps or '–'} "
                f"| {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def disentangle64_table(result: dict[str, Any]) -> str:
    """Scores by method and start, each also less that of beta 1, and of beta 4, from the same start and seed."""
    columns = {
        "MIG of samples": (lambda run: run["mig"]["sample"], 3),
        "MIG of means": (lambda run: run["mig"]["mean"], 3),
        "FactorVAE score": (lambda run: run["factor_vae_score"], 3),
        "DCI disentanglement": (lambda run: run["dci"]["disentanglement"], 3),
        "active": (lambda run: run["active_dimensions"], 1),
        "PSNR (dB)": (lambda run: run["psnr"], 2),
        "KL (nats)": (lambda run: run["kl_nats"], 2),
        "total correlation (nats)": (lambda run: run["gaussian_total_correlation"], 2),
    }
    seeds = max(len(row["runs"]) for row in result["rows"].values())
    lines = [
        f"{result['data']}; {result['steps']} steps of {result['batch_size']}; means over {seeds} seeds, with the "
        f"standard deviation between seeds; {where(result)}.",
        "",
        f"| | seeds | {' | '.join(columns)} |",
        f"|---|---:|{'---:|' * len(columns)}",
    ]
    for name, row in result["rows"].items():
        cells = [
            f"{mean_of(row['runs'], of):.{digits}f}{spread_of(row['runs'], of, digits)}"
            for of, digits in columns.values()
        ]
        lines.append(f"| {name} | {len(row['runs'])} | {' | '.join(cells)} |")
    compared = [*list(columns)[:4], "PSNR (dB)"]
    for method in ("beta 1", "beta 4"):
        lines += [
            "",
            f"Less that of {method} from the same start and seed, with the 95 % interval of the mean (t distribution):",
            "",
            f"| | {' | '.join(compared)} |",
            f"|---|{'---:|' * len(compared)}",
        ]
        for name, row in result["rows"].items():
            start = name.split(", ")[1]
            base = {run["seed"]: run for run in result["rows"].get(f"{method}, {start}", {"runs": []})["runs"]}
            pairs = [(run, base[run["seed"]]) for run in row["runs"] if run["seed"] in base]
            if name.startswith(f"{method},") or len(pairs) < 2:
                continue
            cells = []
            for column in compared:
                of = columns[column][0]
                gained = [of(run) - of(other) for run, other in pairs]
                half = half_width(gained)
                cells.append(f"{mean(gained):+.3f} ({mean(gained) - half:+.3f} to {mean(gained) + half:+.3f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(runs: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> float:
    return mean(of(run) for run in runs)


def spread_of(runs: Sequence[dict[str, Any]], of: Callable[[dict[str, Any]], float], digits: int) -> str:
    """The standard deviation between runs, as text; empty for one run."""
    return f" ± {stdev(of(run) for run in runs):.{digits}f}" if len(runs) > 1 else ""


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


def discrete_table(result: dict[str, Any]) -> str:
    lines = [
        f"BSDS500's 200 photographs to train on, {result['steps']} steps of {result['batch']} crops of {result['px']} "
        f"px, {result['images']} held out; seed {result['seed']}; {where(result)}.",
        "",
        "| | settings | parameters (M) | PSNR (dB) | SSIM | LPIPS (VGG) | codes used | perplexity "
        "| KL (nats per position) | processor time (s) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["contestants"].items():
        found, rate = row["metrics"], row["kl_per_position"]
        cells = [name, f"`{' '.join(row['settings'])}`", f"{row['parameters'] / 1e6:.2f}"]
        cells += [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['lpips_vgg']:.3f}"]
        cells += [f"{row['used']:,} of {row['codes']:,}", f"{row['perplexity']:.0f}"]
        cells += ["" if rate is None else f"{rate:.2f}", f"{row['processor_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def semi_supervised_table(result: dict[str, Any]) -> str:
    steps = ", ".join(f"{result['steps'][name]:,} steps on {name}" for name in result["rows"])
    lines = [f"{steps}; accuracy on the test images in percent, mean over draws of the labels; {where(result)}."]
    names = list(next(iter(next(iter(result["rows"].values())).values()))["mean"])
    lines += ["", f"| | labels per class | draws | {' | '.join(names)} |", "|---|---:|---:|" + "---:|" * len(names)]
    for data, by_labels in result["rows"].items():
        for labels, row in by_labels.items():
            cells = [
                " to ".join(dict.fromkeys((f"{100 * min(found):.1f}", f"{100 * max(found):.1f}")))
                for found in ([one["accuracy"][name] for one in row["draws"]] for name in names)
            ]
            means = [f"{100 * row['mean'][name]:.1f}" for name in names]
            both = [mean if mean == cell else f"{mean} ({cell})" for mean, cell in zip(means, cells, strict=True)]
            lines.append(f"| {data} | {labels} | {len(row['draws'])} | {' | '.join(both)} |")
    return "\n".join(lines)


def vqvae2_table(result: dict[str, Any]) -> str:
    def of(values: list[float], digits: int) -> str:
        return f"{values[0]:.{digits}f} ({values[1]:.{digits}f} to {values[2]:.{digits}f})"

    rows = result["contestants"]
    lines = [
        f"{result['data']}, {result['steps']} steps of {result['batch']} for each first stage, {result['prior_steps']} "
        f"steps of 32 for each transformer; 1,000 held-out images, {result['samples']} samples of each prior; seed "
        f"{result['seed']}; 95 % intervals over the images; {where(result)}.",
        "",
        f"| | {' | '.join(rows)} |",
        "|---|---:|---:|",
    ]

    def line(heading: str, cells: list[str]) -> None:
        lines.append(f"| {heading} | {' | '.join(cells)} |")

    every = list(rows.values())
    line("parameters (M)", [f"{row['parameters'] / 1e6:.2f}" for row in every])
    line("codes of an image", [" + ".join(f"{side} x {side}" for side in row["sides"]) for row in every])
    line("number of codes of each level", [f"{row['codes']:,}" for row in every])
    line("used by held-out images", [" and ".join(f"{one:,}" for one in row["used"]) for row in every])
    line("their perplexity", [" and ".join(f"{one:.0f}" for one in row["perplexity"]) for row in every])
    line("PSNR (dB)", [f"{row['metrics']['psnr']:.2f}" for row in every])
    line("SSIM", [f"{row['metrics']['ssim']:.3f}" for row in every])
    line("bits per code, transformer", [of(row["rate"]["bits_per_code"], 2) for row in every])
    line("bits per dimension of the codes, transformer", [of(row["rate"]["bits_per_dimension"], 4) for row in every])
    line("its loss over that of independent codes", [f"{row['transformer']['relative_loss']:.3f}" for row in every])
    headings = {
        "samples": "samples, transformer over codes",
        "gaussian": "samples, Gaussian of the latents",
        "reconstructions": "reconstructions of held-out images",
        "held_out": "held-out images",
    }
    for kind, heading in headings.items():
        line(f"Fréchet (VGG16) to images trained on: {heading}", [of(row["frechet_vgg16"][kind], 1) for row in every])
    for part, heading in (("training", "first stage"), ("transformer", "transformer")):
        line(f"processor time, {heading} (s)", [f"{row['processor_seconds'][part]:.0f}" for row in every])
    return "\n".join(lines)


MAKERS = {
    "semi-supervised": semi_supervised_table,
    "discrete": discrete_table,
    "vqvae2": vqvae2_table,
    "likelihood": likelihood_table,
    "family": family_table,
    "flow-decoder": flow_decoder_table,
    "hierarchical": hierarchical_table,
    "deep-vae": deep_vae_table,
    "priors": priors_table,
    "disentangle-shapes64": disentangle64_table,
    "disentangle": disentangle_table,
    "collapse": collapse_table,
}
"""By the beginning of a result's name, the longer one first."""
