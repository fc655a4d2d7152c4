"""latent-ae eval likelihood"""

from collections.abc import Sequence

from latent_ae_eval.command import print_result, read_words
from latent_ae_eval.likelihood.settings import LikelihoodSettings

DESCRIPTION = """\
Bound the likelihood that a variational autoencoder gives to images: the ELBO and an importance-weighted bound in bits
per dimension and nats per image, rate and distortion apart. A terminal gets a table, a pipe JSON; result.json,
images.parquet and report.html go into a folder."""
EXAMPLES = """\
example: latent-ae eval likelihood runs/vae /data/cifar10/test.parquet limit=1000 batch_size=64
a tighter bound: latent-ae eval likelihood MODEL DATA samples=1024
a model trained without a likelihood: latent-ae eval likelihood MODEL DATA likelihood=logistic scale=fit"""


def main(argv: Sequence[str]) -> int:
    words = read_words("likelihood", LikelihoodSettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from latent_ae_eval.likelihood.measure import measure_likelihood
    from latent_ae_eval.likelihood.report import likelihood_text

    return print_result(
        words,
        lambda: measure_likelihood(words.model, words.data, words.settings, out=words.out, progress=True),
        words.settings.batch_size,
        likelihood_text,
    )
