"""Which images a first stage cannot reconstruct, and where: scores, thresholds from normal images, heat maps.

from latent_ae_eval.anomaly import find_anomalies
from latent_ae_eval.job_config import AnomalySettings
result = find_anomalies("runs/bottles", "bottles/test", AnomalySettings(normal="bottles/good"), out="anomalies")
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.classes import Classes, find_classes
from latent_ae.config import UserError
from latent_ae.defects import Defect, paste_defect
from latent_ae.detection import PixelScores, auroc, auroc_interval, conformal_threshold
from latent_ae.first_stages import FirstStage
from latent_ae.held_out import HeldOutImage
from latent_ae.sources import StoredImages, StreamSource

from .anomaly_page import Finding, write_anomaly_report, write_maps, write_pictures
from .anomaly_scores import Scored, Scorer, negative_elbo
from .inputs import opened_data, opened_model
from .job_config import AnomalySettings
from .jobs import batches, images_for, lpips_or_reason, make_folder, one_process, write_json
from .manifest import versions

FORMAT = "latent-ae anomaly 1"
FIT = 5
"""One normal image in so many fits the ELBO's variance and gives no threshold: the scores of the others then stay
exchangeable with those of new images."""
SCORES = {
    "pixel_mean": "mean squared error, of values in [-1, 1]",
    "pixel_max": "largest value of the smoothed map of squared errors",
    "lpips_mean": "LPIPS",
    "lpips_max": "largest value of the map of LPIPS",
    "negative_elbo": "nats per pixel and channel: Gaussian of the normal images' variance, one posterior sample",
}


@dataclass
class Part:
    """A set of images and what is known of them."""

    name: str
    source: StoredImages
    abnormal: np.ndarray | None
    """(N,) bool; None without labels."""
    rows: list[dict[str, Any]]
    skipped: list[str]


def find_anomalies(
    model: str | Path | nn.Module | Callable[[Tensor], Tensor],
    data: str | Path,
    settings: AnomalySettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores every image of `data`, and says how well that tells the abnormal ones where they are known; JSON-ready.

    With `out`, writes result.json, images.parquet, report.html, pictures.png and with `maps` the heat maps there.
    Raises UserError for what cannot be loaded, classes that are not there, and several processes.
    """
    settings = settings or AnomalySettings()
    if out is not None:
        make_folder(Path(out))
    device = one_process("anomaly", settings)
    stage = opened_model(model, settings, device)
    part = _opened("data", str(data), settings)
    normal = None
    if settings.normal is not None:
        own = settings.model_copy(update={"split": settings.normal_split, "limit": None})
        normal = _opened("normal", settings.normal, own)
        if normal.abnormal is not None:
            normal.source, normal.abnormal = normal.source.subset(np.flatnonzero(~normal.abnormal)), None
    lpips, why_not = lpips_or_reason(settings.lpips, stage.channels or 3, (1 << 20,), device)
    scorer = Scorer(stage, lpips, blur_px=settings.blur_px, seed=settings.seed, elbo=normal is not None, device=device)
    work = _Work(stage, scorer, settings, progress, [why_not] if why_not else [])

    variance, thresholds, calibration = None, {}, []
    if normal is not None:
        for _ in work.scored(normal, settings.normal or ""):
            pass
        if not normal.rows:
            raise UserError(f"normal: none of the {len(normal.skipped)} images of {settings.normal} is readable")
        calibration = normal.rows
        if scorer.elbo:
            if len(normal.rows) < 2:
                raise UserError(f"normal: {settings.normal} gives one image; two are the fewest")
            fitted, calibration = normal.rows[::FIT], [r for i, r in enumerate(normal.rows) if i % FIT]
            variance = sum(r["squares"] for r in fitted) / sum(r["numbers"] for r in fitted)
            variance = max(variance, 1e-12)  # of a model that reconstructs exactly
            _add_elbo(calibration, variance)
        for name in _names(calibration):
            found = conformal_threshold(np.array([row[name] for row in calibration]), settings.false_positive_rate)
            thresholds[name] = found
        if None in thresholds.values():
            rate = settings.false_positive_rate
            needed = math.ceil(1 / rate - 1 - 1e-9)
            work.notes.append(
                f"no thresholds: a false positive rate of {rate:g} needs {needed} normal images, and there are "
                f"{len(calibration)}"
            )
    else:
        work.notes.append("no thresholds and no ELBO: they need normal images that were not trained on (normal=DATA)")
    if not stage.has_posterior:
        work.notes.append(f"no ELBO: {stage.name} has no posterior")

    pixels: dict[str, PixelScores] = {}
    for scored, masks in work.scored(part, str(data)):
        for name, maps in scored.maps.items():
            for position, mask in enumerate(masks):
                if mask is not None:
                    pixels.setdefault(name, PixelScores()).add(maps[position], mask)
    if not part.rows:
        raise UserError(f"{data}: none of its {len(part.skipped)} images is readable; {(part.skipped or ['none'])[0]}")
    if variance is not None:
        _add_elbo(part.rows, variance)
    names = _names(part.rows)
    result: dict[str, Any] = {
        "format": FORMAT,
        "model": stage.describe(),
        "data": {
            "location": str(data),
            "num_images": len({row["index"] for row in part.rows}),
            "skipped": part.skipped,
        },
        "normal": None
        if normal is None
        else {
            "location": settings.normal,
            "thresholds_from": len(calibration),
            "variance_from": len(normal.rows) - len(calibration),
            "variance": variance,
            "skipped": normal.skipped,
        },
        "method": {
            "scores": {name: SCORES[name] for name in names},
            "threshold": "flagged is what lies above the ceil((n + 1)(1 - rate))-th smallest of n normal scores",
            "interval": "DeLong" + (", paired by image" if settings.defects else ""),
            "lpips": settings.lpips if lpips is not None else None,
        },
        "thresholds": thresholds,
        "scores": {name: _figures(part.rows, name, thresholds.get(name), paired=settings.defects) for name in names},
        "pixel_auroc": {name: found.auroc() for name, found in pixels.items()} or None,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "notes": work.notes,
    }
    if out is not None:
        _write(Path(out), result, part, work, names)
    return result


