"""latent-ae eval diffusion: the command's description; settings, measure and report are separate modules."""

from functools import partial

from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.job import Job, measured_figures

JOB = Job(
    "diffusion",
    DiffusionSettings,
    measure="evaluate_diffusion",
    text="diffusion_text",
    format="latent-ae diffusion 1",
    batch_key="batch_size",
    figures=partial(measured_figures, parts=("samples", "reconstructions")),  # the others are the same for every model
    conditions=("recipe",),
    incidental=("latents", "held_out_latents", "images_at_a_time"),
    description="""\
Train a small diffusion transformer (DiT) by flow matching on the first stage's latents, on a fixed budget and seed,
sample from it through a stock DiTPipeline, and measure the Fréchet distance between samples and data, beside that of
reconstructions and of held-out images. preset=cpu: 32 px images, under eight minutes on two cores. preset=gpu: 256
px. A terminal gets a table, a pipe JSON; result.json, diffusion.html, samples.png, latents and the pipeline are
written into a folder. The same command again resumes a run that was killed, from its finished latents and a checkpoint
every minute; samples are drawn again. One process.""",
    examples="""\
example: latent-ae eval diffusion runs/mine/export /data/cifar10 --out mine
with existing latents: latent-ae encode MODEL DATA z/train part=train; latent-ae encode MODEL DATA z/val part=held_out
  latent-ae eval diffusion MODEL DATA latents=z/train held_out_latents=z/val""",
)
