"""Measures how close a first stage's reconstructions are to their images.

from latent_ae_eval.recon.measure import evaluate_reconstruction
result = evaluate_reconstruction("runs/quickstart/export", "photos")
print(result["metrics"]["mode"])
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.held_out import Framing, HeldOutImages, Part
from latent_ae.data.sources import source_stamp
from latent_ae.distributed import on_main, together
from latent_ae.files import replacing, write_json, writing
from latent_ae.metrics.labels import distance_names
from latent_ae.progress import progress_bar
from latent_ae.provenance import versions
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.features import collect, digests
from latent_ae_eval.inputs import (
    checked_factor,
    opened_data,
    opened_model,
    processes,
    refuse_generation_files,
    report_skipped,
    stream_notes,
)
from latent_ae_eval.recon import JOB
from latent_ae_eval.recon.cost import Costs, cost
from latent_ae_eval.recon.manifest import data_fingerprint, evaluation_key, protocol_manifest, reference_key
from latent_ae_eval.recon.pictures import chosen_rows, reconstructed, shown_groups
from latent_ae_eval.recon.report import ERROR_GAIN, panels, write_recon_report
from latent_ae_eval.recon.settings import ReconSettings
from latent_ae_eval.recon.shard import BASELINE, Measurer, networks_of
from latent_ae_eval.recon.summary import distances, means, unseen_reason
from latent_ae_eval.storage import ReferenceCache, WorkFolder, opened_work, shard_size


def evaluate_reconstruction(
    model: str | Path | nn.Module | Callable[[Tensor], Tensor],
    data: str | Path,
    settings: ReconSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
    rows: bool = True,
) -> dict[str, Any]:
    """Measure the reconstructions of a first stage. Every process of a distributed run calls this.

    Each image is measured once, whatever the number of processes. With `out`, an evaluation that was killed resumes
    from what it had measured.

    Args:
        model: A folder, a hub id, a first stage of diffusers as a module (it is moved to the device and set to
            evaluation mode), or a function from images, (N, C, H, W) in [-1, 1], to their reconstructions.
        data: `photos`, a folder of images, Parquet, Arrow or WebDataset files, or a hub id.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, images.parquet, report.html and pairs.png, which all processes must see; None
            writes nothing.
        progress: Show a progress bar.
        rows: Also return the rows of images.parquet as "images".

    Returns:
        The result, JSON-ready and equal on every process.

    Raises:
        UserError: If model or data cannot be loaded or do not fit, too many images are unreadable, or `out` cannot be
            written.
    """
    settings, started = settings or ReconSettings(), time.perf_counter()
    refuse_generation_files(str(data))
    if out is not None:
        _make_folder(Path(out))
    state, device = processes(settings)
    stage = opened_model(model, settings, device)
    source, choice = opened_data(str(data), settings)
    num_images = choice["number"]
    protocol = settings.resolved()
    images = HeldOutImages(
        source,
        settings.data(str(data)),
        stage.channels or 3,
        Framing(protocol.resize_px, protocol.crop_px, protocol.resample, protocol.crop_rounds == "nearest"),
        checked_factor(stage, protocol.crop_px),
    )
    if settings.bands and (most := max(map(max, settings.bands))) >= images.channels:
        raise UserError(f"bands: {most}, and the channels of {stage.name} are 0 to {images.channels - 1}")
    networks, why_not = networks_of(settings, device)
    caches = {
        name: ReferenceCache(reference_key(settings, images.channels, images.multiple_of, network.sha256))
        for name, network in networks.items()
        if settings.reference_cache
    }
    measurer = Measurer(stage, settings, device, networks, caches)
    with ExitStack() as stack:
        # TF32 convolutions would change the third digit
        stack.enter_context(float32_arithmetic(repeatable=True))
        size = shard_size(num_images, protocol.crop_px is None)
        key = None
        if stage.sha256 is not None and (stamp := source_stamp(source)) is not None:
            key = evaluation_key(settings, model=stage.sha256, data=stamp, shard=size, networks=digests(networks))
        work, done = opened_work(stack, out, {"": key}, state)[""]
        part = Part(state.process_index, state.num_processes, size, done)
        shows = progress and state.is_main_process
        measured = together(lambda: _measure(replace(images, part=part), measurer, work, num_images, size, shows))

        def finish() -> dict[str, Any]:
            result, table = _result(work, measurer, images, str(data), choice, why_not)
            result |= {"device": device.type, "processes": state.num_processes}
            seconds = time.perf_counter() - started
            count = sum(count for count, _ in measured)
            result |= {"seconds": round(seconds, 1), "images_per_second": round(count / seconds, 2)}
            result["cost"] = cost(stage, device, [costs for _, costs in measured])
            if out is not None:
                _write(Path(out), result, table, measurer, images)
                work.remove()
            return result | ({"images": table.to_pylist()} if rows else {})

        finished = on_main(state, finish)
        state.wait_for_everyone()
    return finished


def _measure(
    images: HeldOutImages, measurer: Measurer, work: WorkFolder, num_images: int | None, size: int, shows: bool
) -> tuple[int, Costs]:
    """Measure and write the unfinished shards of this process one by one; return the number of images and the costs."""
    total, count = None, 0
    if num_images is not None:
        mine = (number for number in range(-(-num_images // size)) if images.part.holds(number * size))
        total = sum(min(size, num_images - number * size) for number in mine)
    with progress_bar("recon", total, "image", disable=not shows) as bar:
        for number, group in groupby(images.items(), key=lambda item: item.index // size):
            items = list(group)
            work.write(number, measurer.measure(items))
            bar.update(len(items))
            count += len(items)
    return count, measurer.watch.costs()


def _result(
    work: WorkFolder, measurer: Measurer, images: HeldOutImages, data: str, choice: dict[str, Any], why_not: str
) -> tuple[dict[str, Any], pa.Table]:
    """Return the result without times and costs, and the rows of all images."""
    settings, stage, networks = measurer.settings, measurer.stage, measurer.networks
    with writing(work.folder):  # `collect` writes the features of all shards into files
        table, skipped, files = collect(work, work.done())
    if not table.num_rows:
        reason = f"none of its {len(skipped)} images is readable; {skipped[0]}" if skipped else "it holds no images"
        raise UserError(f"{data}: {reason}")
    report_skipped(skipped, table.num_rows, settings)
    notes = [*([why_not] if why_not else []), *stream_notes(choice)]
    if images.channels == 4 and not settings.bands:
        notes.append(
            f"four channels are taken as RGBA: metrics are of images over background={list(settings.background)}, and "
            "PSNR of alpha is that of the fourth channel; with bands=[[0,1,2]] they are compared as they are"
        )
    metrics: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, Any]] = {}
    for kind in measurer.kinds:
        metrics[kind], intervals[kind] = means(table, kind, notes.append, settings.seed, settings.bands)
        for network in settings.frechet:
            if network == "inception" and network not in networks:
                metrics[kind] |= {"fid": None, "kid": None}
                continue
            name = networks[network].name if network in networks else network
            if reason := unseen_reason(network, images.channels, settings.bands):
                notes.append(f"{distance_names(name)[0]}: {reason}")
                continue
            recall = network in settings.precision_recall
            values, widths = distances(
                files, kind, network, name, notes.append, images=table.num_rows, with_recall=recall
            )
            metrics[kind] |= values
            intervals[kind] |= widths
    if enlarged := int(np.sum(table["enlarged"].to_numpy(zero_copy_only=False))):
        notes.append(f"{enlarged:,} of {table.num_rows:,} images are smaller than the crop and were enlarged to fit")
    result = {
        "format": JOB.format,
        "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
        "protocol": protocol_manifest(settings),
        "networks": digests(networks),
        "data": {
            "location": data,
            "split": settings.split,
            "num_images": table.num_rows,
            "choice": choice,
            "fingerprint": data_fingerprint(table),
            "skipped": skipped,
        },
        "seed": settings.seed,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "metrics": metrics,
        "intervals": intervals,
        "notes": list(dict.fromkeys(notes)),
    }
    if any(name.startswith(BASELINE) for name in table.column_names):
        values, widths = means(table, BASELINE, lambda note: None, settings.seed)
        result["baseline"] = {"name": f"bicubic /{stage.factor}", "metrics": values, "intervals": widths}
    return result, table


def _make_folder(folder: Path) -> None:
    """Make the folder before the measurement, so that one that cannot be written is refused at once."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(folder: Path, result: dict[str, Any], table: pa.Table, measurer: Measurer, images: HeldOutImages) -> None:
    with replacing(folder / "images.parquet") as part:
        pyarrow.parquet.write_table(table, part)
    write_json(folder / "result.json", result)
    groups = chosen_rows(table, measurer.kinds[0], measurer.settings.num_pictures)
    indices = sorted(table["index"][row].as_py() for rows in groups.values() for row in rows)
    shown = shown_groups(groups, table, reconstructed(indices, measurer, images) if indices else {})
    write_recon_report(folder / "report.html", result, table.to_pylist(), shown)
    bands = measurer.settings.bands
    pairs = [list(panels(one, bands).values()) for group in shown.values() for one in group]
    if pairs:
        with replacing(folder / "pairs.png") as part:
            labels = ["input", "reconstruction", f"error x{ERROR_GAIN}"]
            picture_grid(pairs, labels=labels).save(part, format="PNG")
    print(f"wrote result.json, images.parquet, report.html and pairs.png into {folder}", file=sys.stderr)
