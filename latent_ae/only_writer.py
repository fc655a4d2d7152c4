"""A folder that one process at a time writes into."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from latent_ae.config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _forget() -> None:
    """Readers of images that outlive a killed run must not keep its lock: a forked process would share it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def only_writer(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock file `path` during the block; its folder is made where it is missing.

    The lock is the operating system's (flock): it ends with the process, however that ends, and it reaches other
    machines where a shared disk carries locks. The file says who holds it, and is removed afterwards.

    Raises UserError (`refusal`, and who holds the lock since when) without waiting and without a change in the folder
    when another process holds it. Where the disk has no locks or cannot be written, a note is printed and the block
    runs without one.
    """
    folder, made = path.parent, not path.parent.exists()
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path, refusal)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        print(f"note: {folder} cannot be locked ({reason}): a second writer would not be noticed", file=sys.stderr)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def _locked(path: Path, refusal: str) -> int:
    """The lock file, opened and locked. Raises UserError when another process holds it, OSError where there are no
    locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise UserError(f"{refusal} (it is {holder or 'another process'})") from None
            # a holder may have removed this file between the two calls above
            if os.fstat(descriptor).st_nlink:
                started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
                os.ftruncate(descriptor, 0)
                with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {started}\n".encode())
                    os.fsync(descriptor)
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
