"""latent-ae eval recon: what the command says; settings, measure and report are modules of their own."""

from latent_ae_eval.job import Job
from latent_ae_eval.recon.settings import ReconSettings

JOB = Job(
    "recon",
    ReconSettings,
    measure="evaluate_reconstruction",
    text="recon_text",
    on_command_line={"rows": False},
    description="""\
Measure reconstructions of the posterior's mean and of a sample, overall with intervals and per image, by a named
protocol, beside bicubic resampling. A terminal gets a table, a pipe JSON; result.json, images.parquet, report.html
and pairs.png go into a folder. A run that was killed goes on when started again.""",
    examples="""\
example: latent-ae eval recon runs/quickstart/export photos
as VA-VAE measures: latent-ae eval recon MODEL /data/imagenet/val protocol=vavae
on many GPUs: accelerate launch -m latent_ae eval recon MODEL DATA""",
)
