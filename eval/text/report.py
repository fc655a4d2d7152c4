"""The report of an evaluation of text: what was read before and after, by size and script, and what was lost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from latent_ae.metrics.labels import ARROWS, label_of, pair, rounded, short_name
from latent_ae.report import page
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.table import Row, aligned

KINDS = {
    "original": "original",
    "reconstruction": "reconstruction",
    "agreement": "reconstruction against the original",
}
"""What was compared, as a table names it: the first two were compared with what was rendered."""
METRICS = (
    *(f"ned_{kind}" for kind in KINDS),
    "ned_lost",
    *(f"exact_{kind}" for kind in KINDS),
    *("psnr", "ssim", "lpips_vgg", "lpips_alex"),
)
AXES = {"size_px": "size (px)", "script": "script", "background": "background", "content": "content"}
NAMES = {
    "light": "dark on light",
    "dark": "light on dark",
    "photo": "on photographs",
    "random": "random letters and digits",
}
"""Values of the axes as tables name them, where they are no plain words already."""
COLUMNS = {
    "ned_original": "NED before ↑",
    "ned_reconstruction": "NED after ↑",
    "ned_lost": "NED lost ↓",
    "exact_reconstruction": "read exactly ↑",
}
"""What the tables of groups show."""
PICTURE_BYTES = 500_000
ABOUT = (
    "NED is the normalised edit distance, 1 - Levenshtein distance / length of the longer text: 1 is the same text, 0 "
    "has nothing in common. The original's is the ceiling, because no engine reads everything; what the reconstruction "
    "lacks of it was lost by the first stage. "
)
OF_DATA = (
    "NED is the normalised edit distance, 1 - Levenshtein distance / length of the longer text, between the readings "
    "of the reconstruction and of the original, which counts as the truth: 1 is the same text, 0 has nothing in "
    "common. "
)
INTERVALS = "Small: 95 % bootstrap intervals over the crops."
SHOWN_IN = "metrics", "intervals", "groups", "notes"
"""Parts of a result that the page shows above its manifest."""


class Shown(NamedTuple):
    """A crop that the page shows."""

    row: Mapping[str, Any]
    """Its row of readings.parquet."""
    image: Tensor
    """(C, H, W) in [-1, 1] on the CPU, like the next one."""
    reconstruction: Tensor


def _value(name: str, value: float) -> str:
    if name.startswith("exact"):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}".replace("-", "−") if name.startswith("ned") else rounded(name, value)


def _span(name: str, interval: Any) -> str:
    ends = pair(interval)
    return "" if ends is None else " – ".join(_value(name, end) for end in ends)


def _label(name: str) -> tuple[str, str]:
    """Return the name of a metric with its arrow, and what it is measured on."""
    metric, _, kind = name.partition("_")
    if name == "ned_lost":
        return "NED lost ↓", "original − reconstruction"
    if kind in KINDS:
        return {"ned": "NED ↑", "exact": "read exactly ↑"}[metric], KINDS[kind]
    return label_of(name).name + label_of(name).arrow, ""


def text_text(result: Mapping[str, Any]) -> str:
    """Return the figures of all crops, and the NED of each size, as a table for a terminal."""
    rows = [Row("crops", f"{result['metrics']['n']:,}")]
    for name in (name for name in METRICS if name in result["metrics"]):
        label, of = _label(name)
        rows.append(Row(label, _value(name, result["metrics"][name]), _span(name, result["intervals"].get(name)), of))
    for size, group in result["groups"].get("size_px", {}).items():
        for name in ("ned_original", "ned_reconstruction"):
            value, interval = _value(name, group["metrics"][name]), _span(name, group["intervals"].get(name))
            rows.append(Row(f"NED ↑ at {size} px", value, interval, _label(name)[1]))
    return aligned(rows)


def picture_of(shown: Sequence[Shown]) -> Image.Image:
    """Return crops as a picture with a row for each: the original and the reconstruction."""
    return picture_grid([[one.image, one.reconstruction] for one in shown], ["original", "reconstruction"])


def write_text_report(
    path: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], shown: Mapping[str, Sequence[Shown]]
) -> None:
    """Write report.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        rows: The rows of readings.parquet.
        shown: The crops under each heading.
    """
    model, data, engine = result["model"], result["data"], result["engine"]
    facts = {
        "crops": f"{data['num_images']:,}",
        "text": "rendered" if data["location"] is None else "of DATA",
        "size": "as stored" if data["crop_px"] is None else f"{data['crop_px']} px",
        "read by": f"{engine['name']} {engine.get('version', '')}".strip(),
        "languages": ", ".join(engine["languages"]),
        "seed": result["seed"],
    }
    lines: dict[tuple[str, str], page.Html] = {}
    for name in (name for name in METRICS if name in result["metrics"]):
        lines[_label(name)] = page.estimate(
            _value(name, result["metrics"][name]), _span(name, result["intervals"].get(name))
        )
    table = page.table([{"metric": label, "of": of, "": value} for (label, of), value in lines.items()])
    skipped = len(data["skipped"])
    remarks = [*result["notes"], *([f"Unreadable images that were skipped: {skipped:,}."] if skipped else [])]
    meaning = OF_DATA if data["location"] is not None else ABOUT
    about = page.paragraph(meaning + INTERVALS * bool(result["intervals"]), soft=True)
    sections = [
        page.facts(facts),
        page.section("All crops", table, about, page.paragraph(ARROWS, soft=True), page.notes(remarks)),
    ]
    for axis, groups in result["groups"].items():
        charts = [page.grid(*_charts(rows))] if axis == "size_px" and len(groups) > 1 else []
        sections.append(page.section(f"By {AXES[axis]}", *charts, _group_table(axis, groups)))
    for heading, group in shown.items():
        sections.append(page.section(heading, *map(_card, group)))
    manifest = {key: value for key, value in result.items() if key not in SHOWN_IN}
    sections.append(page.section("How this was measured", page.manifest(manifest)))
    name = short_name(model.get("location"), str(model.get("class")))
    what = f"text in {short_name(data['location'], 'images')}" if data["location"] is not None else "rendered text"
    page.write(path, page.page(f"{name}: {what}", sections, subtitle="A first stage, measured by latent-ae eval text."))


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return charts of NED against size: before and after, and after by script."""
    by_kind = {kind: _line(rows, f"ned_{kind}") for kind in ("original", "reconstruction")}
    scripts = dict.fromkeys(row["script"] for row in rows)
    by_script = {
        script: _line([row for row in rows if row["script"] == script], "ned_reconstruction") for script in scripts
    }
    titles = {"all scripts": by_kind, "reconstructions, by script": by_script}
    return [
        page.line_chart(series, title=title, x_label=AXES["size_px"], y_label="NED") for title, series in titles.items()
    ]


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    sizes = sorted({row["size_px"] for row in rows})
    return [(size, float(np.mean([row[name] for row in rows if row["size_px"] == size]))) for size in sizes]


def _group_table(axis: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for value, group in groups.items():
        metrics, intervals = group["metrics"], group["intervals"]
        cells = {
            label: page.estimate(_value(name, metrics[name]), _span(name, intervals.get(name)))
            for name, label in COLUMNS.items()
            if name in metrics
        }
        lines.append({AXES[axis]: NAMES.get(value, value), "crops": metrics["n"]} | cells)
    return page.table(lines)


def _card(one: Shown) -> str:
    """Return a crop, its reconstruction, and what was read in both beside what stands there."""
    row = one.row
    names = {"ned_original": "NED of the original", "ned_reconstruction": "of the reconstruction"}
    if "text" not in row:
        names = {"ned_agreement": "NED"}
    detail = ", ".join(f"{label} {_value(name, row[name])}" for name, label in names.items())
    texts = {"text": "rendered", "read_original": "read before", "read_reconstruction": "read after"}
    readings = {
        label: " / ".join(filter(str.strip, row[key].split("\n"))) for key, label in texts.items() if key in row
    }
    table = page.table([{"": label, "text": text} for label, text in readings.items()])
    return page.card(row["name"], detail, page.figure(picture_of([one]), max_bytes=PICTURE_BYTES), table)
