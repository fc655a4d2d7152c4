"""latent-ae eval interpolate"""

from collections.abc import Sequence

from latent_ae_eval.command import print_result, read_words
from latent_ae_eval.interpolate.settings import InterpolateSettings

DESCRIPTION = """\
Show what lies between images: linear and spherical paths through the latents beside a cross-fade of the pixels. A
terminal gets a table, a pipe JSON; result.json, grid.png, an animation and report.html go into a folder."""
EXAMPLES = """\
example: latent-ae eval interpolate runs/quickstart/export photos
chosen images, as a GIF: latent-ae eval interpolate MODEL DATA images=[cat.png,dog.png] animation=gif"""


def main(argv: Sequence[str]) -> int:
    words = read_words("interpolate", InterpolateSettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from latent_ae_eval.interpolate.measure import interpolate
    from latent_ae_eval.interpolate.report import interpolation_text

    return print_result(
        words,
        lambda: interpolate(words.model, words.data, words.settings, out=words.out, progress=True),
        words.settings.batch_size,
        interpolation_text,
    )
