"""Phases of one recipe: equal to runs by hand, resumed in the right phase, checked before the first step."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AsymmetricAutoencoderKL
from safetensors.torch import load_file

import latent_ae as lae
import latent_ae_train.loop
from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings, to_yaml
from latent_ae.latents.encode import encode_images
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.run_checkpoint import checkpoint_at
from latent_ae_train import TrainSettings, train
from latent_ae_train.checkpoint import complete_checkpoints
from latent_ae_train.phases import phases_of
from latent_ae_train.step import TrainStep
from tests.distributed import children
from tests.runs import differing_tensors, largest_difference, only_message, words

BASE: dict[str, Any] = {"name": "base", "steps": 4}
SHARP: dict[str, Any] = {
    **{"name": "sharp", "steps": 3, "train": "decoder", "data": {"resolution": 8}},
    "gan": {"start": 0, "discriminator_warmup": 0},
}
WEIGHTS = "export/diffusion_pytorch_model.safetensors"


def phased(pictures: Path, run: Path, *more: str, phases: tuple[dict[str, Any], ...] = (BASE, SHARP)) -> list[str]:
    return [*words(pictures, run), f"phases={json.dumps(phases)}", *more]


def log_of(folder: Path) -> list[dict[str, Any]]:
    """What the log says, without times, memory and that the run went on."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [event for event in events if event["event"] != "resume"]
    return [{k: v for k, v in event.items() if k not in ("images_per_second", "memory_gb")} for event in kept]


def differences(run: Path, whole: Path) -> list[str]:
    """In what the folder of a run in phases differs from another."""
    found = []
    for name, last in (("1-base", "step-00000004"), ("2-sharp", "step-00000003")):
        one, other = run / "phases" / name, whole / "phases" / name
        found += [f"log of {name}"] * (log_of(one) != log_of(other))
        found += differing_tensors(one / "checkpoints" / last, other / "checkpoints" / last)
    for name in (WEIGHTS, "results.json"):
        found += [name] * ((run / name).read_bytes() != (whole / name).read_bytes())
    pages = [(place / "report.html").read_text().replace(place.name, "") for place in (run, whole)]
    found += ["report.html"] * (pages[0] != pages[1])
    return found + [path.name for path in run.iterdir() if not (whole / path.name).exists()]


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose end is a stand-in."""
    folder = tmp_path_factory.mktemp("finished")
    code, error = children.run(phased(pictures, folder / "run"), folder / "out")
    assert code == 0, error
    return folder / "run"


@pytest.mark.trained
def test_phases_are_runs_by_hand(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit; the run's folder shows the last phase, and its latents keep the scaling of the first."""
    run, first, second = (tmp_path / name for name in ("run", "first", "second"))
    results = train(TrainSettings.load(*phased(pictures, run)[1:]))
    printed = capsys.readouterr()
    assert printed.err.index("phase 1 of 2 (base): ") < printed.err.index("phase 2 of 2 (sharp): ")
    assert printed.out.index("phase 1 of 2 (base): Held-out") < printed.out.index("phase 2 of 2 (sharp): Held-out")
    assert printed.out.count("from_pretrained") == 1 and f"from_pretrained('{run}/export'" in printed.out

    assert main(words(pictures, first, "steps=4")) == 0
    start = (f"init_from={first}", f"gan.init_from={first}", "gan.start=0", "gan.discriminator_warmup=0", "model={}")
    start += ("optim.layerwise=true",)
    assert main(words(pictures, second, "steps=3", "train=decoder", "data.resolution=8", *start)) == 0
    phases = run / "phases"
    assert differing_tensors(phases / "1-base/checkpoints/step-00000004", first / "checkpoints/step-00000004") == []
    assert differing_tensors(phases / "2-sharp/checkpoints/step-00000003", second / "checkpoints/step-00000003") == []
    assert log_of(phases / "2-sharp") == log_of(second)
    assert (run / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    one, other = (json.loads((place / "export/config.json").read_text()) for place in (phases / "1-base", run))
    assert one["scaling_factor"] == other["scaling_factor"] and one["sample_size"] == 16 and other["sample_size"] == 8
    by_hand = json.loads((second / "results.json").read_text())
    assert results["held_out"] == by_hand["held_out"] and results["step"] == 3
    assert [(phase["name"], phase["step"]) for phase in results["phases"]] == [("1-base", 4), ("2-sharp", 3)]
    assert results == json.loads((run / "results.json").read_text())
    card = (run / "export/README.md").read_text()
    assert "for 7 steps" in card and "name: sharp" in card and f"# {run.name}\n" in card
    page = (run / "report.html").read_text()
    assert page.count("bicubic /2") == 2 and all(f'href="phases/{name}/report.html"' in page for name in ("1-base",))

    # the same again trains nothing and writes no file of results; what is written reads as the same recipe
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}
    capsys.readouterr()
    assert main(["train", str(run / "config.yaml")]) == 0
    assert "phase 1 of 2 (base) is finished" in (said := capsys.readouterr()).err and f"{run}/export" in said.out
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "config.yaml"}
    assert after == before


