"""A short look at whether a run keeps its memory, files and threads; `python -m benchmarks.soak` is the long one."""

from pathlib import Path

from benchmarks.soak import MEMORY_MB, grew, growth, soak
from tests.distributed import children


class Forked:
    """A run that needs no start-up."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.process, self.stderr = children.start_command(words, folder / "said"), folder / "said/stderr.0"
        self.pid = self.process.pid

    def exit_code(self) -> int | None:
        return self.process.exitcode

    def said(self) -> str:
        return self.stderr.read_text()


def test_a_run_keeps_its_memory_files_and_threads(tmp_path: Path) -> None:
    seen = soak(100, tmp_path, Forked)
    assert len(seen) >= 9, "too few looks to judge by"
    assert grew(growth(seen)) == []


def test_growth_is_seen() -> None:
    flat = [
        {"step": step, "memory_mb": 900.0 + step % 3, "files": 30, "threads": 9, "processes": 3} for step in range(60)
    ]
    assert grew(growth(flat)) == []
    leak = [one | {"memory_mb": one["memory_mb"] + one["step"] * MEMORY_MB / 30} for one in flat]
    assert grew(growth(leak)) == [f"memory_mb by {growth(leak)['memory_mb']:g}"]
    open_files = [one | {"files": 30 + one["step"] // 50} for one in flat]
    assert grew(growth(open_files)) == ["files by 1"]
