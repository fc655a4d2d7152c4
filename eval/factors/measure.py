"""Measures which latent dimensions represent which known factors of the images, and how separately.

from latent_ae_eval.factors.measure import factors
result = factors("runs/beta-vae", "blobs.parquet", out="factors")
print(result["mean"]["mig"], result["sample"]["mig"])
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.labels import find_classes
from latent_ae.data.rng import posterior_noise
from latent_ae.data.sources import StoredImages, StreamSource, TableSource, fingerprint
from latent_ae.models.loading import FirstStage
from latent_ae.models.posterior import draw
from latent_ae.provenance import versions
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.factors import JOB
from latent_ae_eval.factors.information import BINS, entropy, measured
from latent_ae_eval.factors.report import write_factors_report
from latent_ae_eval.factors.scores import (
    DCI_IMAGES,
    DCI_TEST_IMAGES,
    EXTRA,
    IMAGES_OF_A_VOTE,
    MOST_WORK,
    TEST_VOTES,
    VOTES,
    dci,
    factor_vae_score,
)
from latent_ae_eval.factors.settings import FactorsSettings
from latent_ae_eval.inputs import opened_data, report_skipped
from latent_ae_eval.jobs import (
    batches,
    cpu_batch,
    images_for,
    opened,
    refuse_infinite,
    watched,
    write_json,
    written_into,
)

MOST_DIMENSIONS = 1024
MOST_VALUES = 1000
ACTIVE = 0.01
"""A dimension is active if its posterior mean has a larger variance over images than this (Burda et al. 2016)."""
TRAVERSED = 12
"""Largest number of dimensions in the picture, those that vary most."""
BIASED = 0.02
"""Bias of the mutual information by chance, relative to a factor's entropy, above which a note is given."""


