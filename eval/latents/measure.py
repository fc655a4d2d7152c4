"""Measures the health of a first stage's latents.

from latent_ae_eval.latents.measure import evaluate_latents
result = evaluate_latents("runs/quickstart/export", "photos")
print(result["findings"])
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.held_out import Framing, HeldOutImages, Part
from latent_ae.data.sources import ImageSource, fingerprint, part_of
from latent_ae.latents.quantiles import QuantileSketch
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.metrics.distances import frechet_distance
from latent_ae.models.loading import FirstStage
from latent_ae.progress import progress_bar
from latent_ae.provenance import versions
from latent_ae_eval.inputs import checked_factor, opened_data, opened_model, processes, report_skipped, stream_notes
from latent_ae_eval.jobs import lpips_or_reason, make_folder, write_json, written_into
from latent_ae_eval.latents import JOB
from latent_ae_eval.latents.findings import findings
from latent_ae_eval.latents.health import (
    TRANSFORMS,
    effective_rank,
    excess_kurtosis,
    outlier_share,
    wasserstein_to_normal,
)
from latent_ae_eval.latents.report import write_latents_page
from latent_ae_eval.latents.settings import LatentsSettings
from latent_ae_eval.latents.sums import Decoded, Encoded, LatentsMeasurer

MOST_BLOCKS, SMALLEST_BLOCK, STREAM_BLOCK, DECODED_BLOCK = 256, 4, 64, 4
CONSTANT = 1e-6
"""A channel of a deterministic model is dead if its std is at most this fraction of the latents' std."""
Sums = TypeVar("Sums", Encoded, Decoded)


