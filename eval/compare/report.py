"""Reports of a comparison: comparison.html, and a table in plain text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from latent_ae.metrics.labels import (
    ARROWS,
    difference,
    difference_span,
    label_of,
    number,
    pair,
    rounded,
    short_name,
    span,
)
from latent_ae.report import page
from latent_ae.text import printable
from latent_ae_eval.cost import cost_lines, number_at
from latent_ae_eval.table import Row, aligned

AXES = {
    "time to decode, ms per image": ((("seconds_per_image", "decode"),), 1e3),
    "stored latent, bits per pixel": ((("bits_per_pixel", "indices"), ("bits_per_pixel", "fp16")), 1.0),
}
"""What quality is drawn against: places in the section `cost`, of which the first known one counts, and a factor."""
HEADLINES = {
    "psnr": ("recon", ("mode", "sample"), ("psnr",)),
    "perceptual": ("recon", ("mode", "sample"), ("fid", "fd_dinov2", "lpips_vgg", "lpips_alex", "dists")),
    "midpoints": ("ifid", ("midpoints",), ("ifid", "fd_dinov2", "frechet_vgg16")),
    "samples": ("diffusion", ("samples",), ("fid", "fd_dinov2", "frechet_vgg16")),
    "text": ("text", ("",), ("ned_reconstruction", "ned_agreement")),
    "rank": ("latents", ("",), ("effective_rank",)),
}
"""What the first table shows and charts draw: an evaluation, its parts, and metrics. Of these the one that most models
have is taken, the first of equals."""
QUALITY, PREDICTION = ("psnr", "perceptual"), ("midpoints", "samples")
"""Headlines that charts draw upwards, and those that they draw to the right, besides time and size."""
MOST_NAMED = 4
"""More models are not named in the title."""
MOST_COLUMNS = 6
"""Tables of more models have a row for each, so that they fit a page."""
ONE_RUN = (
    "Letters are those of the table, lines 95 % intervals. Times are of one run on one machine and vary between runs, "
    "more so beside other work. A latent is stored as the indices of its codes, or in fp16 if it has none. Distances "
    "of samples are those of one seed of the diffusion model."
)
EXPLANATION = (
    "A difference counts if its 95 % interval does not contain zero; of twenty comparisons of equal models, one or so "
    "will count by chance. The paired bootstrap draws images and takes both models' values of each. Distances between "
    "distributions (rFID, KID, Fréchet) have no value per image: their intervals are combined as if each model had "
    "been measured on other images, which makes them too wide if both used the same images."
)


def comparison_page(
    comparison: Mapping[str, Any], per_image: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
) -> str:
    """Return the comparison as one self-contained HTML file.

    Args:
        comparison: A result of `compare`.
        per_image: Each image's differences from the first model, (n,), by evaluation and metric, and by name.
    """
    names = {model["label"]: model["name"] for model in comparison["models"]}
    notes = [f"NOT MEASURED IN THE SAME WAY: {line}" for line in comparison["differing"]] + comparison["notes"]
    costs = [recon.get("cost") for recon in _reconstructions(comparison).values()]
    sections = [
        page.facts(_facts(comparison)),
        page.notes(notes),
        page.section(
            "At a glance",
            page.table(_overview(comparison, names)),
            page.grid(*_quality_charts(comparison)),
            page.paragraph(ONE_RUN, soft=True),
        ),
    ]
    # each kind of latent has all metrics of reconstructions; of the parts of other evaluations each has few
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in comparison["metrics"]:
        of = f", {row['part']}" if row["job"] == "recon" else ""
        tables.setdefault(f"eval {row['job']}{of}", []).append(row)
    for heading, rows in tables.items():
        data = page.paragraph(_data_of(comparison, rows[0]["job"]), soft=True)
        sections.append(page.section(heading, data, page.table(_figures(rows, names))))
    sections += [
        page.paragraph(
            f"{ARROWS} Small: 95 % intervals. Best is marked only where a value beats every other beyond chance.",
            soft=True,
        ),
        page.section(
            f"Differences from {comparison['models'][0]['name']}",
            *_difference_tables(comparison, names),
            page.paragraph(EXPLANATION, soft=True),
        ),
        page.section("Values and their 95 % intervals", page.grid(*_interval_charts(comparison, names))),
    ]
    if any(cost_lines(cost) for cost in costs):
        sections.append(page.section("Cost", page.table(_costs(comparison, names))))
    if per_image:
        charts = (
            page.histogram(
                {name: values.tolist() for name, values in differences.items()},
                title=f"Difference in {label_of(metric, job).name}{label_of(metric, job).arrow}{_of(job)}",
                mark=0.0,
            )
            for (job, metric), differences in per_image.items()
        )
        sections.append(page.section("Differences image by image", page.grid(*charts)))
    compared = {model["label"]: {k: v for k, v in model.items() if k != "label"} for model in comparison["models"]}
    sections.append(page.section("What was compared", page.manifest({"method": comparison["method"]} | compared)))
    *others, last = names.values()
    title = f"{', '.join(others)} and {last}" if len(names) <= MOST_NAMED else f"{len(names)} first stages"
    loud = " (not measured in the same way)" if comparison["differing"] else ""
    return page.page(
        f"Comparison of {title}{loud}", sections, subtitle="First stages, compared by latent-ae eval compare."
    )


def _reconstructions(comparison: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the results of `eval recon` by label; the other models have none."""
    found = {model["label"]: model["results"].get("recon") for model in comparison["models"]}
    return {label: recon for label, recon in found.items() if recon}


