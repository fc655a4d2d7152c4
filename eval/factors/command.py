"""latent-ae eval factors"""

from collections.abc import Sequence

from latent_ae_eval.command import print_result, read_words
from latent_ae_eval.factors.settings import FactorsSettings

DESCRIPTION = """\
Measure how far each latent dimension stands for one known factor of the images: mutual information of every dimension
and factor, and the mutual information gap. DATA needs a table with an integer column for each factor. A terminal gets
a table, a pipe JSON; result.json, traversals.png and report.html go into a folder."""
EXAMPLES = """\
example: python -m latent_ae.data.synthetic shapes.parquet
         latent-ae eval factors runs/beta-vae blobs.parquet
some factors only, another image to start from: latent-ae eval factors MODEL DATA factors=[x,y] traversed=100"""


def main(argv: Sequence[str]) -> int:
    words = read_words("factors", FactorsSettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from latent_ae_eval.factors.measure import factors
    from latent_ae_eval.factors.report import factors_text

    return print_result(
        words,
        lambda: factors(words.model, words.data, words.settings, out=words.out, progress=True),
        words.settings.batch_size,
        factors_text,
    )
