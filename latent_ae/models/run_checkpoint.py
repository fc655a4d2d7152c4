"""Finds the checkpoints of a training run that are finished and match their manifests."""

import errno
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from latent_ae.config import UserError

PREFIX = "step-"
MANIFEST = "manifest.json"
ALWAYS = ("autoencoder.safetensors", "config.json", "optimizer.pt", "state.json")
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
"""Errors that mean a damaged checkpoint; after any other the user can repair the access to a whole one."""


def finished_checkpoints(run: Path) -> dict[int, Path]:
    """Return the folders of a run's finished checkpoints, by step, oldest first, without checking their content."""
    names = {path.name.removeprefix(PREFIX): path for path in (run / "checkpoints").glob(f"{PREFIX}*")}
    return dict(sorted((int(name), path) for name, path in names.items() if name.isdigit()))


def phase_folders(run: Path) -> list[Path]:
    """Return the folders of a run's phases, the first one first; none for a run without phases."""
    folders = [path for path in (run / "phases").glob("*") if re.fullmatch(r"\d+(-.*)?", path.name) and path.is_dir()]
    return sorted(folders, key=lambda folder: int(folder.name.partition("-")[0]))


def newest_whole(run: Path) -> Path | None:
    """Return the newest checkpoint of a run whose files match its manifest; None if the run has no checkpoint.

    Damaged ones are skipped, with a line on stderr.

    Raises:
        UserError: If all are damaged, since a fresh start would overwrite what can perhaps be saved, or if one cannot
            be read.
    """
    folders = finished_checkpoints(run)
    for folder in reversed(folders.values()):
        damage = find_damage(folder)
        if damage is None:
            return folder
        print(f"checkpoint {folder} is damaged ({damage}) and passed over", file=sys.stderr)
    if folders:
        raise UserError(
            f"every checkpoint in {run / 'checkpoints'} is damaged: put a whole one there, or choose another "
            "output_dir to start from the beginning"
        )
    return None


def checkpoint_at(place: Path) -> Path | None:
    """Return the checkpoint at `place`, or the newest whole one of the run there; None if it is neither.

    That of a run in phases is the newest one of its last phase that has any.

    Raises:
        UserError: If all checkpoints are damaged, or one cannot be read.
    """
    if (place / MANIFEST).is_file() and (place / ALWAYS[0]).is_file():
        damage = find_damage(place)
        if damage is not None:
            raise UserError(f"checkpoint {place} is damaged: {damage}")
        return place
    for run in (*reversed(phase_folders(place)), place):
        if (newest := newest_whole(run)) is not None:
            return newest
    return None


def find_damage(folder: Path) -> str | None:
    """Return what differs from a checkpoint's manifest; None if nothing does.

    Raises:
        UserError: If the checkpoint cannot be read for a reason other than damage.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if missing := [name for name in ALWAYS if name not in manifest["files"]]:
            return f"{MANIFEST} does not name {', '.join(missing)}"
        # a file with the name of a network would be loaded; hidden files belong to the system
        names = {name for name in map(str, files_in(folder)) if not Path(name).name.startswith(".")}
        if strange := sorted(names - manifest["files"].keys() - {MANIFEST}):
            return f"{strange[0]} is not in {MANIFEST}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} has another checksum"
    except OSError as error:
        if error.errno not in DAMAGE:
            raise UserError(
                f"checkpoint {folder} cannot be read: {error.strerror or error}. Mend that and run it again, or remove "
                "the checkpoint to go on from an earlier one"
            ) from error
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    return None


def files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, relative to it, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names that only the module or only `tensors` has, and those whose shapes differ, sorted."""
    own = module.state_dict()
    return sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
