"""Measures the interpolated Fréchet distance: decoded midpoints between near latents, compared with the originals.

from latent_ae_eval.ifid.measure import interpolated_distance
result = interpolated_distance("runs/quickstart/export", "photos")
print(result["metrics"]["midpoints"])
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.rng import decoder_generators
from latent_ae.data.sources import StreamSource, fingerprint, source_stamp
from latent_ae.distributed import on_main, together
from latent_ae.files import writing
from latent_ae.models.loading import FirstStage
from latent_ae.provenance import versions
from latent_ae_eval.features import FeatureNetwork, collect, digests, feature_networks, frechet
from latent_ae_eval.ifid import JOB
from latent_ae_eval.ifid.neighbours import midpoints, rows_of
from latent_ae_eval.ifid.passes import ImageSet, Latents, Passes, joined
from latent_ae_eval.ifid.report import Shown, picture_of, write_ifid_report
from latent_ae_eval.ifid.settings import IfidSettings
from latent_ae_eval.inputs import opened_data, processes, refuse_generation_files
from latent_ae_eval.jobs import images_for, latent_model, make_folder, write_json, written_into
from latent_ae_eval.storage import FeatureFile, Shard, opened_work

KINDS = {"midpoints": "midpoint", "reconstructions": "reconstruction"}
"""What is compared with the originals, and its name in the features."""
SIDES = "height", "width"
FILES = ["result.json", "pairs.parquet", "pairs.png", "report.html"]


def interpolated_distance(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: IfidSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the interpolated Fréchet distance (arXiv 2603.05630). Every process of a distributed run calls this.

    With `out`, an evaluation that was killed resumes from what it had encoded and measured.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module, with continuous latents.
        data: `photos`, a folder of images, Parquet or Arrow files, or a hub id.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, pairs.parquet, pairs.png and report.html, which all processes must see; None writes
            nothing.
        progress: Show progress bars.

    Returns:
        The result, JSON-ready and equal on every process.

    Raises:
        UserError: If model or data cannot be loaded or do not fit, latents are codes, images have several sizes or are
            too few, or `out` cannot be written.
    """
    settings, started = settings or IfidSettings(), time.perf_counter()
    for location in (str(data), settings.neighbours_from or ""):
        refuse_generation_files(location)
    if out is not None:
        make_folder(Path(out))
    state, device = processes(settings)
    stage = latent_model("ifid", model, settings, device)
    _refuse_codes(stage)
    networks, notes = feature_networks(settings.frechet, device, settings)
    sets = {"images": _image_set(stage, str(data), settings, networks, 0)}
    if settings.neighbours_from is not None:
        apart = settings.model_copy(update={"split": settings.neighbours_split, "limit": None})
        try:
            sets["others"] = _image_set(stage, settings.neighbours_from, apart, {}, 1)
        except UserError as error:
            raise UserError(str(error).replace("DATA", "neighbours_from")) from error
    others = sets.get("others", sets["images"])
    if len(sets["images"].source) < 2:
        raise UserError(f"{data}: there is no distance of a single image; give more")
    _check_count(others, len(others.source), settings)
    keys = {name: _key(one, stage, settings) for name, one in sets.items()}
    keys["midpoints"] = None if None in keys.values() else {"neighbours": settings.neighbours, **keys}
    with ExitStack() as stack:
        # TF32 would change which latents are nearest
        stack.enter_context(float32_arithmetic(repeatable=True))
        works = opened_work(stack, out, keys, state)
        shows = progress and state.is_main_process
        passes = Passes(stage, settings, device, state, shows)
        latents: dict[str, Latents] = {}
        known = {name: Shard([], [], {}) for name in sets}  # only the main process fills them
        for name, one in sets.items():
            work, done = works[name]
            together(partial(passes.encode, one, work, done))
            latents[name] = on_main(state, partial(joined, one, work, known[name], settings))
        near = latents.get("others", latents["images"])
        if near.shape != latents["images"].shape:
            raise UserError(
                f"neighbours_from: its latents have the shape {_by(near.shape)} and those of DATA "
                f"{_by(latents['images'].shape)}; set resize_px and crop_px"
            )
        _check_count(others, near.file.count, settings)
        work, done = works["midpoints"]
        together(partial(passes.decode, latents["images"], near, works["images"][0], work, done, networks))

        def finish() -> dict[str, Any]:
            with writing(work.folder):  # `collect` writes the features of all shards into files
                table, _, files = collect(work, work.done())
            pairs = _pairs(table, known.get("others", known["images"]).rows)
            result = _result(passes, sets, latents["images"].shape, known, pairs, notes)
            result |= {"networks": digests(networks)} | _distances(files, networks, result["notes"], len(pairs))
            seconds = time.perf_counter() - started
            result |= {"device": device.type, "processes": state.num_processes, "seconds": round(seconds, 1)}
            if out is not None:
                shown = _shown(passes, pairs, sets["images"], others, latents["images"], near)
                with written_into(Path(out), [name for name in FILES if shown or name != "pairs.png"]):
                    _write(Path(out), result, pairs, shown)
                for one, _ in works.values():
                    one.remove()
                if not any(work.folder.parent.iterdir()):
                    work.folder.parent.rmdir()
            return result

        result = on_main(state, finish)
        state.wait_for_everyone()
    return result


