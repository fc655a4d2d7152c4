"""The report of samples: pictures, and their distances to images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latent_ae.metrics.labels import label_of, pair, rounded, short_name, span
from latent_ae.report import page
from latent_ae_eval.generation.report import (
    APART_BY_ROOTS,
    PICTURE_BYTES,
    distance_rows,
    distance_table,
    how_measured,
    pictures_beside,
)
from latent_ae_eval.sample.settings import SampleSettings
from latent_ae_eval.table import Row, aligned

EXPLAINED = f"Lower is better. Small: 95 % intervals over the images of both sets. {APART_BY_ROOTS}"


def sample_text(result: Mapping[str, Any]) -> str:
    """Return the prior, and the distances to images if there are any, as a table for a terminal."""
    compared = "reconstructions" in result["metrics"]
    rows = distance_rows(result) if compared else [Row("samples", f"{result['metrics']['samples']['n']:,}")]
    for key, value in bits_of_codes(result).items():
        ends = span(key, pair((result["intervals"].get("codes") or {}).get(key)))
        rows.append(Row(label_of(key).name, rounded(key, value), ends, "codes of held-out images"))
    return f"prior: {result['prior']['method']}\n\n{aligned(rows)}"


def bits_of_codes(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the rate of a transformer over codes that was fitted, bits by key; empty for other priors."""
    return {key: value for key, value in (result["metrics"].get("codes") or {}).items() if key != "n"}


def write_sample_report(path: Path, result: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> None:
    """Write report.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        pictures: A picture of each set of images.
    """
    model = short_name(result["model"].get("location"), str(result["model"].get("class")))
    facts = {
        "prior": result["prior"]["method"],
        "latent": " x ".join(map(str, result["shape"])),
        "samples": f"{result['metrics']['samples']['n']:,}",
        "seed": result["seed"],
    }
    if "recipe" in result:
        recipe, loss = result["recipe"], result["loss"]
        facts |= {
            "transformer": f"{recipe['parameters'] / 1e6:.1f} M parameters",
            "fitted in": f"{recipe['steps']:,} steps of {recipe['batch_size']}",
            "its loss": f"{loss['relative_loss']:.3f} of the trivial predictor's",
        }
    facts |= {label_of(key).name: rounded(key, value) for key, value in bits_of_codes(result).items()}
    sections, remarks = [page.facts(facts)], page.notes(result["notes"])
    if len(pictures) > 1:
        explained = page.paragraph(EXPLAINED, soft=True)
        sections.append(page.section("Fréchet distances", distance_table(result), explained, remarks))
        sections.append(page.section("Pictures", pictures_beside(pictures)))
    else:
        sections.append(page.section("Samples", page.figure(pictures["samples"], max_bytes=PICTURE_BYTES), remarks))
    sections += how_measured("How this was made", result, SampleSettings)
    page.write(
        path, page.page(f"{model}: samples", sections, subtitle="A first stage, shown by latent-ae eval sample.")
    )
