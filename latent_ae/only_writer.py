"""A lock for a folder into which only one process at a time may write."""

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
"""File descriptors of the locks that this process holds."""


def _forget() -> None:
    """Drop the locks in a forked process, so that image readers that outlive a killed run do not keep its lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def only_writer(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file during a `with` block; its folder is made if it is missing.

    The lock is the operating system's (flock): it ends with the process, however that ends, and it holds for other
    machines if the shared disk supports locks. The file says who holds the lock, and is removed afterwards. If the disk
    has no locks or cannot be written, a note is printed and the block runs without a lock.

    Args:
        path: The lock file.
        refusal: Beginning of the message if another process holds the lock.

    Raises:
        UserError: If another process holds the lock, without waiting and without a change in the folder.
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
    """Open and lock the lock file and return its descriptor.

    Raises UserError if another process holds the lock, OSError if there are no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    access = os.O_RDONLY  # a file that is open for writing would keep its disk from being remounted read-only
    while True:
        descriptor = os.open(path, access | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EBADF and access == os.O_RDONLY:  # NFS locks only what is open for writing
                    access = os.O_RDWR
                    os.close(descriptor)
                    continue
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise UserError(f"{refusal} (it is {holder or 'another process'})") from None
            # a holder may have removed this file between the two calls above
            if os.fstat(descriptor).st_nlink:
                started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
                with contextlib.suppress(OSError):  # a full disk; the lock is held nevertheless
                    path.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
