"""A run that was killed anywhere goes on, ends with the same bits, and its folder tells the same story once."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.checkpoint import complete_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from latent_ae_train.run import cut_back
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep
from tests.distributed import children
from tests.runs import differing_tensors, words
from tests.tiny import GAN, STATE, build_step, micro_batches, settings_for

LAST = "checkpoints/step-00000008"


def long_words(pictures: Path, run: Path, *more: str) -> list[str]:
    """Eight steps of two micro-batches, each step logged and validated, every other saved; the best is step 4."""
    every = ("checkpoint.every=2", "checkpoint.keep=1", "validate.every=1", "log.every=1")
    return words(pictures, run, "steps=8", "micro_batch_size=2", *every, *more)


def events_of(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [event for event in events if kind in (None, event["event"])]


def story(run: Path) -> list[dict[str, Any]]:
    """All that the log says but rates, memory and that the run went on."""
    kept = [event for event in events_of(run) if event["event"] != "resume"]
    return [{k: v for k, v in event.items() if k not in ("images_per_second", "memory_gb")} for event in kept]


def differences(run: Path, whole: Path) -> list[str]:
    """In what the folder of a run differs from that of one which was not interrupted."""
    found = [] if story(run) == story(whole) else ["log"]
    names = [sorted(path.name for path in folder.glob("checkpoints/*")) for folder in (run, whole)]
    found += [] if names[0] == names[1] else [f"checkpoints {names[0]}, not {names[1]}"]
    pngs = [{path.name: path.read_bytes() for path in folder.glob("previews/*")} for folder in (run, whole)]
    return found + ([] if pngs[0] == pngs[1] else ["previews"]) + differing_tensors(run / LAST, whole / LAST)


class Whole(NamedTuple):
    """A run that was not interrupted."""

    run: Path
    writes: list[str]
    """Every change of a file in its folder, in order."""


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _whole(pictures, tmp_path_factory.mktemp("whole"), 1)


@pytest.fixture(scope="module")
def whole_on_two(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _whole(pictures, tmp_path_factory.mktemp("whole-on-two"), 2)


def _whole(pictures: Path, folder: Path, processes: int) -> Whole:
    code, error = children.run(long_words(pictures, folder / "run"), folder / "out", processes)
    assert code == 0, error
    return Whole(folder / "run", json.loads((folder / "out/writes.json").read_text()))


def test_what_is_compared_is_there(whole: Whole) -> None:
    kinds = [(event["event"], event["step"]) for event in story(whole.run)]
    expected = [("baseline", 0), ("validate", 0)]
    for step in range(1, 9):
        expected += [("train", step), ("validate", step)] + [("alarm", step)] * (step == 6)
    assert kinds == expected
    assert len(list(whole.run.glob("previews/*.png"))) == 9
    assert [checkpoint.step for checkpoint in complete_checkpoints(whole.run)] == [2, 4, 8]  # before GAN, best, newest
    tensors = load_file(whole.run / LAST / "objectives.safetensors")
    assert all(bool((tensors[name] != 0).all()) for name in ("gan.balance.weight", "gan.lecam_averages"))


def test_killed_before_any_write_of_a_step_it_ends_the_same(pictures: Path, tmp_path: Path, whole: Whole) -> None:
    """Stopped between train line, save, validation, preview, alarm and pruning; the tests below kill -9."""
    writes = whole.writes

    def number(text: str, after: int = 0) -> int:
        return next(index for index in range(after, len(writes)) if text in writes[index])

    pruned = number("os.rename /checkpoints/step-00000006")
    # a preview is an `open` of its part, a rename, a removal of a part that is gone, and a line of the log
    points = {number("open /previews/.step-00000000.png") + 3, number("os.rename /checkpoints/step-00000002.tmp")}
    points |= {number("os.rename /previews/.step-00000004.png"), number("open /previews/.step-00000004.png") + 3}
    # all of step 6, whose lines are training's, the validation's and an alarm, and step 7's first
    points |= set(range(number("open /previews/.step-00000005.png") + 4, number("open /previews/.step-00000007.png")))
    points |= set(range(number("os.rename /checkpoints/step-00000008.tmp"), pruned + 4)) | {len(writes) - 1}
    assert len(points) >= 20
    copies = {point: tmp_path / f"at-{point}" for point in points}
    code, error = children.run(long_words(pictures, tmp_path / "copied"), tmp_path / "out", copies=copies)
    assert code == 0, error
    for point, run in sorted(copies.items()):
        if writes[point] == "open /log.jsonl":  # it was in the middle of the line
            with open(run / "log.jsonl", "a") as log:
                log.write('{"event": "tra')
        code, error = children.run(long_words(pictures, run), tmp_path / "out")
        assert code == 0, error
        assert differences(run, whole.run) == [], f"killed before write {point}: {writes[point]}"
        shutil.rmtree(run)


def test_killed_again_while_it_goes_on(pictures: Path, tmp_path: Path, whole: Whole) -> None:
    at_six = next(index for index, write in enumerate(whole.writes) if "rename /checkpoints/step-00000006.tmp" in write)
    killed = tmp_path / "killed"
    assert children.run(long_words(pictures, killed), tmp_path / "out", kill_at=at_six)[0] == -signal.SIGKILL
    again = shutil.copytree(killed, tmp_path / "again")
    assert children.run(long_words(pictures, again), tmp_path / "out")[0] == 0
    writes = json.loads((tmp_path / "out/writes.json").read_text())
    first = writes.index("open /log.previous.jsonl")
    assert writes[first : first + 3] == [
        "open /log.previous.jsonl",
        "open /.log.jsonl.part",
        "os.rename /.log.jsonl.part",
    ]
    for point in range(first, first + 6):
        run = shutil.copytree(killed, tmp_path / f"at-{point}")
        code, error = children.run(long_words(pictures, run), tmp_path / "out", kill_at=point)
        assert code == -signal.SIGKILL, error
        assert children.run(long_words(pictures, run), tmp_path / "out")[0] == 0
        assert differences(run, whole.run) == [], writes[point]


def test_pruning_comes_after_the_validation(pictures: Path, tmp_path: Path) -> None:
    """Step 4 is better than step 2, which therefore goes at once, also when the run was killed before it could."""
    arguments = long_words(pictures, tmp_path / "run", "steps=4", "gan.weight=0")
    assert children.run(arguments, tmp_path / "out")[0] == 0
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [4]
    writes = json.loads((tmp_path / "out/writes.json").read_text())
    shutil.rmtree(tmp_path / "run")
    pruned = writes.index("os.rename /checkpoints/step-00000002")
    assert children.run(arguments, tmp_path / "out", kill_at=pruned)[0] == -signal.SIGKILL
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [2, 4]
    assert children.run(arguments, tmp_path / "out")[0] == 0
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "run")] == [4]


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (2, 2)])
def test_killed_on_processes_and_workers(
    pictures: Path, tmp_path: Path, request: pytest.FixtureRequest, processes: int, workers: int
) -> None:
    whole = request.getfixturevalue("whole" if processes == 1 else "whole_on_two")
    run, more = tmp_path / "run", f"data.num_workers={workers}"
    at_six = next(index for index, write in enumerate(whole.writes) if "rename /checkpoints/step-00000006.tmp" in write)
    code, error = children.run(long_words(pictures, run, more), tmp_path / "out", processes, kill_at=at_six)
    assert code == -signal.SIGKILL, error
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [2, 4]
    code, error = children.run(long_words(pictures, run, more), tmp_path / "out", processes)
    assert code == 0, error
    assert differences(run, whole.run) == []
    assert events_of(run, "resume") == [{"event": "resume", "step": 4, "changed": {}}]


@pytest.mark.parametrize(
    ("before", "after", "micro_batch", "changed"),
    [
        (1, 2, 2, {"processes": [1, 2], "accumulation": [2, 1]}),
        (2, 1, 2, {"processes": [2, 1], "accumulation": [1, 2]}),
        (1, 1, 4, {"micro_batch_size": [2, 4], "accumulation": [2, 1]}),
        (2, 1, 4, {"processes": [2, 1], "micro_batch_size": [2, 4]}),
    ],
)
def test_other_processes_and_micro_batches_go_on_alike(
    pictures: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    before: int,
    after: int,
    micro_batch: int,
    changed: dict[str, Any],
) -> None:
    """The first step after the change begins with the weights of a run without one: losses and gradients are equal."""
    whole = request.getfixturevalue("whole" if before == 1 else "whole_on_two")
    run = tmp_path / "run"
    at_six = next(index for index, write in enumerate(whole.writes) if "rename /checkpoints/step-00000006.tmp" in write)
    code, error = children.run(long_words(pictures, run), tmp_path / "out", before, kill_at=at_six)
    assert code == -signal.SIGKILL and complete_checkpoints(run)[-1].step == 4, error
    code, error = children.run(long_words(pictures, run, f"micro_batch_size={micro_batch}"), tmp_path / "out", after)
    assert code == 0, error
    fifth, expected = (
        next(event for event in events_of(folder, "train") if event["step"] == 5) for folder in (run, whole.run)
    )
    compared = {"l1", "kl", "discriminator", "generator", "adaptive_weight", "grad_norm", "grad_norm_discriminator"}
    assert compared <= fifth.keys() and all(fifth[key] == pytest.approx(expected[key], rel=1e-5) for key in compared)
    assert [(e["event"], e["step"]) for e in story(run)] == [(e["event"], e["step"]) for e in story(whole.run)]
    (resumed,) = events_of(run, "resume")
    assert (resumed["step"], resumed["changed"]) == (4, changed)
    for name, (then, now) in changed.items():
        assert f"changed since step 4: {name} from {then} to {now}" in error


@pytest.mark.usefixtures("no_finish")
def test_changed_settings_are_in_the_log_against_what_wrote_the_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert main(words(pictures, run, "steps=2")) == 0
    original = TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda *_: pytest.fail("stopped at once"))
    with pytest.raises(pytest.fail.Exception):
        main(words(pictures, run, "steps=4", "optim.clip=0.5"))
    monkeypatch.setattr(TrainStep, "__call__", original)
    # the start that came to nothing wrote this into config.yaml; the checkpoint knows better
    assert main(words(pictures, run, "steps=4", "optim.clip=0.5")) == 0
    assert [event["changed"] for event in events_of(run, "resume")] == [
        {"steps": [2, 4], "optim.clip": [1.0, 0.5]},
    ] * 2


@pytest.mark.usefixtures("no_finish")
def test_a_discriminator_cannot_begin_in_the_past(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Untrained and past its warm-ups, it would act with its full weight at once."""
    run, gan = tmp_path / "run", ("gan.weight=0.5", "gan.discriminator_warmup=2")
    assert main(words(pictures, run, *gan, "steps=4", "gan.start=9")) == 0
    assert main(words(pictures, run, *gan, "steps=6", "gan.start=1")) == 2
    assert "gan.start: 1 is before step 4" in (said := capsys.readouterr().err) and "Set gan.start=4 or later" in said
    assert main(words(pictures, run, *gan, "steps=6", "gan.start=4")) == 0
    # one that trains by now may have begun at any time
    assert main(words(pictures, run, *gan, "steps=7", "gan.start=3")) == 0


