"""Which checkpoints stay, when the GAN is blamed, and that processes that drift apart are noticed."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latent_ae.__main__ import main
from latent_ae.objectives.base import Batch
from latent_ae.objectives.gan import GanSettings
from latent_ae_train.checkpoint import before_gan, complete_checkpoints, kept_steps, newest_checkpoint
from latent_ae_train.run_config import CheckpointSettings
from latent_ae_train.step import TrainStep
from tests.distributed import children
from tests.distributed.launch import DISTRIBUTED, launch
from tests.robustness.kill_saves import kill_many
from tests.runs import words


def test_what_is_kept_is_the_newest_each_nth_the_best_and_the_last_before_the_gan():
    gan = GanSettings(start=30, discriminator_warmup=5)
    settings = CheckpointSettings(keep=2, keep_every=40)
    steps, distances = range(10, 101, 10), {20: 0.5, 50: 0.2, 60: 0.2, 90: 0.9, 55: 0.0}
    assert kept_steps(steps, settings, gan, distances) == {30, 40, 60, 80, 90, 100}  # the later of two equal ones
    assert kept_steps(steps, CheckpointSettings(keep=1), GanSettings(weight=0), {}) == {100}
    assert kept_steps([], settings, gan, {}) == set()
    assert before_gan([10, 30, 35, 36], gan) == 35 and before_gan([40], gan) is None


def test_a_run_keeps_the_checkpoint_before_its_gan_and_the_best(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("steps=12", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=5", "validate.every=100")
    assert main(words(pictures, run, *more, "gan.start=2", "gan.discriminator_warmup=1")) == 0
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [3, 5, 10, 12]
    assert newest_checkpoint(run).step == 12
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (3, 5, 10, 12)
    ]


def test_the_alarm_names_the_checkpoint_to_go_back_to(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_ae_train.validate import Validator

    original, calls = Validator.measure_model, []

    def worse_every_time(self: Validator, *arguments: object) -> dict:
        calls.append(0)
        return original(self, *arguments) | {"lpips_vgg": 0.1 * 1.2 ** len(calls)}  # type: ignore[arg-type]

    monkeypatch.setattr(Validator, "measure_model", worse_every_time)
    run = tmp_path / "run"
    more = ("steps=6", "checkpoint.every=1", "validate.every=1", "gan.start=2", "gan.discriminator_warmup=0")
    assert main(words(pictures, run, *more)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "the GAN makes it worse" in line]
    # step 3 is 1.2 times worse than step 2, the limit is 1.25
    assert [line.split(":")[0] for line in lines] == ["step 4", "step 5", "step 6"]
    assert all(line.endswith(f"gan.weight: {run}/checkpoints/step-00000002") for line in lines)
    assert (run / "checkpoints/step-00000002/manifest.json").is_file()


def spoil_steps(monkeypatch: pytest.MonkeyPatch, *spoilt: int) -> None:
    """No finite gradient in these steps, counted from 1."""
    original = TrainStep.__call__

    def call(self: TrainStep, step: int, batches: Iterator[Batch]) -> dict:
        if step + 1 in spoilt:
            batches = (batch._replace(images=batch.images * float("nan")) for batch in batches)
        return original(self, step, batches)

    monkeypatch.setattr(TrainStep, "__call__", call)


def test_a_checkpoint_that_is_due_waits_for_a_step_that_changes_something(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_steps(monkeypatch, 4)
    run = tmp_path / "run"
    assert main(words(pictures, run, "gan.weight=0", "steps=7", "checkpoint.keep=9")) == 0
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [2, 5, 6, 7]  # due at 2, 4, 6 and 7
    assert "changed nothing: step 4 (1 so far)" in capsys.readouterr().err
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (skipped,) = (event for event in events if event["event"] == "skipped")
    assert skipped == {"event": "skipped", "step": 4, "first_sample": 12, "last_sample": 15}


def test_a_last_step_that_changes_nothing_does_not_cost_the_run(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed it would fail again, because its batch is the same."""
    spoil_steps(monkeypatch, 6)
    run = tmp_path / "run"
    assert main(words(pictures, run, "gan.weight=0", "checkpoint.every=5")) == 0
    assert "changed nothing: step 6 (1 so far)" in capsys.readouterr().err
    five, six = (load_file(run / f"checkpoints/step-0000000{step}/autoencoder.safetensors") for step in (5, 6))
    assert all(torch.equal(tensor, six[name]) for name, tensor in five.items())


def test_a_signal_saves_after_a_step_that_changed_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_steps(monkeypatch, 3)
    spoilt = TrainStep.__call__

    def stopped_in_the_third(self: TrainStep, step: int, batches: Iterator[Batch]) -> dict:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return spoilt(self, step, batches)

    monkeypatch.setattr(TrainStep, "__call__", stopped_in_the_third)
    run = tmp_path / "run"
    assert main(words(pictures, run, "gan.weight=0", "checkpoint.every=100", "log.every=100")) == 75
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [3]
    assert '{"event": "skipped", "step": 3' in (run / "log.jsonl").read_text()


def test_too_little_room_is_said_before_the_first_step(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**5))
    assert main(words(pictures, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "has 100.0 kB free" in error and "checkpoint.keep" in error and "step 2/" not in error
    # the discriminator's stored reconstructions are part of every checkpoint: 1,000 of 3 x 16 x 16 numbers and a latent
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**7))
    assert main(words(pictures, tmp_path / "run", "gan.replay=1000", "--dry-run")) == 0
    assert int(re.search(r"checkpoint: +(\d+) MB each", capsys.readouterr().out).group(1)) in (4, 5)
    assert main(words(pictures, tmp_path / "run", "gan.replay=1000")) == 2
    assert re.search(r"up to \d checkpoints of [45]\.\d MB", capsys.readouterr().err)
    monkeypatch.undo()
    assert main(words(pictures, tmp_path / "run", "steps=1")) == 0
    assert not list((tmp_path / "run").glob(".preflight*"))


def test_processes_that_drift_apart_are_stopped_together(tmp_path: Path) -> None:
    done = launch(2, DISTRIBUTED / "drift_on_processes.py", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    answers = [(tmp_path / f"out.rank{rank}").read_text().splitlines() for rank in (0, 1)]
    assert answers[0] == answers[1] and answers[0][0] == "equal"
    assert answers[0][1].startswith("after step 50 the weights of process 1 differ from those of process 0")


def killed_while_saving(rank: int, run: Path) -> None:
    (run.parent / "said/steps.json").write_text(json.dumps(kill_many(run, 8, seed=1)))


def test_a_kill_while_saving_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    code, error = children.call(1, killed_while_saving, tmp_path / "run", folder=tmp_path / "said")
    assert code == 0, error
    steps = json.loads((tmp_path / "said/steps.json").read_text())
    assert steps == sorted(steps) and steps[-1] >= 2, "too slow to show anything"
