"""The folder of a latent cache: written file by file, resumable after a kill, and marked when it is complete.

OUT/manifest.json describes the content and says whether it is complete. The Parquet files are in OUT/unfinished until
all of them are written, and in OUT/data from then on.
"""

import contextlib
import json
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pydantic

from latent_ae.config import UserError
from latent_ae.data.loader import stop_if_too_many_bad
from latent_ae.data.sources import fingerprint
from latent_ae.data.transforms import Resample
from latent_ae.files import amount
from latent_ae.only_writer import only_writer

FORMAT = 1
MANIFEST, DATA, UNFINISHED, LOCK = "manifest.json", "data", "unfinished", ".encode.lock"
NOTES = b"latent_ae"
"""Metadata key of a Parquet file, under which it keeps the manifest and its skipped images with their reasons."""
STORED = {"fp16": "float16", "fp32": "float32"}


class _Checked(pydantic.BaseModel):
    """The part of a manifest that is read again; a manifest holds more."""

    class Model(pydantic.BaseModel):
        name: str = pydantic.Field(alias="class")

    class Latent(pydantic.BaseModel):
        shape: tuple[pydantic.PositiveInt, pydantic.PositiveInt, pydantic.PositiveInt]
        scaling_factor: pydantic.FiniteFloat
        shift_factor: pydantic.FiniteFloat
        mean: list[pydantic.FiniteFloat] | None = None
        std: list[pydantic.PositiveFloat] | None = None

    class Framing(pydantic.BaseModel, extra="forbid"):
        resize_px: pydantic.PositiveInt | None = None
        crop_px: pydantic.PositiveInt
        resample: Resample = "adm"
        nearest: bool = False

    class Data(pydantic.BaseModel):
        num_files: pydantic.NonNegativeInt
        num_images: pydantic.NonNegativeInt = 0
        fingerprint: str = ""

    class Labels(pydantic.BaseModel):
        names: list[str] | None

    class MadeFrom(pydantic.BaseModel):
        model: str
        encoder: str | None = None
        data: Any
        settings: dict[str, Any]
        versions: dict[str, Any]

    format: Literal[1]
    complete: bool
    model: Model
    latent: Latent
    framing: Framing
    data: Data
    labels: Labels | None
    made_from: MadeFrom
    files: pydantic.NonNegativeInt = 0

    @pydantic.model_validator(mode="after")
    def _check_consistency(self) -> "_Checked":
        if self.complete and not (self.files and self.data.num_images):
            raise ValueError("it is marked complete but lists no latents")
        if not self.latent.scaling_factor:
            raise ValueError("scaling_factor is 0")
        for values in (self.latent.mean, self.latent.std):
            if values is not None and len(values) != self.latent.shape[0]:
                raise ValueError("mean and std are not one number for each channel")
        return self


