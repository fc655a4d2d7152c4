"""latent-ae eval likelihood: the command's description; settings, measure and report are separate modules."""

from latent_ae_eval.job import Job
from latent_ae_eval.likelihood.settings import LikelihoodSettings

JOB = Job(
    "likelihood",
    LikelihoodSettings,
    measure="measure_likelihood",
    text="likelihood_text",
    description="""\
Bound the likelihood that a variational autoencoder gives to images: the ELBO and an importance-weighted bound in bits
per dimension and nats per image, with rate and distortion. A terminal gets a table, a pipe JSON; result.json,
images.parquet and report.html are written into a folder.""",
    examples="""\
example: latent-ae eval likelihood runs/vae /data/cifar10/test.parquet limit=1000 batch_size=64
a tighter bound: latent-ae eval likelihood MODEL DATA samples=1024
a model trained without a likelihood: latent-ae eval likelihood MODEL DATA likelihood=logistic scale=fit""",
)
