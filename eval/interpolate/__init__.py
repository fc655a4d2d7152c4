"""latent-ae eval interpolate: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae_eval.interpolate.settings import InterpolateSettings
from latent_ae_eval.job import Figures, Job, figures_at


def interpolate_figures(result: Mapping[str, Any]) -> Figures:
    """Return the means over the pairs of images, by kind of path."""
    figures: Figures = {}
    for kind, means in result["means"].items():
        figures |= figures_at(means, {metric: metric for metric in means}, kind)
    return figures


JOB = Job(
    "interpolate",
    InterpolateSettings,
    measure="interpolate",
    text="interpolation_text",
    format="latent-ae interpolation 1",
    figures=interpolate_figures,
    incidental=("batch_size", "animation", "frames"),
    description="""\
Show what lies between images: linear and spherical paths through the latents beside a cross-fade of the pixels. A
terminal gets a table, a pipe JSON; result.json, grid.png, an animation and report.html are written into a folder.""",
    examples="""\
example: latent-ae eval interpolate runs/quickstart/export photos
chosen images, as a GIF: latent-ae eval interpolate MODEL DATA images=[cat.png,dog.png] animation=gif""",
)
