"""latent-ae eval anomaly"""

from collections.abc import Sequence

from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_eval.command import print_result, read_words

DESCRIPTION = """\
Score images by what the first stage fails to reconstruct, with thresholds from normal images, heat maps, and AUROC
where it is known what is normal. A terminal gets a table, a pipe JSON; result.json, images.parquet, pictures.png and
report.html go into a folder."""
EXAMPLES = """\
example: latent-ae eval anomaly runs/bottles bottles/test normal=bottles/held-out
by labels: latent-ae eval anomaly MODEL bottles/test normal=bottles/held-out normal_class=good
with pasted defects: latent-ae eval anomaly runs/quickstart/export photos defects=true"""


def main(argv: Sequence[str]) -> int:
    words = read_words("anomaly", AnomalySettings, argv, description=DESCRIPTION, examples=EXAMPLES)

    from latent_ae_eval.anomaly.measure import find_anomalies
    from latent_ae_eval.anomaly.report import anomaly_text

    return print_result(
        words,
        lambda: find_anomalies(words.model, words.data, words.settings, out=words.out, progress=True),
        words.settings.batch_size,
        anomaly_text,
    )
