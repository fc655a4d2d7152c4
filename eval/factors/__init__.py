"""latent-ae eval factors: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae_eval.factors.settings import FactorsSettings
from latent_ae_eval.job import Figures, Job, figures_at


def factors_figures(result: Mapping[str, Any]) -> Figures:
    """Return the mutual information gap and the total correlation of mean and sample, and the scores of the mean."""
    places = {"mig": "mig", "total_correlation": "total_correlation", "factor_vae_score": "factor_vae_score"}
    places |= {f"dci_{name}": f"dci.{name}" for name in ("disentanglement", "completeness", "informativeness")}
    return figures_at(result["mean"], places, "mean") | figures_at(result["sample"], places, "sample")


JOB = Job(
    "factors",
    FactorsSettings,
    measure="factors",
    text="factors_text",
    format="latent-ae factors 1",
    figures=factors_figures,
    description="""\
Measure how well single latent dimensions represent known factors of the images: mutual information of every dimension
and factor, the mutual information gap (MIG), FactorVAE's score and DCI. DATA needs a table with an integer column for
each factor. A terminal gets a table, a pipe JSON; result.json, traversals.png and report.html are written into a
folder.""",
    examples="""\
example: python -m latent_ae.data.synthetic blobs.parquet --kind blobs
         latent-ae eval factors runs/beta-vae blobs.parquet
some factors only, another image to start from: latent-ae eval factors MODEL DATA factors=[x,y] traversed=100""",
)
