"""Measures how well a diffusion model learns a first stage's latents: a small transformer on a fixed budget.

from latent_ae_eval.diffusion.measure import evaluate_diffusion
result = evaluate_diffusion("runs/mine/export", "/data/cifar10", out="mine")
print(result["metrics"]["samples"])
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from latent_ae.data.rng import spread
from latent_ae_eval.diffusion import JOB
from latent_ae_eval.diffusion.report import write_diffusion_page
from latent_ae_eval.features import digests, feature_networks
from latent_ae_eval.generation.base import FAR_STD, LARGE_MEAN, Generation, begin, fingerprint
from latent_ae_eval.generation.flow import CHOICE_SEED, classes_of
from latent_ae_eval.generation.sampling import left_out, samples
from latent_ae_eval.generation.settings import DiffusionSettings


def evaluate_diffusion(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: DiffusionSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train a diffusion model on the latents of `data` and measure how well its samples fit the data.

    With `out`, a call that was killed resumes from its finished latents and its last checkpoint.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module.
        data: `photos`, a folder of images, Parquet or WebDataset files, or a hub id.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, diffusion.html, samples.png, the latents and a pipeline for
            `DiTPipeline.from_pretrained`; None writes nothing.
        progress: Show progress bars.

    Returns:
        The result, JSON-ready.

    Raises:
        UserError: If model or data cannot be loaded or encoded or do not fit, latents are of another model, or the
            training diverges.
    """
    settings = settings or DiffusionSettings()
    with ExitStack() as stack:
        return begin(stack, _Job, "diffusion", model, str(data), settings, out, progress).run()


class _Job(Generation):
    """The evaluation of a diffusion model."""

    def run(self) -> dict[str, Any]:
        """Run the evaluation and return its result."""
        settings, stage = self.settings, self.stage
        self.check_pipeline()
        # first what may be missing, before anything that takes long
        networks, notes = feature_networks(settings.chosen("frechet"), self.device, settings)
        self.check_data()
        flow = self.flow()
        pipeline = self.pipeline(flow.trainer.average)
        self.save(pipeline)
        count = min(settings.chosen("samples"), len(flow.train))
        classes = classes_of(flow.train, spread(CHOICE_SEED, len(flow.train), count)).tolist()
        with self.timed("sample"):
            drawn = self.image_set(samples(pipeline, classes, settings), networks, count, "samples")
        sets, metrics, intervals = self.compared(drawn, networks, count)
        described = flow.describe(settings)
        result = {
            "format": JOB.format,
            "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
            "data": {
                "location": self.data,
                "fingerprints": [fingerprint(part) for part in (flow.train, flow.held_out)],
                "choices": self.choices,
            },
            **described,
            "networks": digests(networks),
            "metrics": metrics,
            "intervals": intervals,
            "notes": [*notes, *_notes(described["latents"]), *left_out(drawn, count), *self.notes(metrics, networks)],
            **self.facts(),
        }
        self.write(result, sets, "diffusion.html", write_diffusion_page)
        return result


def _notes(latents: dict[str, Any]) -> list[str]:
    notes = []
    if abs(latents["scaled_mean"]) > LARGE_MEAN:
        notes.append(
            f"the scaled latents' mean is {latents['scaled_mean']:.2f}, not 0: DiTPipeline scales and does not shift, "
            "so the diffusion model has to learn it; a pipeline that shifts may do better"
        )
    if not 1 / FAR_STD < latents["scaled_std"] < FAR_STD:
        notes.append(
            f"the scaled latents' standard deviation is {latents['scaled_std']:.3g}, not 1: measure the model's "
            "scaling_factor (`latent-ae export` does)"
        )
    return notes
