"""The images of a search for anomalies: their classes, pasted defects, and scores batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.data.held_out import HeldOutImage
from latent_ae.data.labels import Classes, find_classes
from latent_ae.data.sources import StoredImages, StreamSource
from latent_ae.models.loading import FirstStage
from latent_ae.pretrained.lpips import TRUNKS
from latent_ae.progress import progress_bar
from latent_ae.text import printable
from latent_ae_eval.anomaly.defects import Defect, paste_defect
from latent_ae_eval.anomaly.report import Finding
from latent_ae_eval.anomaly.scores import Scored, Scorer
from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_eval.inputs import opened_data
from latent_ae_eval.jobs import batches, images_for


@dataclass
class Part:
    """A set of images, whether they are abnormal, and the rows of their scores."""

    name: str
    source: StoredImages
    choice: dict[str, Any]
    abnormal: np.ndarray | None
    """(N,) bool; None without labels."""
    rows: list[dict[str, Any]]
    """Scores of each measured image."""
    skipped: list[str]
    """`name: reason` of each unreadable image."""
    normal_class: str | None = None
    """Name of the class of normal images, if classes have names: in another source its number may be another."""


def opened_part(key: str, location: str, settings: AnomalySettings, named: str | None = None) -> Part:
    """Open a source and find which of its images are abnormal, by their classes.

    Args:
        key: "data", or "normal" for the normal images of the setting.
        location: The location of the images.
        settings: The settings.
        named: Name of the class of normal images, which counts in place of its number where classes have names.

    Raises:
        UserError: If the data cannot be opened, or lack the class of normal images.
    """
    try:
        source, choice = opened_data(location, settings)
    except UserError as error:
        raise UserError(f"{key}: {error}" if key == "normal" else str(error)) from error
    assert not isinstance(source, StreamSource), "jobs do not open streams"
    normal_class = settings.normal_class
    if normal_class is None:
        return Part(key, source, choice, None, [], [])
    classes = find_classes(source, source, settings.label_column)
    if classes is None:
        if key == "normal":
            return Part(key, source, choice, None, [], [])
        raise UserError(
            f"normal_class: {location} has no labels; give tables with a column of classes, integers or names "
            "(label_column=NAME), or a folder of images with a folder for each class"
        )
    number = _class_number(named if named and classes.names is not None else normal_class, classes, key)
    known = np.flatnonzero(classes.labels >= 0)
    if len(known) < len(source):  # a table may lack labels, and such images are neither normal nor abnormal
        source, choice = source.subset(known), choice | {"without_label": len(source) - len(known)}
    named = classes.names[number] if classes.names is not None else None
    return Part(key, source, choice, classes.labels[known] != number, [], [], named)


def _class_number(name: str | int, classes: Classes, key: str) -> int:
    if classes.names is not None:
        if str(name) in classes.names:
            return classes.names.index(str(name))
        if isinstance(name, int) and 0 <= name < len(classes.names):
            return name
    elif isinstance(name, int) and name in classes.labels:
        return name
    has = ", ".join(classes.names or map(str, sorted(set(classes.labels.tolist()))))
    raise UserError(f"normal_class: {key} has no class {name}; it has: {has[:200]}")


class Work:
    """Scores parts batch by batch, and chosen images again to show them.

    Args:
        stage: The model.
        scorer: Computes the scores.
        settings: The settings.
        progress: Show progress bars.
    """

    def __init__(self, stage: FirstStage, scorer: Scorer, settings: AnomalySettings, progress: bool):
        self.stage, self.scorer, self.settings, self.progress = stage, scorer, settings, progress
        self.first: HeldOutImage | None = None
        """The first image that was scored."""

    def scored(
        self, part: Part, location: str, indices: Sequence[int] | None = None
    ) -> Iterator[tuple[Scored, list[Tensor | None]]]:
        """Yield scores and defects' masks, (H, W) bool or None, batch by batch; rows are added to the part.

        Args:
            part: The images.
            location: Their location.
            indices: Numbers of the images; None scores all.

        Raises:
            UserError: If images are too small, or no defect shows on one.
        """
        indices = range(len(part.source)) if indices is None else indices
        bar = progress_bar(f"anomaly: {part.name}", len(indices), "image", disable=not self.progress)
        with bar:  # closes the bar also if an image is refused
            for items, scored, defects in self._batches(part, location, indices, bar):
                for i, item in enumerate(items):
                    defect = defects[i]
                    row: dict[str, Any] = {"index": item.index, "name": printable(item.name), "defect": None}
                    row["digest"] = item.digest
                    row["abnormal"] = None if part.abnormal is None else bool(part.abnormal[item.index])
                    if self.settings.defects and part.name == "data":
                        row |= {"abnormal": defect is not None, "defect": defect.kind if defect else None}
                    row |= {name: float(values[i]) for name, values in (scored.scores | scored.parts).items()}
                    row["numbers"] = scored.reconstruction[i].numel()
                    part.rows.append(row)
                yield scored, [defect.mask if defect else None for defect in defects]

    def findings(self, part: Part, location: str, rows: Sequence[dict[str, Any]]) -> Iterator[Finding]:
        """Score the images of `rows` again and yield them with their maps, in the order of their indices."""
        by_image = {(row["index"], row["defect"]): row for row in rows}
        indices = sorted({row["index"] for row in rows})
        for items, scored, defects in self._batches(part, location, indices, None):
            for i, (item, defect) in enumerate(zip(items, defects, strict=True)):
                row = by_image.get((item.index, defect.kind if defect else None))
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
            pasted_on = [defects.pop(id(item), None) for item in items]
            self._check_size(items[0])
            yield items, self.scorer.score(batch, [item.index for item in items]), pasted_on

    def _check_size(self, item: HeldOutImage) -> None:
        assert item.image is not None
        lpips, (height, width) = self.scorer.lpips, item.image.shape[-2:]
        self.first = self.first or item
        assert self.first.image is not None
        if (
            self.scorer.mixture is not None
            and self.stage.module is not None
            and item.image.shape != self.first.image.shape
        ):
            first_height, first_width = self.first.image.shape[-2:]
            raise UserError(
                f"mixture: needs images of one size; {self.first.name} has {first_width} x {first_height} and "
                f"{item.name} has {width} x {height}: set resize_px and crop_px, or mixture=0"
            )
        if self.scorer.neighbours is not None and min(height, width) < (least := TRUNKS["vgg"].min_px):
            raise UserError(
                f"neighbours: VGG16 needs sides of {least} px and {item.name} has {width} x {height}; set resize_px, "
                "or neighbours=0"
            )
        if lpips is not None and min(height, width) < lpips.trunk.min_px:
            raise UserError(
                f"lpips: {lpips.net} needs sides of {lpips.trunk.min_px} px and {item.name} has {width} x {height}; "
                f"set resize_px, {'lpips=vgg, ' if lpips.net == 'alex' else ''}or lpips=null"
            )
