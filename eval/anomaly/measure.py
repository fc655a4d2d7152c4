"""Finds images that a first stage cannot reconstruct, and where: scores, thresholds from normal images, heat maps.

from latent_ae_eval.anomaly.measure import find_anomalies
from latent_ae_eval.anomaly.settings import AnomalySettings
result = find_anomalies("runs/bottles", "bottles/test", AnomalySettings(normal="bottles/good"), out="anomalies")
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.rng import spread
from latent_ae.data.sources import fingerprint
from latent_ae.models.density import Density, stored_density
from latent_ae.models.loading import FirstStage
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.provenance import versions
from latent_ae_eval.anomaly import JOB
from latent_ae_eval.anomaly.density import Mixture
from latent_ae_eval.anomaly.images import Part, Work, opened_part
from latent_ae_eval.anomaly.neighbours import Neighbours
from latent_ae_eval.anomaly.report import Finding, write_anomaly_report, write_maps, write_pictures
from latent_ae_eval.anomaly.roc import FEWEST_SCORES, PixelScores, auroc, auroc_interval, conformal_threshold
from latent_ae_eval.anomaly.scores import Scorer, negative_elbo
from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_eval.inputs import opened_model, report_skipped
from latent_ae_eval.jobs import lpips_or_reason, make_folder, one_process, write_json, written_into

FIT = 5
"""One in this many normal images, drawn evenly, fits the ELBO's variance and is not used for thresholds, so that the
scores of the others stay exchangeable with those of new images."""
FIT_DENSITY = 2
"""The same where a density or a bank of patches is fitted, too."""
SCORES = {
    "pixel_mean": "mean squared error, of values in [-1, 1]",
    "pixel_max": "largest value of the smoothed map of squared errors",
    "lpips_mean": "LPIPS",
    "lpips_max": "largest value of the map of LPIPS",
    "negative_elbo": "nats per pixel and channel: Gaussian of the normal images' variance, one posterior sample",
    "density": "minus the log-density (nats) of latent and reconstruction errors, the mixture trained with the model",
    "mixture": "minus the log-density (nats) of latent and reconstruction errors, a mixture of Gaussians",
    "neighbours": "largest distance of a patch to the nearest one of normal images, VGG16 features",
}


@float32_arithmetic(repeatable=True)
def find_anomalies(
    model: str | Path | nn.Module | Callable[[Tensor], Tensor],
    data: str | Path,
    settings: AnomalySettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score every image of `data`, and measure how well the scores detect abnormal images if they are known.

    Runs on one process.

    Args:
        model: A folder, a hub id, a first stage of diffusers as a module, or a function from images, (N, C, H, W) in
            [-1, 1], to their reconstructions.
        data: `photos`, a folder of images, Parquet or Arrow files, or a hub id.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, images.parquet, report.html, pictures.png and, with `maps`, the heat maps; None
            writes nothing.
        progress: Show progress bars.

    Returns:
        The result, JSON-ready.

    Raises:
        UserError: If model or data cannot be loaded, a class or score is missing, or several processes were launched.
    """
    settings = settings or AnomalySettings()
    if out is not None:
        make_folder(Path(out))
    device = one_process("anomaly", settings)
    stage = opened_model(model, settings, device)
    part = opened_part("data", str(data), settings)
    normal = None
    if settings.normal is not None:
        own = settings.model_copy(update={"split": settings.normal_split, "limit": None})
        normal = opened_part("normal", settings.normal, own, part.normal_class)
        if normal.abnormal is not None:
            normal.source, normal.abnormal = normal.source.subset(np.flatnonzero(~normal.abnormal)), None
    lpips, why_not = lpips_or_reason(settings.lpips, stage.channels or 3, None, device)
    mixture = Mixture(settings.mixture, settings.seed) if settings.mixture else None
    neighbours, why_no_neighbours = _neighbours(settings, stage, lpips, device)
    scorer = Scorer(
        stage,
        lpips,
        blur_px=settings.blur_px,
        seed=settings.seed,
        elbo=normal is not None,
        device=device,
        mixture=mixture,
        neighbours=neighbours,
        density=_trained_density(model, stage, settings.revision),
    )
    rank_by = settings.rank_by or ("lpips_max" if "lpips_max" in scorer.names else "pixel_max")
    if rank_by not in scorer.names:
        why = "; an ELBO needs normal=DATA and one Gaussian posterior" if rank_by == "negative_elbo" else ""
        if rank_by == "density":
            why = "; the model's folder holds no density that was trained with it (density.components)"
        if rank_by in ("mixture", "neighbours"):
            why = f"; {why_no_neighbours or f'it needs {rank_by}=NUMBER and normal=DATA'}"
        raise UserError(f"rank_by: {rank_by} will not be measured; there are {', '.join(scorer.names)}{why}")
    work = Work(stage, scorer, settings, progress)
    notes = [why for why in (why_not, why_no_neighbours) if why]

    variance, thresholds, fitted, calibration = None, {}, [], []
    if normal is not None:
        fit, rest = _parted(len(normal.source), settings, scorer)
        for scored, _ in work.scored(normal, settings.normal or "", fit):
            scorer.learn(scored)
        fitted, normal.rows = normal.rows, []
        if fitted:
            if scorer.elbo:
                variance = sum(r["squares"] for r in fitted) / sum(r["numbers"] for r in fitted)
                variance = max(variance, 1e-12)  # above 0 also for a model that reconstructs exactly
            scorer.fit()
        for _ in work.scored(normal, settings.normal or "", rest):
            pass
        calibration = normal.rows
        report_skipped(normal.skipped, len(fitted) + len(calibration), settings)
        if not fitted and not calibration:
            raise UserError(f"normal: none of the {len(normal.skipped)} images of {settings.normal} is readable")
        if len(fit) and not (fitted and calibration):
            raise UserError(f"normal: {settings.normal} gives one image; two are the fewest")
        if variance is not None:
            _add_elbo(calibration, variance)
        for name in scorer.names:
            values = np.array([row[name] for row in calibration])
            thresholds[name] = conformal_threshold(values, settings.false_positive_rate)
        if None in thresholds.values():
            rate = settings.false_positive_rate
            needed = math.ceil(1 / rate - 1 - 1e-9)
            notes.append(
                f"no thresholds: a false positive rate of {rate:g} needs {needed} normal images, and there are "
                f"{len(calibration)}"
            )
    else:
        notes.append("no thresholds and no ELBO: they need normal images that were not trained on (normal=DATA)")
    if not stage.has_posterior:
        notes.append(f"no ELBO: {stage.name} has no posterior that is one Gaussian")

    pixels: dict[str, PixelScores] = {}
    for scored, masks in work.scored(part, str(data)):
        for name, maps in scored.maps.items():
            for position, mask in enumerate(masks):
                if mask is not None:
                    pixels.setdefault(name, PixelScores()).add(maps[position], mask)
    report_skipped(part.skipped, len({row["index"] for row in part.rows}), settings)
    if not part.rows:
        raise UserError(f"{data}: none of its {len(part.skipped)} images is readable; {(part.skipped or ['none'])[0]}")
    if normal is not None:
        shared = len({row["digest"] for row in part.rows} & {row["digest"] for row in (*fitted, *calibration)})
        if shared:
            notes.append(
                f"{shared:,} of the images are among the normal ones that scores and thresholds were fitted to, which "
                "makes them too good: give normal other images"
            )
    if variance is not None:
        _add_elbo(part.rows, variance)
    scores = {name: _figures(part.rows, name, thresholds.get(name), paired=settings.defects) for name in scorer.names}
    notes += _without_intervals(part.rows, scores)
    result: dict[str, Any] = {
        "format": JOB.format,
        "model": stage.describe(),
        "data": {
            "location": str(data),
            "num_images": len({row["index"] for row in part.rows}),
            "fingerprint": _fingerprint(part.rows),
            "choice": part.choice,
            "skipped": part.skipped,
        },
        "normal": None
        if normal is None
        else {
            "location": settings.normal,
            "fingerprint": _fingerprint([*fitted, *calibration]),
            "thresholds_from": len(calibration),
            "variance_from": len(fitted),
            "variance": variance,
            "skipped": normal.skipped,
        },
        "method": {
            "scores": {name: SCORES[name] for name in scorer.names},
            "threshold": "flagged are scores above the ceil((n + 1)(1 - rate))-th smallest of n normal scores",
            "interval": "DeLong, on the logit's scale" + (", paired by image" if settings.defects else ""),
            "lpips": settings.lpips if lpips is not None else None,
        },
        "thresholds": thresholds,
        "scores": scores,
        "pixel_auroc": {name: scores_of_pixels.auroc() for name, scores_of_pixels in pixels.items()} or None,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "notes": notes,
    }
    if out is not None:
        _write(Path(out), result, part, work, rank_by)
    return result