@torch.no_grad()
@float32_arithmetic(repeatable=True)
def factors(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: FactorsSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure mutual information of dimensions and factors, its gap, FactorVAE's score and DCI. Runs on one process.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module, with a Gaussian posterior.
        data: A table with a column of integers or classes for each factor.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, traversals.png and report.html; None writes nothing.
        progress: Show a progress bar.

    Returns:
        The result, JSON-ready.

    Raises:
        UserError: If the model has no Gaussian posterior or more than `MOST_DIMENSIONS` latent values, data have no
            factors or several sizes, or several processes were launched.
    """
    settings = settings or FactorsSettings()
    if settings.dci and not importlib.util.find_spec("sklearn"):
        raise UserError(f"dci: {EXTRA}")
    device, stage, folder = opened("factors", model, settings, out)
    if not stage.has_posterior:
        raise UserError(f"eval factors needs a posterior that is one Gaussian, and {stage.name} has none")
    source, choice = opened_data(str(data), settings)
    assert not isinstance(source, StreamSource), "jobs do not open streams"
    names, labels = _factors(source, str(data), settings)
    if settings.traversed is not None and settings.traversed >= len(source):
        raise UserError(f"traversed: there is no image {settings.traversed}; {data} holds {len(source)}, from 0 on")
    means, samples, digests, shape, skipped = _codes(stage, source, settings, str(data), device, progress)
    rows = np.array(list(digests), dtype=np.int64)
    report_skipped(skipped, len(rows), settings)
    if not len(rows):
        raise UserError(f"{data}: none of its images is readable; {(skipped or ['there are none'])[0]}")
    values = _numbered(labels[rows], names, str(data))
    counts = [int(column.max()) + 1 for column in values.T]
    entropies = [entropy(np.bincount(column)) for column in values.T]
    variances = means.var(0)
    active = np.flatnonzero(variances > ACTIVE)
    chance = [(BINS - 1) * (count - 1) / (2 * len(rows)) for count in counts]
    worst = max(range(len(names)), key=lambda k: chance[k] / entropies[k])
    notes = []
    if chance[worst] > BIASED * entropies[worst]:
        notes.append(
            f"{len(rows):,} images are few: by chance alone a dimension shows about {chance[worst]:.2f} nats of "
            f"information about {names[worst]} ({chance[worst] / entropies[worst]:.0%} of its entropy)"
        )
    mean = measured(means, values, names) | {"factor_vae_score": factor_vae_score(means, values, active, settings.seed)}
    if settings.dci is not False:
        left_out = _no_dci(settings, len(active), sum(counts))
        try:
            mean |= {} if left_out else {"dci": dci(means, values, names, active, settings.seed, progress)}
        except UserError as error:
            if settings.dci:
                raise
            left_out = str(error).removeprefix("dci: ")
        notes += [f"DCI is left out: {left_out}"] if left_out else []
    result: dict[str, Any] = {
        "format": JOB.format,
        "model": stage.describe(),
        "data": {
            "location": str(data),
            "num_images": len(rows),
            "fingerprint": fingerprint(digests.values()),
            "choice": choice,
            "factors": dict(zip(names, counts, strict=True)),
            "entropies": dict(zip(names, entropies, strict=True)),
            "skipped": skipped,
        },
        "latent": list(shape),
        "method": {
            "mig": "mean over factors of (largest - second largest mutual information) / entropy (Chen et al. 2018)",
            "bins": f"{BINS} of equal width for each dimension",
            "total_correlation": "nats, of the Gaussian fitted to the codes: -ln det of their correlations / 2",
            "mean": "of the posterior",
            "sample": "of the posterior, one for each image",
            "factor_vae_score": f"accuracy of {TEST_VOTES:,} votes of the active dimensions, each by "
            f"{IMAGES_OF_A_VOTE} images with a factor in common, after {VOTES:,} votes (Kim and Mnih 2018)",
            "dci": "gradient-boosted trees on the active dimensions of two thirds of the images, up to "
            f"{DCI_IMAGES:,}, tested with up to {DCI_TEST_IMAGES:,} others (Eastwood and Williams 2018)",
            "active": f"variance of the posterior's mean over the images above {ACTIVE} (Burda et al. 2016)",
            "dimensions": "of the latent, flattened: channel, row, column",
        },
        "mean": mean,
        "sample": measured(samples, values, names),
        "active_dimensions": active.tolist(),
        "variances": variances.tolist(),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "notes": notes,
    }
    if folder is not None:
        shown = active[np.argsort(-variances[active], kind="stable")][:TRAVERSED]
        at = len(rows) // 2 if settings.traversed is None else int(np.searchsorted(rows, settings.traversed))
        if settings.traversed is not None and (at == len(rows) or rows[at] != settings.traversed):
            raise UserError(f"traversed: image {settings.traversed} of {data} is not readable")
        result["traversed"] = {"image": int(rows[at]), "dimensions": shown.tolist()}
        picture = _traversals(stage, torch.from_numpy(means[at]).view(shape), shown, result, settings, device)
        _write(folder, result, picture)
    return result


def _no_dci(settings: FactorsSettings, active: int, levels: int) -> str:
    """Return why DCI is left out; empty if it is measured.

    Args:
        settings: The settings.
        active: Number of active dimensions.
        levels: Number of values of all factors.
    """
    if not active:
        return "no dimension is active"
    if settings.dci:
        return ""
    if active * levels > MOST_WORK:
        return f"its trees take long for {active:,} active dimensions and {levels:,} values of factors; dci=true has it"
    return "" if importlib.util.find_spec("sklearn") else EXTRA


def _factors(source: StoredImages, data: str, settings: FactorsSettings) -> tuple[list[str], np.ndarray]:
    """Return the names of the factors, and the values of every image, (N, K)."""
    if not isinstance(source, TableSource):
        raise UserError(f"{data} is not a table: eval factors needs one with an integer column for each factor")
    columns = source.others.features
    integers = [
        name
        for name, feature in columns.items()
        if isinstance(feature, datasets.ClassLabel) or (isinstance(feature, datasets.Value) and "int" in feature.dtype)
    ]
    names = list(settings.factors or integers)
    if not names:
        has = ", ".join(columns) or "no others"
        raise UserError(f"{data} has no column of integers or classes besides images ({has}): what are its factors?")
    if missing := [name for name in names if name not in integers]:
        raise UserError(
            f"factors: {missing[0]} is no column of integers or classes of {data}; it has "
            f"{', '.join(integers) or 'none'}"
        )
    for name in names:
        if empty := source.others.data.column(name).null_count:
            raise UserError(f"factors: {name} is empty in {empty:,} of {source.label}'s images: leave it or them out")
    columns_of = [find_classes(source, source, name) for name in names]
    return names, np.stack([classes.labels for classes in columns_of if classes is not None], 1)


def _numbered(labels: np.ndarray, names: Sequence[str], data: str) -> np.ndarray:
    """Return each factor's values numbered 0, 1, ... in their order, (N, K)."""
    columns = []
    for name, column in zip(names, labels.T, strict=True):
        known, numbers = np.unique(column, return_inverse=True)
        if not 2 <= len(known) <= MOST_VALUES:
            raise UserError(
                f"factors: {name} has {len(known):,} value(s) in the {len(labels):,} images of {data} that are "
                f"measured; a factor has from 2 to {MOST_VALUES:,} of them: raise limit where it is set, or name the "
                "columns that are factors, as factors=[shape,scale]"
            )
        columns.append(numbers)
    return np.stack(columns, 1)


def _codes(
    stage: FirstStage, source: StoredImages, settings: FactorsSettings, data: str, device: torch.device, progress: bool
) -> tuple[np.ndarray, np.ndarray, dict[int, str], torch.Size, list[str]]:
    """Return means and samples, (N, D), of readable images, their digests by number, the latent's shape, and others."""
    bad: list[str] = []
    items_read = watched(images_for(stage, source, settings, data), len(source), "factors: latents", bad, progress)
    means: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    digests: dict[int, str] = {}
    shape = torch.Size()
    assert stage.module is not None
    for items, batch in batches(items_read, settings.batch_size, device):
        batch = batch.to(device, stage.dtype)
        mean = draw(stage.module, batch, None).latent
        refuse_infinite(mean, [item.name for item in items], stage, data)
        if shape and mean.shape[1:] != shape:
            raise UserError(f"{data}: images of several sizes have latents of several; set crop_px (and resize_px)")
        shape = mean.shape[1:]
        if shape.numel() > MOST_DIMENSIONS:
            raise UserError(
                f"the latent has {' x '.join(map(str, shape))} = {shape.numel():,} dimensions, and eval factors takes "
                f"at most {MOST_DIMENSIONS:,}: give smaller images (crop_px, resize_px) or a smaller latent"
            )
        numbers = [item.index for item in items]
        noise = posterior_noise(settings.seed, numbers, shape).to(device)
        means.append(mean.flatten(1).cpu().numpy())
        samples.append(draw(stage.module, batch, noise).latent.flatten(1).cpu().numpy())
        digests |= {item.index: item.digest for item in items}
    if not digests:
        return np.empty((0, 0)), np.empty((0, 0)), {}, shape, bad
    return np.concatenate(means), np.concatenate(samples), digests, shape, bad


def _traversals(
    stage: FirstStage,
    latent: Tensor,
    shown: Sequence[int],
    result: dict[str, Any],
    settings: FactorsSettings,
    device: torch.device,
) -> Image.Image | None:
    """Return a picture with a row for each dimension, which goes from -2 to 2 while the others stay as in `latent`.

    None if no dimension is active.
    """
    if not len(shown):
        return None
    steps = torch.linspace(-2, 2, settings.steps)
    held = {d: [name for name, best in result["mean"]["dimensions"].items() if best == d] for d in shown}
    rows, labels = [], []
    for dimension in shown:
        points = latent.flatten().repeat(len(steps), 1)
        points[:, dimension] = steps
        points = points.view(len(steps), *latent.shape).to(device)
        size = cpu_batch(settings.batch_size, latent[0].numel() * stage.factor**2)
        decoded = [stage.decode(part).clamp(-1, 1).cpu() for part in points.split(size)]
        rows.append(list(torch.cat(decoded)))
        labels.append(f"{dimension}: {', '.join(held[dimension])}" if held[dimension] else str(dimension))
    return picture_grid(rows, [f"{step:+.1f}" for step in steps.tolist()], row_labels=labels, largest_px=128)


def _write(folder: Path, result: dict[str, Any], picture: Image.Image | None) -> None:
    names = ["result.json", *(["traversals.png"] if picture is not None else []), "report.html"]
    with written_into(folder, names):
        if picture is not None:
            picture.save(folder / "traversals.png")
        write_json(folder / "result.json", result)
        write_factors_report(folder / "report.html", result, picture)