class LatentFolder:
    """The folder into which one job, on any number of processes, writes the latents that `manifest` describes."""

    def __init__(self, out: Path, manifest: dict[str, Any], features: datasets.Features):
        self.out, self.manifest, self.features = out, manifest, features
        self.shards, self.unfinished = manifest["shards"], out / UNFINISHED

    def begin(self, stack: ExitStack) -> frozenset[int] | None:
        """Take the folder for writing until `stack` ends. One process calls this.

        Args:
            stack: Holds the lock of the folder.

        Returns:
            The numbers of the finished shards, or None if the cache is complete.

        Raises:
            UserError: If the folder holds something else, is in use, cannot be written or has too little space.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            refusal = f"OUT: another process is encoding into {self.out}; wait for it"
            stack.enter_context(only_writer(self.out / LOCK, refusal))
            manifest = read_manifest(self.out)
            if manifest is None:
                others = [path.name for path in self.out.iterdir() if not path.name.startswith(".")]
                if others:
                    raise UserError(f"OUT: {self.out} holds other files ({others[0]}); give a new or empty folder")
                self._check_space()
                write_manifest(self.out, self.manifest)
            else:
                _refuse_others(manifest["made_from"], self.manifest["made_from"], self.out)
                if manifest["complete"]:
                    print(f"{self.out} is complete already", file=sys.stderr)
                    return None
            if (self.out / DATA).is_dir():  # killed between the last two steps
                os.replace(self.out / DATA, self.unfinished)
            self.unfinished.mkdir(exist_ok=True)
            for part in self.unfinished.glob(".*.part"):
                part.unlink()
            done = frozenset(number for number in range(self.shards) if read_notes(self._path(number)) is not None)
            if done:
                print(f"resuming from {len(done)} of {self.shards} finished files", file=sys.stderr)
            return done
        except OSError as error:
            raise UserError(f"OUT: cannot write into {self.out}: {error.strerror or error}") from error

    def write(self, number: int, columns: dict[str, Any], skipped: list[str], enlarged: int) -> None:
        """Write a shard as a Parquet file that `datasets` loads with `features`; a kill leaves the whole file or none.

        Args:
            number: Number of the shard.
            columns: The shard's values by column.
            skipped: `name: reason` of each unreadable image.
            enlarged: How many images were smaller than the crop.

        Raises:
            UserError: If the file cannot be written.
        """
        notes = {"manifest": self.manifest, "skipped": skipped, "enlarged": enlarged}
        table = datasets.Dataset.from_dict(columns, features=self.features).data.table
        table = table.replace_schema_metadata(
            {**table.schema.metadata, NOTES: json.dumps(notes, sort_keys=True).encode()}
        )
        path = self._path(number)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as stream:
                # half-precision latents do not compress, and no two are alike
                pa.parquet.write_table(table, stream, compression="none", use_dictionary=False)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, path)
        except OSError as error:
            raise UserError(
                f"OUT: cannot write {path}: {error}. The finished files stay; free space, then run the same command "
                "again"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def finish(self, max_bad_fraction: float) -> dict[str, Any]:
        """Count the latents, report skipped images on stderr and mark the cache complete. Needs all shards.

        Args:
            max_bad_fraction: Largest accepted fraction of unreadable images, 0 to 1.

        Returns:
            The manifest, JSON-ready.

        Raises:
            UserError: If no image or too few images could be read, or the folder cannot be written. The shards stay.
        """
        skipped, digests, enlarged, empty = list[str](), list[str](), 0, list[Path]()
        for number in range(self.shards):
            notes = read_notes(self._path(number))
            assert notes is not None, f"shard {number} is missing"
            skipped += notes["skipped"]
            enlarged += notes["enlarged"]
            of_shard = pa.parquet.read_table(self._path(number), columns=["digest"])["digest"].to_pylist()
            digests += of_shard
            if not of_shard:
                empty.append(self._path(number))
        _report_skipped(skipped, len(digests), max_bad_fraction)
        if enlarged:
            few = f"{enlarged:,} of {len(digests):,} images"
            print(f"{few} are smaller than the crop and were enlarged to fit", file=sys.stderr)
        counts = {"num_images": len(digests), "fingerprint": fingerprint(digests)}
        counts |= {"enlarged": enlarged, "skipped": skipped}
        manifest = self.manifest | {"complete": True, "data": self.manifest["data"] | counts}
        manifest |= {"files": self.shards - len(empty)}
        try:
            for path in empty:  # datasets does not load a file without rows
                path.unlink()
            os.replace(self.unfinished, self.out / DATA)
            write_manifest(self.out, manifest)
        except OSError as error:
            raise UserError(f"OUT: cannot write into {self.out}: {error.strerror or error}") from error
        return manifest

    def _path(self, number: int) -> Path:
        return self.unfinished / f"{self.manifest['split']}-{number:05d}-of-{self.shards:05d}.parquet"

    def _check_space(self) -> None:
        latents = (feature for feature in self.features.values() if isinstance(feature, datasets.Array3D))
        each = sum(int(np.prod(feature.shape)) * np.dtype(feature.dtype).itemsize for feature in latents)
        needed, free = self.manifest["data"]["num_files"] * each, shutil.disk_usage(self.out).free
        if free < needed:
            raise UserError(
                f"OUT: {self.out} has {amount(free)} free and the latents need {amount(needed)}; free space"
            )


def features_of(
    shape: tuple[int, int, int], stored: str, *, posterior: bool, flips: bool, names: list[str] | None, labels: bool
) -> datasets.Features:
    """Return the columns of a cache.

    Args:
        shape: (C, h, w) of a latent.
        stored: "fp16" or "fp32".
        posterior: Whether there are log-variances.
        flips: Whether mirrored images are encoded too.
        names: Names of the classes; None stores their numbers.
        labels: Whether there is a column of classes.
    """
    columns: dict[str, Any] = {"id": datasets.Value("string"), "digest": datasets.Value("string")}
    if labels:
        columns["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    kinds = ["mean", "logvar"] if posterior else ["mean"]
    for kind in [*kinds, *(f"{kind}_flip" for kind in kinds if flips)]:
        columns[kind] = datasets.Array3D(shape, STORED[stored])
    return datasets.Features(columns)


def read_notes(path: Path) -> dict[str, Any] | None:
    """Return the notes stored in a shard, or None if the file is missing or was not written completely."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        notes: dict[str, Any] = json.loads(pa.parquet.read_schema(path).metadata[NOTES])
        return notes
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a cache's folder, or None if there is none.

    Raises:
        UserError: If the file is no manifest of this version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        _Checked.model_validate_json(text, strict=True)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is no manifest of a latent cache, or of another version: {reason}") from None
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest; a kill leaves the whole file or none.

    Raises:
        OSError: If it cannot be written.
    """
    part = folder / f".{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)


def _refuse_others(existing: dict[str, Any], requested: dict[str, Any], out: Path) -> None:
    """Raise UserError if the folder's latents were made from something else, and name the differences."""
    differs = []
    if existing["model"] != requested["model"]:
        differs.append("another model (or other weights)")
    if existing["data"] != requested["data"]:
        differs.append("other images (or some were added, removed or written to)")
    for name in ("settings", "versions"):
        keys = [key for key in requested[name] if existing[name].get(key) != requested[name][key]]
        differs += [f"{key}={existing[name].get(key)}, not {requested[name][key]}" for key in keys]
    if differs:
        raise UserError(
            f"OUT: {out} holds latents of {'; '.join(differs)} ({MANIFEST} says more). Give another folder or remove it"
        )


def _report_skipped(skipped: list[str], num_read: int, max_bad_fraction: float) -> None:
    total = num_read + len(skipped)
    if not num_read:
        raise UserError(f"DATA: none of the {total} images is readable; {skipped[0]}")
    try:
        stop_if_too_many_bad(len(skipped), total, skipped, num_images=total, max_bad_fraction=max_bad_fraction)
    except UserError as error:
        raise UserError(str(error).replace("data.", "", 1)) from error
    if skipped:
        print(f"skipped {len(skipped)} of {total} images:\n  " + "\n  ".join(skipped), file=sys.stderr)
