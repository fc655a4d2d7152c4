"""The report of a run: one self-contained page with results, curves, pictures and settings."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latent_ae.config import to_yaml
from latent_ae.metrics.labels import NAMES
from latent_ae.objectives import OBJECTIVES
from latent_ae.objectives.base import Objective
from latent_ae.report import page
from latent_ae.text import choice_in_words

from .settings import TrainSettings

OTHER_CHARTS = {
    "Latent standard deviation": ("latent_std",),
    "Gradient norms": ("grad_norm", "grad_norm_discriminator"),
    "Images per second": ("images_per_second",),
}
"""Charts of values that no objective logs."""
HIGHER_IS_BETTER = ("psnr", "ssim", "ms_ssim", "psnr_alpha")


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of log.jsonl by step, one per event and step: a resumed run replaces lines that it repeats."""
    path = run / "log.jsonl"
    events: dict[tuple[str, int], dict[str, Any]] = {}
    if path.is_file():
        with open(path, "rb") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                    events[event["event"], event["step"]] = event
                except (ValueError, KeyError, TypeError):  # a line cut short when the process was killed
                    continue
    return sorted(events.values(), key=lambda event: event["step"])


def held_out_distances(run: Path) -> dict[int, float]:
    """Return the held-out LPIPS of the validated steps."""
    events = [event for event in read_log(run) if event["event"] == "validate"]
    distances = {event["step"]: event.get("lpips_vgg", event.get("lpips_alex")) for event in events}
    return {step: distance for step, distance in distances.items() if distance is not None}


def write_report(
    run: Path,
    settings: TrainSettings,
    rows: Sequence[dict[str, Any]],
    remarks: Sequence[str] = (),
    objectives: Sequence[type[Objective[Any]]] = OBJECTIVES,
) -> None:
    """Write report.html from the run folder's log and previews.

    Args:
        run: The run folder.
        settings: The run's settings.
        rows: The final table, from `result_rows`.
        remarks: Sentences about the table.
        objectives: Classes whose charts are drawn if their values were logged.

    Raises:
        UserError: If the file cannot be written.
    """
    log = read_log(run)
    training = [event for event in log if event["event"] == "train"]
    held_out = [event for event in log if event["event"] == "validate"]
    framed = (page.paragraph(line, soft=True) for line in framing(run, settings))
    notes = page.notes([*remarks, *filter(None, [decline(rows)])])
    sections = [page.section("Held-out images, before and after", page.table(rows), notes, *framed)]
    if training and training[-1].get("verdict"):
        sections.append(page.section("How training went", page.paragraph(training[-1]["verdict"])))
    previews = sorted((run / "previews").glob("*.png"))
    shown = {"Before training": previews[:1], "After training": previews[-1:]}
    for heading, preview in ((heading, paths[0]) for heading, paths in reversed(shown.items()) if paths):
        with Image.open(preview) as picture:
            caption = f"{preview.stem}: input, reconstruction, bicubic. Click for full size."
            sections.append(page.section(heading, page.figure(picture, caption, jpeg_quality=92)))
    sides = settings.validation.also_px
    charts = [
        page.line_chart(series, title=f"Held-out {name}")
        for key, name in NAMES.items()
        if (series := _series(held_out, [key, *(at_side(key, side) for side in sides)]))
    ]
    charted = {
        title: keys for one in (*objectives, None) for title, keys in (one.charts if one else OTHER_CHARTS).items()
    }
    charts += [
        page.line_chart(series, title=title) for title, keys in charted.items() if (series := _series(training, keys))
    ]
    sections.append(page.section("Curves", page.grid(*charts)))
    sections.append(page.section("Settings", page.preformatted(to_yaml(settings))))
    subtitle = f"{settings.steps:,} steps of {settings.batch_size} crops of {settings.data.crops_title}"
    page.write(run / "report.html", page.page(f"Training report: {run.name}", sections, subtitle=subtitle))


def result_rows(results: dict[str, dict[str, Any]], also_px: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Return the rows of the final table.

    Args:
        results: Summaries of held-out images by name ("bicubic /4", "before", "after").
        also_px: Other sides at which they were measured, px, whose rows follow.
    """
    keys = [key for key in NAMES if any(summary.get(key) is not None for summary in results.values())]
    rows = [(name, summary) for name, summary in results.items()]
    for side in also_px:
        rows += [
            (f"{name}, {side} px", {key: summary.get(at_side(key, side)) for key in keys})
            for name, summary in results.items()
        ]
    return [{"": name} | {NAMES[key]: _rounded(key, summary.get(key)) for key in keys} for name, summary in rows]


def at_side(key: str, side_px: int) -> str:
    """Return the name of a held-out metric at another side than the first."""
    return f"{key}_{side_px}px"


def remarks_on(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return sentences on which images the final table measures; `results` as for `result_rows`."""
    before, after = (results.get(name, {}).get("choice") for name in ("before", "after"))
    remarks = [f"The table measures {choice_in_words(after)}."] if after and after["method"] != "all" else []
    if results.get("before") and before != after:
        remarks.append(
            f"The rows measure different images: {choice_in_words(before)} before training, and "
            f"{choice_in_words(after)} after it."
        )
    return remarks


def framing(run: Path, settings: TrainSettings) -> list[str]:
    """Return lines on how held-out images were framed, and the `latent-ae eval recon` command that does the same."""
    data, sides = settings.data, settings.validation_sides
    before = "" if data.resize_px is None else f", after its shorter side was resized to {data.resize_px} px"
    before = ", framed as its source" if data.mixture else before
    commands = []
    for one in data.sources() or (data,):
        words = ["latent-ae", "eval", "recon", str(run / "export"), one.eval_source or one.source]
        words += [f"split={one.eval_split}"] if one.eval_split else []
        words += [f"image_column={one.image_column}"] if one.image_column != "image" else []
        words += [f"resize_px={'null' if one.resize_px is None else one.resize_px}", f"crop_px={sides[0]}"]
        words += [f"limit={settings.validation.images}"]
        commands.append(shlex.join(words))
    size = " and of ".join(map(str, sides))
    same = "these commands measure each source" if data.mixture else "this command gives the same ones"
    lines = [
        f"Each held-out image is a square of {size} px from its middle{before}. By default `latent-ae eval recon` "
        f"resizes to 256 px first, so its results differ; {same}: {' ; '.join(commands)}"
    ]
    if data.eval_source is None and data.eval_split is None and data.title != "photos":
        lines.append("If images were held out by data.eval_fraction, that command also measures training images.")
    return lines


def decline(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return a sentence on the metrics that are worse than before training; None if none is."""
    named = {row[""]: row for row in rows}
    before, after = named.get("before", {}), named.get("after", {})
    worse = []
    for key, name in NAMES.items():
        if before.get(name) is None or after.get(name) is None:
            continue
        change = float(after[name]) - float(before[name])
        if change < 0 if key in HIGHER_IS_BETTER else change > 0:
            worse.append(f"{name} {after[name]} (before: {before[name]})")
    return f"The run ended below its start on the held-out images: {', '.join(worse)}." if worse else None


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as aligned plain text."""
    columns = list(rows[0])
    cells = [columns] + [["" if row[key] is None else str(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if not index else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _rounded(key: str, value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}" if key.startswith("psnr") else f"{value:.3f}"


def _series(events: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    series = {key: [(event["step"], event[key]) for event in events if event.get(key) is not None] for key in keys}
    return {key: points for key, points in series.items() if points}
