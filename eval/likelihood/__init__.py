"""latent-ae eval likelihood: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae.metrics.labels import number, pair
from latent_ae_eval.job import Figures, Job
from latent_ae_eval.likelihood.settings import LikelihoodSettings


def likelihood_figures(result: Mapping[str, Any]) -> Figures:
    """Return the bounds, and the rate and distortion, which are two sides of one model and have no better direction."""
    figures: Figures = {}
    for part, metrics in result["metrics"].items():
        if part == "rate_levels":  # a list, whose length is the model's own
            continue
        bits = metrics["bits_per_dimension"]
        if (mean := number(bits["mean"])) is not None:
            figures[part, part if part in ("rate", "distortion") else "bits_per_dimension"] = (
                mean,
                pair(bits["interval"]),
            )
    return figures


JOB = Job(
    "likelihood",
    LikelihoodSettings,
    measure="measure_likelihood",
    text="likelihood_text",
    format="latent-ae likelihood 1",
    figures=likelihood_figures,
    images="images.parquet",
    image_column="{part}_bits",
    conditions=("likelihood.kind", "likelihood.discretised"),
    incidental=("batch_size", "likelihood", "discretised"),  # the conditions hold what was found
    description="""\
Bound the likelihood that a variational autoencoder gives to images: the ELBO and an importance-weighted bound in bits
per dimension and nats per image, with rate and distortion. A terminal gets a table, a pipe JSON; result.json,
images.parquet and report.html are written into a folder.""",
    examples="""\
example: latent-ae eval likelihood runs/vae /data/cifar10/test.parquet limit=1000 batch_size=64
a tighter bound: latent-ae eval likelihood MODEL DATA samples=1024
a model trained without a likelihood: latent-ae eval likelihood MODEL DATA likelihood=logistic scale=fit""",
)
