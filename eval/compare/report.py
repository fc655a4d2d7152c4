"""Reports of a comparison: comparison.html, and a table in plain text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from latent_ae.metrics.labels import (
    ARROWS,
    difference,
    difference_span,
    in_order,
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
    "time to decode, ms per image": (("seconds_per_image", "decode"), 1e3),
    "latent in fp16, bits per pixel": (("bits_per_pixel", "fp16"), 1.0),
}
"""What quality is drawn against: where it is in the section `cost`, and its factor."""
PERCEPTUAL = ("fid", "lpips_vgg", "lpips_alex")
"""The first of these metrics that all results have is drawn besides PSNR."""
EXPLANATION = (
    "A difference counts if its 95 % interval does not contain zero; of twenty comparisons of equal models, one or so "
    "will count by chance. The paired bootstrap draws images and takes both models' values of each. Distances between "
    "distributions (rFID, KID, Fréchet) have no value per image: their intervals are combined as if each model had "
    "been measured on other images, which makes them too wide if both used the same images."
)


def comparison_page(comparison: Mapping[str, Any], per_image: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Return the comparison as one self-contained HTML file.

    Args:
        comparison: A result of `compare`.
        per_image: Each image's differences from the first result, (n,), by metric and name.
    """
    results = comparison["results"]
    names = {result["label"]: result["name"] for result in results}
    notes = [f"NOT MEASURED IN THE SAME WAY: {line}" for line in comparison["differing"]] + comparison["notes"]
    kinds = dict.fromkeys(row["latent"] for row in comparison["metrics"])
    facts = {
        "images": _each(f"{result['data']['num_images']:,}" for result in results),
        "data": _each(short_name(result["data"].get("location"), "not recorded") for result in results),
        "protocol": _each(result["protocol"].get("name") for result in results),
        "results": len(results),
    }
    sections = [
        page.facts(facts),
        page.notes(notes),
        *(page.section(f"Latent: {kind}", page.table(_figures(comparison, kind, names))) for kind in kinds),
        page.paragraph(
            f"{ARROWS} Small: 95 % intervals. Best is marked only where a value beats every other beyond chance.",
            soft=True,
        ),
        page.section(
            f"Differences from {results[0]['name']}",
            *_difference_tables(comparison, names),
            page.paragraph(EXPLANATION, soft=True),
        ),
        page.section("Values and their 95 % intervals", page.grid(*_interval_charts(comparison, names))),
    ]
    if any(cost_lines(result.get("cost")) for result in results):
        sections.append(page.section("Cost", page.table(_costs(results)), page.grid(*_cost_charts(comparison))))
    if per_image:
        charts = (
            page.histogram(
                {name: values.tolist() for name, values in per_image[metric].items()},
                title=f"Difference in {label_of(metric).name}{label_of(metric).arrow}",
                mark=0.0,
            )
            for metric in in_order(per_image)
        )
        sections.append(page.section("Differences image by image", page.grid(*charts)))
    compared = {result["label"]: {k: v for k, v in result.items() if k != "label"} for result in results}
    sections.append(page.section("What was compared", page.manifest({"method": comparison["method"]} | compared)))
    title = " and ".join([", ".join(list(names.values())[:-1]), list(names.values())[-1]])
    loud = " (not measured in the same way)" if comparison["differing"] else ""
    return page.page(
        f"Comparison of {title}{loud}", sections, subtitle="First stages, compared by latent-ae eval compare."
    )


def _each(values: Iterable[Any]) -> str:
    """Return the value that all results share, or all different values."""
    return " / ".join(dict.fromkeys(map(str, values)))


def _figures(comparison: Mapping[str, Any], kind: str, names: Mapping[str, str]) -> list[dict[str, Any]]:
    lines = []
    for row in comparison["metrics"]:
        if row["latent"] == kind:
            label = label_of(row["metric"])
            line: dict[str, Any] = {"": f"{label.name}{label.arrow}"}
            for key, name in names.items():
                value = number(row["values"][key])
                interval = span(row["metric"], pair(row["intervals"][key]))
                text = "" if value is None else rounded(row["metric"], value)
                line[name] = page.estimate(text, interval, best=row["best"] == key) if text else None
            lines.append(line)
    return lines


