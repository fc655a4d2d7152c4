"""Pictures and report of a search for anomalies: metrics, distributions of scores, and heat maps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_ae.data.images import to_tensor
from latent_ae.metrics.labels import short_name
from latent_ae.report import page
from latent_ae.report.pictures import picture_grid, to_picture
from latent_ae_eval.table import Row, aligned

NAMES = {
    "pixel_mean": "squared error, mean",
    "pixel_max": "squared error, largest",
    "lpips_mean": "LPIPS",
    "lpips_max": "LPIPS, largest",
    "negative_elbo": "negative ELBO",
    "density": "density trained with it",
    "mixture": "mixture of Gaussians",
    "neighbours": "nearest patches",
}
MAPS = {"pixel_error": "squared error", "lpips": "LPIPS", "neighbours": "nearest patches"}
PICTURE_BYTES = 400_000


@dataclass(frozen=True)
class Finding:
    """An image with its heat maps, on the CPU."""

    row: dict[str, Any]
    image: Tensor
    """(C, H, W) in [-1, 1]."""
    reconstruction: Tensor
    """The same shape."""
    maps: dict[str, Tensor]
    """(H, W) >= 0 by name."""
    mask: Tensor | None
    """(H, W) bool, True on a pasted defect."""


def heat(values: Tensor, top: float) -> Tensor:
    """Return a heat map in the colours of matplotlib's inferno.

    Args:
        values: (H, W) >= 0; 0 is black.
        top: Value from which on the colour is the brightest.

    Returns:
        (3, H, W) in [-1, 1].
    """
    from matplotlib import colormaps

    levels = (values / top if top > 0 else values).clamp(0, 1).numpy()
    return to_tensor((colormaps["inferno"](levels)[..., :3] * 255).round().astype(np.uint8))


def _panels(finding: Finding, tops: Mapping[str, float]) -> dict[str, Tensor]:
    panels = {"input": finding.image, "reconstruction": finding.reconstruction.nan_to_num(nan=-1)}
    panels |= {MAPS[name]: heat(values, tops[name]) for name, values in finding.maps.items()}
    if finding.mask is not None:
        panels["pasted"] = torch.where(finding.mask, 1.0, -1.0)[None]
    return panels


def write_pictures(path: Path, shown: Mapping[str, Sequence[Finding]], tops: Mapping[str, float]) -> None:
    """Write a picture with a row for each image. Raises OSError if it cannot be written.

    Args:
        path: The file.
        shown: Images by heading.
        tops: Values of the brightest colour by the name of the heat map.
    """
    rows = [_panels(finding, tops) for findings in shown.values() for finding in findings]
    if rows:
        labels = max((list(row) for row in rows), key=len)
        picture_grid([list(row.values()) for row in rows], labels, largest_px=256).save(path)


def write_maps(folder: Path, finding: Finding, tops: Mapping[str, float]) -> None:
    """Write a picture of each heat map of an image, named by the image's number. Raises OSError if that fails.

    Args:
        folder: The folder, which is made if it is missing.
        finding: The image.
        tops: Values of the brightest colour by the name of the heat map.
    """
    folder.mkdir(exist_ok=True)
    which = f"{finding.row['index']:06d}" + ("-defect" if finding.row["defect"] else "")
    for name, values in finding.maps.items():
        to_picture(heat(values, tops[name])).save(folder / f"{which}-{name}.png")


def write_anomaly_report(
    path: Path,
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    shown: Mapping[str, Sequence[Finding]],
    tops: Mapping[str, float],
    rank_by: str,
) -> None:
    """Write report.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        rows: The rows of images.parquet.
        shown: Images by heading.
        tops: Values of the brightest colour by the name of the heat map.
        rank_by: The score that chose the images.
    """
    model = short_name(result["model"].get("location"), str(result["model"].get("class")))
    normal = result["normal"]
    abnormal = sum(bool(row["abnormal"]) for row in rows)
    facts = {
        "images": f"{result['data']['num_images']:,}",
        "abnormal": f"{abnormal:,}" if rows[0]["abnormal"] is not None else None,
        "normal images for thresholds": f"{normal['thresholds_from']:,}" if normal else None,
        "requested false positive rate": f"{result['settings']['false_positive_rate']:g}" if normal else None,
    }
    remarks = list(result["notes"])
    if skipped := len(result["data"]["skipped"]):
        remarks.append(f"Unreadable images that were skipped: {skipped:,}.")
    summary = page.facts({name: value for name, value in facts.items() if value is not None}) + page.notes(remarks)
    sections = [summary, _figures(result), _spread(result, rows), *_pictures(shown, tops, rank_by)]
    hidden = ("scores", "thresholds", "notes", "pixel_auroc")
    manifest = {key: value for key, value in result.items() if key not in hidden}
    sections.append(page.section("How this was measured", page.manifest(manifest)))
    title = f"{model}: anomalies in {short_name(result['data']['location'], 'images')}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval anomaly."))


def anomaly_text(result: Mapping[str, Any]) -> str:
    """Return the metrics of each score as a table for a terminal."""
    rows = [Row("images", f"{result['data']['num_images']:,}")]
    for name, values in result["scores"].items():
        label, threshold = NAMES[name], result["thresholds"].get(name)
        if "auroc" in values:
            rows.append(Row(label, f"{values['auroc']:.3f}", _ends(values["interval"]), "AUROC"))
            rows += [Row(label, f"{area:.3f}", "", f"AUROC, {kind}") for kind, area in _by_defect(values).items()]
        if threshold is not None:
            rows.append(Row(label, f"{threshold:.4g}", "", "threshold"))
        if "detection_rate" in values:
            rows.append(Row(label, f"{100 * values['detection_rate']:.1f} %", "", "found"))
            rows.append(Row(label, f"{100 * values['false_positive_rate']:.1f} %", "", "false alarms"))
        elif values["flagged"] is not None:
            rows.append(Row(label, f"{values['flagged']:,}", "", "flagged"))
    return aligned(rows)


def _ends(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else ""


def _by_defect(values: Mapping[str, Any]) -> Mapping[str, float]:
    return values.get("auroc_by_defect") or {}


def _figures(result: Mapping[str, Any]) -> str:
    lines = []
    for name, values in result["scores"].items():
        line: dict[str, Any] = {"score": NAMES[name]}
        if "auroc" in values:
            line["AUROC"] = page.estimate(f"{values['auroc']:.3f}", _ends(values["interval"]))
            line |= {kind: f"{area:.3f}" for kind, area in _by_defect(values).items()}
        if (threshold := result["thresholds"].get(name)) is not None:
            line["threshold"] = f"{threshold:.4g}"
        if "detection_rate" in values:
            line["found"] = f"{100 * values['detection_rate']:.1f} %"
            line["false alarms"] = f"{100 * values['false_positive_rate']:.1f} %"
        elif values["flagged"] is not None:
            line["flagged"] = values["flagged"]
        lines.append(line)
    text = []
    if "AUROC" in lines[0]:
        text.append("AUROC: the chance that an abnormal image scores above a normal one; 0.5 is guessing. ")
        text += ["Small: 95 % interval. "] if any(values["interval"] for values in result["scores"].values()) else []
    if "threshold" in lines[0]:
        text.append("Found, false alarms and flagged are images above the threshold.")
    pieces = [page.table(lines), page.paragraph("".join(text), soft=True)]
    if result["pixel_auroc"]:
        known = {MAPS[name]: area for name, area in result["pixel_auroc"].items() if area is not None}
        areas = ", ".join(f"{name} {area:.3f}" for name, area in known.items())
        pieces.append(page.paragraph(f"AUROC of pixels, over all images with a pasted defect: {areas}."))
    return page.section("Scores", *pieces)


def _spread(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    charts = []
    for name in result["scores"]:
        if rows[0]["abnormal"] is None:
            values = {"images": [row[name] for row in rows]}
        else:
            values = {
                label: [row[name] for row in rows if row["abnormal"] is kind]
                for label, kind in (("normal", False), ("abnormal", True))
            }
        charts.append(page.histogram(values, title=NAMES[name], mark=result["thresholds"].get(name)))
    below = page.paragraph("Dashed: the threshold.", soft=True)
    return page.section("How the scores spread", page.grid(*charts), *[below] * bool(result["thresholds"]))


def _pictures(shown: Mapping[str, Sequence[Finding]], tops: Mapping[str, float], rank_by: str) -> list[str]:
    bright = ", ".join(f"{MAPS[name]} {top:.3g}" for name, top in tops.items())
    about = page.paragraph(
        f"Ranked by {NAMES[rank_by]}. The heat maps have one scale on all pictures: black is 0, the brightest is "
        f"{bright} or more.",
        soft=True,
    )
    sections = []
    for heading, findings in shown.items():
        cards = []
        for finding in findings:
            figures = [
                page.figure(to_picture(panel), caption, max_bytes=PICTURE_BYTES)
                for caption, panel in _panels(finding, tops).items()
            ]
            row = finding.row
            detail = f"no. {row['index']}" + (f", {row['defect']}" if row["defect"] else "")
            scores = ", ".join(f"{label} {row[name]:.4g}" for name, label in NAMES.items() if name in row)
            cards.append(page.card(row["name"], detail, page.beside(*figures), page.paragraph(scores, soft=True)))
        sections.append(page.section(heading, about, *cards))
        about = ""
    return sections