def test_killed_anywhere_it_goes_on_in_the_right_phase(finished: Path, pictures: Path, tmp_path: Path) -> None:
    """At the end of a phase, between two, in the next one, and at the end of all."""
    writes = json.loads((finished.parent / "out/writes.json").read_text())

    def number(text: str) -> int:
        return next(index for index, write in enumerate(writes) if text in write)

    base_ends = number("rename /phases/1-base/checkpoints/step-00000004.tmp")
    published = [index for index, write in enumerate(writes) if "rename" in write and "/export" in write]
    assert len(published) == 3  # one for the first phase; the second one's export replaces it
    sharp_saved = number("rename /phases/2-sharp/checkpoints/step-00000002.tmp")
    points = {base_ends, *published, number("open /phases/2-sharp/"), sharp_saved + 1, number("rename /.results.json")}
    copies = {point: tmp_path / f"at-{point}" for point in points}
    assert len(copies) == 7
    code, error = children.run(phased(pictures, tmp_path / "copied"), tmp_path / "out", copies=copies)
    assert code == 0, error
    # commands that name the run take its newest checkpoint before a phase is finished, then the one that finished last
    assert checkpoint_at(copies[published[0]]) == copies[published[0]] / "phases/1-base/checkpoints/step-00000004"
    ended = load_file(finished / "phases/1-base" / WEIGHTS)
    for point in (published[0], sharp_saved + 1):
        module = lae.load(copies[point]).module
        assert module is not None
        assert all(torch.equal(tensor, ended[name]) for name, tensor in module.state_dict().items())
    for point, run in sorted(copies.items()):
        code, error = children.run(phased(pictures, run), tmp_path / "out")
        assert code == 0, error
        assert differences(run, finished) == [], f"killed before write {point}: {writes[point]}"
        again = any(
            "/phases/1-base/checkpoints/" in write for write in json.loads((tmp_path / "out/writes.json").read_text())
        )
        assert again == (point <= base_ends)