def _opened(key: str, location: str, settings: AnomalySettings) -> Part:
    """A source and which of its images are abnormal, by their classes."""
    try:
        source, _ = opened_data(location, settings)
    except UserError as error:
        raise UserError(f"{key}: {error}" if key == "normal" else str(error)) from error
    assert not isinstance(source, StreamSource), "jobs do not open streams"
    wanted = settings.normal_class
    if wanted is None:
        return Part(key, source, None, [], [])
    classes = find_classes(source, source, settings.label_column)
    if classes is None:
        if key == "normal":
            return Part(key, source, None, [], [])
        raise UserError(
            f"normal_class: {location} has no labels; give tables with a column of classes or integers "
            "(label_column=NAME), or a folder of images with a folder for each class"
        )
    number = _class_number(wanted, classes, key)
    return Part(key, source, classes.labels != number, [], [])


def _class_number(wanted: str | int, classes: Classes, key: str) -> int:
    if classes.names is not None:
        if str(wanted) in classes.names:
            return classes.names.index(str(wanted))
        if isinstance(wanted, int) and 0 <= wanted < len(classes.names):
            return wanted
    elif isinstance(wanted, int) and wanted in classes.labels:
        return wanted
    has = ", ".join(classes.names or map(str, sorted(set(classes.labels.tolist()))))
    raise UserError(f"normal_class: {key} has no class {wanted}; it has: {has[:200]}")


