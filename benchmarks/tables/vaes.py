"""The tables of docs/vaes.md."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.machine import where
from benchmarks.tables import half_width
from latent_ae.report.charts import line_chart


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
    recipe = {run["seed"]: run["bits"]["mean"] for run in result["rows"]["the recipe"]["runs"]}
    skipped = sum(run["skipped"] for row in result["rows"].values() for run in row["runs"])
    lines = [
        f"{result['data']}; bits per dimension are the bound of {result['samples']} samples, means over the seeds with "
        "the smallest and the largest, or of one seed with a 95 % interval over the images (*in italics*); the last "
        "column is the difference of each seed's bits from those of the recipe's run of this seed, and their mean; "
        f"{skipped or 'no'} steps were skipped; {where(result)}.",
        "",
        "| | parameters | steps of 16 | processor time (s) | held out | seeds | bits per dimension | ELBO "
        "| reconstruction | KL by level | difference from the recipe |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name, row in result["rows"].items():
        runs = row["runs"]
        first, bits = runs[0], [run["bits"]["mean"] for run in runs]
        means = {key: mean(run[key] for run in runs) for key in ("processor_seconds", "elbo", "reconstruction")}
        levels = [mean(found) for found in zip(*(run["levels"] for run in runs), strict=True)]
        # a longer run is not the recipe's equal in anything but the seed
        differences = [
            run["bits"]["mean"] - recipe[run["seed"]]
            for run in runs
            if name not in ("the recipe", "longer") and run["seed"] in recipe
        ]
        cells = [name, f"{first['parameters']:,}", f"{first['steps']:,}", f"{means['processor_seconds']:,.0f}"]
        cells += [f"{first['held_out']:,}", f"{len(runs)}"]
        low, high = (min(bits), max(bits)) if len(runs) > 1 else first["bits"]["interval"]
        spread = f"{low:.3f} to {high:.3f}"
        cells.append(f"{mean(bits):.3f} ({spread if len(runs) > 1 else f'*{spread}*'})")
        cells += [f"{means['elbo']:.3f}", f"{means['reconstruction']:.3f}", ", ".join(f"{one:.2f}" for one in levels)]
        each = ", ".join(f"{one:+.3f}" for one in differences)
        cells.append(f"{each}: {mean(differences):+.3f}" if len(differences) > 1 else each)
        lines.append(f"| {' | '.join(cells)} |")
    stored = result["stored"]
    lines.append(
        f"| *the files themselves: {stored['format']}* | | | | {stored['images']:,} | | {stored['file']:.3f} | | | | |"
    )
    return "\n".join(lines)


DRAWN = (
    "the recipe",
    "one logistic in place of the mixture",
    "posteriors that begin as the priors",
    "a third of the warm-up of the KL",
    "no warm-up of the KL",
    "longer",
)
"""Rows whose curves are drawn."""


def deep_vae_curves(result: dict[str, Any]) -> str:
    """SVG: bits per dimension of training images by images seen, of each row's first seed.

    Each point is a mean over a twentieth of the steps. Points above 8 bits, which a uniform guess needs, are left out:
    those of the first steps would hide the others.
    """
    first = {name: row["runs"][0] for name, row in result["rows"].items()}
    curves = {name: [(seen, bits) for seen, bits in run["curve"] if bits <= 8] for name, run in first.items()}
    chart = line_chart(
        {name: curves[name] for name in DRAWN if name in curves},
        title="bits per dimension of training images",
        x_label="images seen",
        log_x=True,
    )
    # a grey that shows on white and on black, because a picture does not know the colour of its page
    return chart[chart.index("<svg") : chart.index("</figure>")].replace("currentColor", "#808080")


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


MAKERS = {
    "likelihood": likelihood_table,
    "hierarchical": hierarchical_table,
    "deep-vae": deep_vae_table,
    "priors": priors_table,
    "disentangle-shapes64": disentangle64_table,
    "disentangle": disentangle_table,
    "collapse": collapse_table,
    "semi-supervised": semi_supervised_table,
}
"""By the beginning of a result's name, the longer one first."""
FIGURES = {"deep-vae": deep_vae_curves}
"""Drawn into docs/images/NAME-curves.svg, by the result's name."""