def _refuse_codes(stage: FirstStage) -> None:
    """Raise UserError if there is nothing between two latents, or the features need other images."""
    assert stage.family is not None and stage.module is not None
    if stage.family.latent == "codebook" or stage.family.codes(stage.module.config) is not None:
        raise UserError(
            f"eval ifid interpolates between latents, and those of this {stage.name} are codes, between which there is "
            "nothing; it measures first stages with continuous latents"
        )
    if stage.channels not in (1, 3):
        raise UserError(f"images of {stage.channels} channels have no features to compare them by; 1 or 3 are needed")


def _image_set(
    stage: FirstStage, data: str, settings: IfidSettings, networks: Mapping[str, FeatureNetwork], number: int
) -> ImageSet:
    source, choice = opened_data(data, settings)
    assert not isinstance(source, StreamSource), "jobs do not open streams"
    return ImageSet(data, images_for(stage, source, settings, data), source, choice, networks, number)


def _check_count(others: ImageSet, count: int, settings: IfidSettings) -> None:
    """Raise UserError if there are fewer images than neighbours of an image, or only one."""
    left = count - (settings.neighbours_from is None)
    if left < settings.neighbours:
        advice = f"set neighbours={left} or less" if left else "give more images"
        raise UserError(
            f"neighbours: each image needs {settings.neighbours} others, and {others.location} has {left}; {advice}"
        )


def _key(one: ImageSet, stage: FirstStage, settings: IfidSettings) -> dict[str, Any] | None:
    """Return everything that latents and features of a set depend on, JSON-ready; None if it cannot be resumed."""
    stamp = source_stamp(one.source)
    if stage.sha256 is None or stamp is None:
        return None
    irrelevant = {"batch_size", "num_workers", "num_pictures", "max_bad_fraction", "device"}
    irrelevant |= {"neighbours", "neighbours_from", "neighbours_split", "frechet"}
    return {
        "settings": settings.model_dump(mode="json", exclude=irrelevant),
        "model": stage.sha256,
        "data": stamp,
        "shard": one.shard,
        "networks": digests(one.networks),
        "draw": one.number,
        "versions": versions(),
    }


