"""One process at a time writes into a folder: real processes, killed and stopped ones among them."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.only_writer import only_writer
from tests.distributed import children
from tests.runs import words

HOLDS = """
import os, sys, time
from pathlib import Path
from latent_ae.only_writer import only_writer

with only_writer(Path(sys.argv[1]), "in use"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.usefixtures("no_finish")
def test_a_second_training_is_refused_and_a_killed_one_leaves_no_lock(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "run/log.jsonl"
    endless = words(pictures, run, "steps=100000", "checkpoint.every=3", "log.every=1", "validate.every=100000")
    arguments = (children._train, (endless, tmp_path, None, {}), tmp_path, {}, 0)
    first = children.context.Process(target=children._child, args=arguments)
    first.start()
    try:
        until = time.monotonic() + 60
        while not log.is_file() or len(log.read_text().splitlines()) < 6:
            assert first.is_alive() and time.monotonic() < until, (tmp_path / "stderr.0").read_text()
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGSTOP)
        before = files_of(run)
        assert main(endless) == 2
        error = capsys.readouterr().err
        assert f"output_dir: another training is writing into {run}" in error
        assert f"process {first.pid} on {socket.gethostname()}, since 2" in error
        assert files_of(run) == before
        assert main([*endless, "--dry-run"]) == 0
        code, error = children.run(endless, tmp_path / "two", processes=2)
        assert code == 2 and error.count("another training is writing into") == 1  # of both; both have ended
        assert files_of(run) == before
    finally:
        first.kill()
        first.join()
    capsys.readouterr()
    assert (run / ".lock").is_file()
    assert main([*endless, "steps=12"]) == 0
    assert "resuming" in capsys.readouterr().err or (run / "checkpoints/step-00000012").is_dir()
    assert not (run / ".lock").exists()


def test_a_reader_that_outlives_a_killed_process_does_not_hold_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "new/.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    reader = int(holder.stdout.readline())
    try:
        with pytest.raises(UserError, match=rf"^in use \(it is process {holder.pid} on "), only_writer(path, "in use"):
            pass
        holder.kill()
        holder.wait()
        os.kill(reader, 0)  # it lives on
        with only_writer(path, "in use"):
            assert str(os.getpid()) in path.read_text()
        assert path.parent.is_dir() and not path.exists()  # the folder was there before
    finally:
        holder.kill()
        os.kill(reader, signal.SIGKILL)


def test_a_folder_that_nothing_was_written_into_is_gone_again(tmp_path: Path) -> None:
    with only_writer(tmp_path / "new/.lock", "in use"):
        assert (tmp_path / "new/.lock").is_file()
    assert not (tmp_path / "new").exists()
    with only_writer(tmp_path / "new/.lock", "in use"):
        (tmp_path / "new/log").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["log"]


def test_a_disk_without_locks_gets_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with only_writer(tmp_path / "file/.lock", "in use"):  # no folder can be made there
        pass
    assert "cannot be locked" in capsys.readouterr().err

    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with only_writer(tmp_path / ".lock", "in use"):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
