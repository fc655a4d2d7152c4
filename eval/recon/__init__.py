"""latent-ae eval recon: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae_eval.job import Figures, Job, measured_figures
from latent_ae_eval.recon.settings import ReconSettings


def recon_figures(result: Mapping[str, Any]) -> Figures:
    """Return the metrics of each kind of latent. A deterministic model's only reconstruction is its sample, too."""
    figures = measured_figures(result)
    if is_deterministic(result):
        figures |= {("sample", metric): value for (part, metric), value in figures.items() if part == "mode"}
    return figures


def is_deterministic(result: Mapping[str, Any]) -> bool:
    """Return whether samples were to be decoded and the model has none."""
    metrics = result["metrics"]
    return "sample" in result["protocol"].get("latents", ()) and not metrics.get("sample") and bool(metrics.get("mode"))


JOB = Job(
    "recon",
    ReconSettings,
    measure="evaluate_reconstruction",
    text="recon_text",
    format="latent-ae reconstruction 1",
    images="images.parquet",
    figures=recon_figures,
    on_command_line={"rows": False},
    description="""\
Measure reconstructions of the posterior's mode and of a sample, overall with intervals and per image, by a named
protocol, beside bicubic resampling. A terminal gets a table, a pipe JSON; result.json, images.parquet, report.html
and pairs.png are written into a folder. The same command again resumes an evaluation that was killed.""",
    examples="""\
example: latent-ae eval recon runs/quickstart/export photos
as VA-VAE measures: latent-ae eval recon MODEL /data/imagenet/val protocol=vavae
on many GPUs: accelerate launch --multi_gpu --num_processes 8 -m latent_ae eval recon MODEL DATA""",
)
