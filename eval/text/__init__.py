"""latent-ae eval text: the command's description; settings, measure and report are separate modules."""

from latent_ae_eval.job import Job
from latent_ae_eval.text.settings import TextSettings

JOB = Job(
    "text",
    TextSettings,
    measure="text_fidelity",
    text="text_text",
    needs_data=False,
    description="""\
Measure how well text survives a first stage: text is rendered in several scripts, sizes and colours, or crops of text
are taken from DATA, and tesseract reads originals and reconstructions. The normalised edit distance (NED) compares
what it reads with what was rendered; with DATA, with what it reads in the originals. Needs tesseract and
pip install 'latent-ae[text]'. A terminal gets a table, a pipe JSON; result.json, readings.parquet, pairs.png and
report.html are written into a folder. The same command again resumes an evaluation that was killed.""",
    examples="""\
example: latent-ae eval text runs/quickstart/export
one script, small letters: latent-ae eval text MODEL scripts=[latin] sizes_px=[8,10,12] repeats=20
crops of documents: latent-ae eval text MODEL crops/ languages=[eng,chi_sim]
on many GPUs: accelerate launch -m latent_ae eval text MODEL""",
)