def _facts(comparison: Mapping[str, Any]) -> dict[str, Any]:
    models = comparison["models"]
    recons = list(_reconstructions(comparison).values())
    shared = recons or [result for model in models for result in model["results"].values()]
    facts = {"data": _each(short_name(result["data"].get("location"), "not recorded") for result in shared)}
    if recons:
        facts["images"] = _each(f"{recon['data']['num_images']:,}" for recon in recons)
        facts["protocol"] = _each(recon["protocol"].get("name") for recon in recons)
    jobs = dict.fromkeys(job for model in models for job in model["results"])
    return facts | {"models": len(models), "evaluations": ", ".join(jobs)}


def _data_of(comparison: Mapping[str, Any], job: str) -> str:
    """Return on what an evaluation was made."""
    found = [model["results"][job]["data"] for model in comparison["models"] if job in model["results"]]
    location = _each(short_name(data.get("location"), "no data") for data in found)
    counts = [count for data in found if (count := number(data.get("num_images"))) is not None]
    return f"{_each(f'{count:,.0f}' for count in counts)} images of {location}." if counts else f"On {location}."


def _headlines(comparison: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the rows of HEADLINES that at least one model has."""
    found = {}
    for headline, (job, parts, metrics) in HEADLINES.items():
        rows = [
            row
            for part in parts
            for metric in metrics
            for row in comparison["metrics"]
            if (row["job"], row["part"], row["metric"]) == (job, part, metric)
        ]
        if rows:
            found[headline] = max(rows, key=_known)  # the first of equals
    return found


def _known(row: Mapping[str, Any]) -> int:
    """Return how many models have a value."""
    return sum(number(value) is not None for value in row["values"].values())


def _place(cost: Mapping[str, Any] | None, axis: str) -> float | None:
    """Return where a model stands on an axis of AXES; None if that is not known."""
    places, factor = AXES[axis]
    known = (value for path in places if (value := number_at(cost, *path)) is not None)
    return None if (value := next(known, None)) is None else factor * value


def _overview(comparison: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what each model is, what it costs, and the headlines: in its column, or its row if there are many."""
    lines = []
    recons, headlines = _reconstructions(comparison), _headlines(comparison).values()
    abouts = {model["label"]: next(iter(model["results"].values()))["model"] for model in comparison["models"]}
    classes = {str(about.get("class")) for about in abouts.values()}
    for model in comparison["models"]:
        about = abouts[model["label"]]
        cost = recons.get(model["label"], {}).get("cost")
        line: dict[str, Any] = {"": names[model["label"]]} | ({"class": about.get("class")} if len(classes) > 1 else {})
        parameters = number(about.get("parameters"))
        line["parameters"] = None if parameters is None else f"{parameters:,.0f}"
        line |= {axis: None if (at := _place(cost, axis)) is None else f"{at:.4g}" for axis in AXES}
        for row in headlines:
            line[_title(row)] = _estimate(row, model["label"], interval=False)
        lines.append(line)
    if len(names) > MOST_COLUMNS:
        return lines
    return [{"": key} | {line[""]: line[key] for line in lines} for key in list(lines[0])[1:]]


def _title(row: Mapping[str, Any]) -> str:
    """Return the name of a figure, with its part unless that is a kind of latent."""
    label = label_of(row["metric"], row["job"])
    part = f", {row['part']}" if row["job"] != "recon" and row["part"] else ""
    return f"{label.name}{part}{label.arrow}"


def _estimate(row: Mapping[str, Any], label: str, *, interval: bool = True) -> page.Html | None:
    """Return the table cell of a model's value, with its interval in small print."""
    value = number(row["values"][label])
    ends = span(row["metric"], pair(row["intervals"][label])) if interval else ""
    return None if value is None else page.estimate(rounded(row["metric"], value), ends, best=row["best"] == label)


def _of(job: str) -> str:
    """Return what a title says behind a metric; reconstructions are the usual case."""
    return "" if job == "recon" else f", eval {job}"


def _each(values: Iterable[Any]) -> str:
    """Return the value that all results share, or all different values."""
    return " / ".join(dict.fromkeys(map(str, values)))


def _figures(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a row for each figure, or for each model if there are many."""
    cells = {key: [_estimate(row, key) for row in rows] for key in names}
    if len(names) > MOST_COLUMNS:
        titles = [_title(row) for row in rows]
        return [{"": names[key]} | dict(zip(titles, cells[key], strict=True)) for key in names]
    return [{"": _title(row)} | {names[key]: cells[key][at] for key in names} for at, row in enumerate(rows)]


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the differences as rows of text, for a page or a terminal."""
    lines = []
    most: dict[str, int] = {}
    for row in rows:
        most[row["job"]] = max(row["n"] or 0, most.get(row["job"], 0))
    for row in rows:
        label = label_of(row["metric"], row["job"])
        fewer = "" if (row["n"] or 0) == most[row["job"]] else f", {row['n'] or 0:,} images"
        winner = f", {row['better']} is better" if row["better"] else ""
        lines.append(
            {
                "metric": f"{label.name}{label.arrow}",
                "of": row["part"] if row["job"] == "recon" else f"{row['job']} {row['part']}".strip(),
                "": f"{row['of']} − {row['against']}",
                "difference": difference(row["metric"], row["difference"]),
                "95 % interval": difference_span(row["metric"], pair(row["interval"])),
                "verdict": f"{row['verdict']}{winner}",
                "how": f"{row['method']}{fewer}",
            }
        )
    return lines


def _difference_tables(comparison: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    tables = []
    for of in list(names)[1:]:
        lines = _differences([row for row in comparison["differences"] if row["of"] == of])
        for line in lines:
            line[line.pop("")] = page.estimate(line.pop("difference"), line.pop("95 % interval"))
        order = ["metric", "of", *(key for key in (lines[0] if lines else ()) if "−" in key), "verdict"]
        how = {line["how"] for line in lines}
        order += ["how"] if len(how) > 1 else []
        tables += [
            f"<h3>{page.escape(names[of])}</h3>",
            page.table([{key: line[key] for key in order} for line in lines]),
            *([page.paragraph(f"Method of all: {how.pop()}.", soft=True)] if len(how) == 1 else []),
        ]
    return tables


def _interval_charts(comparison: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return a chart for each metric of an evaluation that has intervals."""
    charts = []
    for job, metric in dict.fromkeys((row["job"], row["metric"]) for row in comparison["metrics"]):
        rows = [row for row in comparison["metrics"] if (row["job"], row["metric"]) == (job, metric)]
        if not any(pair(interval) for row in rows for interval in row["intervals"].values()):
            continue
        series: dict[str, dict[str, tuple[float, float | None, float | None]]] = {row["part"]: {} for row in rows}
        for row in rows:
            for key, name in names.items():
                value = number(row["values"][key])
                if value is not None:
                    low, high = pair(row["intervals"][key]) or (None, None)
                    series[row["part"]][name] = value, low, high
        title = f"{label_of(metric, job).name}{label_of(metric, job).arrow}{_of(job)}"
        charts.append(page.interval_chart(series, title=title))
    return charts


def _costs(comparison: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what each model costs: a row for each number, or for each model if there are many."""
    lines = {names[label]: cost_lines(recon.get("cost")) for label, recon in _reconstructions(comparison).items()}
    keys = dict.fromkeys(key for known in lines.values() for key in known)
    if len(names) > MOST_COLUMNS:
        title = {key: ", ".join(key) for key in keys}
        return [{"": model} | {title[key]: known.get(key) for key in keys} for model, known in lines.items()]
    return [
        {"": name, "of": of} | {model: known.get((name, of)) for model, known in lines.items()} for name, of in keys
    ]


def _quality_charts(comparison: Mapping[str, Any]) -> list[str]:
    """Return quality against time, size and predictions of samples, where at least two models have both."""
    headlines, recons = _headlines(comparison), _reconstructions(comparison)
    across: dict[str, dict[str, float | None]] = {
        axis: {key: _place(recon.get("cost"), axis) for key, recon in recons.items()} for axis in AXES
    }
    across |= {
        _title(headlines[key]): {label: number(value) for label, value in headlines[key]["values"].items()}
        for key in PREDICTION
        if key in headlines
    }
    charts = []
    for label, positions in across.items():
        for row in (headlines[key] for key in QUALITY if key in headlines):
            points = {
                model["label"]: (x, y)
                for model in comparison["models"]
                if (x := positions.get(model["label"])) is not None
                and (y := number(row["values"][model["label"]])) is not None
            }
            if len(points) > 1:
                title = f"{_title(row)} against {label}"
                ends = {key: known for key in points if (known := pair(row["intervals"][key]))}
                axes = {"x_label": label, "y_label": _title(row)}
                everyone = [model["label"] for model in comparison["models"]]
                charts.append(page.scatter_chart(points, title=title, intervals=ends, everyone=everyone, **axes))
    return charts


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Return the differences as an aligned table for a terminal, with obstacles above and notes below."""
    lines = [f"NOT MEASURED IN THE SAME WAY: {line}" for line in comparison["differing"]]
    for model in comparison["models"]:
        lines += [f"{model['name']}: {result['path']}" for result in model["results"].values()]
    rows = _differences(comparison["differences"])
    notes = [f"note: {note}" for note in comparison["notes"]]
    if not rows:
        return printable("\n".join([*lines, "No two models have a metric in common.", *notes]), lines=True)
    shown = [
        Row(_title(row), rounded(row["metric"], value), span(row["metric"], pair(row["intervals"][label])), label, best)
        for row in _headlines(comparison).values()
        for label in row["values"]
        if (value := number(row["values"][label])) is not None
        for best in ["best" if row["best"] == label else ""]
    ]
    lines += ["", aligned(shown), ""] if shown else []
    how = {row["how"] for row in rows}
    shown = []
    for row in rows:
        remark = row["verdict"] if len(how) == 1 else f"{row['verdict']} ({row['how']})"
        of = f"{row['of']}, {row['']}"
        shown.append(Row(row["metric"], row["difference"], row["95 % interval"], of, remark))
    known = {label: cost_lines(recon.get("cost")) for label, recon in _reconstructions(comparison).items()}
    costs = [
        Row(name, text, of=f"{of}, {label}")
        for name, of in dict.fromkeys(key for lines_of in known.values() for key in lines_of)
        for label, lines_of in known.items()
        if (text := lines_of.get((name, of)))
    ]
    table = [aligned(shown), *([f"\nMethod of all: {how.pop()}."] if len(how) == 1 else [])]
    table += ["", aligned(costs)] if costs else []
    return printable("\n".join([*lines, "", *table, "", *notes]).rstrip(), lines=True)
