"""Images -> their latents in files: each image once, on any number of processes, going on after a kill.

from latent_ae.encode import encode_images
encode_images("runs/mine/export", "/my/photos", "latents/mine")
"""

import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.classes import Classes, find_classes
from latent_ae.config import UserError
from latent_ae.data import open_images, stop_if_too_many_bad
from latent_ae.encode_settings import EncodeSettings
from latent_ae.first_stages import CPU_BATCH_PX, FAMILIES, FirstStage, open_first_stage
from latent_ae.held_out import Framing, HeldOutImage, HeldOutImages, Part
from latent_ae.latent_cache import (
    DATA,
    FORMAT,
    MANIFEST,
    STORED,
    UNFINISHED,
    features_of,
    read_manifest,
    read_notes,
    write_manifest,
    write_shard,
)
from latent_ae.locations import SPLIT_NAMES
from latent_ae.processes import on_main, processes, together
from latent_ae.sources import StoredImages, StreamSource, TableSource, fingerprint, source_stamp

PACKAGES = ("latent-ae", "torch", "diffusers", "numpy", "pillow")
LOCK = ".encode.lock"
KIND_OF_LATENT = {
    "posterior": "moments of the posterior",
    "deterministic": "latents; there is no posterior",
    "codebook": "latents before quantisation; there is no posterior",
}


