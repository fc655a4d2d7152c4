"""A disk that is full, locked or over quota, when it strikes in the middle of a save and in the last stages."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.models.run_checkpoint import find_damage
from latent_ae_train.checkpoint import complete_checkpoints
from latent_ae_train.report import read_log
from latent_ae_train.step import TrainStep
from tests.robustness.failing_disk import fill, limit, mounted, remount
from tests.runs import differing_tensors, only_message, words


@pytest.fixture(autouse=True)
def unlimited() -> Iterator[None]:
    yield
    limit(None)


def assert_whole(run: Path, *steps: int) -> None:
    """Only these checkpoints are there, each as it was written, and nothing that could be taken for one."""
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == list(steps)
    assert all(find_damage(checkpoint.folder) is None for checkpoint in complete_checkpoints(run))


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Calls `act` once, as the step with this number begins."""
    original = TrainStep.__call__

    def with_trouble(self: TrainStep, step: int, *rest: Any) -> Any:
        if step == number:
            monkeypatch.setattr(TrainStep, "__call__", original)
            act()
        return original(self, step, *rest)

    monkeypatch.setattr(TrainStep, "__call__", with_trouble)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met no trouble, up to its last checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latent_ae_train.loop.finish_run", lambda *_: {})
        assert main(words(pictures, run)) == 0
    return run