def _trained_density(model: Any, stage: FirstStage, revision: str | None) -> Density | None:
    """Return the density in the model's folder; None if it has none, or is for other latents."""
    density = stored_density(model, revision) if isinstance(model, (str, Path)) else None
    fits = density is not None and density.config.latent_channels == stage.latent_channels
    return density if fits else None


def _neighbours(
    settings: AnomalySettings, stage: FirstStage, lpips: LPIPS | None, device: torch.device
) -> tuple[Neighbours | None, str]:
    """Return an empty bank of patches, or None and the reason why there is none; no reason if none is wanted."""
    if not settings.neighbours:
        return None, ""
    network, why_not = lpips, ""
    if network is None or network.net != "vgg":
        network, why_not = lpips_or_reason("vgg", stage.channels or 3, None, device)
    if network is None:
        return None, why_not.replace("LPIPS is missing", "no score of nearest patches")
    return Neighbours(network, settings.neighbours, settings.seed), ""


def _parted(count: int, settings: AnomalySettings, scorer: Scorer) -> tuple[list[int], list[int]]:
    """Return the numbers of the normal images to which scores are fitted, and of those that give thresholds.

    Args:
        count: Number of normal images.
        settings: The settings.
        scorer: Has the scores.
    """
    one_in = FIT_DENSITY if settings.mixture or settings.neighbours else FIT if scorer.elbo else 0
    fit = set(spread(settings.seed, count, -(-count // one_in)).tolist() if one_in else [])
    return sorted(fit), [number for number in range(count) if number not in fit]


def _fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """Return the fingerprint of the images of rows, in the order of their numbers; one with and without a defect counts
    once."""
    digests = {row["index"]: row["digest"] for row in rows}
    return fingerprint(digests[number] for number in sorted(digests))


def _add_elbo(rows: list[dict[str, Any]], variance: float) -> None:
    for row in rows:
        row["negative_elbo"] = negative_elbo(row, variance)


def _figures(rows: Sequence[dict[str, Any]], name: str, threshold: float | None, *, paired: bool) -> dict[str, Any]:
    """Return how many images a score flags, and its area and rates if it is known which images are normal."""
    values = np.array([row[name] for row in rows])
    flagged = None if threshold is None else values > threshold
    figures: dict[str, Any] = {"flagged": None if flagged is None else int(flagged.sum())}
    if rows[0]["abnormal"] is None:
        return figures
    abnormal = np.array([row["abnormal"] for row in rows])
    if not abnormal.any() or abnormal.all():
        return figures
    figures["auroc"] = auroc(values[~abnormal], values[abnormal])
    figures["interval"] = auroc_interval(values[~abnormal], values[abnormal], paired=paired)
    if flagged is not None:
        figures["false_positive_rate"] = float(flagged[~abnormal].mean())
        figures["detection_rate"] = float(flagged[abnormal].mean())
    kinds = sorted({row["defect"] for row in rows if row["defect"]})
    if kinds:
        of = np.array([row["defect"] for row in rows if row["abnormal"]], dtype=object)  # images are in pairs
        before, after = values[~abnormal], values[abnormal]
        figures["auroc_by_defect"] = {kind: auroc(before[of == kind], after[of == kind]) for kind in kinds}
    return figures


def _without_intervals(rows: Sequence[dict[str, Any]], scores: dict[str, dict[str, Any]]) -> list[str]:
    """Return a note on why areas have no interval, in a list; an empty list if all have one."""
    lacking = [name for name, figures in scores.items() if "auroc" in figures and figures["interval"] is None]
    if not lacking:
        return []
    abnormal = sum(row["abnormal"] for row in rows)
    normal = len(rows) - abnormal
    if min(normal, abnormal) < FEWEST_SCORES:
        return [
            f"AUROC without intervals: there are {normal:,} normal and {abnormal:,} abnormal images, and an interval "
            f"needs {FEWEST_SCORES} of each"
        ]
    return [f"AUROC without intervals: {', '.join(lacking)} separate all images, so the width cannot be estimated"]


def _write(folder: Path, result: dict[str, Any], part: Part, work: Work, rank_by: str) -> None:
    settings, location = work.settings, result["data"]["location"]
    groups = chosen(part.rows, rank_by, settings.num_pictures)
    pictured = [row for rows in groups.values() for row in rows]
    tops = {
        name: float(np.quantile([row[score] for row in part.rows], 0.95))
        for name, score in (("pixel_error", "pixel_max"), ("lpips", "lpips_max"), ("neighbours", "neighbours"))
        if score in work.scorer.names
    }
    files = ["result.json", "images.parquet", "report.html", "pictures.png", *(["maps/"] if settings.maps else [])]
    with written_into(folder, files):
        write_json(folder / "result.json", result)
        table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "numbers"} for row in part.rows])
        pa.parquet.write_table(table, folder / "images.parquet.part")
        (folder / "images.parquet.part").replace(folder / "images.parquet")
        shown: dict[tuple[int, str | None], Finding] = {}
        for finding in work.findings(part, location, part.rows if settings.maps else pictured):
            if settings.maps:
                write_maps(folder / "maps", finding, tops)
            if any(finding.row is row for row in pictured):
                shown[finding.row["index"], finding.row["defect"]] = finding
        by_heading = {
            heading: [shown[row["index"], row["defect"]] for row in rows if (row["index"], row["defect"]) in shown]
            for heading, rows in groups.items()
        }
        write_pictures(folder / "pictures.png", by_heading, tops)
        write_anomaly_report(folder / "report.html", result, part.rows, by_heading, tops, rank_by)


def chosen(rows: Sequence[dict[str, Any]], rank_by: str, count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows to show by heading, those with the highest score first.

    Args:
        rows: The rows of all images.
        rank_by: Name of the score.
        count: Number of rows in each group.
    """
    ranked = sorted(rows, key=lambda row: -row[rank_by])
    if rows[0]["abnormal"] is None:
        groups = {"Highest scores": ranked[:count], "Lowest scores": ranked[count:][-count:]}
    else:
        abnormal = [row for row in ranked if row["abnormal"]]
        groups = {
            "Abnormal, highest scores": abnormal[:count],
            "Abnormal, lowest scores": abnormal[count:][-count:],
            "Normal, highest scores": [row for row in ranked if not row["abnormal"]][:count],
        }
    return {heading: group for heading, group in groups.items() if group}