def _differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the differences as rows of text, for a page or a terminal."""
    lines = []
    most = max((row["n"] for row in rows), default=0)
    for row in rows:
        label = label_of(row["metric"])
        fewer = "" if row["n"] == most else f", {row['n']:,} images"
        winner = f", {row['better']} is better" if row["better"] else ""
        lines.append(
            {
                "metric": f"{label.name}{label.arrow}",
                "latent": row["latent"],
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
        order = ["metric", "latent", *(key for key in (lines[0] if lines else ()) if "−" in key), "verdict"]
        how = {line["how"] for line in lines}
        order += ["how"] if len(how) > 1 else []
        tables += [
            f"<h3>{page.escape(names[of])}</h3>",
            page.table([{key: line[key] for key in order} for line in lines]),
            *([page.paragraph(f"Method of all: {how.pop()}.", soft=True)] if len(how) == 1 else []),
        ]
    return tables


def _interval_charts(comparison: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    kinds = list(dict.fromkeys(row["latent"] for row in comparison["metrics"]))
    charts = []
    for metric in in_order(row["metric"] for row in comparison["metrics"]):
        series: dict[str, dict[str, tuple[float, float | None, float | None]]] = {kind: {} for kind in kinds}
        for row in comparison["metrics"]:
            for key, name in names.items():
                value = number(row["values"][key])
                if row["metric"] == metric and value is not None:
                    low, high = pair(row["intervals"][key]) or (None, None)
                    series[row["latent"]][name] = value, low, high
        charts.append(page.interval_chart(series, title=f"{label_of(metric).name}{label_of(metric).arrow}"))
    return charts


def _costs(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines = {result["name"]: cost_lines(result.get("cost")) for result in results}
    keys = dict.fromkeys(key for known in lines.values() for key in known)
    return [
        {"": name, "of": of} | {model: known.get((name, of)) for model, known in lines.items()} for name, of in keys
    ]


def _cost_charts(comparison: Mapping[str, Any]) -> list[str]:
    """Return PSNR and a perceptual metric against time and size, where all results have both."""
    results = comparison["results"]
    values: dict[str, Mapping[str, Any]] = {}
    for row in comparison["metrics"]:  # the first kind of latent that all have
        if all(number(row["values"][result["label"]]) is not None for result in results):
            values.setdefault(row["metric"], row["values"])
    metrics = [*(["psnr"] if "psnr" in values else []), *[metric for metric in PERCEPTUAL if metric in values][:1]]
    charts = []
    for label, (path, factor) in AXES.items():
        known = {result["label"]: number_at(result.get("cost"), *path) for result in results}
        if any(value is None for value in known.values()):
            continue
        for metric in metrics:
            points = {
                result["name"]: (factor * (known[result["label"]] or 0.0), values[metric][result["label"]])
                for result in results
            }
            name = f"{label_of(metric).name}{label_of(metric).arrow}"
            charts.append(page.scatter_chart(points, title=f"{name} against {label}", x_label=label, y_label=name))
    return charts


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Return the differences as an aligned table for a terminal, with obstacles above and notes below."""
    lines = [f"NOT MEASURED IN THE SAME WAY: {line}" for line in comparison["differing"]]
    lines += [f"{result['name']}: {result['path']}" for result in comparison["results"]]
    rows = _differences(comparison["differences"])
    if not rows:
        return printable("\n".join([*lines, "No two results have a metric in common."]), lines=True)
    how = {row["how"] for row in rows}
    shown = []
    for row in rows:
        remark = row["verdict"] if len(how) == 1 else f"{row['verdict']} ({row['how']})"
        of = f"{row['latent']}, {row['']}"
        shown.append(Row(row["metric"], row["difference"], row["95 % interval"], of, remark))
    costs = [
        Row(name, text, of=f"{of}, {result['label']}")
        for name, of in dict.fromkeys(key for result in comparison["results"] for key in cost_lines(result.get("cost")))
        for result in comparison["results"]
        if (text := cost_lines(result.get("cost")).get((name, of)))
    ]
    table = [aligned(shown), *([f"\nMethod of all: {how.pop()}."] if len(how) == 1 else [])]
    table += ["", aligned(costs)] if costs else []
    notes = [f"note: {note}" for note in comparison["notes"]]
    return printable("\n".join([*lines, "", *table, "", *notes]).rstrip(), lines=True)