@pytest.mark.usefixtures("no_finish")
@pytest.mark.parametrize("file", ["autoencoder.safetensors", "optimizer.pt", "state.json"])
def test_a_disk_that_fills_up_while_saving(
    file: str, whole: Path, pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """`file` is the one that no longer fits."""
    written = ["autoencoder", "ema", "discriminator", "objectives"]
    names = ["config.json", *(f"{name}.safetensors" for name in written), "optimizer.pt", "state.json"]
    sizes = {name: (whole / "checkpoints/step-00000006" / name).stat().st_size for name in names}
    page = os.sysconf("SC_PAGESIZE")
    pages = sum(-(-sizes[name] // page) for name in names[: names.index(file)]) + sizes[file] // page // 2
    with mounted(tmp_path / "disk", "32m") as disk:
        run = disk / "run"
        before_step(monkeypatch, 3, lambda: fill(disk, pages * page))
        assert main(words(pictures, run)) == 2
        message = only_message(capsys)
        assert f"{run}/checkpoints/step-00000004: No space left on device" in message and "free space" in message
        assert_whole(run, 2)
        (disk / "filler").unlink()
        with open(run / "log.jsonl", "a") as log:
            log.write('{"event": "tra')  # a line that found no more room
        assert main(words(pictures, run)) == 0
        assert differing_tensors(run / "checkpoints/step-00000006", whole / "checkpoints/step-00000006") == []
        assert [event["step"] for event in read_log(run) if event["event"] == "train"] == [2, 4, 6]
        assert all(json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())


@pytest.mark.usefixtures("no_finish")
def test_a_disk_that_becomes_read_only(pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with mounted(tmp_path / "disk", "32m") as disk:
        run = disk / "run"
        before_step(monkeypatch, 3, lambda: remount(disk, "ro"))
        assert main(words(pictures, run, "log.every=100")) == 2
        assert f"{run}/log.jsonl: Read-only file system" in only_message(capsys)  # synced before the save
        assert main(words(pictures, run, "log.every=100")) == 2
        assert "output_dir: " in (error := capsys.readouterr().err) and "is not writable" in error
        remount(disk, "rw")
        assert_whole(run, 2)
        assert main(words(pictures, run, "log.every=100", "steps=4")) == 0


@pytest.mark.usefixtures("no_finish")
@pytest.mark.parametrize(("call", "number"), [("fsync", errno.EDQUOT), ("replace", errno.EACCES)])
def test_a_save_that_quota_or_permission_stops(
    call: str, number: int, pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    run, original = tmp_path / "run", getattr(os, call)

    def refused(*arguments: Any) -> Any:
        names = [os.readlink(f"/proc/self/fd/{each}") if isinstance(each, int) else str(each) for each in arguments]
        if any("step-00000004.tmp" in name for name in names):
            raise OSError(number, os.strerror(number))
        return original(*arguments)

    monkeypatch.setattr(os, call, refused)
    assert main(words(pictures, run)) == 2
    assert f"{run}/checkpoints/step-00000004: {os.strerror(number)}" in only_message(capsys)
    assert_whole(run, 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002"]
    monkeypatch.setattr(os, call, original)
    assert main(words(pictures, run, "steps=4")) == 0


@pytest.mark.parametrize("place", ["log.jsonl", "export", "report.html", "results.json"])
def test_the_last_stages(
    place: str, whole: Path, pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    monkeypatch.setattr("latent_ae.export.write.verify_export", lambda *_: 0.0)  # a process of its own, slow to start
    name = {
        "log.jsonl": "latent_ae_train.loop.complete_checkpoints",
        "export": "latent_ae.export.write._twin",
        "report.html": "latent_ae_train.finish.result_rows",
        "results.json": "latent_ae_train.finish.write_report",
    }[place]
    module, _, function = name.rpartition(".")
    original = getattr(sys.modules[module], function)

    def last(*arguments: Any, **more: Any) -> Any:
        found = original(*arguments, **more)
        limit(0)
        return found

    if place == "log.jsonl":  # its last line is missing, and written before the export
        lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
        (run / "log.jsonl").write_text("".join(lines[:-1]))
        from latent_ae_train.validate import Validator

        measured = Validator.measure_model

        def then_full(*arguments: Any) -> Any:
            found = measured(*arguments)
            limit(0)
            return found

        monkeypatch.setattr(Validator, "measure_model", then_full)
    else:
        monkeypatch.setattr(name, last)
    assert main(words(pictures, run)) == 2
    limit(None)
    message = only_message(capsys)
    assert f"cannot write {run}/{place}: File too large" in message and "run the same command again" in message
    assert not (run / "results.json").exists()
    assert_whole(run, 2, 4, 6)
    assert not [path for path in run.rglob("*") if path.suffix in (".part", ".tmp")]
    monkeypatch.setattr(name, original)
    if place == "log.jsonl":
        monkeypatch.setattr(Validator, "measure_model", measured)
    assert main(words(pictures, run)) == 0
    assert json.loads((run / "results.json").read_text())["held_out"]["after"]["n"] == 3
    assert "bicubic /2" in (run / "report.html").read_text() and (run / "export/config.json").is_file()


@pytest.mark.usefixtures("no_finish")
def test_a_preview_is_whole_or_not_there(pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from latent_ae_train import validate

    run, original, drawn = tmp_path / "run", validate.picture_grid, []

    def second_does_not_fit(*arguments: Any, **more: Any) -> Any:
        drawn.append(0)
        limit(0 if len(drawn) == 2 else None)
        return original(*arguments, **more)

    monkeypatch.setattr(validate, "picture_grid", second_does_not_fit)
    assert main(words(pictures, run)) == 2
    limit(None)
    assert f"cannot write {run}/previews/step-00000003.png: File too large" in only_message(capsys)
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["step-00000000.png"]
    assert main(words(pictures, run)) == 0


def test_an_evaluation_goes_on_when_there_is_room_again(model: str, photos: str, tmp_path: Path, capsys: Any) -> None:
    from latent_ae_eval.recon import measure as recon

    out = tmp_path / "out"
    arguments = ["eval", "recon", model, photos, "crop_px=32", "resize_px=null", "lpips=[]", "frechet=[]"]
    arguments += ["num_workers=0", "--out", str(out)]
    for hook, place in (("collect", "images.parquet"), ("write_recon_report", "pairs.png")):
        with pytest.MonkeyPatch.context() as patch:
            original = getattr(recon, hook)

            def last(*words: Any, original: Any = original) -> Any:
                found = original(*words)
                limit(0)
                return found

            patch.setattr(recon, hook, last)
            assert main(arguments) == 2
            limit(None)
        assert f"cannot write {out}/{place}: File too large" in only_message(capsys)
        assert not list(out.rglob("*.part"))
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "resuming from 1 finished part" in captured.err and json.loads(captured.out)["data"]["num_images"] == 5


def test_weights_that_cannot_be_kept(world: Any) -> None:
    from latent_ae.pretrained.weights import weight_file

    world.torchvision.write_bytes(world.pth)
    limit(100)
    with pytest.raises(UserError, match="cannot keep the weights of tiny under .*: File too large.*XDG_CACHE_HOME"):
        weight_file("tiny")
    limit(None)
    assert {path.suffix for path in world.cached.parent.iterdir()} <= {".lock"}
    world.check(weight_file("tiny"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is there on Linux only")
def test_results_that_find_no_room(pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([*words(pictures, tmp_path / "run"), "--dry-run"]) == 2
        monkeypatch.undo()  # and closing the file complains no more
    assert only_message(capsys).startswith("latent-ae train: what it writes: No space left on device")
