"""The report of a measurement of latents: findings in sentences, and charts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_ae.metrics.labels import label_of, short_name
from latent_ae.report import page
from latent_ae_eval.table import Row, aligned, to_look_at

MARKS = {"fine": "fine", "look": "look here", "problem": "problem"}
ORDER = ("problem", "look", "fine")
MOST_LINES = 32
SHOWN_IN = "health", "findings", "notes", "latents"
"""Parts of a result that the page shows above its manifest."""


def write_latents_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result of `evaluate_latents` as one self-contained HTML file. Raises UserError if that fails."""
    model, data = result["model"], result["data"]
    name = short_name(model.get("location"), str(model.get("class") or "model"))
    sections = [
        _facts(result),
        page.section("Findings", _findings(result)),
        page.section("Channels", page.grid(*_channel_charts(result)), page.table(_channel_rows(result))),
        page.section("Spectrum", _spectrum(result)),
    ]
    if "noise" in result["health"]:
        sections.append(page.section("Decoding changed latents", *_changes(result)))
    rest = {key: value for key, value in result.items() if key not in SHOWN_IN}
    sections.append(page.section("How this was measured", page.manifest(rest)))
    title = f"{name}: latents of {short_name(data.get('location'), 'images')}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval latents."))


def latents_text(result: Mapping[str, Any]) -> str:
    """Return the main numbers as a table for a terminal, and every finding that needs a look."""
    rows = [Row(name, page.format_value(value)) for name, value in _values(result).items()]
    lines = to_look_at(_sorted(result), MARKS)
    return "\n".join([aligned(rows), "", *(lines or ["None of the findings needs a look."])])


def _sorted(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the findings; those that need a look come first."""
    return sorted(result["findings"], key=lambda one: ORDER.index(one["state"]))


def _findings(result: Mapping[str, Any]) -> str:
    return page.findings([(one["name"], one["state"], MARKS[one["state"]], one["text"]) for one in _sorted(result)])


def _facts(result: Mapping[str, Any]) -> str:
    return page.facts(_values(result)) + page.notes(result["notes"])


def _values(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the main numbers by name."""
    model, health, latents = result["model"], result["health"], result["latents"]
    channels = len(health["channels"])
    facts = {
        "images": f"{result['data']['num_images']:,}",
        "model": model.get("class"),
        "latent": f"1/{model['factor']} of each side, {channels} channels",
        "dead channels": len(health["dead_channels"]),
        "effective rank": f"{health['effective_rank']:.2f} of {channels}",
        "scaling_factor": latents["scaling_factor"],
        "shift_factor": latents["shift_factor"],
    }
    if "kl_nats_per_dim" in health:
        facts["KL per value"] = f"{health['kl_nats_per_dim']:.3g} nats"
    return facts


def _channel_charts(result: Mapping[str, Any]) -> list[str]:
    channels = result["health"]["channels"]
    names = [str(row["channel"]) for row in channels]

    def of(key: str) -> dict[str, float]:
        return {name: row[key] for name, row in zip(names, channels, strict=True) if row[key] is not None}

    charts = []
    if "kl_nats_per_dim" in result["health"]:
        charts.append(page.bar_chart(of("kl_nats_per_dim"), title="KL per value (nats)", x_label="channel"))
    charts.append(page.bar_chart(of("std"), title="standard deviation", x_label="channel"))
    title = "distance from a Gaussian (1-Wasserstein)"
    charts.append(page.bar_chart(of("wasserstein_1"), title=title, x_label="channel"))
    ends = {
        name: (quantiles["0.5"], quantiles["0.01"], quantiles["0.99"])
        for name, quantiles in zip(names, result["latents"]["channel_quantiles"], strict=True)
    }
    if len(ends) <= MOST_LINES:
        charts.append(page.interval_chart({"values": ends}, title="median, 1 % and 99 % of the values by channel"))
    return charts


def _channel_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, dead = [], bool(result["health"]["dead_channels"])
    for row in result["health"]["channels"]:
        line = {"channel": row["channel"], "mean": row["mean"], "std": row["std"]}
        if "kl_nats_per_dim" in row:
            line |= {"KL (nats)": row["kl_nats_per_dim"], "posterior std": row["posterior_std"]}
        line |= {"kurtosis": row["excess_kurtosis"], "beyond 5 std": row["outliers"]}
        line |= {"": "dead" if row["dead"] else ""} if dead else {}
        rows.append(line)
    return rows


def _spectrum(result: Mapping[str, Any]) -> str:
    """Return the spectra of latents and images, each relative to its own mean power."""
    series = {}
    for name, spectrum in result["health"]["spectrum"].items():
        mean = sum(spectrum["power"]) / max(1, len(spectrum["power"]))
        if mean > 0:
            series[name] = [(x, y / mean) for x, y in zip(spectrum["frequency"], spectrum["power"], strict=True)]
    words = page.paragraph(
        "Power over spatial frequency, averaged over directions, channels and images, each relative to its own mean. "
        "Frequencies are relative to Nyquist's of each grid: 1 is the finest that the pixels or the latents can hold. "
        "White noise is a level line; the power of photographs falls about a hundredfold per decade.",
        soft=True,
    )
    chart = page.line_chart(series, x_label="frequency / Nyquist", y_label="relative power", log_x=True, log_y=True)
    return words + page.grid(chart)


def _changes(result: Mapping[str, Any]) -> list[str]:
    health = result["health"]
    rows = health["noise"]
    charts = []
    for key in [key for key in rows[0] if key != "sigma"] if rows else []:
        points = [(row["sigma"], row[key]) for row in rows if row.get(key) is not None]
        label = label_of(key)
        charts.append(
            page.line_chart(
                {label.name: points},
                title=f"{label.name}{label.arrow} of noised latents",
                x_label="noise / the latents' standard deviation",
            )
        )
    columns = {
        "psnr_in_latents": "changed in latents (dB)",
        "psnr_in_images": "changed in images (dB)",
        "psnr_apart": "apart (dB)",
    }
    table = [
        {"": row["transform"]}
        | {name: page.estimate(f"{row[key]:.2f}") if row[key] is not None else None for key, name in columns.items()}
        for row in health["transforms"]
    ]
    words = (
        f"Of {health['num_decoded']:,} images. First PSNR of the decoded, changed latent against the changed image; "
        "then that of the changed image's own reconstruction; last that between the decoded, changed latent and the "
        "changed reconstruction, which are the same (100 dB) for a first stage that follows the change."
    )
    return [page.grid(*charts), page.table(table), page.paragraph(words, soft=True)]
