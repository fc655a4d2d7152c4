"""latent-ae eval probe"""

from collections.abc import Sequence

from latent_ae_eval.command import print_result, read_words
from latent_ae_eval.probe.settings import ProbeSettings

DESCRIPTION = """\
Measure how well simple classifiers read classes from latents when labels are few, beside raw pixels and their
principal components. DATA needs labels: a column of tables, or a folder for each class. A terminal gets a table, a
pipe JSON; result.json and report.html go into a folder."""
EXAMPLES = """\
example: latent-ae eval probe runs/cifar/export /data/cifar10
fewer labels, another column: latent-ae eval probe MODEL DATA labels_per_class=[5,20] label_column=species"""


def main(argv: Sequence[str]) -> int:
    words = read_words("probe", ProbeSettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from latent_ae_eval.probe.measure import probe
    from latent_ae_eval.probe.report import probe_text

    return print_result(
        words,
        lambda: probe(words.model, words.data, words.settings, out=words.out, progress=True),
        words.settings.batch_size,
        probe_text,
    )
