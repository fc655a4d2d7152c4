"""latent-ae eval latents: the command's description; settings, measure and report are separate modules."""

from latent_ae_eval.job import Job
from latent_ae_eval.latents.settings import LatentsSettings

JOB = Job(
    "latents",
    LatentsSettings,
    measure="evaluate_latents",
    text="latents_text",
    description="""\
Measure the latents: information and noise of each channel, dead channels, effective rank, outliers, distance from a
Gaussian, power spectrum beside the images', and what scaling, rotating and noising latents does to the decoded image.
A terminal gets a table, a pipe JSON; result.json and latents.html, with a plain sentence on each finding, are written
into a folder.""",
    examples="""\
example: latent-ae eval latents runs/quickstart/export photos
quicker: latent-ae eval latents MODEL /my/photos limit=1000 num_decoded=16
on many GPUs: accelerate launch -m latent_ae eval latents MODEL DATA""",
)
