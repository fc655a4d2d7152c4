"""Measures how well text survives a first stage: an OCR engine reads originals and reconstructions.

from latent_ae_eval.text.measure import text_fidelity
result = text_fidelity("runs/quickstart/export")
print(result["metrics"]["ned_reconstruction"])
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate.utils import get_int_from_env
from PIL import features
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError, refuse
from latent_ae.data.held_out import Framing, HeldOutImage, HeldOutImages, Part
from latent_ae.data.images import to_uint8
from latent_ae.data.sources import StreamSource, fingerprint, part_of, source_stamp
from latent_ae.distributed import on_main, together
from latent_ae.files import replacing, writing
from latent_ae.metrics.similarity import FEWEST, bootstrap_interval, compare, json_columns
from latent_ae.models.loading import FirstStage
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.progress import progress_bar
from latent_ae.provenance import versions
from latent_ae_eval.features import collect
from latent_ae_eval.inputs import (
    checked_factor,
    opened_data,
    opened_model,
    processes,
    refuse_generation_files,
    report_skipped,
)
from latent_ae_eval.jobs import batches, lpips_or_reason, make_folder, write_json, written_into
from latent_ae_eval.storage import Shard, WorkFolder, opened_work, shard_size
from latent_ae_eval.text import JOB
from latent_ae_eval.text.fonts import fonts_for
from latent_ae_eval.text.reading import Reader, Tesseract, comparable, missing_language, ned, reading_pool
from latent_ae_eval.text.rendering import RenderedText, samples_of
from latent_ae_eval.text.report import AXES, METRICS, Shown, picture_of, write_text_report
from latent_ae_eval.text.scripts import SCRIPTS
from latent_ae_eval.text.settings import SIDE_PX, TextSettings

FILES = ["result.json", "readings.parquet", "pairs.png", "report.html"]


@dataclass(frozen=True)
class Texts:
    """The crops of an evaluation, and what is known about them."""

    images: HeldOutImages
    choice: dict[str, Any]
    location: str | None
    """None if they are rendered."""
    languages: tuple[str, ...]
    """Languages in which they are read; of rendered text each crop has one of them."""

    @property
    def rendered(self) -> RenderedText | None:
        """The rendered text, if it is such."""
        source = self.images.source
        return source if isinstance(source, RenderedText) else None

    def __len__(self) -> int:
        assert not isinstance(self.images.source, StreamSource), "jobs do not open streams"
        return len(self.images.source)

    def facts(self, index: int) -> dict[str, Any]:
        """Return what is known about a crop: script, size, text and so on; nothing if it is not rendered."""
        return self.rendered.facts(index) if self.rendered else {}

    def stamp(self) -> Any:
        """Return a value that changes when the crops do."""
        if self.rendered is None:
            return source_stamp(self.images.source)
        return _described_fonts(self.rendered), [sample.number for sample in self.rendered.samples]


def text_fidelity(
    model: str | Path | nn.Module | Callable[[Tensor], Tensor],
    data: str | Path | None = None,
    settings: TextSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure how well text survives a first stage. Every process of a distributed run calls this.

    With `out`, an evaluation that was killed resumes from what it had read.

    Args:
        model: A folder, a hub id, a first stage of diffusers as a module, or a function from images, (N, C, H, W) in
            [-1, 1], to their reconstructions.
        data: A folder of crops of text, Parquet or Arrow files, or a hub id; None renders text.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, readings.parquet, pairs.png and report.html, which all processes must see; None
            writes nothing.
        progress: Show a progress bar.

    Returns:
        The result, JSON-ready and equal on every process.

    Raises:
        UserError: If tesseract is missing or fails, model or data cannot be loaded or do not fit, no script can be
            rendered and read, no text is found in DATA, or `out` cannot be written.
    """
    settings, started = settings or TextSettings(), time.perf_counter()
    refuse(settings.misplaced(data is not None))
    reader: Reader = Tesseract()
    if out is not None:
        make_folder(Path(out))
    state, device = processes(settings)
    stage = opened_model(model, settings, device)
    if stage.channels not in (None, 1, 3):
        raise UserError(f"text is read in images of 1 or 3 channels, and those of {stage.name} have {stage.channels}")
    notes: list[str] = []
    texts = _rendered(stage, settings, reader, notes) if data is None else _given(str(data), stage, settings, reader)
    lpips, why_not = lpips_or_reason(settings.lpips, stage.channels or 3, texts.images.framing.crop_px, device)
    notes += [why_not] if why_not else []
    size = shard_size(len(texts), whole_images=False)
    key = None
    if stage.sha256 is not None and (stamp := texts.stamp()) is not None:
        irrelevant = {"batch_size", "num_workers", "num_readers", "num_pictures", "max_bad_fraction", "device"}
        chosen = settings.model_dump(mode="json", exclude=irrelevant)
        key = {"settings": chosen, "model": stage.sha256, "data": stamp, "shard": size, "engine": reader.describe()}
        key |= {"languages": texts.languages, "versions": versions()}
    with ExitStack() as stack:
        stack.enter_context(float32_arithmetic(repeatable=True))
        work, done = opened_work(stack, out, {"": key}, state)[""]
        part = Part(state.process_index, state.num_processes, size, done)
        mine = replace(texts, images=replace(texts.images, part=part))
        measurer = Measurer(stage, settings, device, lpips, reader)
        together(lambda: measurer.measure_all(mine, work, progress and state.is_main_process))

        def finish() -> dict[str, Any]:
            with writing(work.folder):
                table, skipped, _ = collect(work, work.done())
            if not table.num_rows:
                reason = f"none of its {len(skipped)} images is readable; {skipped[0]}" if skipped else "it is empty"
                raise UserError(f"{texts.location}: {reason}")
            report_skipped(skipped, table.num_rows, settings)
            rows = table.to_pylist()
            result = _result(stage, settings, texts, rows, skipped, reader, notes)
            seconds = time.perf_counter() - started
            result |= {"device": device.type, "processes": state.num_processes, "seconds": round(seconds, 1)}
            if out is not None:
                shown = _shown(texts, rows, measurer)
                with written_into(Path(out), [name for name in FILES if any(shown.values()) or name != "pairs.png"]):
                    _write(Path(out), result, rows, shown)
                work.remove()
            return result

        result = on_main(state, finish)
        state.wait_for_everyone()
    return result