@pytest.mark.trained
def test_phases_on_two_processes_take_the_steps_of_one(pictures: Path, tmp_path: Path) -> None:
    """The same two processes train both phases; the weights hardly move, so that each step begins with equal ones."""
    ends = []
    for processes in (1, 2):
        run = tmp_path / f"on-{processes}"
        more = ("optim.lr=1e-12", "phases.base.steps=2", "phases.sharp.steps=2", "data.resolution=16")
        code, error = children.run(phased(pictures, run, *more), tmp_path / "out", processes)
        assert code == 0, error
        assert json.loads((run / "results.json").read_text())["step"] == 2
        ends.append(run / "phases/2-sharp/checkpoints/step-00000002")
    state = json.loads((ends[1] / "state.json").read_text())
    assert state["num_processes"] == 2
    assert largest_difference(*ends) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["seed=1"], "phase 1 of 2 (base): {run}/phases/1-base was begun with another recipe:\n  seed: 0 in step-0000"),
        (["phases.sharp.batch_size=8"], "phase 2 of 2 (sharp): {run}/phases/2-sharp was begun with another recipe"),
        (["phases.base.steps=6"], "from the weights of 1-base, which ended at step 4 and now has 6 steps: restore"),
        (["phases.base.steps=2"], "of 1-base, which ended at step 4 and now has 2 steps: restore that phase"),
        (["phases.sharp.steps=2"], "is at step 3 already, past 2: raise steps"),
        (["phases.base.name=first"], "holds the phase 1-base, and the settings have 1-first, 2-sharp"),
        (["phases=[{name: base, steps: 4}]"], "holds the phase 2-sharp, and the settings have 1-base"),
        (["phases=[]"], "holds a run in phases (1-base, 2-sharp), and these settings have none"),
    ],
)
def test_another_recipe_is_refused(
    finished: Path, pictures: Path, changes: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert main(phased(pictures, finished, *changes)) == 2
    assert expected.format(run=finished) in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latent_ae_train.loop.finish_run", children.finish_quickly)


@pytest.mark.usefixtures("quick")
def test_a_phase_may_be_added_and_the_last_one_prolonged(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "elsewhere"  # a folder may be moved
    shutil.copytree(finished, run)
    more = [BASE, {**SHARP, "steps": 5}, {"steps": 1, "gan": {"weight": 0}}]
    assert main(phased(pictures, run, f"phases={json.dumps(more)}")) == 0
    said = capsys.readouterr().err
    assert "phase 1 of 3 (base) is finished" in said and "resuming" in said and "phase 3 of 3: " in said
    assert log_of(run / "phases/1-base") == log_of(finished / "phases/1-base")
    assert [one.step for one in complete_checkpoints(run / "phases/2-sharp")][-1] == 5
    results = json.loads((run / "results.json").read_text())
    assert [phase["step"] for phase in results["phases"]] == [4, 5, 1]
    assert (run / "results.previous.json").is_file()
    assert (run / WEIGHTS).read_bytes() == (run / "phases/3" / WEIGHTS).read_bytes()
    settings = yaml.safe_load((run / "phases/3/config.yaml").read_text())
    assert settings["init_from"] == f"{run}/phases/2-sharp" and settings["gan"]["init_from"] is None


@pytest.mark.usefixtures("quick")
def test_a_signal_in_the_last_step_of_a_phase_keeps_the_next_from_beginning(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = TrainStep.__call__

    def signalled(self: TrainStep, number: int, *rest: Any) -> Any:
        if number == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(self, number, *rest)

    run = tmp_path / "run"
    monkeypatch.setattr(TrainStep, "__call__", signalled)
    assert main(phased(pictures, run, "steps=1")) == 75
    assert (run / "phases/1-base/results.json").is_file() and not (run / "phases/2-sharp").exists()
    assert "the checkpoint of step 1 is kept; the same command resumes from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("phases=[{}, {gan: {start: -1}}]", "phases.2.gan.start: input should be greater than or equal to 0"),
        ("phases=[{name: a, stesp: 2}]", "phases.a.stesp: no such setting; did you mean steps?"),
        ("phases=[{}, {data: {resolution: 100}}]", "phases.2.data.resolution: 100 is not a multiple"),
        ("phases=[{}, {gan: 3}]", "phases.2.gan: a section of keys and values is expected"),
        ("phases=[{}, {name: x, output_dir: y}]", "phases.x.output_dir: belongs to the run as a whole"),
        ("phases=[{}, {init_from: y}]", "phases.2.init_from: belongs to the run as a whole"),
        ("phases=[{}, {model: {latent_channels: 8}}]", "phases.2.model: the shape stays that of the first phase"),
        ("phases=[{name: 2nd}]", "phases.1.name: '2nd': give a letter, then letters"),
        ("phases=[{name: a}, {name: a}]", "phases.a.name: is given twice"),
        ("phases={steps: 3}", "phases: is a list with a section for each phase"),
        ("phases=[3]", "phases: a section of keys and values is expected, as in {key: value} (given: 3)"),
        ("phases=[{}, {name: b}] | phases.3.steps=2", "phases.3.steps: there is no 3, only 1, 2, b"),
        ("phases=[{}] | phases.1=2", "phases.1: phases is a list"),
        ("phases.1.steps=2", "phases: is a list with a section for each phase"),
        ("data.source=/nowhere | phases=[{steps: 1}, {steps: 2}]", "\n  data.source: no such file or folder: /nowhere"),
        ("phases=[{data: {source: /nowhere}}, {}]", "\n  phases.1.data.source: no such file or folder: /nowhere"),
        ("stesp=3 | phases=[{}, {}]", "\n  stesp: no such setting"),
    ],
)
def test_each_mistake_has_its_message(given: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(TrainSettings, None, given.split(" | "))
    assert str(caught.value).startswith("1 problem in the settings:") and expected in str(caught.value)


def test_which_value_holds(tmp_path: Path) -> None:
    """A phase's over the file's, a word's in all phases or in the one that it names, and of two words the last."""
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 9\nphases: [{steps: 1}, {name: b, steps: 2, optim: {lr: 1e-5, clip: 2}}, {}]\n")

    def steps(*given: str) -> list[int]:
        settings = load_settings(TrainSettings, str(path), given)
        assert TrainSettings.model_validate(yaml.safe_load(to_yaml(settings))) == settings
        return [phase.settings.steps for phase in phases_of(settings)]

    assert steps() == [1, 2, 9]
    assert steps("steps=7") == [7, 7, 7]
    assert steps("phases.1.steps=5", "phases.b.steps=6") == [5, 6, 9]
    assert steps("steps=7", "phases.2.steps=6") == [7, 6, 7]
    assert steps("phases.2.steps=6", "steps=7") == [7, 7, 7]
    second = phases_of(load_settings(TrainSettings, str(path), ["optim.lr=2e-5"]))[1].settings
    assert (second.optim.lr, second.optim.clip, second.optim.warmup) == (2e-5, 2, TrainSettings().optim.warmup)


def test_the_documented_recipe_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/phases.md").read_text(encoding="utf-8")
    path = tmp_path / "two-phases.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0])
    first, second = phases_of(load_settings(TrainSettings, str(path), ["data.source=photos"]))
    assert (first.settings.data.resolution, second.settings.data.resolution) == (128, 256)
    assert second.settings.gan.init_from == "runs/two-phases/phases/1-base"


def test_the_discriminator_goes_on_where_it_fits(tmp_path: Path) -> None:
    def starts(*entries: dict[str, Any], **gan: Any) -> list[str | None]:
        settings = TrainSettings.model_validate({"output_dir": "x", "steps": 5, "gan": gan, "phases": entries})
        return [phase.settings.gan.init_from for phase in phases_of(settings)]

    first = str(Path("x/phases/1"))
    assert starts({}, {}, start=0, init_from="hub/id") == ["hub/id", first]
    assert starts({}, {}, start=5, init_from="hub/id") == ["hub/id", "hub/id"]  # it has not trained
    assert starts({}, {"gan": {"layers": 2}}, start=0) == [None, None]
    assert starts({}, {"gan": {"weight": 0}}, start=0) == [None, None]
    assert starts({}, {"gan": {"init_from": None}}, start=0) == [None, None]
    larger = {"data": {"resolution": 128}}  # only that of patches and of resized images takes any size
    assert starts({}, larger, start=0) == [None, first]
    assert starts({}, larger, start=0, network="stylegan") == [None, None]
    assert starts({}, {"gan": {"network": "stylegan"}}, start=0) == [None, None]


def test_a_dry_run_shows_every_phase(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*phased(pictures, run), "--dry-run"]) == 0
    first, second = capsys.readouterr().out.split("phase 1 of 2 (base)")[1].split("phase 2 of 2 (sharp)")
    assert "steps:         4, 16 crops" in first and f"output:         {run}/phases/1-base" in first.replace(
        ": ", ":  "
    )
    assert f"init_from: {run}/phases/1-base" in second and "latent 4 x 4 x 4 for 8 px" in second
    assert "trains:        decoder, post_quant_conv" in second and "warning" not in second
    assert not run.exists()


def test_a_later_phase_that_does_not_fit_the_model_is_refused_before_the_first_trains(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, wrong = tmp_path / "run", {"train": ["decoder.nowhere"]}
    assert main(phased(pictures, run, phases=(BASE, wrong))) == 2
    line = only_message(capsys)
    assert line == "latent-ae train: phase 2 of 2: 1 problem in the settings with this autoencoder:"
    assert not run.exists()


def test_a_new_decoder_of_the_whole_is_that_of_the_first_phase(model: str) -> None:
    words = (f"init_from={model}", "decoder.layers_per_block=2", "phases=[{steps: 2}, {steps: 3}]", "model={}")
    first, second = phases_of(load_settings(TrainSettings, "quickstart", words))
    assert first.settings.decoder.layers_per_block == 2 and not second.settings.decoder.wanted
    assert first.settings.train == second.settings.train == "decoder"
    assert second.first_start.decoder == first.settings.decoder and second.first_start.init_from == model
    assert second.settings.init_from == first.settings.output_dir


@pytest.mark.trained
def test_a_later_phase_gives_the_first_stage_before_it_a_new_decoder(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all phases after the first train on stored latents; what cannot work is refused before the first step."""
    monkeypatch.setattr("latent_ae.export.write.verify_export", lambda *_: 0.0)
    own = [word for word in words(pictures, tmp_path / "run", "steps=1") if not word.startswith("gan.")]
    deeper: dict[str, Any] = {"decoder": {"layers_per_block": 2}}
    assert main([*own, "gan.weight=0", f"phases={json.dumps([{}, deeper, {'train': 'decoder'}])}"]) == 0
    export = AsymmetricAutoencoderKL.from_pretrained(tmp_path / "run/export")
    assert export.config.layers_per_up_block == 2
    first = tmp_path / "run/phases/1/export"
    encode_images(first, pictures, tmp_path / "latents", EncodeSettings(resolution=16, device="cpu"))
    stored = ["model={}", f"init_from={first}", f"decoder.latents={tmp_path / 'latents'}", "decoder.layers_per_block=2"]
    stored += ["gan.weight=0", "phases=[{}, {}]", f"output_dir={tmp_path / 'stored'}"]
    seen = []
    begin = latent_ae_train.loop.stored_latents
    monkeypatch.setattr("latent_ae_train.loop.stored_latents", lambda *given: seen.append(begin(*given)) or seen[-1])
    assert main([*own, *stored]) == 0
    assert len(seen) == 2 and None not in seen
    wrong = json.dumps([{}, {"decoder": {"block_out_channels": [8]}}])
    capsys.readouterr()
    assert main([*own, f"phases={wrong}", f"output_dir={tmp_path / 'wrong'}"]) == 2
    assert "phase 2 of 2: decoder.block_out_channels: has 1 widths" in capsys.readouterr().err
    assert not (tmp_path / "wrong/phases").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", [True, True, True]),
        ("model.init=default", [False, False, False]),
        ("optim.layerwise=false", [False, False, False]),
        ("optim.kind=muon", [False, False, False]),
        ("phases.2.decoder.block_out_channels=[32,64,64]", [True, False, False]),
        ("phases.3.optim.layerwise=false", [True, True, False]),
        ("phases.3.decoder.latents=stored", [True, True, False]),
    ],
)
def test_later_phases_keep_the_steps_by_layer_of_a_linear_start(
    words: str, expected: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stored").mkdir()
    Path("stored/manifest.json").touch()
    recipe = "phases=[{steps: 2}, {steps: 2, optim: {lr: 1e-4}}, {steps: 2, train: decoder}]"
    settings = TrainSettings.load("quickstart", recipe, *words.split())
    assert [phase.settings.layerwise for phase in phases_of(settings)] == expected
