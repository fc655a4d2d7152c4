"""latent-ae eval sample: the command's description; settings, measure and report are separate modules."""

from functools import partial

from latent_ae_eval.job import Job, measured_figures
from latent_ae_eval.sample.settings import SampleSettings

JOB = Job(
    "sample",
    SampleSettings,
    measure="sample",
    text="sample_text",
    format="latent-ae sample 1",
    needs_data=False,
    batch_key="images_at_a_time",
    # the others are the same for every model
    figures=partial(measured_figures, parts=("samples", "reconstructions", "codes")),
    conditions=("recipe", "prior.kind"),
    incidental=("latents", "held_out_latents", "images_at_a_time", "prior"),  # its kind is a condition
    description="""\
Draw latents from a prior and decode them: prior=normal, the one that a variational autoencoder was trained with;
prior=gaussian, with the mean and covariance of the latents of DATA; prior=flow, a small transformer trained by flow
matching on them; prior=codes, one that predicts codes one after another (VQModel, DiscreteVAE, VQVAE2), with its bits
per dimension; prior=DIR, a flow or a transformer over codes fitted before. With DATA the Fréchet distance between
samples and images is measured, beside that of reconstructions and of held-out images. A terminal gets a table, a pipe
JSON; result.json, samples.png and report.html are written into a folder, and for a fitted prior its latents and a stock
DiTPipeline or the transformer over codes.""",
    examples="""\
example: latent-ae eval sample runs/vae/export
compared with images: latent-ae eval sample runs/vae/export /data/cifar10 prior=flow --out samples
the same prior again: latent-ae eval sample runs/vae/export prior=samples seed=1""",
)
