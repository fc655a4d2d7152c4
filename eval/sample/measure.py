"""Decodes latents drawn from a prior: the model's own, or a Gaussian, a flow or a transformer fitted to its latents.

from latent_ae_eval.sample.measure import sample
result = sample("runs/mine/export", "/data/cifar10", "flow", out="samples")
print(result["metrics"]["samples"])
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, ModelMixin
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.data.rng import decoder_generators, spread
from latent_ae.latents.cache import LatentCache, open_latents
from latent_ae.models.codes import WITH_CODES, has_codes
from latent_ae.models.registry import scaling_of
from latent_ae_eval.features import FeatureNetwork, digests, feature_networks
from latent_ae_eval.generation.base import FAR_STD, Generation, begin, fingerprint
from latent_ae_eval.generation.flow import CHOICE_SEED, STATISTICS, flow_batch, raw_latents
from latent_ae_eval.generation.sampling import GRID, finite_pixels, generators, left_out, samples
from latent_ae_eval.sample import JOB
from latent_ae_eval.sample.codes import CodeImages, CodeTrainer, CodeValidation, code_samples
from latent_ae_eval.sample.report import write_sample_report
from latent_ae_eval.sample.settings import CODE_PRIOR, FITTED, OF_FLOWS, PRIORS, SampleSettings
from latent_ae_eval.sample.transformer import CodeTransformer

MOST_VALUES, MOST_LATENTS = 4096, 10_000
"""Largest number of values of a latent, and of images, to which a Gaussian with a full covariance is fitted."""
NO_CLASS = 0
"""The class of all samples of a transformer without classes."""
OVER_CODES = "a transformer over the codes"
"""What results call a transformer over codes."""
RATE = (
    "bits of codes: minus the log-likelihood of the codes of held-out images. Per dimension it is divided by the "
    "number of an image's values: the rate of a lossy code, and no likelihood of images"
)


def sample(
    model: str | Path | nn.Module,
    data: str | Path | None = None,
    prior: str | Path | None = None,
    settings: SampleSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Draw latents from a prior and decode them; with `data`, measure how far the images are from those of `data`.

    With `out`, a fit that was killed resumes from its last checkpoint.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module.
        data: `photos`, a folder of images, Parquet or WebDataset files, or a hub id; None compares with nothing.
        prior: Replaces the prior of the settings.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, samples.png and report.html, and for a fitted flow the latents and a pipeline for
            `DiTPipeline.from_pretrained`, or the latents and the transformer over codes; None writes nothing.
        progress: Show progress bars.

    Returns:
        The result, JSON-ready.

    Raises:
        UserError: If model or data cannot be loaded or encoded, the model does not have the prior, or a training
            diverges.
    """
    settings = settings or SampleSettings()
    if prior is not None:
        settings = settings.model_copy(update={"prior": str(prior)})
    with ExitStack() as stack:
        return begin(stack, _Job, "sample", model, "" if data is None else str(data), settings, out, progress).run()