def test_cutting_the_log_back(tmp_path: Path) -> None:
    lines = [{"event": "train", "step": step} for step in (2, 4, 6)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"event": "tra')
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "previews").mkdir()
    for step in (0, 4, 6):
        (tmp_path / f"previews/step-{step:08d}.png").touch()
    cut_back(tmp_path, 4)
    assert events_of(tmp_path) == lines[:2]
    previous = tmp_path / "log.previous.jsonl"
    assert previous.read_text() == json.dumps(lines[2]) + '\n{"event": "tra\n'
    assert [path.name for path in sorted((tmp_path / "previews").iterdir())] == [
        "step-00000000.png",
        "step-00000004.png",
    ]
    assert (tmp_path / "results.previous.json").is_file() and not (tmp_path / "results.json").exists()
    cut_back(tmp_path, 4)
    assert events_of(tmp_path) == lines[:2] and len(previous.read_text().splitlines()) == 2
    cut_back(tmp_path, -1)
    assert events_of(tmp_path) == [] and len(previous.read_text().splitlines()) == 4


# ---------------------------------------------------------------------------------------------------- a new phase


@pytest.mark.usefixtures("no_finish")
def test_a_refused_recipe_names_the_settings_of_a_new_phase_and_they_work(
    pictures: Path, tmp_path: Path, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole.run, tmp_path / "first phase")
    other = shutil.copytree(pictures, tmp_path / "other")
    changes = ["seed=5", f"data.source={other}", "data.resolution=32", "train=decoder", "steps=1"]
    assert main(long_words(pictures, run, *changes)) == 2
    error = capsys.readouterr().err
    for key in ("seed", "data.source", "data.resolution", "train"):
        assert f"  {key}: " in error
    assert "model" not in error
    more = shlex.split(error.splitlines()[-1])
    by_layer = "optim.layerwise=true"  # as in the first phase, which has the linear start
    assert more == [f"output_dir={run}-2", f"init_from={run}", by_layer, f"gan.init_from={run}", "gan.start=0"]
    # the discriminator alone learns in the first step: the average must be what the first phase ended with
    assert main(long_words(pictures, run, *changes, *more)) == 0
    folder = Path(f"{run}-2") / "checkpoints/step-00000001"
    start, end = load_file(run / LAST / "ema.safetensors"), load_file(folder / "autoencoder.safetensors")
    same = [torch.equal(start[name], end[name]) for name in start if name.startswith(("encoder.", "quant_conv."))]
    assert len(same) > 20 and all(same) and not all(torch.equal(start[name], end[name]) for name in start)
    judges = [load_file(place / "discriminator.safetensors") for place in (run / LAST, folder)]
    assert 0 < max(float((judges[0][name] - judges[1][name]).abs().max()) for name in judges[0]) < 0.01
    # and that name is taken now
    assert main(long_words(pictures, run, "seed=5")) == 2
    assert f"{run}-3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("model.latent_channels=5", ["model={{}}", "optim.layerwise=true", "gan.init_from={}", "gan.start=0"]),
        ("gan.channels=4", ["optim.layerwise=true"]),
        ("gan.weight=0 optim.layerwise=false", []),
    ],
)
def test_a_new_phase_takes_what_fits(
    pictures: Path, whole: Whole, capsys: pytest.CaptureFixture[str], change: str, expected: list[str]
) -> None:
    assert main(long_words(pictures, whole.run, *change.split())) == 2
    more = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert more == [word.format(whole.run) for word in ("output_dir={}-2", "init_from={}", *expected)]
    settings = load_settings(TrainSettings, *_recipe(long_words(pictures, whole.run, *change.split(), *more)))
    assert starting_autoencoder(settings).config.latent_channels == 4


