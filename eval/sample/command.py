"""latent-ae eval sample"""

from collections.abc import Sequence

from latent_ae_eval.command import print_result, read_words
from latent_ae_eval.sample.settings import SampleSettings

DESCRIPTION = """\
Draw latents from a prior and decode them: prior=normal, the one that a variational autoencoder was trained with;
prior=gaussian, of the mean and covariance of the latents of DATA; prior=flow, a small transformer trained by flow
matching on them; prior=DIR, a flow fitted before. With DATA the Frechet distance between samples and images is
measured, beside that of reconstructions and of held-out images. A terminal gets a table, a pipe JSON; result.json,
samples.png and report.html go into a folder, and for a fitted flow its latents and a stock DiTPipeline."""
EXAMPLES = """\
example: latent-ae eval sample runs/vae/export
compared with images: latent-ae eval sample runs/vae/export /data/cifar10 prior=flow --out samples
the same prior again: latent-ae eval sample runs/vae/export prior=samples seed=1"""


def main(argv: Sequence[str]) -> int:
    words = read_words("sample", SampleSettings, argv, description=DESCRIPTION, examples=EXAMPLES, needs_data=False)

    from latent_ae_eval.sample.measure import sample
    from latent_ae_eval.sample.report import sample_text

    return print_result(
        words,
        lambda: sample(words.model, words.data or None, settings=words.settings, out=words.out, progress=True),
        words.settings.images_at_a_time,
        sample_text,
    )