class _Job(Generation):
    """The evaluation of samples from a prior."""

    settings: SampleSettings

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Run the evaluation and return its result."""
        settings, stage = self.settings, self.stage
        side = self._side()
        networks: dict[str, FeatureNetwork] = {}
        notes: list[str] = []
        count = min(settings.chosen("samples"), GRID**2)
        if self.data:
            networks, notes = feature_networks(settings.chosen("frechet"), self.device, settings)
            self.check_data()
            count = min(settings.chosen("samples"), len(self.source("train")))
        elif settings.prior in FITTED:
            raise UserError(f"prior: {settings.prior} is fitted to the latents of images; give DATA")
        about: dict[str, Any] = {}
        of_codes: tuple[dict[str, Any], dict[str, list[float]]] | None = None
        kind = settings.prior
        if settings.prior == "normal":
            batches, method = self._decoded(self._own_prior(), side, count), self._own_name()
            notes += self._scale_notes()
        elif settings.prior == "gaussian":
            train = self.latents("train")
            self.check_images(train, "train")
            about = {"latents": {"shape": list(train.shape), "train": len(train), "classes": 0}}
            about["fingerprints"] = [fingerprint(train)]
            batches = self._decoded(gaussian_prior(train, settings.seed), side, count)
            method = "a Gaussian with the mean and covariance of the latents"
        elif settings.prior == "codes":
            transformer, about, of_codes = self._fitted_codes()
            batches, method = self._decoded_codes(transformer, count), OVER_CODES
        elif settings.prior == "flow" or not (Path(settings.prior).expanduser() / CODE_PRIOR).is_dir():
            self.check_pipeline()
            kind = "flow"
            pipeline, about = self._fitted() if settings.prior == kind else self._loaded_flow(side)
            batches = samples(pipeline, [NO_CLASS] * count, settings)
            method = "a flow fitted to the latents"
        else:
            kind = "codes"
            transformer, about = self._loaded(side, CODE_PRIOR, CodeTransformer)
            batches, method = self._decoded_codes(transformer, count), OVER_CODES
        with self.timed("sample"):
            sets = {"samples": self.image_set(batches, networks, count, "samples")}
        notes += left_out(sets["samples"], count)
        metrics: dict[str, dict[str, Any]] = {"samples": {"n": sets["samples"].size}}
        intervals: dict[str, dict[str, list[float]]] = {}
        if self.data:
            sets, metrics, intervals = self.compared(sets["samples"], networks, count)
            notes += self.notes(metrics, networks)
        if of_codes is not None:
            metrics["codes"], intervals["codes"] = of_codes
            notes.append(RATE)
        result = {
            "format": JOB.format,
            "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
            "data": {
                "location": self.data or None,
                "fingerprints": about.pop("fingerprints", []),
                "choices": self.choices,
            },
            "prior": {"kind": kind, "method": method},
            "shape": [stage.latent_channels, side, side],
            **about,
            "networks": digests(networks),
            "metrics": metrics,
            "intervals": intervals,
            "notes": notes,
            **self.facts(),
        }
        self.write(result, sets, "report.html", write_sample_report)
        return result

    def _side(self) -> int:
        """Return the side of a latent, px."""
        resolution, factor = self.settings.chosen("resolution"), self.stage.factor
        if self.stage.side is not None and resolution != self.stage.side:
            raise UserError(f"resolution: {self.stage.name} makes images of {self.stage.side} px alone; use that")
        if resolution % factor:
            near = max(1, resolution // factor) * factor
            raise UserError(f"resolution: {resolution} is not a multiple of the model's factor {factor}; use {near}")
        return int(resolution // factor)

    def _decoded(self, latents: Callable[[Tensor], Tensor], side: int, count: int) -> Iterator[Tensor]:
        """Yield batches of samples, (N, C, H, W) uint8 on the CPU; sample i is a function of the seed and i."""
        shape, size = (self.stage.latent_channels, side, side), self.settings.images_at_a_time
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            drawn = generators(self.settings.seed, numbers)
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in drawn])
            begun = decoder_generators(self.settings.seed, numbers)
            yield finite_pixels(self.stage.decode(latents(noise.to(self.device)), begun).cpu())

    @property
    def has_own_prior(self) -> bool:
        """Whether the model has a method `sample_prior` that turns noise into latents of its prior."""
        return hasattr(self.stage.module, "sample_prior")

    def _own_prior(self) -> Callable[[Tensor], Tensor]:
        """Return a function that turns noise into latents of the prior with which the model was trained."""
        assert self.stage.module is not None
        if not (self.stage.random or self.has_own_prior):
            raise UserError(
                f"prior: {self.stage.name} was trained without one; prior=flow or prior=gaussian"
                f"{' or prior=codes' if has_codes(self.stage.module) else ''} fits one to the latents of DATA"
            )
        return self.stage.module.sample_prior if self.has_own_prior else lambda noise: noise

    def _own_name(self) -> str:
        return "the model's own prior" if self.has_own_prior else "N(0, I) in raw latent units"

    def _scale_notes(self) -> list[str]:
        assert self.stage.module is not None
        scaling = scaling_of(self.stage.module)
        std = (sum(scaling.std) / len(scaling.std) if scaling.std else 1.0) / scaling.factor
        if self.has_own_prior or 1 / FAR_STD < std < FAR_STD:
            return []
        told_by = "latents_std says" if scaling.std else "scaling_factor says"
        return [
            f"the model's {told_by} that its latents' standard deviation is {std:.3g}, not 1: "
            "N(0, I) is far from what it decodes well; prior=flow fits a prior to its latents"
        ]

    def _fitted(self) -> tuple[DiTPipeline, dict[str, Any]]:
        with torch.enable_grad():
            flow = self.flow()
        assert self.stage.module is not None
        pipeline = self.pipeline(flow.trainer.average)
        self.save(pipeline)
        return pipeline, flow.describe(self.settings) | {
            "fingerprints": [fingerprint(flow.train), fingerprint(flow.held_out)]
        }

    def _fitted_codes(
        self,
    ) -> tuple[CodeTransformer, dict[str, Any], tuple[dict[str, Any], dict[str, list[float]]]]:
        """Train a transformer over codes, and return it, what a result tells of it, and its rate with intervals."""
        settings, module = self.settings, self.stage.module
        assert module is not None
        if not has_codes(module):
            raise UserError(
                f"prior: codes is for latents that are codes ({', '.join(WITH_CODES)}), and {self.stage.name} has "
                "none: take prior=flow or prior=gaussian"
            )
        for key, folder in (("latents", settings.latents), ("held_out_latents", settings.held_out_latents)):
            # before the others are encoded
            if folder and (stored := open_latents(folder).manifest["latent"]["stored"]) != "fp32":
                raise UserError(
                    f"{key}: {folder} holds latents in {stored}, whose rounding can change codes; encode them with "
                    "stored=fp32"
                )
        caches = self.both_latents()
        train, held_out = (CodeImages(module, cache, self.device) for cache in caches)
        values = int(self.stage.channels or 3) * int(settings.chosen("resolution")) ** 2
        validation = CodeValidation(held_out, train, settings, values)
        trainer = CodeTrainer(train, settings, self.device)
        with torch.enable_grad():
            curve = self.fit(trainer, validation, f"{self.key(*caches)} codes")
        validation.measure(trainer.average, self.device)  # a resumed training may have measured it before
        try:
            trainer.average.save_pretrained(self.folder / CODE_PRIOR)
        except OSError as error:
            raise UserError(f"--out: cannot write {self.folder}: {error.strerror or error}") from error
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        recipe = {key: value for key, value in settings.recipe().items() if key not in OF_FLOWS}
        about = {
            "fingerprints": [fingerprint(cache) for cache in caches],
            "latents": {"shape": list(caches[0].shape), "train": len(train), "held_out": len(held_out), "classes": 0},
            "codes": {"sides": train.sides, "number": train.codes},
            "recipe": recipe | {"parameters": parameters},
            "validated_on": validation.choice,
            "loss": {key: value for key, value in curve[-1].items() if key not in ("step", "images", "train_loss")},
            "curve": curve,
        }
        return trainer.average, about, validation.metrics(settings.seed)

    def _decoded_codes(self, transformer: CodeTransformer, count: int) -> Iterator[Tensor]:
        """Yield batches of images decoded from samples of a transformer, (N, C, H, W) uint8 on the CPU."""
        for latents in code_samples(transformer, self.stage.module, count, self.settings, self.device):
            yield finite_pixels(self.stage.decode(latents).cpu())

    def _loaded_flow(self, side: int) -> tuple[DiTPipeline, dict[str, Any]]:
        transformer, about = self._loaded(side, "pipeline/transformer", DiTTransformer2DModel)
        return self.pipeline(transformer), about

    def _loaded(self, side: int, name: str, kind: type[ModelMixin]) -> tuple[Any, dict[str, Any]]:
        """Load a flow, or a transformer over codes, that was fitted before.

        Args:
            side: Side of the latents.
            name: Its place in the folder.
            kind: Its class.

        Returns:
            The transformer, and what the folder's result tells of it.
        """
        folder = Path(self.settings.prior).expanduser()
        try:
            known = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            keys = ("latents", "recipe", "loss", "curve", *(["codes"] if kind is CodeTransformer else []))
            about = {key: known[key] for key in keys}
            classes, sha256 = about["latents"]["classes"], known["model"]["sha256"]
            transformer: Any = kind.from_pretrained(folder / name)
            fitted = about["latents"]["shape"][-1]
        except Exception as error:  # a file is missing, damaged or something else
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"prior: {folder} holds no fitted flow or transformer ({reason}); `latent-ae eval sample MODEL DATA "
                f"prior=flow --out {folder}` writes one, and one of {', '.join(PRIORS)} needs none"
            ) from error
        if sha256 != self.stage.sha256:
            raise UserError(f"prior: {folder} was fitted to latents of another model ({known['model']['location']})")
        if classes:
            raise UserError(
                f"prior: {folder} is a model of {classes} classes, and a prior has none; fit one with prior=flow"
            )
        if fitted != side:
            px = fitted * self.stage.factor
            raise UserError(f"resolution: {folder} was fitted at {px} px; set resolution={px}")
        return transformer.to(self.device).eval(), about


def gaussian_prior(train: LatentCache, seed: int) -> Callable[[Tensor], Tensor]:
    """Fit a Gaussian with a full covariance to latents and return a function that turns noise into its samples.

    Args:
        train: The latents, of which up to MOST_LATENTS posterior samples are used.
        seed: Seed of these samples.

    Returns:
        A function of (N, C, h, w) standard normal noise that returns raw latents of the same shape.

    Raises:
        UserError: If a latent has more than MOST_VALUES values.
    """
    values = math.prod(train.shape)
    if values > MOST_VALUES:
        raise UserError(
            f"prior: gaussian fits a full covariance to up to {MOST_VALUES:,} values, and these latents have "
            f"{values:,}; take prior=flow"
        )
    rows = spread(CHOICE_SEED, len(train), MOST_LATENTS)
    numbers = range(STATISTICS, STATISTICS + len(rows))
    flat = raw_latents(train, flow_batch(train, seed, numbers, rows, torch.zeros(len(rows))).x.double()).flatten(1)
    mean = flat.mean(0)
    # a root of the covariance, which may not have full rank
    power, axes = torch.linalg.eigh(torch.cov(flat.T).reshape(values, values))
    root = axes * power.clamp(min=0).sqrt()

    def latents(noise: Tensor) -> Tensor:
        return (mean + noise.flatten(1).double().cpu() @ root.T).float().view_as(noise).to(noise.device)

    return latents
