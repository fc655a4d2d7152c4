"""Encodes images into files of latents: each image once, on any number of processes, resumable after a kill.

from latent_ae.latents.encode import encode_images
encode_images("runs/mine/export", "/my/photos", "latents/mine")
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array3D
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.datasets import SPLIT_NAMES
from latent_ae.data.held_out import Framing, HeldOutImage, HeldOutImages, Part
from latent_ae.data.labels import Classes, find_classes
from latent_ae.data.loader import open_images
from latent_ae.data.sources import StoredImages, StreamSource, TableSource, source_stamp
from latent_ae.distributed import on_main, processes, together
from latent_ae.latents.pairs import image_id
from latent_ae.latents.parquet import FORMAT, STORED, LatentFolder, features_of, read_manifest
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.borrowed_encoder import borrowed_encoder
from latent_ae.models.loading import CPU_BATCH_PX, FirstStage, load
from latent_ae.models.registry import scaling_of
from latent_ae.progress import progress_bar
from latent_ae.provenance import computing_versions

KIND_OF_LATENT = {
    "posterior": "moments of the posterior",
    "deterministic": "latents; there is no posterior",
    "hierarchy": "modes of all levels given the modes above, packed, the top level first; raw",
    "flow": "modes before the flow, sent through it; its posterior has no moments",
    "codebook": "latents before quantisation; there is no posterior",
    "code_levels": "vectors of the codes of all levels, the coarsest first, the finer ones folded into channels",
    "categorical": "vectors of the most likely codes; their posterior is not stored",
}


def encode_images(
    model: str | Path | nn.Module,
    data: str | Path,
    out: str | Path,
    settings: EncodeSettings | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Encode the images of `data` and write their latents into the folder `out`.

    A call that was killed resumes from its finished files; a finished folder is left unchanged. The files do not depend
    on the number of processes, which must all see `out`.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module.
        data: `photos`, a folder of images, Parquet or WebDataset files, or a hub id.
        out: The folder to write; it must be new, empty or hold the same latents.
        settings: Which images are encoded, how they are framed and what is stored; None takes the defaults.
        progress: Show a progress bar.

    Returns:
        The manifest, JSON-ready, with `folder`, `device`, `processes`, `seconds` and `images_per_second`.

    Raises:
        UserError: If the model or data cannot be loaded, `out` holds other latents or anything else or cannot be
            written, too many images are unreadable, or latents are not finite.
    """
    settings, out, started = settings or EncodeSettings(), Path(out).expanduser(), time.perf_counter()
    state, device = processes(settings.device)
    stage = load(model, device=device, dtype=settings.dtype, **settings.place)
    if stage.module is None:
        raise UserError("a function has no latents; give a first stage of diffusers")
    source, classes = _opened(str(data), settings)
    if progress and state.is_main_process and settings.label_column is not None:
        print(_of_labels(source, classes), file=sys.stderr)
    images = HeldOutImages(
        source, settings.data(str(data)), stage.channels or 3, Framing(**settings.framing()), _factor(stage, settings)
    )
    manifest = _manifest(stage, str(data), source, classes, settings)
    features = features_of(
        tuple(manifest["latent"]["shape"]),
        settings.stored,
        posterior=stage.has_posterior,
        flips=settings.flips,
        names=classes.names if classes else None,
        labels=classes is not None,
    )
    folder = LatentFolder(out, manifest, features)
    encoder = _Encoder(stage, settings, source, classes, folder, device)
    with ExitStack() as stack:
        # TF32 convolutions would move the third digit
        stack.enter_context(float32_arithmetic(repeatable=True))
        done = on_main(state, lambda: folder.begin(stack))
        if done is not None:
            if not folder.unfinished.is_dir():
                raise UserError(
                    f"OUT: this process does not see {folder.unfinished}; give a folder that all machines share"
                )
            part = Part(state.process_index, state.num_processes, settings.shard_size, done)
            shows = progress and state.is_main_process
            counts = together(lambda: encoder.run(replace(images, part=part), shows))
            manifest = on_main(state, lambda: folder.finish(settings.max_bad_fraction))
        else:
            manifest, counts = on_main(state, lambda: read_manifest(out) or {}), [0]
        state.wait_for_everyone()
    seconds = time.perf_counter() - started
    took = {"seconds": round(seconds, 1), "images_per_second": round(sum(counts) / seconds, 2)}
    return manifest | {"folder": str(out), "device": device.type, "processes": state.num_processes} | took


