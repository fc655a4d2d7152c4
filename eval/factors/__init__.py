"""latent-ae eval factors: what the command says; settings, measure and report are modules of their own."""

from latent_ae_eval.factors.settings import FactorsSettings
from latent_ae_eval.job import Job

JOB = Job(
    "factors",
    FactorsSettings,
    measure="factors",
    text="factors_text",
    description="""\
Measure how far each latent dimension stands for one known factor of the images: mutual information of every dimension
and factor, and the mutual information gap. DATA needs a table with an integer column for each factor. A terminal gets
a table, a pipe JSON; result.json, traversals.png and report.html go into a folder.""",
    examples="""\
example: python -m latent_ae.data.synthetic shapes.parquet
         latent-ae eval factors runs/beta-vae blobs.parquet
some factors only, another image to start from: latent-ae eval factors MODEL DATA factors=[x,y] traversed=100""",
)