def encode_images(
    model: str | Path | nn.Module,
    data: str | Path,
    out: str | Path,
    settings: EncodeSettings | None = None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes the latents of `data` into the folder `out`; returns its manifest and how long it took, JSON-ready.

    `model` is a folder, a hub id or an instance of a first stage of diffusers, `data` as on the command line. A call
    that was killed goes on from its finished files; a finished folder is left as it is. The files do not depend on
    the number of processes, which must all see `out`.

    Raises UserError for what cannot be loaded, an `out` that holds other latents or anything else, too many unreadable
    images, and latents that are not finite.
    """
    settings, out, started = settings or EncodeSettings(), Path(out).expanduser(), time.perf_counter()
    state, device = processes(settings.device)
    stage = open_first_stage(
        model,
        device=device,
        dtype=settings.dtype,
        subfolder=settings.subfolder,
        revision=settings.revision,
        variant=settings.variant,
        ema=settings.ema,
    )
    if stage.module is None:
        raise UserError("a function has no latents; give a first stage of diffusers")
    source, classes = _opened(str(data), settings)
    images = HeldOutImages(
        source, settings.data(str(data)), stage.channels or 3, Framing(**settings.framing()), _factor(stage, settings)
    )
    manifest = _manifest(stage, str(data), source, classes, settings)
    job = _Job(stage, settings, source, classes, manifest, out, device)
    with ExitStack() as stack:
        # TF32 convolutions would move the third digit
        stack.enter_context(
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        )
        done = on_main(state, lambda: job.begin(stack))
        if done is not None:
            if not job.folder.is_dir():
                raise UserError(f"OUT: this process does not see {job.folder}; give a folder that all machines share")
            part = Part(state.process_index, state.num_processes, settings.shard_size, done)
            shows = progress and state.is_main_process
            counts = together(lambda: job.run(replace(images, part=part), shows))
            manifest = on_main(state, job.finish)
        else:
            manifest, counts = on_main(state, lambda: read_manifest(out) or {}), [0]
        state.wait_for_everyone()
    seconds = time.perf_counter() - started
    took = {"seconds": round(seconds, 1), "images_per_second": round(sum(counts) / seconds, 2)}
    return manifest | {"folder": str(out), "device": device.type, "processes": state.num_processes} | took


class _Job:
    """One process's part of the work, and what the main one does before and after."""

    def __init__(
        self,
        stage: FirstStage,
        settings: EncodeSettings,
        source: StoredImages,
        classes: Classes | None,
        manifest: dict[str, Any],
        out: Path,
        device: torch.device,
    ):
        self.stage, self.settings, self.source, self.classes = stage, settings, source, classes
        self.manifest, self.out, self.folder, self.device = manifest, out, out / UNFINISHED, device
        self.shards, self.split = manifest["shards"], manifest["split"]
        self.features = features_of(
            tuple(manifest["latent"]["shape"]),
            settings.stored,
            posterior=stage.has_posterior,
            flips=settings.flips,
            names=classes.names if classes else None,
            labels=classes is not None,
        )

    def begin(self, stack: ExitStack) -> frozenset[int] | None:
        """Takes the folder for this job; the finished shards, or None when all is done."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(self.out / LOCK, timeout=0))
            found = read_manifest(self.out)
            if found is None:
                others = [path.name for path in self.out.iterdir() if not path.name.startswith(".")]
                if others:
                    raise UserError(f"OUT: {self.out} holds other files ({others[0]}); give a new or empty folder")
                self._check_space()
                write_manifest(self.out, self.manifest)
            else:
                _refuse_others(found["made_from"], self.manifest["made_from"], self.out)
                if found["complete"]:
                    print(f"{self.out} is complete already", file=sys.stderr)
                    return None
            if (self.out / DATA).is_dir():  # killed between the last two steps
                os.replace(self.out / DATA, self.folder)
            self.folder.mkdir(exist_ok=True)
            for part in self.folder.glob(".*.part"):
                part.unlink()
            done = frozenset(number for number in range(self.shards) if read_notes(self._path(number)) is not None)
            if done:
                print(f"going on from {len(done)} of {self.shards} finished files", file=sys.stderr)
            return done
        except Timeout:
            raise UserError(f"OUT: another process is encoding into {self.out}; wait for it") from None
        except OSError as error:
            raise UserError(f"OUT: cannot write into {self.out}: {error.strerror or error}") from error

    def run(self, images: HeldOutImages, shows: bool) -> int:
        """Encodes this process's shards that are not done, each written as soon as it is; the number of images."""
        size, total, count = self.settings.shard_size, len(self.source), 0
        mine = sum(images.part.holds(index) for index in range(0, total, size)) * size
        interval = 0.5 if sys.stderr.isatty() else 30
        with tqdm(total=min(mine, total), desc="encode", unit="image", disable=not shows, mininterval=interval) as bar:
            for number, group in groupby(images.items(), key=lambda item: item.index // size):
                items = list(group)
                readable = [item for item in items if item.image is not None]
                notes = {
                    "manifest": self.manifest,
                    "skipped": [f"{item.name}: {item.reason}" for item in items if item.image is None],
                    "enlarged": sum(item.enlarged for item in readable),
                }
                columns = self._facts(readable) | self._latents(readable, bar)
                try:
                    write_shard(self._path(number), columns, self.features, notes)
                except OSError as error:
                    raise UserError(
                        f"OUT: cannot write {self._path(number)}: {error}. The finished files stay; free space, then "
                        "run the same command again"
                    ) from error
                bar.update(len(items) - len(readable))
                count += len(items)
        return count

    def finish(self) -> dict[str, Any]:
        """When all shards are there: counts, names the skipped images, and declares the folder complete."""
        skipped, digests, enlarged = [], list[str](), 0
        for number in range(self.shards):
            notes = read_notes(self._path(number))
            assert notes is not None, f"shard {number} is missing"
            skipped += notes["skipped"]
            enlarged += notes["enlarged"]
            digests += pyarrow.parquet.read_table(self._path(number), columns=["digest"])["digest"].to_pylist()
        self._report_skipped(skipped, len(digests))
        if enlarged:
            print(f"{enlarged:,} of {len(digests):,} images are smaller than the crop and were enlarged to fit",
                  file=sys.stderr)  # fmt: skip
        counts = {"num_images": len(digests), "fingerprint": fingerprint(digests)}
        counts |= {"enlarged": enlarged, "skipped": skipped}
        manifest = self.manifest | {"complete": True, "data": self.manifest["data"] | counts}
        try:
            os.replace(self.folder, self.out / DATA)
            write_manifest(self.out, manifest)
        except OSError as error:
            raise UserError(f"OUT: cannot write into {self.out}: {error.strerror or error}") from error
        return manifest

    def _report_skipped(self, skipped: list[str], num_read: int) -> None:
        total = num_read + len(skipped)
        if not num_read:
            raise UserError(f"DATA: none of the {total} images is readable; {skipped[0]}")
        bound = self.settings.max_bad_fraction
        try:
            stop_if_too_many_bad(len(skipped), total, skipped, num_images=total, max_bad_fraction=bound)
        except UserError as error:
            raise UserError(str(error).replace("data.", "", 1)) from error
        if skipped:
            print(f"skipped {len(skipped)} of {total} images:\n  " + "\n  ".join(skipped), file=sys.stderr)

    @torch.no_grad()
    def _latents(self, items: list[HeldOutImage], bar: tqdm) -> dict[str, np.ndarray]:
        """Columns of moments, in the stored type; batches are of one shard, so that its file depends on it alone."""
        size = self.settings.batch_size
        if self.device.type == "cpu":
            size = max(1, min(size, CPU_BATCH_PX // self.settings.resolution**2))
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(items), size):
            batch = items[first : first + size]
            images = torch.stack([item.image for item in batch if item.image is not None])
            if self.device.type == "cuda":
                images = images.pin_memory().to(self.device, non_blocking=True)
            parts.append(self._moments(images, ""))
            if self.settings.flips:
                parts[-1] |= self._moments(images.flip(3), "_flip")
            bar.update(len(batch))
        found = {name: np.zeros((0, *self.manifest["latent"]["shape"]), STORED[self.settings.stored])
                 for name in self.features if name.startswith(("mean", "logvar"))}  # fmt: skip
        if parts:
            found = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in found}
        for name, values in found.items():
            self._refuse_infinite(name, values, items)
        return found

    def _moments(self, images: Tensor, suffix: str) -> dict[str, Tensor]:
        mean, logvar = self.stage.moments(images.contiguous(memory_format=torch.channels_last))
        stored = getattr(torch, STORED[self.settings.stored])
        found = {f"mean{suffix}": mean.to(stored)}
        return found | ({f"logvar{suffix}": logvar.to(stored)} if logvar is not None else {})

    def _refuse_infinite(self, name: str, values: np.ndarray, items: list[HeldOutImage]) -> None:
        bad = ~np.isfinite(values).all(axis=(1, 2, 3))
        if bad.any():
            settings = self.settings
            change = [f"{key}=fp32" for key in ("dtype", "stored") if getattr(settings, key) != "fp32"]
            advice = f"set {' or '.join(change)}" if change else "the weights have diverged"
            raise UserError(f"{items[int(bad.argmax())].name}: its {name} holds values that are not finite; {advice}")

    def _facts(self, items: list[HeldOutImage]) -> dict[str, Any]:
        rows = self.source.rows if isinstance(self.source, TableSource) else None
        # file names may hold what no table can
        names = [item.name.encode("utf-8", "backslashreplace").decode() for item in items]
        ids = names if rows is None else [str(rows[item.index]) for item in items]
        facts: dict[str, Any] = {"id": ids, "digest": [item.digest for item in items]}
        if self.classes is not None:
            facts["label"] = self.classes.labels[[item.index for item in items]]
        return facts

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}-of-{self.shards:05d}.parquet"

    def _check_space(self) -> None:
        values = int(np.prod(self.manifest["latent"]["shape"])) * (1 + self.stage.has_posterior)
        each = values * (1 + self.settings.flips) * np.dtype(STORED[self.settings.stored]).itemsize
        needed, free = len(self.source) * each, shutil.disk_usage(self.out).free
        if free < needed:
            raise UserError(
                f"OUT: {self.out} has {free / 1e9:.1f} GB free and the latents need {needed / 1e9:.1f} GB; free space"
            )


def _opened(data: str, settings: EncodeSettings) -> tuple[StoredImages, Classes | None]:
    try:
        opened = settings.data(data)
        source, whole = open_images(opened, settings.part), open_images(opened, "all")
    except UserError as error:
        # the settings have other names here than in training
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
    """All that is known before the first image is read."""
    assert stage.module is not None
    config, side = stage.module.config, settings.resolution // stage.factor
    split = SPLIT_NAMES.get(settings.split, "train") if settings.part != "held_out" else "validation"
    return {
        "format": FORMAT,
        "complete": False,
        "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
        "latent": {
            "kind": KIND_OF_LATENT[FAMILIES[stage.name].latent],
            "shape": [stage.latent_channels, side, side],
            "stored": settings.stored,
            "scaling_factor": config.get("scaling_factor") or 1.0,
            "shift_factor": config.get("shift_factor") or 0.0,
        },
        "framing": settings.framing(),
        "flips": settings.flips,
        "data": {"location": data, "part": settings.part, "num_files": len(source)},
        "labels": {"from": classes.column, "names": classes.names} if classes else None,
        "split": split,
        "shards": -(-len(source) // settings.shard_size),
        "made_from": {
            "model": stage.sha256,
            "data": source_stamp(source),
            "settings": settings.contents(),
            "versions": {name: version(name) for name in PACKAGES},
        },
    }


def _refuse_others(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    """Raises UserError naming what is different about the latents that are there."""
    differs = []
    if found["model"] != wanted["model"]:
        differs.append("another model (or other weights)")
    if found["data"] != wanted["data"]:
        differs.append("other images (or some were added, removed or written to)")
    for name in ("settings", "versions"):
        keys = [key for key in wanted[name] if found[name].get(key) != wanted[name][key]]
        differs += [f"{key}={found[name].get(key)}, not {wanted[name][key]}" for key in keys]
    if differs:
        raise UserError(
            f"OUT: {out} holds latents of {'; '.join(differs)} ({MANIFEST} says more). Give another folder or remove it"
        )