@dataclass
class _Encoder:
    """Encodes the images of one process and writes their files."""

    stage: FirstStage
    settings: EncodeSettings
    source: StoredImages
    classes: Classes | None
    folder: LatentFolder
    device: torch.device

    def run(self, images: HeldOutImages, shows: bool) -> int:
        """Encode and write the unfinished shards of this process one by one; return the number of images."""
        size, total, count = self.settings.shard_size, len(self.source), 0
        mine = sum(min(size, total - index) for index in range(0, total, size) if images.part.holds(index))
        with progress_bar("encode", mine, "image", disable=not shows) as bar:
            for number, group in groupby(images.items(), key=lambda item: item.index // size):
                seen, skipped, parts = list[HeldOutImage](), list[str](), list[dict[str, Tensor]]()
                # batches of one shard, so that its file depends on nothing else
                while batch := list(islice(group, self._batch_size)):
                    readable = [item for item in batch if item.image is not None]
                    if readable:
                        parts.append(self._latents([item.image for item in readable if item.image is not None]))
                    seen += [replace(item, image=None) for item in readable]
                    skipped += [f"{item.name}: {item.reason}" for item in batch if item.image is None]
                    bar.update(len(batch))
                columns = self._facts(seen) | self._columns(parts, seen)
                self.folder.write(number, columns, skipped, sum(item.enlarged for item in seen))
                count += len(seen) + len(skipped)
        return count

    @property
    def _batch_size(self) -> int:
        size = self.settings.batch_size
        return size if self.device.type != "cpu" else max(1, min(size, CPU_BATCH_PX // self.settings.resolution**2))

    @torch.no_grad()
    def _latents(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """Return the latents of a batch by column, on the device, in the stored type."""
        images = torch.stack(batch)
        if self.device.type == "cuda":
            images = images.pin_memory().to(self.device, non_blocking=True)
        latents = self._moments(images, "")
        return latents | (self._moments(images.flip(3), "_flip") if self.settings.flips else {})

    def _columns(self, parts: list[dict[str, Tensor]], items: list[HeldOutImage]) -> dict[str, np.ndarray]:
        """Return the latents of a shard by column. Waits for the device."""
        columns = dict[str, np.ndarray]()
        for name, feature in self.folder.features.items():
            if isinstance(feature, Array3D):
                columns[name] = np.zeros((0, *feature.shape))
                if parts:
                    columns[name] = torch.cat([part[name] for part in parts]).cpu().numpy()
                self._refuse_infinite(name, columns[name], items)
        return columns

    def _moments(self, images: Tensor, suffix: str) -> dict[str, Tensor]:
        mean, logvar = self.stage.moments(images.contiguous(memory_format=torch.channels_last))
        stored = getattr(torch, STORED[self.settings.stored])
        moments = {f"mean{suffix}": mean.to(stored)}
        return moments | ({f"logvar{suffix}": logvar.to(stored)} if logvar is not None else {})

    def _refuse_infinite(self, name: str, values: np.ndarray, items: list[HeldOutImage]) -> None:
        bad = ~np.isfinite(values).all(axis=(1, 2, 3))
        if bad.any():
            settings = self.settings
            change = [f"{key}=fp32" for key in ("dtype", "stored") if getattr(settings, key) != "fp32"]
            advice = f"set {' or '.join(change)}" if change else "the weights have diverged"
            raise UserError(f"{items[int(bad.argmax())].name}: its {name} holds values that are not finite; {advice}")

    def _facts(self, items: list[HeldOutImage]) -> dict[str, Any]:
        ids = [image_id(self.source, item.index) for item in items]
        facts: dict[str, Any] = {"id": ids, "digest": [item.digest for item in items]}
        if self.classes is not None:
            facts["label"] = self.classes.labels[[item.index for item in items]]
        return facts


def _of_labels(source: StoredImages, classes: Classes | None) -> str:
    """Return a line about where the labels come from, because nobody would see that they are missing."""
    if classes is not None:
        count = f"{len(classes.names):,} classes" if classes.names is not None else "integers"
        where = f"those of the column {classes.column}" if isinstance(source, TableSource) else classes.column
        return f"labels: {where} ({count})"
    if isinstance(source, TableSource):
        return f"labels: none (columns: {', '.join(source.others.features) or 'no others'}); set label_column=NAME"
    return "labels: none (not all images are in folders of two or more names)"


def _opened(data: str, settings: EncodeSettings) -> tuple[StoredImages, Classes | None]:
    try:
        opened = settings.data(data)
        source, whole = open_images(opened, settings.part), open_images(opened, "all")
    except UserError as error:
        # this command's settings have other names than those of training
        raise UserError(str(error).replace("data.source", "DATA").replace("data.", "")) from error
    assert not isinstance(source, StreamSource) and not isinstance(whole, StreamSource)
    if not len(source):
        raise UserError(f"DATA: {data} holds no images")
    return source, find_classes(source, whole, settings.label_column)


def _factor(stage: FirstStage, settings: EncodeSettings) -> int:
    if settings.resolution % stage.factor:
        near = max(1, settings.resolution // stage.factor) * stage.factor
        raise UserError(
            f"resolution: {settings.resolution} is not a multiple of the model's factor {stage.factor}; use {near}"
        )
    return stage.factor


def _manifest(
    stage: FirstStage, data: str, source: StoredImages, classes: Classes | None, settings: EncodeSettings
) -> dict[str, Any]:
    """Return the part of the manifest that is known before the first image is read."""
    assert stage.module is not None and stage.family is not None
    scaling, side = scaling_of(stage.module), settings.resolution // stage.factor
    if stage.family.scaled_by_patches:
        print(
            f"a {stage.name} scales patches of 2 x 2 latents by the statistics in its batch norm, and `scaled` will "
            "leave the latents as they are",
            file=sys.stderr,
        )
    elif not scaling.measured and borrowed_encoder(stage.module) is None:  # whose latents are scaled already
        print(
            "the model's config has no measured scaling_factor, so `scaled` will leave the latents as they are (those "
            "of TAESD are scaled already); `latent-ae export RUN` measures that of a run",
            file=sys.stderr,
        )
    split = SPLIT_NAMES.get(settings.split, "train") if settings.part != "held_out" else "validation"
    return {
        "format": FORMAT,
        "complete": False,
        "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
        "latent": {
            "kind": KIND_OF_LATENT[stage.family.latent],
            "shape": [stage.latent_channels, side, side],
            "stored": settings.stored,
            "scaling_factor": scaling.factor,
            "shift_factor": scaling.shift,
            "mean": scaling.mean,
            "std": scaling.std,
        },
        "framing": settings.framing(),
        "flips": settings.flips,
        "data": {"location": data, "part": settings.part, "num_files": len(source)},
        "labels": {"from": classes.column, "names": classes.names} if classes else None,
        "split": split,
        "shards": -(-len(source) // settings.shard_size),
        "made_from": {
            "model": stage.sha256,
            "encoder": stage.encoder_sha256,
            "data": source_stamp(source),
            "settings": settings.contents(),
            "versions": computing_versions(),
        },
    }
