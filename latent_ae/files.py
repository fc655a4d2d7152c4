"""Writes files so that a full, locked or failing disk becomes a UserError with the path and the cause."""

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
"""Error numbers of the operating system about a disk or folder that the user can correct."""
ADVICE = "Free space there, mend its permissions or choose another place, then run the same command again"


def disk_trouble(error: BaseException) -> str | None:
    """Return the operating system's reason why a file could not be written; None if `error` is of another kind.

    safetensors (SafetensorError) and torch.save (RuntimeError) hide the reason in their text or cause.
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
    """Turn errors of a `with` block that writes `path` into a UserError with the path and the reason.

    Args:
        path: What the block writes, for the message.
        advice: What to do, the end of the message.

    Raises:
        UserError: If the disk or folder is at fault. Other exceptions pass.
    """
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
    """Yield a temporary path beside `path` that replaces it at the end of the `with` block.

    So a reader finds either the old file or the new one, never a part.

    Args:
        path: The file to replace.
        advice: What to do, the end of a message.

    Raises:
        UserError: If it cannot be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    with writing(path, advice):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def amount(num_bytes: float) -> str:
    """Return a number of bytes as text in a suitable unit, for example "1.5 GB"."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
    unit = next((unit for unit, size in units.items() if num_bytes >= size), "kB")
    return f"{num_bytes / units.get(unit, 1e3):.1f} {unit}"


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; a reader never finds a part. Raises UserError if it cannot be written."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2), encoding="utf-8")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        UserError: If it cannot be read, is no JSON, or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of names to values: it is damaged, or another file")
    return content