def _pairs(table: pa.Table, others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each image, with the index and name of its neighbour."""
    rows: list[dict[str, Any]] = table.to_pylist()
    for row in rows:
        neighbour = others[row["neighbour"]]
        row |= {"neighbour_index": neighbour["index"], "neighbour_name": neighbour["name"]}
    return rows


def _distances(
    files: Mapping[str, FeatureFile], networks: Iterable[str], notes: list[str], count: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the Fréchet distances to the originals and their intervals; notes on unreliable ones are appended."""
    metrics: dict[str, dict[str, Any]] = {kind: {"n": count} for kind in KINDS}
    intervals: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for network in networks:
        original = files.get(f"{network}.input")
        if original is None or original.count < 2:
            raise UserError(f"fewer than two images have finite features of {network}: there is no distance")
        if original.count < count:
            notes.append(
                f"{network}: {count - original.count:,} of {count:,} images left out, because the reconstruction or "
                "the midpoint is not finite"
            )
        for kind, made in KINDS.items():
            name = "ifid" if network == "fid" and kind == "midpoints" else network
            value, interval = frechet(original, files[f"{network}.{made}"])
            metrics[kind] |= {"n": original.count, name: value}
            if interval is not None:
                intervals[kind][name] = interval
        if original.count < original.dimensions:
            names = "ifid, fid" if network == "fid" else network
            notes.append(
                f"{names}: {original.count:,} images are fewer than the features ({original.dimensions:,}): biased "
                "upwards, and not to be compared with values at another number"
            )
    return {"metrics": metrics, "intervals": intervals}


def _result(
    passes: Passes,
    sets: Mapping[str, ImageSet],
    shape: tuple[int, ...],
    known: Mapping[str, Shard],
    pairs: Sequence[Mapping[str, Any]],
    notes: list[str],
) -> dict[str, Any]:
    """Return the result without the distances and times."""
    settings, stage = passes.settings, passes.stage
    digests = {name: [row["digest"] for row in shard.rows] for name, shard in known.items()}
    if shared := len(set(digests["images"]) & set(digests.get("others", ()))):
        notes.append(
            f"{shared:,} images of DATA are in neighbours_from, too, and may be their own neighbours, which makes the "
            "distance too small"
        )
    described = {
        name: {
            "location": one.location,
            "num_images": len(known[name].rows),
            "choice": one.choice,
            "fingerprint": fingerprint(digests[name]),
            "skipped": known[name].skipped,
        }
        for name, one in sets.items()
    }
    first = known["images"].rows[0]
    columns = ("nearest_cosine", "cosine", "mean_squared_distance", "perplexity")
    return {
        "format": JOB.format,
        "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
        "data": described["images"] | {"split": settings.split, "size_px": [first[side] for side in SIDES]},
        "neighbours_from": described.get("others"),
        "latent": list(shape),
        "method": {
            "latents": f"raw, without scaling: the posterior's {'mean' if settings.latents == 'mode' else 'sample'}"
            if stage.random
            else "raw, without scaling: deterministic",
            "neighbours": f"the {settings.neighbours} nearest by cosine"
            + ("" if "others" in sets else ", without the image itself"),
            "draw": "one of them, softmax of minus the mean squared difference",
            "midpoint": "of the great circle about the origin, flattened",
            "distance": "to the originals, of 8-bit images",
        },
        "neighbours": {name: float(np.mean([pair[name] for pair in pairs])) for name in columns},
        "seed": settings.seed,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "notes": notes,
    }


@torch.no_grad()
def _shown(
    passes: Passes, pairs: Sequence[dict[str, Any]], images: ImageSet, others: ImageSet, own: Latents, near: Latents
) -> dict[str, list[Shown]]:
    """Return the pairs with the largest and the smallest cosine, with their images and decoded midpoints."""
    order = sorted(range(len(pairs)), key=lambda row: -pairs[row]["cosine"])
    count = min(passes.settings.num_pictures, max(1, len(order) // 2))
    groups = {"Nearest pairs": order[:count], "Farthest pairs": order[::-1][:count]} if count else {}
    shown: dict[str, list[Shown]] = {}
    for heading, chosen in groups.items():
        for row in chosen:
            pair = pairs[row]
            ends = [
                rows_of(latents.file, torch.tensor([at])).view(1, *latents.shape)
                for latents, at in ((own, row), (near, pair["neighbour"]))
            ]
            begun = decoder_generators(passes.settings.seed, [pair["index"]])
            middle = passes.stage.decode(midpoints(*ends).to(passes.device), begun)[0].cpu()
            first, second = _image(images, pair["index"]), _image(others, pair["neighbour_index"])
            shown.setdefault(heading, []).append(Shown(pair, first, middle, second))
    return shown


def _image(one: ImageSet, index: int) -> Tensor:
    """Return the image of this index, (C, H, W) in [-1, 1]."""
    (item,) = replace(one.images, source=one.source.subset(np.array([index]))).items()
    assert item.image is not None
    return item.image


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _write(
    folder: Path, result: dict[str, Any], pairs: list[dict[str, Any]], shown: Mapping[str, Sequence[Shown]]
) -> None:
    part = folder / "pairs.parquet.part"
    pyarrow.parquet.write_table(pa.Table.from_pylist(pairs), part)
    part.replace(folder / "pairs.parquet")
    write_json(folder / "result.json", result)
    write_ifid_report(folder / "report.html", result, pairs, shown)
    if flat := [one for group in shown.values() for one in group]:
        picture_of(flat).save(folder / "pairs.png")
