"""latent-ae eval probe: the command's description; settings, measure and report are separate modules."""

from latent_ae_eval.job import Job
from latent_ae_eval.probe.settings import ProbeSettings

JOB = Job(
    "probe",
    ProbeSettings,
    measure="probe",
    text="probe_text",
    description="""\
Measure how well simple classifiers read classes from latents when labels are few, beside raw pixels and their
principal components. DATA needs labels: a column of tables, or a folder for each class. A terminal gets a table, a
pipe JSON; result.json and report.html are written into a folder.""",
    examples="""\
example: latent-ae eval probe runs/cifar/export /data/cifar10
fewer labels, another column: latent-ae eval probe MODEL DATA labels_per_class=[5,20] label_column=species""",
)
