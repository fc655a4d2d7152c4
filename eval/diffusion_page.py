"""diffusion.html: what a diffusion model made of a first stage's latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latent_ae import page
from latent_ae.weights import how_to_get

from .config import DiffusionSettings
from .labels import label_of, pair, rounded, short_name, span
from .table import Row, aligned

ROWS = {
    "samples": "samples, to images trained on",
    "reconstructions": "reconstructions of held-out images, to images trained on",
    "held_out": "held-out images, to images trained on",
    "reconstructions_of_originals": "reconstructions, to their originals",
}
APART_BY_ROOTS = (
    "These are squared distances, so one minus another is no part of it. Their roots obey the triangle inequality: the "
    "distance between samples and reconstructions lies between the difference and the sum of the roots in their rows."
)
SHORT = {
    "samples": "samples",
    "reconstructions": "reconstructions",
    "held_out": "held-out images",
    "reconstructions_of_originals": "reconstructions, to originals",
}
SHOWN_IN = "metrics", "intervals", "curve", "loss", "notes"
PICTURE_BYTES = 3_000_000


def write_diffusion_page(path: Path, result: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> None:
    """Writes one self-contained HTML file, atomically. `result` is what result.json holds. Raises OSError."""
    model = short_name(result["model"].get("location"), str(result["model"].get("class")))
    data = short_name(result["data"].get("location"), "images")
    latents, recipe, loss = result["latents"], result["recipe"], result["loss"]
    facts = {
        "latent": " x ".join(map(str, latents["shape"])),
        "trained on": f"{latents['train']:,} images",
        "classes": latents["classes"] or "none",
        "transformer": f"{recipe['parameters'] / 1e6:.1f} M parameters",
        "budget": f"{recipe['steps']:,} steps of {recipe['batch_size']}",
        "loss": f"{loss['loss']:.4f}, {loss['relative_loss']:.3f} of the trivial predictor's",
        "seed": result["seed"],
    }
    curve = result["curve"]
    sections = [
        page.facts(facts),
        page.section(
            "Fréchet distances",
            distance_table(result),
            page.paragraph(
                "Lower is better. Small: 95 % intervals over the images of both sets; another seed of the training "
                f"moves the samples' distance besides. {APART_BY_ROOTS}",
                soft=True,
            ),
            page.notes(result["notes"]),
        ),
        page.section("Pictures", pictures_beside(pictures, "images trained on, of the same classes")),
        page.section(
            "Validation loss",
            page.grid(
                page.line_chart(
                    {"held-out latents": [(point["step"], point["relative_loss"]) for point in curve]},
                    title="error of the velocity, relative to the trivial predictor's",
                ),
                page.line_chart(
                    {
                        f"after {point['step']:,} steps": _by_time(point["relative_loss_by_time"])
                        for point in (
                            result["curve"][0],
                            result["curve"][len(result["curve"]) // 2],
                            result["curve"][-1],
                        )
                    },
                    title="the same, by time",
                    x_label="t (0: latent, 1: noise)",
                ),
            ),
            page.paragraph(
                "The trivial predictor knows mean and variance of each latent value and takes them for independent; "
                "1 means that nothing was learned beyond that. It differs between first stages, and so does what is "
                "left to learn: the judge is the Fréchet distance.",
                soft=True,
            ),
        ),
        *how_measured("How this was measured", result, DiffusionSettings),
    ]
    title = f"{model}: a diffusion model of {data}"
    page.write(path, page.page(title, sections, subtitle="A first stage, judged by latent-ae eval diffusion."))


def how_measured(heading: str, result: Mapping[str, Any], kind: type[DiffusionSettings]) -> list[str]:
    """All that the page does not show above, with the preset's values, and how to get an FID that is missing."""
    settings, used = result["settings"], result.get("recipe") or {}
    preset = kind.presets[settings["preset"]]
    settings = {key: used.get(key, preset[key]) if value == "preset" else value for key, value in settings.items()}
    manifest = {key: value for key, value in {**result, "settings": settings}.items() if key not in SHOWN_IN}
    pieces = [page.section(heading, page.manifest(manifest))]
    if any(note.startswith("FID is missing") for note in result["notes"]):
        pieces.append(page.details("How to get FID", how_to_get("inception")))
    return pieces


def diffusion_text(result: Mapping[str, Any]) -> str:
    """The distances as a table for a terminal."""
    rows = [Row("loss, relative to the trivial predictor's", f"{result['loss']['relative_loss']:.3f}")]
    return aligned(rows + distance_rows(result))


def distance_rows(result: Mapping[str, Any]) -> list[Row]:
    """A row for each distance and each of ROWS, for a terminal."""
    rows = [Row("images", f"{result['metrics'][kind]['n']:,}", "", short) for kind, short in SHORT.items()]
    for name in _distances(result):
        title = _title(name)
        for kind, short in SHORT.items():
            interval = span(name, pair((result["intervals"].get(kind) or {}).get(name)))
            rows.append(Row(f"{title} ↓", rounded(name, result["metrics"][kind][name]), interval, short))
    return rows


def _distances(result: Mapping[str, Any]) -> list[str]:
    return [key for key in result["metrics"]["samples"] if key not in ("n", "reference_images")]


def _title(name: str) -> str:
    return "FID" if name == "fid" else label_of(name).name


def distance_table(result: Mapping[str, Any]) -> str:
    """A row for each of ROWS."""
    rows = []
    for kind, heading in ROWS.items():
        values, intervals = result["metrics"][kind], result["intervals"].get(kind) or {}
        row: dict[str, Any] = {"": heading, "images": f"{values['n']:,} to {values['reference_images']:,}"}
        for name in _distances(result):
            row[_title(name)] = page.estimate(rounded(name, values[name]), span(name, pair(intervals.get(name))))
        rows.append(row)
    return page.table(rows)


def pictures_beside(pictures: Mapping[str, Image.Image], reference: str = "images trained on") -> str:
    """Of the four sets that are compared."""
    captions = {
        "samples": "samples",
        "reference": reference,
        "held_out": "held-out images",
        "reconstructions": "their reconstructions",
    }
    return page.beside(
        *(page.figure(pictures[name], caption, max_bytes=PICTURE_BYTES) for name, caption in captions.items())
    )


def _by_time(values: list[float]) -> list[tuple[float, float]]:
    return [((number + 0.5) / len(values), value) for number, value in enumerate(values)]