class _Work:
    """Scores parts batch by batch, and chosen images again when they are to be shown."""

    def __init__(self, stage: FirstStage, scorer: Scorer, settings: AnomalySettings, progress: bool, notes: list[str]):
        self.stage, self.scorer, self.settings, self.progress, self.notes = stage, scorer, settings, progress, notes

    def scored(self, part: Part, location: str) -> Iterator[tuple[Scored, list[Tensor | None]]]:
        """Batches with their scores and masks; rows are added to the part."""
        bar = tqdm(
            total=len(part.source),
            desc=f"anomaly: {part.name}",
            unit="image",
            disable=not self.progress,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        for items, scored, defects in self._batches(part, location, range(len(part.source)), bar):
            for i, item in enumerate(items):
                defect = defects[i]
                row: dict[str, Any] = {"index": item.index, "name": _printable(item.name), "defect": None}
                row["abnormal"] = None if part.abnormal is None else bool(part.abnormal[item.index])
                if self.settings.defects and part.name == "data":
                    row |= {"abnormal": defect is not None, "defect": defect.kind if defect else None}
                row |= {name: float(values[i]) for name, values in (scored.scores | scored.parts).items()}
                row["numbers"] = scored.reconstruction[i].numel()
                part.rows.append(row)
            yield scored, [defect.mask if defect else None for defect in defects]
        bar.close()

    def findings(self, part: Part, location: str, rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
        """Images of `rows`, in the order of their indices, once more with their maps."""
        wanted = {(row["index"], row["defect"]): row for row in rows}
        indices = sorted({row["index"] for row in rows})
        for items, scored, defects in self._batches(part, location, indices, None):
            for i, (item, defect) in enumerate(zip(items, defects, strict=True)):
                row = wanted.get((item.index, defect.kind if defect else None))
                if row is not None and item.image is not None:
                    maps = {name: maps[i].cpu() for name, maps in scored.maps.items()}
                    mask = defect.mask if defect else None
                    yield Finding(row, item.image, scored.reconstruction[i].cpu(), maps, mask)

    def _batches(
        self, part: Part, location: str, indices: Sequence[int], bar: tqdm | None
    ) -> Iterator[tuple[list[HeldOutImage], Scored, list[Defect | None]]]:
        source = part.source.subset(np.asarray(indices, dtype=np.int64))
        images = images_for(self.stage, source, self.settings, location)
        defects: dict[int, Defect] = {}

        def read() -> Iterator[HeldOutImage]:
            for item in images.items():
                if bar is not None:
                    bar.update()
                if item.image is None:
                    if bar is not None:
                        part.skipped.append(f"{item.name}: {item.reason}")
                    continue
                item = replace(item, index=int(indices[item.index]))
                yield item
                if self.settings.defects and part.name == "data":
                    try:
                        defect = paste_defect(item.image, self.settings.seed, item.index)
                    except ValueError as error:
                        raise UserError(f"defects: {item.name}: {error}") from error
                    pasted = replace(item, image=defect.image)
                    defects[id(pasted)] = defect
                    yield pasted

        for items, batch in batches(read(), self.settings.batch_size, self.scorer.device):
            found = [defects.pop(id(item), None) for item in items]
            self._check_size(items[0])
            yield items, self.scorer.score(batch, [item.index for item in items]), found

    def _check_size(self, item: HeldOutImage) -> None:
        assert item.image is not None
        lpips, (height, width) = self.scorer.lpips, item.image.shape[-2:]
        if lpips is not None and min(height, width) < lpips.trunk.min_px:
            raise UserError(
                f"lpips: {lpips.net} needs sides of {lpips.trunk.min_px} px and {item.name} has {width} x {height}; "
                f"set resize_px, {'lpips=vgg, ' if lpips.net == 'alex' else ''}or lpips=null"
            )


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()  # file names may hold what no table can


def _add_elbo(rows: list[dict[str, Any]], variance: float) -> None:
    for row in rows:
        row["negative_elbo"] = negative_elbo(row, variance)


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in SCORES if name in rows[0]]


def _figures(rows: Sequence[dict[str, Any]], name: str, threshold: float | None, *, paired: bool) -> dict[str, Any]:
    """How a score did: flagged images, and where it is known what is normal also its area and rates."""
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


def _write(folder: Path, result: dict[str, Any], part: Part, work: _Work, names: Sequence[str]) -> None:
    settings, location = work.settings, result["data"]["location"]
    rank_by = settings.rank_by or ("lpips_max" if "lpips_max" in names else "pixel_max")
    if rank_by not in names:
        raise UserError(f"rank_by: {rank_by} was not measured; there are {', '.join(names)}")
    groups = chosen(part.rows, rank_by, settings.num_pictures)
    wanted = [row for rows in groups.values() for row in rows]
    tops = {
        name: float(np.quantile([row[score] for row in part.rows], 0.95))
        for name, score in (("pixel_error", "pixel_max"), ("lpips", "lpips_max"))
        if score in names
    }
    try:
        write_json(folder / "result.json", result)
        table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "numbers"} for row in part.rows])
        pa.parquet.write_table(table, folder / "images.parquet.part")
        (folder / "images.parquet.part").replace(folder / "images.parquet")
        shown: dict[tuple[int, str | None], Finding] = {}
        for finding in work.findings(part, location, part.rows if settings.maps else wanted):
            if settings.maps:
                write_maps(folder / "maps", finding, tops)
            if any(finding.row is row for row in wanted):
                shown[finding.row["index"], finding.row["defect"]] = finding
        found = {
            heading: [shown[row["index"], row["defect"]] for row in rows if (row["index"], row["defect"]) in shown]
            for heading, rows in groups.items()
        }
        write_pictures(folder / "pictures.png", found, tops)
        write_anomaly_report(folder / "report.html", result, part.rows, found, tops, rank_by)
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder}: {error.strerror or error}") from error
    files = "result.json, images.parquet, report.html, pictures.png" + (", maps/" if settings.maps else "")
    print(f"wrote {files} into {folder}", file=sys.stderr)


def chosen(rows: Sequence[dict[str, Any]], rank_by: str, count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows to show by heading: with the highest score first; where it is known what is normal, also both mistakes."""
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
