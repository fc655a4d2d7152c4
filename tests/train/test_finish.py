"""The end of a run: nobody waits too long for the process that exports, and nothing is lost when that fails."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_ae_train import agreement
from latent_ae_train.finish import trained_discriminator
from latent_ae_train.preflight import _warn_of_slow_bf16
from latent_ae_train.settings import TrainSettings
from tests.distributed.launch import DISTRIBUTED, launch
from tests.tiny import GAN, build_step, settings_for


def test_a_discriminator_is_exported_once_it_has_trained() -> None:
    step = build_step(settings_for(gan=GAN | {"start": 5}))
    objectives = list(step.objectives.values())
    assert trained_discriminator(objectives, 5) is None
    assert trained_discriminator(objectives, 6) is step.bare_adversaries["gan"]
    assert trained_discriminator(list(build_step(settings_for()).objectives.values()), 9) is None


def test_one_process_works_longer_than_a_collective_waits(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(2, DISTRIBUTED / "finish_on_processes.py", str(run), str(pictures))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(Path(f"{run}.rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["slow"] == ["start", "preview", "prune", "checkpoint", "export"] and second["slow"] == []
    # an export that is refused ends both, and says so once
    (code, said), (other_code, other_said) = first["refused"], second["refused"]
    assert code == other_code == 2 and said.count("latent-ae train: this export is refused\n") == 1
    assert "the checkpoint of step 2 is kept" in said and "latent-ae" not in other_said
    # the same command makes it, and an upload that fails is no failure of the run
    assert first["whole"][0] == second["whole"][0] == 0
    assert json.loads((run / "results.json").read_text())["step"] == 2 and (run / "export/config.json").is_file()
    assert first["upload"] == [False, True] and "upload" not in second
    said = first["whole"][1]
    assert "cannot upload" in said and f"then: hf upload ada/vae {run}/export" in said


def test_the_process_that_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = socket.gethostname()
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    killed, alive = (subprocess.Popen(sleeper) for _ in range(2))
    try:
        places = [(here, alive.pid), (here, killed.pid), ("elsewhere", 1)]
        monkeypatch.setattr(agreement, "SECONDS_TO_DIE", 0.1)
        monkeypatch.setattr(agreement, "_hosts", {0: agreement.Hosts(None, places)})  # type: ignore[arg-type]
        assert agreement.lost_process().startswith("a process on another machine (elsewhere) has ended: its output")
        killed.send_signal(signal.SIGKILL)
        named = f"process 1 (pid {killed.pid} on {here}) has ended"
        monkeypatch.setattr(agreement, "SECONDS_TO_DIE", 30)
        assert agreement.lost_process().startswith(named)  # nobody has waited for it yet: a zombie
        killed.wait()
        assert agreement.lost_process().startswith(named)
    finally:
        for process in (killed, alive):
            process.kill()
            process.wait()


def test_bf16_without_hardware_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Tesla T4")
    gpu = torch.device("cuda")
    for supported, precision, device in (
        (True, "bf16", gpu),
        (False, "fp32", gpu),
        (False, "bf16", torch.device("cpu")),
    ):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, known=supported: known)
        _warn_of_slow_bf16(TrainSettings(precision=precision), device)
        assert capsys.readouterr().err == ""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    _warn_of_slow_bf16(TrainSettings(precision="bf16"), gpu)
    assert "Tesla T4 has no bf16 arithmetic and emulates it" in capsys.readouterr().err
