"""latent-ae eval recon"""

from collections.abc import Sequence

from latent_ae_eval.command import print_result, read_words
from latent_ae_eval.recon.settings import ReconSettings

DESCRIPTION = """\
Measure reconstructions of the posterior's mean and of a sample, overall with intervals and per image, by a named
protocol, beside bicubic resampling. A terminal gets a table, a pipe JSON; result.json, images.parquet, report.html
and pairs.png go into a folder. A run that was killed goes on when started again."""
EXAMPLES = """\
example: latent-ae eval recon runs/quickstart/export photos
as VA-VAE measures: latent-ae eval recon MODEL /data/imagenet/val protocol=vavae
on many GPUs: accelerate launch -m latent_ae eval recon MODEL DATA"""


def main(argv: Sequence[str]) -> int:
    words = read_words("recon", ReconSettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from latent_ae_eval.recon.measure import evaluate_reconstruction
    from latent_ae_eval.recon.report import recon_text

    return print_result(
        words,
        lambda: evaluate_reconstruction(
            words.model, words.data, words.settings, out=words.out, progress=True, rows=False
        ),
        words.settings.batch_size,
        recon_text,
    )
