"""latent-ae eval probe: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae_eval.job import Figures, Job, figures_at
from latent_ae_eval.probe.settings import ProbeSettings


def probe_figures(result: Mapping[str, Any]) -> Figures:
    """Return the mean accuracy over the draws of labels, by feature, classifier and number of labels per class."""
    figures: Figures = {}
    for feature, found in result["features"].items():
        for classifier in ("logistic", "nearest"):
            for labels, accuracy in found[classifier].items():
                part = f"{feature}, {classifier}, {labels} labels"
                figures |= figures_at(accuracy, {"accuracy": "mean"}, part)
    return figures


JOB = Job(
    "probe",
    ProbeSettings,
    measure="probe",
    text="probe_text",
    format="latent-ae probe 1",
    figures=probe_figures,
    description="""\
Measure how well simple classifiers read classes from latents when labels are few, beside raw pixels and their
principal components. DATA needs labels: a column of tables, or a folder for each class. A terminal gets a table, a
pipe JSON; result.json and report.html are written into a folder.""",
    examples="""\
example: latent-ae eval probe runs/cifar/export /data/cifar10
fewer labels, another column: latent-ae eval probe MODEL DATA labels_per_class=[5,20] label_column=species""",
)
