"""The report of an interpolation: the animation, the paths of each pair, and the measures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latent_ae.metrics.labels import short_name
from latent_ae.report import page
from latent_ae_eval.table import Row, aligned

ABOUT = (
    "Linear and spherical paths run through the latents, the cross-fade through the pixels of the two "
    "reconstructions: a latent path that shows two transparent images has learned no more than the cross-fade."
)
MEASURES = {
    "length": "length",
    "largest_step": "largest step",
    "middle_from_cross_fade": "middle from the cross-fade's, levels",
}
MIDDLE = "middle_from_cross_fade"
EXPLAINED = (
    "Length: sum of the roots of LPIPS between neighbours over the root of LPIPS between the ends; 1 is a straight "
    "line in the features that LPIPS compares, and no path is shorter. Largest step: over the mean step; 1 is even. "
    "Middle: root mean squared difference from the cross-fade's middle, in levels of 255; 0 is a cross-fade."
)


def interpolation_text(result: Mapping[str, Any]) -> str:
    """Return the means over the pairs as a table for a terminal."""
    rows = [Row("images", f"{len(result['data']['images']):,}")]
    for key, name in MEASURES.items():
        known = {kind: values.get(key) for kind, values in result["means"].items()}
        rows += [Row(name, f"{value:.2f}", "", kind) for kind, value in known.items() if value is not None]
    return aligned(rows)


def write_interpolation_report(
    path: Path, result: Mapping[str, Any], grids: Sequence[Image.Image], animation: Path | None
) -> None:
    """Write report.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        grids: A picture of the paths of each pair.
        animation: The animation's file, or None.
    """
    model = short_name(result["model"].get("location"), str(result["model"].get("class")))
    data = result["data"]
    facts = {
        "images": len(data["images"]),
        "size": " x ".join(map(str, reversed(data["size_px"]))) + " px",
        "latent": " x ".join(map(str, result["latent"])),
        "turns around": result["method"]["centre"],
        "LPIPS": result["method"]["lpips"] or "none",
    }
    sections = [page.facts(facts) + page.notes(result["notes"])]
    if animation is not None:
        moving = page.animation(animation.read_bytes(), animation.suffix[1:], f"the paths in time ({animation.name})")
        sections.append(page.section("There and back", page.paragraph(ABOUT), moving))
    lines = [{"path, mean over the pairs": kind} | _cells(values) for kind, values in result["means"].items()]
    sections.append(page.section("Figures", page.table(lines), page.paragraph(EXPLAINED, soft=True)))
    cards = []
    for pair, grid in zip(result["pairs"], grids, strict=True):
        latents = pair["latents"]
        detail = f"{latents['angle_degrees']:.1f}° between the latents"
        if latents["spherical_is_linear"]:
            detail += ", too close to parallel or opposite for a sphere: the spherical path is the linear one"
        lines = [{"path": kind} | _cells(values) for kind, values in pair["paths"].items()]
        picture = page.figure(grid, max_bytes=1_500_000)
        cards.append(page.card(f"{pair['from']} to {pair['to']}", detail, picture, page.table(lines)))
    sections.append(page.section("From image to image", *cards))
    manifest = {key: value for key, value in result.items() if key not in ("pairs", "means", "notes")}
    sections.append(page.section("How this was made", page.manifest(manifest)))
    title = f"{model}: paths between images of {short_name(data['location'], 'images')}"
    page.write(path, page.page(title, sections, subtitle="A first stage, shown by latent-ae eval interpolate."))


def _cells(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the cells of a path's row; without LPIPS there are no lengths."""
    known = {key: name for key, name in MEASURES.items() if key == MIDDLE or values.get(key) is not None}
    return {name: None if (value := values.get(key)) is None else f"{value:.2f}" for key, name in known.items()}
