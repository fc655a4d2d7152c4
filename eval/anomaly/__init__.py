"""latent-ae eval anomaly: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae.metrics.labels import number, pair
from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_eval.job import Figures, Job


def anomaly_figures(result: Mapping[str, Any]) -> Figures:
    """Return the area under the curve of each score, where it is known which images are normal."""
    return {
        (name, "auroc"): (area, pair(found["interval"]))
        for name, found in result["scores"].items()
        if (area := number(found.get("auroc"))) is not None
    }


JOB = Job(
    "anomaly",
    AnomalySettings,
    measure="find_anomalies",
    text="anomaly_text",
    format="latent-ae anomaly 1",
    incidental=("batch_size", "normal", "normal_split"),
    conditions=("normal.fingerprint",),
    figures=anomaly_figures,
    description="""\
Score images by what the first stage fails to reconstruct, with thresholds from normal images, heat maps, and AUROC if
it is known which images are normal. A density that was trained with MODEL (density.components) scores, too. mixture=4
adds one that is fitted to latents and errors, neighbours=4000 the distance of patches to those of normal images; both
need normal=DATA. A terminal gets a table, a pipe JSON; result.json, images.parquet, pictures.png and report.html are
written into a folder.""",
    examples="""\
example: latent-ae eval anomaly runs/bottles bottles/test normal=bottles/held-out
by labels: latent-ae eval anomaly MODEL bottles/test normal=bottles/held-out normal_class=good
with pasted defects: latent-ae eval anomaly runs/quickstart/export photos defects=true""",
)
