"""A run that a signal ends leaves a checkpoint of the step it was in, and goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from latent_ae.__main__ import main
from latent_ae_train.checkpoint import complete_checkpoints
from tests.distributed import children
from tests.distributed.launch import ROOT
from tests.runs import differing_tensors, words

LONG = ("steps=30", "checkpoint.every=1000", "validate.every=1000", "log.every=1")


def launched(processes: int, *arguments: str) -> subprocess.Popen[str]:
    """`latent-ae ARGUMENTS` as accelerate's own launcher starts it; the other tests have forks (`children`)."""
    # --multi_gpu is accelerate's word for several processes on one machine; without a GPU they talk through gloo
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        [*command, "-m", "latent_ae", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )


def wait_for_training(run: Path, goes_on: Callable[[], bool]) -> None:
    log, deadline = run / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and goes_on():
        if log.is_file() and '"event": "train"' in log.read_text():
            return
        time.sleep(0.01)
    pytest.fail("no step was logged")


@pytest.mark.usefixtures("no_finish")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_this_step_and_the_same_command_goes_on(name: str, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = children.start_command(words(pictures, run, *LONG), tmp_path / "said")
    wait_for_training(run, process.is_alive)
    os.kill(process.pid or 0, getattr(signal, name))
    process.join(120)
    error = (tmp_path / "said/stderr.0").read_text()
    assert process.exitcode == 75, error
    (checkpoint,) = complete_checkpoints(run)
    assert 0 < checkpoint.step < 30 and f"the checkpoint of step {checkpoint.step} is kept" in error
    assert "Traceback" not in error and not (run / "results.json").exists()
    if name == "SIGTERM":
        assert main(words(pictures, run, *LONG)) == 0
        whole = tmp_path / "whole"
        assert main(words(pictures, whole, *LONG)) == 0
        ends = [folder / "checkpoints/step-00000030" for folder in (run, whole)]
        assert differing_tensors(*ends) == []


def test_a_second_interrupt_stops_at_once(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_ae_train.step import TrainStep

    def interrupt_twice(self: TrainStep, *_: object) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainStep, "__call__", interrupt_twice)
    before = signal.getsignal(signal.SIGINT)
    assert main(words(pictures, tmp_path / "run", *LONG)) == 130
    assert not complete_checkpoints(tmp_path / "run") and signal.getsignal(signal.SIGINT) == before


@pytest.mark.usefixtures("no_finish")
def test_a_signal_to_one_process_ends_all_at_the_same_step(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launched(2, *words(pictures, run, *LONG, "micro_batch_size=2"))
    drained: list[str] = []
    reader = threading.Thread(target=lambda: drained.append(process.stderr.read()))
    reader.start()
    wait_for_training(run, lambda: process.poll() is None)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "latent_ae" in child.cmdline()]
    ranks = [child for child in ranks if child.environ().get("RANK") == "1"]
    os.kill(ranks[0].pid, signal.SIGUSR1)
    process.wait(timeout=120)
    reader.join()
    assert process.returncode != 0, "a launcher must not take a stopped run for a finished one"
    (checkpoint,) = complete_checkpoints(run)
    assert f"the checkpoint of step {checkpoint.step} is kept" in drained[0] and 0 < checkpoint.step < 30
    # on one process it goes on to its end, each step once (that it is the same training: tests/train/test_resume.py)
    assert main(words(pictures, run, *LONG, "micro_batch_size=2")) == 0
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "train"] == list(range(1, 31))
