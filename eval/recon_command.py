"""latent-ae eval recon"""

from collections.abc import Sequence

from .command import print_result, read_words
from .config import ReconSettings

DESCRIPTION = """\
Measure reconstructions of the posterior's mean and of a sample, overall with intervals and per image, by a named
protocol, beside bicubic resampling. JSON goes to stdout; result.json, images.parquet, report.html and pairs.png into a
folder. A run that was killed goes on when started again."""
EXAMPLES = """\
example: latent-ae eval recon runs/quickstart/export photos
as VA-VAE measures: latent-ae eval recon MODEL /data/imagenet/val protocol=vavae
on many GPUs: accelerate launch -m latent_ae eval recon MODEL DATA"""


def main(argv: Sequence[str]) -> int:
    words = read_words("recon", ReconSettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from .recon import evaluate_reconstruction

    return print_result(
        lambda: evaluate_reconstruction(
            words.model, words.data, words.settings, out=words.out, progress=True, rows=False
        ),
        words.settings.batch_size,
    )