def _recipe(arguments: list[str]) -> tuple[str, list[str]]:
    return arguments[1], arguments[2:]


def test_where_the_weights_of_a_run_come_from(pictures: Path, tmp_path: Path, whole: Whole) -> None:
    """The newest whole checkpoint's average, whether it is named by its run or itself; a damaged one is refused."""
    run = shutil.copytree(whole.run, tmp_path / "run")
    stored = {step: load_file(run / f"checkpoints/step-0000000{step}/ema.safetensors") for step in (4, 8)}

    def start(place: Path) -> dict[str, torch.Tensor]:
        recipe = _recipe(long_words(pictures, tmp_path / "new", f"init_from={place}"))
        return starting_autoencoder(load_settings(TrainSettings, *recipe)).state_dict()

    def step_of(weights: dict[str, torch.Tensor]) -> list[int]:
        return [s for s, ema in stored.items() if all(torch.equal(weights[name], ema[name]) for name in ema)]

    assert step_of(start(run)) == step_of(start(run / LAST)) == [8]
    assert step_of(start(run / "checkpoints/step-00000004")) == [4]
    flip_bit(run / LAST / "ema.safetensors", -5)
    assert step_of(start(run)) == [4]
    with pytest.raises(UserError, match=r"step-00000008 is damaged: ema.safetensors has another checksum"):
        start(run / LAST)
    # an export counts when it is of the newest weights
    shutil.rmtree(run / LAST)
    model = starting_autoencoder(load_settings(TrainSettings, *_recipe(long_words(pictures, tmp_path / "new"))))
    model.save_pretrained(run / "export")
    (run / "results.json").write_text(json.dumps({"step": 2}))
    assert step_of(start(run)) == [4]
    (run / "results.json").write_text(json.dumps({"step": 4}))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in start(run).items())