def evaluate_latents(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: LatentsSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the latents of a first stage. Every process of a distributed run calls this.

    The numbers do not depend on the number of processes: sums over blocks of images are merged in the order of the
    blocks.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module (it is moved to the device and set to
            evaluation mode).
        data: `photos`, a folder of images, Parquet, Arrow or WebDataset files, or a hub id.
        settings: The settings; None takes the defaults.
        out: Folder for result.json and latents.html; None writes nothing.
        progress: Show progress bars.

    Returns:
        The result, JSON-ready and equal on every process.

    Raises:
        UserError: If model or data cannot be loaded or do not fit, the model is a function or has latents on several
            grids, too many images are unreadable, latents are all equal or not finite, or `out` cannot be written.
    """
    settings, started = settings or LatentsSettings(), time.perf_counter()
    if out is not None:
        make_folder(Path(out))
    state, device = processes(settings)
    stage = opened_model(model, settings, device)
    if stage.module is None:
        raise UserError(f"{stage.name} is a function, which has no latents; give a first stage of diffusers")
    assert stage.family is not None
    if not stage.family.one_grid:
        raise UserError(
            f"the latents of a {stage.name} are levels on several grids, packed into one: there is no grid to measure. "
            "The training log has the KL, or the use of the codes, of each level"
        )
    shows = progress and state.is_main_process
    lpips, why_not = None, ""
    if settings.num_decoded:
        lpips, why_not = lpips_or_reason(settings.lpips, stage.channels or 3, settings.crop_px, device)
    notes = [why_not] if why_not else []
    measurer = LatentsMeasurer(stage, device, seed=settings.seed, batch_size=settings.batch_size, lpips=lpips)
    # TF32 convolutions would change the third digit
    with float32_arithmetic(repeatable=True):
        source, choice = opened_data(str(data), settings)
        images, count = _images(stage, source, data, settings), choice["number"]
        size = STREAM_BLOCK if count is None else max(SMALLEST_BLOCK, -(-count // MOST_BLOCKS))
        encoded = _over_blocks(images, measurer.encode, Encoded(), size, count, "encode", shows)
        num_images, skipped = encoded.num_images, sorted(encoded.skipped)
        if not num_images:
            reason = f"none of its {len(skipped)} images is readable; {skipped[0]}" if skipped else "it holds no images"
            raise UserError(f"{data}: {reason}")
        report_skipped(skipped, num_images, settings, shows=state.is_main_process)
        std = encoded.statistics.std
        decoded = Decoded()
        if settings.num_decoded:
            few, decoded_choice = part_of(source, settings.num_decoded, settings.seed)
            decoded = _over_blocks(
                _images(stage, few, data, settings),
                lambda items: measurer.decode(items, settings.noise, std),
                decoded,
                DECODED_BLOCK,
                decoded_choice["number"],
                "decode",
                shows,
            )
    result: dict[str, Any] = {
        "format": JOB.format,
        "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
        "data": {
            "location": str(data),
            "split": settings.split,
            "num_images": num_images,
            "fingerprint": fingerprint(digest for _, digest in sorted(encoded.digests.items())),
            "choice": choice,
            "skipped": skipped,
        },
        "latents": encoded.statistics.summary(),
        "health": _health(stage, encoded) | _changes(decoded, settings),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    if stage.family.latent == "codebook":
        notes.append(f"latents of a {stage.name} are those before quantisation, which decoding then quantises")
    if stage.family.latent == "categorical":
        notes.append(f"latents of a {stage.name} are the vectors of its most likely codes, without KL and spread")
    elif stage.family.draws_itself:
        notes.append(f"the posterior of a {stage.name} is not Gaussian: its mode is measured, without KL and spread")
    elif not stage.has_posterior:
        notes.append(f"{stage.name} has no posterior, so there is no KL and no posterior's spread")
    if stage.side is not None and decoded.num_images:
        notes.append(f"half size was left out: {stage.name} takes images of {stage.side} px only")
    elif "half size/apart" not in decoded.counts and decoded.num_images:
        notes.append(
            "half size was left out: the latents' sides are odd; set crop_px to a multiple of twice the factor"
        )
    result["notes"] = notes + stream_notes(choice)
    result["findings"] = [finding._asdict() for finding in findings(result)]
    seconds = time.perf_counter() - started
    result |= {"device": device.type, "processes": state.num_processes, "seconds": round(seconds, 1)}
    if out is not None and state.is_main_process:
        with written_into(Path(out), ["result.json", "latents.html"]):
            write_json(Path(out) / "result.json", result)
            write_latents_page(Path(out) / "latents.html", result)
    state.wait_for_everyone()
    return result


def _images(stage: FirstStage, source: ImageSource, data: str | Path, settings: LatentsSettings) -> HeldOutImages:
    multiple_of = checked_factor(stage, settings.crop_px) * (1 if settings.crop_px is not None else 2)
    framing = Framing(settings.resize_px, settings.crop_px)
    return HeldOutImages(source, settings.data(str(data)), stage.channels or 3, framing, multiple_of)


def _over_blocks(
    images: HeldOutImages,
    measure: Callable[[Any], Sums],
    total: Sums,
    size: int,
    count: int | None,
    verb: str,
    shows: bool,
) -> Sums:
    """Return `total` with the sums of all blocks merged in their order, on every process."""
    state = PartialState()
    images = replace(images, part=Part(state.process_index, state.num_processes, size))
    share = None if count is None else sum(1 for index in range(count) if images.part.holds(index))
    mine: list[Any] = []
    sketch = QuantileSketch()
    failure: UserError | None = None
    with progress_bar(verb, share, "image", disable=not shows) as bar:

        def counted(items: Any) -> Any:
            for item in items:
                yield item
                bar.update()

        try:
            for number, items in groupby(images.items(), key=lambda item: item.index // size):
                sums = measure(counted(items))
                if isinstance(sums, Encoded):  # counts of bins can be merged at once: their order does not matter
                    sketch.merge(sums.statistics.sketch)
                    sums.statistics.sketch = QuantileSketch()
                mine.append((number, sums))
        except UserError as error:  # raised below, where the other processes wait
            failure = error
    gathered = gather_object([(failure, mine, sketch)])
    if failures := [one for one, _, _ in gathered if one is not None]:
        raise failures[0]
    for _, sums in sorted((pair for _, pairs, _ in gathered for pair in pairs), key=lambda pair: pair[0]):
        total.merge(sums)
    if isinstance(total, Encoded):
        for _, _, one in gathered:
            total.statistics.sketch.merge(one)
    return total


def _health(stage: FirstStage, encoded: Encoded) -> dict[str, Any]:
    """Return the measurements of the first pass, JSON-ready."""
    statistics = encoded.statistics
    signal = statistics.posterior_means if stage.has_posterior else statistics.latents
    channels = []
    dead = set(_dead(stage, statistics))
    for channel in range(len(statistics.latents.mean)):
        values, counts = statistics.sketch.distribution(channel)
        outliers, farthest = outlier_share(values, counts)
        row: dict[str, Any] = {
            "channel": channel,
            "mean": statistics.channel_mean[channel],
            "std": statistics.channel_std[channel],
            "dead": channel in dead,
            "wasserstein_1": _finite(wasserstein_to_normal(values, counts)),
            "excess_kurtosis": _finite(excess_kurtosis(values, counts)),
            "outliers": outliers,
            "farthest_stds": farthest,
        }
        if stage.has_posterior:
            noise = float(statistics.posterior_variances.mean[channel])
            own = float(statistics.posterior_means.variance[channel])
            row |= {
                "kl_nats_per_dim": statistics.channel_kl[channel],
                "posterior_std": math.sqrt(noise),
                "signal_share": own / (own + noise),
            }
        channels.append(row)
    values, counts = statistics.sketch.distribution()
    outliers, farthest = outlier_share(values, counts)
    scaled = {"mean": statistics.latents.mean - statistics.mean, "covariance": statistics.latents.covariance}
    mean, covariance = (scaled["mean"] / statistics.std).numpy(), (scaled["covariance"] / statistics.std**2).numpy()
    size = len(channels)
    health: dict[str, Any] = {
        "channels": channels,
        "dead_channels": sorted(dead),
        "effective_rank": effective_rank(signal.covariance),
        "outliers": outliers,
        "farthest_stds": farthest,
        "wasserstein_1": _finite(wasserstein_to_normal(values, counts)),
        "excess_kurtosis": _finite(excess_kurtosis(values, counts)),
        "frechet_to_normal": frechet_distance(mean, covariance, np.zeros(size), np.eye(size)),
        "spectrum": {name: _spectrum(encoded, name) for name in encoded.spectra},
    }
    if stage.has_posterior:
        noise = float(statistics.posterior_variances.mean.mean())
        per_dim = float(statistics.kl.mean.mean())
        health |= {
            "kl_nats_per_dim": per_dim,
            "kl_nats_per_image": per_dim * statistics.count / encoded.num_images,
            "posterior_std": math.sqrt(noise),
            "noise_share": noise / statistics.std**2,
        }
    return health


def _dead(stage: FirstStage, statistics: LatentStatistics) -> list[int]:
    if stage.has_posterior:
        return statistics.dead_channels
    return [channel for channel, std in enumerate(statistics.channel_std) if std <= CONSTANT * statistics.std]


def _spectrum(encoded: Encoded, name: str) -> dict[str, Any]:
    spectrum = encoded.spectra[name]
    frequency, power = spectrum.rings()
    share, slope = spectrum.high_share(), spectrum.slope()
    return {"frequency": frequency.tolist(), "power": power.tolist(), "slope": slope, "high_share": share}


def _changes(decoded: Decoded, settings: LatentsSettings) -> dict[str, Any]:
    """Return the measurements of the second pass, JSON-ready; empty if nothing was decoded."""
    if not decoded.num_images:
        return {}
    noise = [
        {"sigma": sigma, "psnr": decoded.mean(f"psnr/{sigma}")}
        | ({f"lpips_{settings.lpips}": decoded.mean(f"lpips/{sigma}")} if f"lpips/{sigma}" in decoded.counts else {})
        for sigma in sorted(settings.noise)
    ]
    transforms = [
        {"transform": name}
        | {
            f"psnr_{key.replace(' ', '_')}": decoded.mean(f"{name}/{key}")
            for key in ("in latents", "in images", "apart")
        }
        for name in TRANSFORMS
        if f"{name}/apart" in decoded.counts
    ]
    return {"noise": noise, "transforms": transforms, "num_decoded": decoded.num_images}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
