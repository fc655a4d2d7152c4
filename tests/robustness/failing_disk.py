"""Disks that fail for real: a small one of its own, and a limit on what this process may write."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` at `folder`; skips the test where mounting is not permitted."""
    folder.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid():
        pytest.skip("mounting a small disk takes root on Linux: run the tests as root")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here: run the tests as root outside a container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    """`ro` or `rw`."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Writes a file until `left` bytes (in whole pages) are free."""
    with open(folder / "filler", "wb") as stream:
        disk = os.statvfs(folder)
        os.posix_fallocate(stream.fileno(), 0, disk.f_bavail * disk.f_frsize - left)


def limit(size: int | None) -> None:
    """From now on the kernel refuses to let a file of this process grow beyond `size` bytes; None: as far as it may."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
