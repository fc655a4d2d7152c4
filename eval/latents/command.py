"""latent-ae eval latents"""

from collections.abc import Sequence

from latent_ae_eval.command import print_result, read_words
from latent_ae_eval.latents.settings import LatentsSettings

DESCRIPTION = """\
Measure the latents: information and noise of each channel, dead channels, effective rank, outliers, distance from a
Gaussian, power spectrum beside the images', and what scaling, rotating and noising latents does to the decoded image.
A terminal gets a table, a pipe JSON; result.json and latents.html, with a plain sentence on each finding, go into a
folder."""
EXAMPLES = """\
example: latent-ae eval latents runs/quickstart/export photos
quicker: latent-ae eval latents MODEL /my/photos limit=1000 num_decoded=16
on many GPUs: accelerate launch -m latent_ae eval latents MODEL DATA"""


def main(argv: Sequence[str]) -> int:
    words = read_words("latents", LatentsSettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from latent_ae_eval.latents.measure import evaluate_latents
    from latent_ae_eval.latents.report import latents_text

    return print_result(
        words,
        lambda: evaluate_latents(words.model, words.data, words.settings, out=words.out, progress=True),
        words.settings.batch_size,
        latents_text,
    )
