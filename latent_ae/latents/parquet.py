"""The folder of a latent cache on disk: how it grows file by file, survives a kill, and becomes complete.

OUT/manifest.json says what is in it and whether it is complete; the Parquet files lie in OUT/unfinished, and once all
are there in OUT/data.
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
from latent_ae.files import amount
from latent_ae.only_writer import only_writer

FORMAT = 1
MANIFEST, DATA, UNFINISHED, LOCK = "manifest.json", "data", "unfinished", ".encode.lock"
NOTES = b"latent_ae"
"""Key of the Parquet files' metadata: the manifest, and of which images there is nothing and why."""
STORED = {"fp16": "float16", "fp32": "float32"}


class _Checked(pydantic.BaseModel):
    """What others read in a manifest; there is more in it."""

    class Model(pydantic.BaseModel):
        name: str = pydantic.Field(alias="class")

    class Latent(pydantic.BaseModel):
        shape: tuple[pydantic.PositiveInt, pydantic.PositiveInt, pydantic.PositiveInt]
        scaling_factor: pydantic.FiniteFloat
        shift_factor: pydantic.FiniteFloat
        mean: list[pydantic.FiniteFloat] | None = None
        std: list[pydantic.PositiveFloat] | None = None

    class Data(pydantic.BaseModel):
        num_files: pydantic.NonNegativeInt
        num_images: pydantic.NonNegativeInt = 0
        fingerprint: str = ""

    class Labels(pydantic.BaseModel):
        names: list[str] | None

    class MadeFrom(pydantic.BaseModel):
        model: str
        data: Any
        settings: dict[str, Any]
        versions: dict[str, Any]

    format: Literal[1]
    complete: bool
    model: Model
    latent: Latent
    data: Data
    labels: Labels | None
    made_from: MadeFrom
    files: pydantic.NonNegativeInt = 0

    @pydantic.model_validator(mode="after")
    def _of_a_finished_one(self) -> "_Checked":
        if self.complete and not (self.files and self.data.num_images):
            raise ValueError("it says complete, and tells of no latents")
        if not self.latent.scaling_factor:
            raise ValueError("scaling_factor is 0")
        for values in (self.latent.mean, self.latent.std):
            if values is not None and len(values) != self.latent.shape[0]:
                raise ValueError("mean and std are not one number for each channel")
        return self


class LatentFolder:
    """Where one job, on any number of processes, writes the latents that `manifest` describes."""

    def __init__(self, out: Path, manifest: dict[str, Any], features: datasets.Features):
        self.out, self.manifest, self.features = out, manifest, features
        self.shards, self.unfinished = manifest["shards"], out / UNFINISHED

    def begin(self, stack: ExitStack) -> frozenset[int] | None:
        """Called by one process: takes the folder until `stack` ends; the finished shards, or None when all is done.

        Raises UserError for a folder that holds something else, is in use, cannot be written or is too small.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            refusal = f"OUT: another process is encoding into {self.out}; wait for it"
            stack.enter_context(only_writer(self.out / LOCK, refusal))
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
                os.replace(self.out / DATA, self.unfinished)
            self.unfinished.mkdir(exist_ok=True)
            for part in self.unfinished.glob(".*.part"):
                part.unlink()
            done = frozenset(number for number in range(self.shards) if read_notes(self._path(number)) is not None)
            if done:
                print(f"going on from {len(done)} of {self.shards} finished files", file=sys.stderr)
            return done
        except OSError as error:
            raise UserError(f"OUT: cannot write into {self.out}: {error.strerror or error}") from error

    def write(self, number: int, columns: dict[str, Any], skipped: list[str], enlarged: int) -> None:
        """A shard, whole or not at all: a Parquet file that `datasets` loads with `features`."""
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
        """When all shards are there: counts, names the skipped images, and declares the folder complete.

        Returns the manifest. Raises UserError when no image, or more than `max_bad_fraction` less, could be read; the
        shards stay.
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
    """Columns of a cache. `stored`: fp16 or fp32."""
    columns: dict[str, Any] = {"id": datasets.Value("string"), "digest": datasets.Value("string")}
    if labels:
        columns["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    kinds = ["mean", "logvar"] if posterior else ["mean"]
    for kind in [*kinds, *(f"{kind}_flip" for kind in kinds if flips)]:
        columns[kind] = datasets.Array3D(shape, STORED[stored])
    return datasets.Features(columns)


def read_notes(path: Path) -> dict[str, Any] | None:
    """What a shard says of itself; None for a file that was not written whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        notes: dict[str, Any] = json.loads(pa.parquet.read_schema(path).metadata[NOTES])
        return notes
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is none. Raises UserError for a file that is something else."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        _Checked.model_validate_json(text, strict=True)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not of a latent cache (or of another version of this program): {reason}") from None
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Whole or not at all. Raises OSError."""
    part = folder / f".{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)


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
