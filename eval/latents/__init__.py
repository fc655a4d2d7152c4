"""latent-ae eval latents: the command's description; settings, measure and report are separate modules."""

from collections.abc import Mapping
from typing import Any

from latent_ae_eval.job import Figures, Job, figures_at
from latent_ae_eval.latents.settings import LatentsSettings

HEALTH = {
    "kl_nats_per_dim": "kl_nats_per_dim",
    "effective_rank": "effective_rank",
    "noise_share": "noise_share",
    "outliers": "outliers",
    "excess_kurtosis": "excess_kurtosis",
    "frechet_to_normal": "frechet_to_normal",
    "spectrum_slope": "spectrum.latents.slope",
    "high_share": "spectrum.latents.high_share",
}
"""Where the compared numbers stand in the section `health`, by metric."""


def latents_figures(result: Mapping[str, Any]) -> Figures:
    """Return the health of the latents, and what noise and transforms of latents cost in the decoded image."""
    health = result["health"]
    figures = figures_at(health, HEALTH)
    figures["", "dead_channels"] = float(len(health["dead_channels"])), None
    for row in (row for row in health.get("noise") or () if row["sigma"]):  # without noise it is that of `eval recon`
        figures |= figures_at(row, {"psnr": "psnr"}, f"noise of {row['sigma']:g} stds")
    for row in health.get("transforms") or ():
        figures |= figures_at(row, {"psnr_apart": "psnr_apart"}, str(row["transform"]))
    return figures


JOB = Job(
    "latents",
    LatentsSettings,
    measure="evaluate_latents",
    text="latents_text",
    format="latent-ae latents 1",
    figures=latents_figures,
    description="""\
Measure the latents: information and noise of each channel, dead channels, effective rank, outliers, distance from a
Gaussian, power spectrum beside the images', and what scaling, rotating and noising latents does to the decoded image.
A terminal gets a table, a pipe JSON; result.json and latents.html, with a plain sentence on each finding, are written
into a folder.""",
    examples="""\
example: latent-ae eval latents runs/quickstart/export photos
quicker: latent-ae eval latents MODEL /my/photos limit=1000 num_decoded=16
on many GPUs: accelerate launch --multi_gpu --num_processes 8 -m latent_ae eval latents MODEL DATA""",
)
