"""Bounds the likelihood that a variational autoencoder gives to images: ELBO, rate, distortion and a tighter bound.

from latent_ae_eval.likelihood.measure import measure_likelihood
result = measure_likelihood("runs/vae", "cifar10/test.parquet")
print(result["metrics"]["importance_bound"]["bits_per_dimension"])
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.held_out import HeldOutImage
from latent_ae.data.images import kind_of, open_encoded
from latent_ae.data.rng import spread
from latent_ae.data.sources import Encoded, StoredImages, StreamSource, fingerprint
from latent_ae.metrics.similarity import FEWEST, bootstrap_interval
from latent_ae.models.likelihood import LIKELIHOODS, SCALED, Likelihood, LikelihoodKind, bits_per_dimension
from latent_ae.models.loading import FirstStage
from latent_ae.progress import progress_bar
from latent_ae.provenance import versions
from latent_ae.text import printable
from latent_ae_eval.inputs import opened_data, report_skipped
from latent_ae_eval.jobs import batches, images_for, opened, write_json, written_into
from latent_ae_eval.likelihood import JOB
from latent_ae_eval.likelihood.bounds import FIT_VALUES, Estimator, curve_sizes, fitted_scale
from latent_ae_eval.likelihood.report import Shown, findings, write_likelihood_report
from latent_ae_eval.likelihood.settings import LikelihoodSettings

FIT = 5
"""One in this many images, spread over all, fits the scale and is not measured."""
METHOD = {
    "elbo": "minus distortion and rate (Kingma and Welling 2014)",
    "importance_bound": "log of the mean weight of K posterior samples (Burda et al. 2016, eq. 8); "
    "with fewer samples the mean over disjoint groups of the K",
    "weight": "p(x | z) p(z) / q(z | x), its logarithm summed in float64",
    "distortion": "minus log p(x | z), mean over the samples",
    "rate": "KL(q(z | x) || p(z)) in closed form where there is one, mean over the samples",
    "effective_samples": "squared sum of the weights over the sum of their squares (Kong 1992)",
    "bits_per_dimension": "of an image over its pixels and channels, then the mean over images",
    "intervals": "95 %, bootstrap over images",
}


@float32_arithmetic(repeatable=True)
def measure_likelihood(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: LikelihoodSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure bounds on log p(x), with means over the images of `data` and intervals. Runs on one process.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module, with a random posterior.
        data: `photos`, a folder of images, Parquet or Arrow files, or a hub id.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, images.parquet and report.html; None writes nothing.
        progress: Show progress bars.

    Returns:
        The result, JSON-ready.

    Raises:
        UserError: If model or data cannot be loaded, the model has no random posterior, the settings do not fit its
            likelihood, or several processes were launched.
    """
    settings = settings or LikelihoodSettings()
    device, stage, folder = opened("likelihood", model, settings, out)
    if not stage.random:
        raise UserError(
            f"eval likelihood needs a posterior to sample, and the latents of {stage.name} are not random; eval recon "
            "measures its reconstructions"
        )
    source, choice = opened_data(str(data), settings)
    assert not isinstance(source, StreamSource), "jobs do not open streams"
    known, notes = stage.likelihood, list[str]()
    trained: LikelihoodKind = known.kind if known else _unrecorded(stage)
    if known is None and settings.likelihood == "auto":
        notes.append(f"no likelihood.json lies beside the model's weights, so the likelihood is taken to be {trained}")
    kind = trained if settings.likelihood == "auto" else settings.likelihood
    if kind not in SCALED and settings.scale != "auto":
        raise UserError(
            f"scale: the model was trained with {kind}, which takes no scale; leave it out or set likelihood"
        )
    if kind != "gaussian" and not settings.discretised:
        raise UserError(f"discretised: the model was trained with {kind}, and only gaussian has both; leave it out")
    estimator = Estimator(stage, kind, seed=settings.seed, discretised=settings.discretised, device=device)
    work = _Work(stage, source, settings, str(data), device, progress)
    measured, scale, scale_from = np.arange(len(source)), None, None
    if kind in SCALED:
        if isinstance(settings.scale, float):
            scale, scale_from = settings.scale, "given"
        elif settings.scale == "auto" and known is not None and known.kind == kind:
            scale, scale_from = known.scale, "training"
        else:
            if len(source) < 2:
                raise UserError(
                    f"scale: {data} holds one image, and scale=fit needs two: one in {FIT} fits the scale and does not "
                    "count; give more images or a number"
                )
            fit = spread(settings.seed, len(source), -(-len(source) // FIT))
            measured = np.delete(measured, fit)
            scale, scale_from = work.fitted(estimator, fit), "fitted"
            notes.append(
                f"the scale {scale:.4g} was fitted to {len(fit):,} of the images, one in {FIT}, which do not count"
            )
    elif kind == "bernoulli":
        notes.append(
            "bernoulli: the bits are of binary images, each pixel drawn once with the probability of its brightness; "
            "they cannot be compared with the bits of 256 levels"
        )
    rows = work.measured(estimator, measured, scale)
    finite = [row for row in rows if np.isfinite(row["curve"]).all()]
    if len(finite) < len(rows):
        notes.append(f"images left out, because the model gives NaN or infinity: {len(rows) - len(finite):,}")
    if not finite:
        why = "the model gives NaN or infinity for all of them" if rows else (work.skipped or ["there are none"])[0]
        raise UserError(f"{data}: no image to measure; {why}")
    if off := sum(row.pop("off_level") for row in finite):
        text = "values between levels of 8 bits (more bits, or resized): the probability is that of a level's width"
        notes += [f"{off:,} images have {text} around them"] if kind != "bernoulli" and settings.discretised else []
    lossy = Counter(found for row in finite if (found := row.pop("lossy")))
    if lossy and kind != "bernoulli":
        kinds = ", ".join(f"{count:,} of {len(finite):,} are {name}" for name, count in sorted(lossy.items()))
        notes.append(
            f"stored with losses: {kinds}. The bits are of the decoded images, which lack what compression left out, "
            "and cannot be compared with bits of the original images, as published ones are"
        )
    result: dict[str, Any] = {
        "format": JOB.format,
        "model": stage.describe(),
        "data": {
            "location": str(data),
            "split": settings.split,
            "num_images": len(finite),
            "fingerprint": fingerprint(row["digest"] for row in rows),
            "choice": choice,
            "skipped": work.skipped,
        },
        "likelihood": {
            "kind": kind,
            "scale": scale,
            "scale_from": scale_from,
            "discretised": kind in ("logistic", "logistic_mixture") or (kind == "gaussian" and settings.discretised),
        },
        "latent_dimensions": finite[0]["latent_dimensions"],
        **_figures(finite, Likelihood(kind, scale), settings),
        "method": METHOD,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "notes": notes,
    }
    result["findings"] = [finding._asdict() for finding in findings(result)]
    if folder is not None:
        _write(folder, result, finite, work, settings)
    return result


def lossy_format(encoded: Encoded) -> str | None:
    """Return the name of the format if an image is stored as JPEG or as lossy WebP, and None otherwise.

    Raises:
        ImageError: If it is unreadable.
    """
    name = kind_of(encoded).split()[0]
    if name in ("JPEG", "MPO"):  # the first picture of an MPO is a JPEG
        return "JPEG"
    if name != "WEBP":
        return None
    with open_encoded(encoded) as stream:
        stream.seek(len(b"RIFF....WEBP"))
        while len(head := stream.read(8)) == 8:
            chunk, size = head[:4], int.from_bytes(head[4:], "little")
            if chunk in (b"VP8 ", b"VP8L"):  # RFC 9649: lossy, lossless
                return "lossy WebP" if chunk == b"VP8 " else None
            # the first frame of an animation has its own chunks after 16 bytes
            stream.seek(16 if chunk == b"ANMF" else size + size % 2, 1)
    return None


def _unrecorded(stage: FirstStage) -> LikelihoodKind:
    """Return the likelihood of a model that says none: that whose parameters its decoder gives, or else gaussian."""
    stated = stage.family.states(stage.module.config) if stage.family and stage.module is not None else None
    return next((kind for kind in LIKELIHOODS if kind == stated), "gaussian")


def _figures(rows: Sequence[dict[str, Any]], likelihood: Likelihood, settings: LikelihoodSettings) -> dict[str, Any]:
    """Add each image's bits to its row, and return metrics, the curve and effective samples over the images."""
    none = torch.zeros((), dtype=torch.float64)
    level = float(bits_per_dimension(none, likelihood.kind, discretised=settings.discretised))

    def bits(nats: float, row: dict[str, Any], level: float = level) -> float:
        """Return a cost in nats as bits; `level` turns a density into a level's probability, and is 0 for the rate."""
        return float(nats / row["elements"] / math.log(2.0) + level)

    for row in rows:
        row["elbo"], row["importance_bound"] = row["curve"][0], row["curve"][-1]
        for key in ("elbo", "importance_bound", "distortion"):
            row[f"{key}_bits"] = bits(row[key] if key == "distortion" else -row[key], row)
        row["rate_bits"] = bits(row["rate"], row, 0.0)

    def over_images(values: Sequence[float]) -> dict[str, Any]:
        interval = bootstrap_interval(values, settings.seed) if len(values) >= FEWEST else None
        return {"mean": float(np.mean(values)), "interval": interval}

    metrics: dict[str, Any] = {
        key: {
            "bits_per_dimension": over_images([row[f"{key}_bits"] for row in rows]),
            "nats_per_image": over_images([row[key] for row in rows]),
        }
        for key in ("elbo", "importance_bound", "distortion", "rate")
    }
    levels = len(rows[0]["rate_levels"])
    if levels > 1:
        metrics["rate_levels"] = [
            {
                "bits_per_dimension": over_images([bits(row["rate_levels"][n], row, 0.0) for row in rows]),
                "nats_per_image": over_images([row["rate_levels"][n] for row in rows]),
            }
            for n in range(levels)
        ]
    curve = []
    for position, size in enumerate(curve_sizes(settings.samples)):
        costs = [bits(-row["curve"][position], row) for row in rows]
        nats = [row["curve"][position] for row in rows]
        curve.append(
            {
                "samples": size,
                "bits_per_dimension": float(np.mean(costs)),
                "nats_per_image": float(np.mean(nats)),
            }
        )
    effective = [row["effective_samples"] for row in rows]
    return {"metrics": metrics, "curve": curve, "effective_samples": {"median": float(np.median(effective))}}


class _Work:
    """Reads images of a source by their numbers and measures them with an estimator."""

    def __init__(
        self,
        stage: FirstStage,
        source: StoredImages,
        settings: LikelihoodSettings,
        location: str,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.stage, self.source, self.settings, self.location = stage, source, settings, location
        self.device, self.progress = device, progress
        self.skipped: list[str] = []
        self.num_read = 0

    def fitted(self, estimator: Estimator, indices: np.ndarray) -> float:
        """Return the scale fitted to some of the images."""
        count = max(1, FIT_VALUES // max(1, len(indices)))
        pairs = [
            estimator.pairs(images, [item.index for item in items], count)
            for items, images in self.batches(indices, "likelihood: scale")
        ]
        if not pairs:
            raise UserError(f"{self.location}: none of the images that the scale is fitted to is readable")
        return fitted_scale(estimator.kind, torch.cat(pairs, 1), discretised=self.settings.discretised)

    def measured(self, estimator: Estimator, indices: np.ndarray, scale: float | None) -> list[dict[str, Any]]:
        """Return a row for each readable image, in nats.

        `off_level` is True if a value is between 8-bit levels; `lossy` is what `lossy_format` returns.
        """
        rows = []
        for items, images in self.batches(indices, "likelihood"):
            bounds = estimator.measure(images, [item.index for item in items], self.settings.samples, scale)
            levels = (images + 1.0) * 127.5
            off_level = ((levels - levels.round()).abs() > 1e-3).flatten(1).any(1)
            dimensions = math.prod(side // self.stage.factor for side in images.shape[2:])
            if self.stage.family is None or self.stage.family.latent != "categorical":  # one code at each position
                dimensions *= self.stage.latent_channels or 0
            for i, item in enumerate(items):
                rows.append(
                    {
                        "index": item.index,
                        "name": printable(item.name),
                        "digest": item.digest,
                        "elements": images[i].numel(),
                        "latent_dimensions": dimensions,
                        "distortion": float(bounds.distortion[i]),
                        "rate": float(bounds.rates[i].sum()),
                        "rate_levels": bounds.rates[i].tolist(),
                        "curve": bounds.curve[i].tolist(),
                        "effective_samples": float(bounds.effective[i]),
                        "off_level": bool(off_level[i]),
                        "lossy": lossy_format(self.source.read(item.index)),
                    }
                )
        report_skipped(self.skipped, self.num_read, self.settings)
        return rows

    def shown(self, rows: Sequence[dict[str, Any]]) -> list[Shown]:
        """Return the images of rows, in their order, with their reconstructions."""
        indices = sorted({row["index"] for row in rows})
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for items, images in self.batches(np.array(indices, dtype=np.int64), None):
            with torch.no_grad():
                reconstructions = self.stage.reconstruct(images.to(self.device)).cpu()
            pairs |= {item.index: (image, one) for item, image, one in zip(items, images, reconstructions, strict=True)}
        return [Shown(row, *pairs[row["index"]]) for row in rows]

    def batches(self, indices: np.ndarray, task: str | None) -> Iterator[tuple[list[HeldOutImage], Tensor]]:
        """Yield batches of readable neighbours of one shape; without a task nothing is counted or reported again."""
        held_out = images_for(self.stage, self.source.subset(indices), self.settings, self.location)
        bar = progress_bar(task, len(indices), "image", disable=not self.progress or task is None)

        def read() -> Iterator[HeldOutImage]:
            for item in held_out.items():
                if item.image is not None:
                    yield replace(item, index=int(indices[item.index]))
                elif task is not None:
                    self.skipped.append(f"{item.name}: {item.reason}")
                    bar.update()

        with bar:
            for items, images in batches(read(), self.settings.batch_size, self.device):
                yield items, images
                bar.update(len(items))
                self.num_read += len(items) if task is not None else 0


def _write(
    folder: Path, result: dict[str, Any], rows: list[dict[str, Any]], work: _Work, settings: LikelihoodSettings
) -> None:
    ranked = sorted(rows, key=lambda row: row["importance_bound_bits"])
    count = min(settings.num_pictures, -(-len(rows) // 2))
    groups = {"Most likely": ranked[:count], "Least likely": ranked[count:][::-1][:count]}
    with written_into(folder, ["result.json", "images.parquet", "report.html"]):
        write_json(folder / "result.json", result)
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "images.parquet.part")
        (folder / "images.parquet.part").replace(folder / "images.parquet")
        shown = {heading: work.shown(group) for heading, group in groups.items() if group}
        write_likelihood_report(folder / "report.html", result, rows, shown)
