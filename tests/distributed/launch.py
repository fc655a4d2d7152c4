"""Runs a script or a command of `latent-ae` on several CPU processes that talk through gloo."""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.distributed import children

DISTRIBUTED = Path(__file__).parent
ROOT = DISTRIBUTED.parents[1]


def launch(processes: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished script on so many processes, which start with everything imported; output is that of all.

    The exit code is the first process's, or else another's that is not 0.
    """
    return _finished(processes, children.run_script, str(script), arguments)


def launch_command(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The finished `latent-ae WORDS`, as `launch` runs a script; tests/train/test_signals.py has the real launcher."""
    return _finished(processes, children.run_command, words)


def _finished(
    processes: int, function: Callable[..., None], *arguments: str | tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        codes = children.call_all(processes, function, *arguments, folder, folder=Path(folder))
        said = [
            "".join(path.read_text() for path in sorted(Path(folder).glob(f"{name}.*")))
            for name in ("stdout", "stderr")
        ]
        return subprocess.CompletedProcess([], next(filter(None, codes), 0), *said)
