"""The report of a diffusion model on a first stage's latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latent_ae.metrics.labels import short_name
from latent_ae.report import page
from latent_ae_eval.generation.report import (
    APART_BY_ROOTS,
    distance_rows,
    distance_table,
    how_measured,
    pictures_beside,
)
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.table import Row, aligned


def write_diffusion_page(path: Path, result: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> None:
    """Write diffusion.html, one self-contained file. Raises UserError if it cannot be written.

    Args:
        path: The file.
        result: The content of result.json.
        pictures: A picture of each set of images.
    """
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
                f"also changes the samples' distance. {APART_BY_ROOTS}",
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
                "The trivial predictor knows mean and variance of each latent value and takes them as independent; "
                "1 means that nothing was learned beyond that. It differs between first stages, and so does what is "
                "left to learn, so compare first stages by the Fréchet distance.",
                soft=True,
            ),
        ),
        *how_measured("How this was measured", result, DiffusionSettings),
    ]
    title = f"{model}: a diffusion model of {data}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval diffusion."))


def diffusion_text(result: Mapping[str, Any]) -> str:
    """Return the loss and the distances as a table for a terminal."""
    rows = [Row("loss, relative to the trivial predictor's", f"{result['loss']['relative_loss']:.3f}")]
    return aligned(rows + distance_rows(result))


def _by_time(values: list[float]) -> list[tuple[float, float]]:
    return [((number + 0.5) / len(values), value) for number, value in enumerate(values)]