def test_a_model_that_is_not_the_one_that_comes_is_refused(
    pictures: Path, tmp_path: Path, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = long_words(pictures, tmp_path / "new", f"init_from={whole.run}", "model.latent_channels=5")
    assert main([*arguments, "--dry-run"]) == 2
    assert "model.latent_channels: 5, and init_from brings 4" in capsys.readouterr().err
    assert main([*arguments, "model={}", "--dry-run"]) == 0
    # how fresh weights begin is no part of the shape
    assert main([*arguments[:-1], "model.init=default", "--dry-run"]) == 0
    assert "4 x 8 x 8" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- damage and saves


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_go_on_in_another_memory_format(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors differ in the faster one, and so may those on which a run begins and goes on."""
    settings = settings_for(gan=GAN, optim={"kind": kind}, batch_size=2)

    def after(first: int, last: int, layout: torch.memory_format, resumed: bool) -> list[torch.Tensor]:
        monkeypatch.setattr("latent_ae_train.step.training_memory_format", lambda device: layout)
        step = build_step(settings)
        if resumed:
            load_checkpoint(newest_checkpoint(tmp_path), step)
        for number in range(first, last):
            step(number, micro_batches(number, settings))
        if not resumed:
            save_checkpoint(tmp_path, step, {**STATE, "step": last})
        return [parameter.detach().clone() for network in step.networks for parameter in network.parameters()]

    def way(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        return float(sum((a - b).square().sum() for a, b in zip(one, other, strict=True)) ** 0.5)

    before = after(0, 6, torch.channels_last, resumed=False)
    same = after(6, 9, torch.channels_last, resumed=True)
    other = after(6, 9, torch.contiguous_format, resumed=True)
    assert way(same, other) < 0.02 * way(before, same)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with all kinds of files."""
    run = tmp_path_factory.mktemp("saved")
    train_step = build_step(settings_for(gan=GAN, ema={"decay": 0.9}, batch_size=2))
    train_step(0, micro_batches(0, train_step.settings))
    for step in (1, 2):
        save_checkpoint(run, train_step, {**STATE, "step": step})
    return run


FILES = (
    *("autoencoder.safetensors", "ema.safetensors", "discriminator.safetensors", "objectives.safetensors"),
    *("optimizer.pt", "config.json", "state.json", "manifest.json"),
)
DAMAGES = {
    "first bit": lambda path: flip_bit(path, 0),
    "a bit in the middle": lambda path: flip_bit(path, path.stat().st_size // 2),
    "last byte lost": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half lost": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "other JSON": lambda path: path.write_text('{"files": []}'),
    "no files": lambda path: path.write_text('{"files": {}}'),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_noticed(name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(FILES) == sorted(path.name for path in (saved / "checkpoints/step-00000002").iterdir())
    for number, damage in enumerate(DAMAGES.values()):
        run = shutil.copytree(saved, tmp_path / str(number))
        assert newest_checkpoint(run).step == 2 and capsys.readouterr().err == ""
        damage(run / "checkpoints/step-00000002" / name)
        assert newest_checkpoint(run).step == 1, list(DAMAGES)[number]
        assert re.search(rf"step-00000002 is damaged \(.*{name}.*\) and passed over", capsys.readouterr().err)
        assert name == "manifest.json" or (run / "checkpoints/step-00000002/manifest.json").is_file()


def test_every_bit_of_the_manifest_counts(saved: Path, tmp_path: Path) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    manifest = run / "checkpoints/step-00000002/manifest.json"
    content = manifest.read_bytes()
    for position in range(0, len(content), 7):
        flip_bit(manifest, position)
        try:
            same = json.loads(manifest.read_bytes()) == json.loads(content)  # a space that became another
        except ValueError:
            same = False
        assert newest_checkpoint(run).step == (2 if same else 1), position
        manifest.write_bytes(content)


def test_a_file_too_many_is_noticed(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(saved, tmp_path / "run")
    (run / "checkpoints/step-00000002/.nfs0001").touch()  # the system's own
    assert newest_checkpoint(run).step == 2
    (run / "checkpoints/step-00000002/discriminator_2.safetensors").touch()
    assert newest_checkpoint(run).step == 1
    assert "discriminator_2.safetensors is not in manifest.json" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_set_aside_and_not_counted(pictures: Path, tmp_path: Path, whole: Whole) -> None:
    """The run goes on from the one before and ends the same, with the same checkpoints besides."""
    run = shutil.copytree(whole.run, tmp_path / "run")
    flip_bit(run / LAST / "optimizer.pt", 1000)
    code, error = children.run(long_words(pictures, run), tmp_path / "out")
    assert code == 0 and "optimizer.pt has another checksum" in error and "at step 4 of 8" in error
    (run / f"{LAST}.damaged/manifest.json").unlink()  # it is there
    shutil.rmtree(run / f"{LAST}.damaged")
    assert differences(run, whole.run) == []


def test_a_name_is_on_the_disk_before_the_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: each file, the manifest, the folder, its new name, and the folders that hold names."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(f"{source.relative_to(tmp_path)} -> {target.relative_to(tmp_path)}")
        replace(source, target)

    train_step = build_step(settings_for(batch_size=2))
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder = save_checkpoint(tmp_path / "run", train_step, {**STATE, "step": 3}).folder
    temporary = "run/checkpoints/step-00000003.tmp"
    files = [f"{temporary}/{path.name}" for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    assert done == [
        *files,
        f"{temporary}/manifest.json",
        temporary,
        f"{temporary} -> run/checkpoints/step-00000003",
        "run/checkpoints",
        "run",
    ]


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("step", "code", "saved"), [(3, 75, [2, 3]), (4, 75, [2, 4]), (8, 0, [2, 8])])
def test_a_signal_in_a_step_with_a_validation(
    pictures: Path,
    tmp_path: Path,
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    code: int,
    saved: list[int],
) -> None:
    """Without and with a save due; and in the last step, which ends the run as if there had been none."""
    original = TrainStep.__call__

    def signalled(self: TrainStep, number: int, *rest: Any) -> Any:
        if number == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self, number, *rest)

    run = tmp_path / "run"
    monkeypatch.setattr(TrainStep, "__call__", signalled)
    monkeypatch.setattr("latent_ae_train.loop.finish_run", lambda *_: {})
    assert main(long_words(pictures, run)) == code
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == saved
    lines = [(event["event"], event["step"]) for event in events_of(run)]
    # the checkpoint comes before a validation, which may take longer than a scheduler waits
    assert lines[-1] == (("train", step) if code else ("validate", step))
    if code:
        monkeypatch.setattr(TrainStep, "__call__", original)
        assert main(long_words(pictures, run)) == 0
        assert differing_tensors(run / LAST, whole.run / LAST) == []
        again = [(event["event"], event["step"]) for event in story(run) if event["event"] != "alarm"]
        assert again == [(e["event"], e["step"]) for e in story(whole.run) if e["event"] != "alarm"]
