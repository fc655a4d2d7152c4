"""The common part of the reports of `eval diffusion` and `eval sample`."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from latent_ae.metrics.labels import label_of, pair, rounded, span
from latent_ae.pretrained.weights import how_to_get
from latent_ae.report import page
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.table import Row

APART_BY_ROOTS = (
    "These are squared distances, so their differences mean nothing. Their roots obey the triangle inequality: the "
    "root of the distance between samples and reconstructions is between the difference and the sum of the roots in "
    "their rows."
)
PICTURE_BYTES = 3_000_000


def how_measured(heading: str, result: Mapping[str, Any], kind: type[DiffusionSettings]) -> list[str]:
    """Return HTML of the part of a result that the page does not show above, and how to get FID if it is missing.

    Args:
        heading: Heading of the section.
        result: The result; settings that say "preset" are shown with the preset's values.
        kind: Class of the settings.
    """
    settings, used = result["settings"], result.get("recipe") or {}
    preset = kind.presets[settings["preset"]]
    settings = {key: used.get(key, preset[key]) if value == "preset" else value for key, value in settings.items()}
    manifest = {key: value for key, value in {**result, "settings": settings}.items() if key not in SHOWN_IN}
    pieces = [page.section(heading, page.manifest(manifest))]
    if any(note.startswith("FID is missing") for note in result["notes"]):
        pieces.append(page.details("How to get FID", how_to_get("inception")))
    return pieces


def distance_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return a row for each distance and each of ROWS, for a terminal."""
    rows = [Row("images", f"{result['metrics'][kind]['n']:,}", "", short) for kind, short in SHORT.items()]
    for name in _distances(result):
        title = label_of(name, "sample").name
        for kind, short in SHORT.items():
            interval = span(name, pair((result["intervals"].get(kind) or {}).get(name)))
            rows.append(Row(f"{title} ↓", rounded(name, result["metrics"][kind][name]), interval, short))
    return rows


def _distances(result: Mapping[str, Any]) -> list[str]:
    return [key for key in result["metrics"]["samples"] if key not in ("n", "reference_images")]


def distance_table(result: Mapping[str, Any]) -> str:
    """Return the distances as an HTML table with a row for each of ROWS."""
    rows = []
    for kind, heading in ROWS.items():
        values, intervals = result["metrics"][kind], result["intervals"].get(kind) or {}
        row: dict[str, Any] = {"": heading, "images": f"{values['n']:,} to {values['reference_images']:,}"}
        for name in _distances(result):
            row[label_of(name, "sample").name] = page.estimate(
                rounded(name, values[name]), span(name, pair(intervals.get(name)))
            )
        rows.append(row)
    return page.table(rows)


def pictures_beside(pictures: Mapping[str, Image.Image], reference: str = "images trained on") -> str:
    """Return pictures of the four compared sets side by side, as HTML."""
    captions = {
        "samples": "samples",
        "reference": reference,
        "held_out": "held-out images",
        "reconstructions": "their reconstructions",
    }
    return page.beside(
        *(page.figure(pictures[name], caption, max_bytes=PICTURE_BYTES) for name, caption in captions.items())
    )


ROWS = {
    "samples": "samples, to images trained on",
    "reconstructions": "reconstructions of held-out images, to images trained on",
    "held_out": "held-out images, to images trained on",
    "reconstructions_of_originals": "reconstructions, to their originals",
}
SHORT = {
    "samples": "samples",
    "reconstructions": "reconstructions",
    "held_out": "held-out images",
    "reconstructions_of_originals": "reconstructions, to originals",
}
SHOWN_IN = "metrics", "intervals", "curve", "loss", "notes"
