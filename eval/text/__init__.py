"""latent-ae eval text: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae.metrics.labels import number, pair
from latent_ae_eval.job import Figures, Job
from latent_ae_eval.text.settings import TextSettings

COMPARED = ("ned_reconstruction", "ned_lost", "ned_agreement", "exact_reconstruction")
"""Metrics that tell models apart; those of the originals are the same for all."""


def text_figures(result: Mapping[str, Any]) -> Figures:
    """Return what was read of the reconstructions, over all crops and by size."""
    groups = {"": result} | {f"{size} px": group for size, group in result["groups"].get("size_px", {}).items()}
    return {
        (part, metric): (value, pair(group["intervals"].get(metric)))
        for part, group in groups.items()
        for metric in COMPARED
        if (value := number(group["metrics"].get(metric))) is not None
    }


JOB = Job(
    "text",
    TextSettings,
    measure="text_fidelity",
    text="text_text",
    format="latent-ae text 1",
    figures=text_figures,
    images="readings.parquet",
    incidental=("batch_size", "num_readers"),
    conditions=("engine",),
    needs_data=False,
    description="""\
Measure how well text survives a first stage: text is rendered in several scripts, sizes and colours, or crops of text
are taken from DATA, and tesseract reads originals and reconstructions. The normalised edit distance (NED) compares
what it reads with what was rendered; with DATA, with what it reads in the originals. Needs tesseract and
pip install '.[text]' in the checkout. A terminal gets a table, a pipe JSON; result.json, readings.parquet, pairs.png
and report.html are written into a folder. The same command again resumes an evaluation that was killed.""",
    examples="""\
example: latent-ae eval text runs/quickstart/export
one script, small letters: latent-ae eval text MODEL scripts=[latin] sizes_px=[8,10,12] repeats=20
crops of documents: latent-ae eval text MODEL crops/ languages=[eng,chi_sim]
on many GPUs: accelerate launch --multi_gpu --num_processes 8 -m latent_ae eval text MODEL""",
)
