"""A disk that is full, locked or failing: told apart from a bug, and said with the path and the cause."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_ae.config import UserError

TROUBLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG),
)
"""What the operating system says of a disk or folder that its owner can mend."""
ADVICE = "Free space there, mend its permissions or choose another place, then run the same command again"


def disk_trouble(error: BaseException) -> str | None:
    """The operating system's words for why a file could not be written; None where `error` is of another kind.

    safetensors (SafetensorError) and torch.save (RuntimeError) hide them in their text or in what they came from.
    """
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, OSError):
        if number := re.search(r"\(os error (\d+)\)", str(reason)):
            return os.strerror(int(number[1]))
        reason = reason.__cause__ or reason.__context__
    if reason is not None:
        return os.strerror(reason.errno) if reason.errno else str(reason)  # pyarrow wraps the text in another
    written = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    return "the file could not be written" if written else None


@contextmanager
def writing(path: Path, advice: str = ADVICE) -> Iterator[None]:
    """What fails in here because `path` cannot be written becomes a UserError that names it and says why."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}. {advice}") from error


@contextmanager
def replacing(path: Path, advice: str = ADVICE) -> Iterator[Path]:
    """Gives a path beside `path`, of another suffix, that takes its place at the end.

    So a reader finds the former file or this one. Raises UserError, and leaves the former, when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    with writing(path, advice):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def amount(num_bytes: float) -> str:
    """So many bytes in the unit that suits them."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
    unit = next((unit for unit, size in units.items() if num_bytes >= size), "kB")
    return f"{num_bytes / units.get(unit, 1e3):.1f} {unit}"


def write_json(path: Path, value: Any) -> None:
    """The value as indented JSON, whole or not at all. Raises UserError."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2), encoding="utf-8")
