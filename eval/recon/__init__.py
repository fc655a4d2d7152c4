"""latent-ae eval recon: the command's description; settings, measure and report are separate modules."""

from latent_ae_eval.job import Job
from latent_ae_eval.recon.settings import ReconSettings

JOB = Job(
    "recon",
    ReconSettings,
    measure="evaluate_reconstruction",
    text="recon_text",
    format="latent-ae reconstruction 1",
    images="images.parquet",
    on_command_line={"rows": False},
    description="""\
Measure reconstructions of the posterior's mean and of a sample, overall with intervals and per image, by a named
protocol, beside bicubic resampling. A terminal gets a table, a pipe JSON; result.json, images.parquet, report.html
and pairs.png are written into a folder. The same command again resumes an evaluation that was killed.""",
    examples="""\
example: latent-ae eval recon runs/quickstart/export photos
as VA-VAE measures: latent-ae eval recon MODEL /data/imagenet/val protocol=vavae
on many GPUs: accelerate launch -m latent_ae eval recon MODEL DATA""",
)
