"""The report of the interpolated Fréchet distance: distances, how near neighbours are, pairs and their midpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from latent_ae.metrics.labels import label_of, pair, rounded, short_name, span
from latent_ae.pretrained.weights import how_to_get
from latent_ae.report import page
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.table import Row, aligned

PICTURE_BYTES = 1_000_000
COLUMNS = ("image", "midpoint", "neighbour")
KINDS = {"midpoints": "decoded midpoints, to the originals", "reconstructions": "reconstructions, to the originals"}
NEIGHBOURS = {
    "nearest_cosine": "cosine to the nearest latent",
    "cosine": "cosine to the drawn neighbour",
    "mean_squared_distance": "mean squared difference from it",
    "perplexity": "neighbours among which it was drawn (perplexity)",
}
EXPLAINED = (
    "Lower is better. Small: 95 % intervals over the images. Midpoints are decoded, too, so they can hardly be nearer "
    "than the reconstructions. Compare only values of the same images, size and settings."
)
ABOUT = (
    "A midpoint that looks like an image of the data, and not like two images on top of each other, speaks for latents "
    "between which a diffusion model may sample."
)
SHOWN_IN = "metrics", "intervals", "neighbours", "notes"
"""Parts of a result that the page shows above its manifest."""


class Shown(NamedTuple):
    """A pair that the page shows."""

    row: Mapping[str, Any]
    """Its row of pairs.parquet."""
    image: Tensor
    """(C, H, W) in [-1, 1] on the CPU, like the next two."""
    midpoint: Tensor
    neighbour: Tensor


def ifid_text(result: Mapping[str, Any]) -> str:
    """Return the distances and the mean figures of neighbours as a table for a terminal."""
    rows = [Row("images", f"{result['data']['num_images']:,}")]
    for kind, values in result["metrics"].items():
        for name in (name for name in values if name != "n"):
            label = label_of(name)
            interval = span(name, pair(result["intervals"][kind].get(name)))
            rows.append(Row(f"{label.name}{label.arrow}", rounded(name, values[name]), interval, kind))
    rows += [Row(text, f"{result['neighbours'][name]:.3g}") for name, text in NEIGHBOURS.items()]
    return aligned(rows)


def picture_of(shown: Sequence[Shown]) -> Image.Image:
    """Return pairs as a picture with a row for each: the image, the decoded midpoint and the neighbour."""
    return picture_grid([[one.image, one.midpoint, one.neighbour] for one in shown], COLUMNS)


def write_ifid_report(
    path: Path, result: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]], shown: Mapping[str, Sequence[Shown]]
) -> None:
    """Write report.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        pairs: The rows of pairs.parquet.
        shown: The pairs under each heading.
    """
    model, data = result["model"], result["data"]
    height, width = data["size_px"]
    others = result["neighbours_from"]
    facts = {
        "images": f"{data['num_images']:,}",
        "size": f"{width} x {height} px",
        "latent": " x ".join(map(str, result["latent"])),
        "neighbours from": f"{others['num_images']:,} other images" if others else "the same images",
        "drawn from": result["method"]["neighbours"],
        "seed": result["seed"],
    }
    lines = []
    for kind, heading in KINDS.items():
        values, intervals = result["metrics"][kind], result["intervals"][kind]
        cells = {
            _column(name): page.estimate(rounded(name, value), span(name, pair(intervals.get(name))))
            for name, value in values.items()
            if name != "n"
        }
        lines.append({"": heading} | cells)
    skipped = len(data["skipped"])
    remarks = [*result["notes"], *([f"Unreadable images that were skipped: {skipped:,}."] if skipped else [])]
    sections = [
        page.facts(facts),
        page.section("Distances", page.table(lines), page.paragraph(EXPLAINED, soft=True), page.notes(remarks)),
    ]
    figures = [{"mean over the images": text, "": result["neighbours"][name]} for name, text in NEIGHBOURS.items()]
    cosines = {"nearest": "nearest_cosine", "drawn": "cosine"}
    charts = [
        page.histogram(
            {name: [float(row[key]) for row in pairs] for name, key in cosines.items()}, title="cosine to the neighbour"
        ),
        page.histogram(
            {"neighbours": [float(row["perplexity"]) for row in pairs]}, title="neighbours to draw from (perplexity)"
        ),
    ]
    sections.append(page.section("Neighbours", page.table(figures), page.grid(*charts)))
    about = page.paragraph(ABOUT)
    for heading, group in shown.items():
        cards = [_card(one) for one in group]
        sections.append(page.section(heading, about, *cards))
        about = ""
    manifest = {key: value for key, value in result.items() if key not in SHOWN_IN}
    sections.append(page.section("How this was measured", page.manifest(manifest)))
    if any(note.startswith("FID is missing") for note in result["notes"]):
        sections.append(page.details("How to get iFID", how_to_get("inception")))
    name = short_name(model.get("location"), str(model.get("class")))
    title = f"{name}: midpoints between images of {short_name(data['location'], 'images')}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval ifid."))


def _column(name: str) -> str:
    """Return the heading under which both rows show their distances of one network."""
    return "Inception (iFID and rFID)" if name in ("ifid", "fid") else label_of(name).name


def _card(one: Shown) -> str:
    row = one.row
    detail = (
        f"cosine {row['cosine']:.3f}, mean squared difference {row['mean_squared_distance']:.3g}, drawn with "
        f"probability {row['probability']:.2f}"
    )
    picture = page.figure(picture_of([one]), max_bytes=PICTURE_BYTES)
    return page.card(f"{row['name']} and {row['neighbour_name']}", detail, picture)