def _rendered(stage: FirstStage, settings: TextSettings, reader: Reader, notes: list[str]) -> Texts:
    """Return rendered text; notes on scripts that are left out are appended."""
    side = settings.crop_px or stage.side or max(1, SIDE_PX // stage.factor) * stage.factor
    checked_factor(stage, side)
    refuse(settings.too_large(side))
    fonts, missing = {}, []
    for name in settings.scripts:
        script = SCRIPTS[name]
        found = fonts_for(script, settings.fonts)
        if script.language not in reader.languages:
            missing.append(f"{name}: left out, because {missing_language(script.language)}")
        elif script.right_to_left and not features.check("raqm"):
            missing.append(f"{name}: left out, because Pillow finds no Raqm or FriBiDi, which join its letters")
        elif not found:
            missing.append(
                f"{name}: left out, because no font has all of its letters; name one in fonts, or install one, on "
                "Debian for example fonts-noto-core and fonts-noto-cjk"
            )
        else:
            fonts[name] = found
    if not fonts:
        raise UserError("no script can be rendered and read:\n  " + "\n  ".join(missing))
    notes += missing
    scripts = [name for name in settings.scripts if name in fonts]
    samples = samples_of(scripts, settings.sizes_px, settings.backgrounds, settings.contents, settings.repeats)
    source, choice = part_of(
        RenderedText(samples, fonts, settings.seed, side, settings.lines), settings.limit, settings.seed
    )
    images = HeldOutImages(source, settings.data("photos"), stage.channels or 3, Framing(None, side), stage.factor)
    return Texts(images, choice, None, tuple(SCRIPTS[name].language for name in scripts))


def _given(data: str, stage: FirstStage, settings: TextSettings, reader: Reader) -> Texts:
    """Return the crops of DATA."""
    refuse_generation_files(data)
    if missing := [language for language in settings.languages if language not in reader.languages]:
        has = ", ".join(sorted(reader.languages))
        raise UserError(f"languages: {'; '.join(map(missing_language, missing))}; it has {has}")
    factor = checked_factor(stage, settings.crop_px)
    source, choice = opened_data(data, settings)
    framing = Framing(settings.resize_px, settings.crop_px)
    images = HeldOutImages(source, settings.data(data), stage.channels or 3, framing, factor)
    return Texts(images, choice, data, settings.languages)


@dataclass(frozen=True)
class Measurer:
    """Reconstructs crops, and reads them before and after."""

    stage: FirstStage
    settings: TextSettings
    device: torch.device
    lpips: LPIPS | None
    reader: Reader

    def measure_all(self, texts: Texts, work: WorkFolder, shows: bool) -> None:
        """Measure and write this process's unfinished shards one by one."""
        size = texts.images.part.block
        total = sum(texts.images.part.holds(index) for index in range(len(texts)))
        readers = self.settings.num_readers or max(1, _cores() // get_int_from_env(["LOCAL_WORLD_SIZE"], 1))
        with reading_pool(readers) as pool, progress_bar("text", 2 * total, "reading", disable=not shows) as bar:
            for number, group in groupby(texts.images.items(), key=lambda item: item.index // size):
                items = list(group)
                rows, pictures = self._reconstructed(items, texts)
                # originals and reconstructions in turn, read by all threads
                pieces = [picture for pair in pictures for picture in pair]
                languages = [self._language(row, texts) for row in rows for _ in range(2)]
                readings = []
                for reading in pool.map(self.reader.read, pieces, languages):
                    readings.append(reading)
                    bar.update()
                both = zip(readings[::2], readings[1::2], strict=True)
                rows = [row | compared(row.get("text"), *one) for row, one in zip(rows, both, strict=True)]
                skipped = [f"{item.name}: {item.reason}" for item in items if item.image is None]
                bar.update(2 * len(skipped))
                work.write(number, Shard(rows, skipped, {}))

    def _language(self, row: Mapping[str, Any], texts: Texts) -> str:
        return SCRIPTS[row["script"]].language if "script" in row else "+".join(texts.languages)

    @torch.no_grad()
    def _reconstructed(
        self, items: Sequence[HeldOutImage], texts: Texts
    ) -> tuple[list[dict[str, Any]], list[tuple[np.ndarray, np.ndarray]]]:
        """Return the rows of readable crops without readings, and their pixels before and after, (H, W, C) uint8."""
        rows, pictures = [], []
        nets = {} if self.lpips is None or self.settings.lpips is None else {self.settings.lpips: self.lpips}
        for batch, images in batches(items, self.settings.batch_size, self.device):
            inputs = images.to(self.device).contiguous(memory_format=torch.channels_last)
            made = self.stage.reconstruct(inputs)
            columns = json_columns(compare(inputs, {"": made}, nets).metrics[""])
            columns.pop("ms_ssim")
            made[~made.isfinite().flatten(1).all(1)] = 0  # a plain grey, in which nothing is read
            pixels = [to_uint8(some).permute(0, 2, 3, 1).cpu().numpy() for some in (inputs, made)]
            pictures += list(zip(*pixels, strict=True))
            for i, item in enumerate(batch):
                name = item.name.encode("utf-8", "backslashreplace").decode()  # names may be no valid UTF-8
                about = {"index": item.index, "name": name, "digest": item.digest} | texts.facts(item.index)
                rows.append(about | {metric: column[i] for metric, column in columns.items()})
        return rows, pictures


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compared(truth: str | None, original: str, reconstruction: str) -> dict[str, Any]:
    """Return the columns of a crop about what was read.

    Args:
        truth: What stands in it; None if that is unknown.
        original: The reading of the original.
        reconstruction: The reading of the reconstruction.

    Returns:
        The readings, and `ned_` and `exact_` of `original` and `reconstruction` against the truth and of the
        `agreement` of both readings, which is None where nothing was read in the original.
    """
    pairs = {"agreement": (original, reconstruction)}
    if truth is not None:
        pairs = {"original": (truth, original), "reconstruction": (truth, reconstruction)} | pairs
    columns: dict[str, Any] = {"read_original": original, "read_reconstruction": reconstruction}
    for kind, (a, b) in pairs.items():
        known = bool(comparable(a))
        columns[f"ned_{kind}"] = ned(a, b) if known else None
        columns[f"exact_{kind}"] = float(comparable(a) == comparable(b)) if known else None
    if truth is not None:
        columns["ned_lost"] = columns["ned_original"] - columns["ned_reconstruction"]
    return columns


def summary(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return the means over the crops that have a metric, and their 95 % bootstrap intervals from 20 crops on."""
    metrics: dict[str, Any] = {"n": len(rows)}
    intervals = {}
    for name in METRICS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            metrics[name] = float(np.mean(values))
        if len(values) >= FEWEST:
            intervals[name] = bootstrap_interval(values, seed)
    return {"metrics": metrics, "intervals": intervals}


def _result(
    stage: FirstStage,
    settings: TextSettings,
    texts: Texts,
    rows: Sequence[Mapping[str, Any]],
    skipped: list[str],
    reader: Reader,
    notes: list[str],
) -> dict[str, Any]:
    """Return the result without times."""
    silent = sum(row["ned_agreement"] is None for row in rows)
    if silent == len(rows):
        raise UserError(f"{texts.location or 'rendered text'}: nothing was read in any of the {silent:,} originals")
    if silent:
        of = "NED and exact readings" if texts.rendered is None else "the agreement of both readings"
        notes.append(f"nothing was read in {silent:,} of {len(rows):,} originals, which {of} leave out")
    if bad := sum(row["psnr"] is None for row in rows):
        notes.append(f"{bad:,} of {len(rows):,} reconstructions are not finite, and nothing is read in them")
    groups = {}
    if texts.rendered is not None:
        for axis in AXES:
            values = list(dict.fromkeys(row[axis] for row in rows))
            groups[axis] = {
                str(value): summary([row for row in rows if row[axis] == value], settings.seed) for value in values
            }
    framing = texts.images.framing
    return {
        "format": JOB.format,
        "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
        "data": {
            "location": texts.location,
            "num_images": len(rows),
            "choice": texts.choice,
            "fingerprint": fingerprint(row["digest"] for row in rows),
            "skipped": skipped,
            "crop_px": framing.crop_px,
            "fonts": _described_fonts(texts.rendered) if texts.rendered else None,
        },
        "engine": reader.describe() | {"languages": list(texts.languages)},
        "method": {
            "latent": "the posterior's mode" if stage.random else "deterministic",
            "ned": "1 - Levenshtein / longer length, of NFKC without white space; higher is better",
            "truth": "what was rendered" if texts.rendered else "the reading of the original",
        },
        **summary(rows, settings.seed),
        "groups": groups,
        "seed": settings.seed,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "notes": notes,
    }


def _described_fonts(text: RenderedText) -> dict[str, list[dict[str, Any]]]:
    return {script: [font.describe() for font in fonts] for script, fonts in text.fonts.items()}


def _shown(texts: Texts, rows: Sequence[dict[str, Any]], measurer: Measurer) -> dict[str, list[Shown]]:
    """Return the crops that lost most, and of each size the one with the median loss (of DATA, of all)."""

    def loss(row: Mapping[str, Any]) -> float:
        return row["ned_lost"] if "ned_lost" in row else 1 - (row["ned_agreement"] or 0.0)

    known = sorted((row for row in rows if row["ned_agreement"] is not None), key=loss)
    sizes: dict[Any, list[dict[str, Any]]] = {}
    for row in known:
        sizes.setdefault(row.get("size_px"), []).append(row)
    count = measurer.settings.num_pictures
    chosen = {
        "Where most was lost": known[::-1][:count],
        "Where as much was lost as in the median": [sizes[size][len(sizes[size]) // 2] for size in sorted(sizes)],
    }
    pictures = _pictures(texts, [row["index"] for group in chosen.values() for row in group], measurer) if count else {}
    return {name: [Shown(row, *pictures[row["index"]]) for row in group] for name, group in chosen.items() if count}


@torch.no_grad()
def _pictures(texts: Texts, indices: Sequence[int], measurer: Measurer) -> dict[int, tuple[Tensor, Tensor]]:
    """Return images and their reconstructions by index, (C, H, W) in [-1, 1] on the CPU."""
    source = texts.images.source
    assert not isinstance(source, StreamSource)
    ordered = sorted(set(indices))
    images = replace(texts.images, source=source.subset(np.array(ordered)), part=Part())
    pairs = {}
    for item in images.items():
        assert item.image is not None
        made = measurer.stage.reconstruct(item.image[None].to(measurer.device))[0]
        pairs[ordered[item.index]] = item.image, made.cpu()
    return pairs


def _write(
    folder: Path, result: dict[str, Any], rows: list[dict[str, Any]], shown: Mapping[str, Sequence[Shown]]
) -> None:
    with replacing(folder / "readings.parquet") as part:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), part)
    write_json(folder / "result.json", result)
    write_text_report(folder / "report.html", result, rows, shown)
    if flat := [one for group in shown.values() for one in group]:
        picture_of(flat).save(folder / "pairs.png")
