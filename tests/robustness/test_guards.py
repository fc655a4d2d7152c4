"""What a run guards itself with is called where it must be: each guard is met in a run that needs it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae_train.checkpoint import complete_checkpoints
from latent_ae_train.step import TrainStep
from latent_ae_train.validate import Validator
from tests.distributed.launch import DISTRIBUTED, launch
from tests.runs import only_message, words

pytestmark = pytest.mark.usefixtures("no_finish")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def spoil(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """No finite gradient from the step `first` on."""
    original = TrainStep.__call__

    def spoilt(self: TrainStep, step: int, batches: Any) -> Any:
        if step >= first:
            batches = (batch._replace(images=batch.images * float("nan")) for batch in batches)
        return original(self, step, batches)

    monkeypatch.setattr(TrainStep, "__call__", spoilt)


def test_a_held_out_batch_is_tried(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise UserError("the metrics cannot be computed")

    monkeypatch.setattr("latent_ae_train.validate.ReconstructionMetrics.update", broken)
    monkeypatch.setattr(Validator, "measure", lambda *_: pytest.fail("the run had begun"))
    assert main(words(pictures, tmp_path / "run")) == 2
    assert "the metrics cannot be computed" in only_message(capsys)


def test_weights_that_are_not_finite_are_not_saved(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainStep.__call__

    def spoilt(self: TrainStep, step: int, batches: Any) -> Any:
        means = original(self, step, batches)
        if step == 3:
            with torch.no_grad():
                self.bare_reconstructor.last_layer[0, 0, 0, 0] = float("inf")
        return means

    monkeypatch.setattr(TrainStep, "__call__", spoilt)
    assert main(words(pictures, tmp_path / "run")) == 2
    assert "after step 4 the weight" in capsys.readouterr().err
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [2]


def test_the_log_is_on_the_disk_before_the_checkpoint_of_its_lines(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        done.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    run = tmp_path / "run"
    assert main(words(pictures, run, "steps=2")) == 0
    assert done.index(f"{run}/log.jsonl") < done.index(f"{run}/checkpoints/step-00000002")


def test_too_many_skipped_steps_stop_a_run_under_way(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, first=2)
    run = tmp_path / "run"
    assert main(words(pictures, run, "steps=12", "optim.max_skipped=2", "gan.weight=0")) == 2
    assert "the gradients of the last 2 steps to 4 were not finite" in capsys.readouterr().err
    assert [line["step"] for line in events(run, "skipped")] == [3, 4]


def test_too_many_steps_above_the_limit_stop_a_run(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    run, more = tmp_path / "run", ("steps=12", "optim.max_skipped=2", "gan.weight=0", "log.every=1")
    assert main(words(pictures, run, *more, "optim.skip_above=1e-9")) == 2
    assert "the gradient norms of the last 2 steps to 2 were above optim.skip_above 1e-09" in capsys.readouterr().err
    assert [(line["step"], line["grad_norm_above"]) for line in events(run, "skipped")] == [(1, 1e-9), (2, 1e-9)]
    assert [line.get("skipped_steps", 0) for line in events(run, "train")] == [0, 1]


@pytest.mark.parametrize("what", ["the report", "other weights"])
def test_the_way_of_an_export_is_tried(
    what: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AutoencoderKL.from_pretrained

    def other(*arguments: Any, **more: Any) -> Any:
        network = load(*arguments, **more)
        with torch.no_grad():
            network.decoder.conv_out.bias.add_(1e-6)
        return network

    def broken(*_: Any) -> None:
        raise ArithmeticError("the report")

    if what == "the report":
        monkeypatch.setattr("latent_ae_train.preflight.write_report", broken)
    else:
        monkeypatch.setattr(AutoencoderKL, "from_pretrained", other)
    with pytest.raises((ArithmeticError, RuntimeError), match=what):
        main(words(pictures, tmp_path / "run"))
    assert not (tmp_path / "run/log.jsonl").exists()


def test_room_is_asked_for_as_many_checkpoints_as_there_may_be(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are kept, the best, the one before the GAN, and the one that is being written."""
    run, more = tmp_path / "run", ("checkpoint.keep=2", "checkpoint.keep_every=3")
    assert main(words(pictures, run, *more)) == 0
    size = sum(path.stat().st_size for path in (run / "checkpoints/step-00000006").iterdir())
    capsys.readouterr()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=int(6.3 * size)))
    assert main(words(pictures, tmp_path / "small", *more)) == 2
    assert "up to 7 checkpoints" in only_message(capsys)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=int(8 * size)))
    assert main(words(pictures, tmp_path / "large", *more, "steps=1")) == 0


def test_one_of_two_processes_is_spoilt(pictures: Path, tmp_path: Path) -> None:
    """By a gradient: both skip the step, and go on with equal weights. By a weight: both stop."""
    out = tmp_path / "out"
    done = launch(2, DISTRIBUTED / "spoilt_on_processes.py", str(out), str(pictures))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((out / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first["gradient"] == second["gradient"] == [0, [2]]
    assert [line["step"] for line in events(out / "gradient", "skipped")] == [2]
    assert first["weight"][0] == second["weight"][0] == 2
    assert "after step 2 the weights of process 1 differ from those of process 0" in first["weight"][1]
    assert not complete_checkpoints(out / "weight")
