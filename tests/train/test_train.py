"""The main job on tiny networks and generated pictures: run folder, resume, processes, export, messages."""

import json
import multiprocessing
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from latent_ae.__main__ import main
from latent_ae_train import loop
from tests.distributed import children
from tests.distributed.launch import launch_command
from tests.runs import SHAPES, difference_of_the_third_step, differing_tensors, words


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(words(pictures, run)) == 0
    return run


def test_the_run_folder_holds_what_the_design_says(finished: Path) -> None:
    assert yaml.safe_load((finished / "config.yaml").read_text())["data"]["resolution"] == 16
    events = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "train"] == [2, 4, 6]
    assert [event["step"] for event in events if event["event"] == "validate"] == [0, 3, 6]
    last = [event for event in events if event["event"] == "train"][-1]
    assert {"l1", "kl", "generator", "discriminator", "adaptive_weight", "lecam", "lr"} <= last.keys()
    diagnostics = {"accuracy", "logit_gap", "gradient_ratio", "kl_per_dimension", "latent_std", "images_per_second"}
    assert diagnostics | {"memory_gb", "verdict"} <= last.keys()
    assert all(np.isfinite(value) for value in last.values() if isinstance(value, float))
    with Image.open(finished / "previews/step-00000006.png") as preview:
        assert preview.width > 3 * 16 and preview.height > 2 * 16
    # the newest two, and the last one before the GAN
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004", "step-00000006"]
    page = (finished / "report.html").read_text()
    assert "bicubic /2" in page and "data:image/" in page
    assert not re.search(r"(src|href)=.https?:", page), "the page must not load anything"


def test_workers_have_ended_when_a_run_is_finished(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is left would keep the program from ending."""
    finish, left = loop.finish_run, list[bool]()

    def finishing(*arguments: Any) -> Any:
        deadline = time.monotonic() + 30
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.05)
        left.append(bool(multiprocessing.active_children()))
        return finish(*arguments)

    monkeypatch.setattr(loop, "finish_run", finishing)
    assert main(words(pictures, tmp_path / "run", "data.num_workers=1", "steps=1")) == 0
    assert left == [False]


def test_the_export_holds_the_averaged_weights_and_measured_latents(finished: Path, pictures: Path) -> None:
    stock = AutoencoderKL.from_pretrained(finished / "export").eval()
    averaged = load_file(finished / "checkpoints/step-00000006/ema.safetensors")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in stock.state_dict().items())
    trained = load_file(finished / "checkpoints/step-00000006/autoencoder.safetensors")
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in averaged.items())
    results = json.loads((finished / "results.json").read_text())
    assert stock.config.sample_size == 16
    assert stock.config.scaling_factor == pytest.approx(1 / results["latents"]["std"])
    assert stock.config.shift_factor == pytest.approx(results["latents"]["mean"])
    assert results["export"]["max_abs_difference"] <= 1e-5
    # an independent estimate from the whole training pictures
    latents = []
    with torch.no_grad():
        for path in sorted(pictures.glob("*.png")):
            pixels = torch.tensor(np.asarray(Image.open(path)))[:16, :32].permute(2, 0, 1)[None] / 127.5 - 1
            latents.append(stock.encode(pixels).latent_dist.mean.flatten())
    assert stock.config.scaling_factor == pytest.approx(float(1 / torch.cat(latents).std()), rel=0.25)


def test_running_again_changes_nothing(finished: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "log.jsonl").read_text()
    weights = (finished / "export/diffusion_pytorch_model.safetensors").read_bytes()
    assert main(words(pictures, finished)) == 0
    assert (finished / "log.jsonl").read_text() == before
    assert (finished / "export/diffusion_pytorch_model.safetensors").read_bytes() == weights
    captured = capsys.readouterr()
    assert "after" in captured.out and "from_pretrained" in captured.out
    assert main(words(pictures, finished, "steps=5")) == 2
    assert "is at step 6 already" in capsys.readouterr().err


STAGES = ("latent statistics: 100%", "trial in half precision: 100%", "trial in tiles ...", "check of the export in a")
"""What the end of a run and `latent-ae export` name on stderr, in this order."""


def test_a_run_killed_before_its_results_gets_them(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "export")
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    assert '"event": "validate", "step": 6' in log[-1]
    (run / "log.jsonl").write_text("".join(log[:-1]))
    assert main(words(pictures, run)) == 0
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (run, finished))
    assert ours["held_out"]["after"] == theirs["held_out"]["after"]
    error = capsys.readouterr().err
    places = [error.index(name) for name in (*STAGES, "report ...")]
    assert places == sorted(places)


@pytest.mark.usefixtures("no_finish")
@pytest.mark.parametrize(("workers", "kind"), [(0, "adamw"), (2, "adamw"), (0, "muon")])
def test_resumed_equals_uninterrupted(pictures: Path, tmp_path: Path, workers: int, kind: str) -> None:
    """Bit for bit, stopped in the middle of the GAN's ramp; a schedule without horizon, as `steps` differs."""
    more = ("optim.schedule=constant", f"data.num_workers={workers}", "micro_batch_size=2", f"optim.kind={kind}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(words(pictures, whole, *more)) == 0
    assert main(words(pictures, parts, *more, "steps=2")) == 0
    assert main(words(pictures, parts, *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(whole / last, parts / last) == []
    state = json.loads((parts / last / "state.json").read_text())
    assert (state["step"], state["num_images_seen"]) == (6, 24)


@pytest.mark.trained
@pytest.mark.usefixtures("no_finish")
def test_two_processes_take_the_step_of_one(pictures: Path, tmp_path: Path) -> None:
    """The whole command, images and noise included, with the adversarial term."""
    command = words(pictures, tmp_path / "run", "optim.schedule=constant", "micro_batch_size=2", "gan.start=0")
    assert main([*command, "steps=2"]) == 0
    assert difference_of_the_third_step(tmp_path / "run", command) < 1e-5


def test_a_finished_run_is_not_trained_anew_in_silence(
    finished: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither after its checkpoints were removed, nor to check its export for a pipeline."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(words(pictures, run, "export_for=sd")) == 2
    assert f"latent-ae export {run} OUT --for sd" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(words(pictures, run)) == 2
    error = capsys.readouterr().err
    assert "has lost its checkpoints" in error and f"init_from={run}/export" in error
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [["export", "run", "out"], ["data", "check", "photos"]])
def test_a_command_of_one_process_refuses_several(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert "runs on one process, and 2 were launched" in capsys.readouterr().err


def test_two_processes_end_a_run_like_one(finished: Path, pictures: Path, tmp_path: Path) -> None:
    """From the last checkpoint: held-out figures, latents and export."""
    run = shutil.copytree(finished, tmp_path / "two")
    shutil.rmtree(run / "export")
    (run / "results.json").unlink()
    result = launch_command(2, *words(pictures, run))
    assert result.returncode == 0, result.stderr[-3000:]
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (finished, run))
    assert theirs["held_out"]["after"]["n"] == ours["held_out"]["after"]["n"] == 3
    assert theirs["held_out"]["after"]["psnr"] == pytest.approx(ours["held_out"]["after"]["psnr"], rel=1e-5)
    assert theirs["latents"]["std"] == pytest.approx(ours["latents"]["std"], rel=1e-5)
    weights = [load_file(folder / "export/diffusion_pytorch_model.safetensors") for folder in (finished, run)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_two_processes_have_the_same_running_statistics(pictures: Path, tmp_path: Path) -> None:
    """Of an AutoencoderDC's batch normalisations: each process sees other images, and a difference would stop both."""
    config = json.dumps({**SHAPES["AutoencoderDC"], "decoder_norm_types": ["batch_norm", "rms_norm"]})
    command = ["train", "dc-ae", f"output_dir={tmp_path / 'run'}", f"data.source={pictures}", f"model.config={config}"]
    command += ["data.resolution=16", "validate.crop_px=16", "steps=3", "batch_size=4", "loss.perceptual=0"]
    command += ["log.every=1", "validate.every=3", "checkpoint.every=3"]
    code, error = children.run(command, tmp_path, 2)
    assert code == 0 and "batch normalisations of this AutoencoderDC take their statistics" in error, error
    last = tmp_path / "run/checkpoints/step-00000003"
    trained, averaged = (load_file(last / f"{name}.safetensors") for name in ("autoencoder", "ema"))
    names = [name for name in trained if "running_" in name]
    assert names and all(torch.equal(trained[name], averaged[name]) for name in names)


@pytest.mark.usefixtures("no_finish")
def test_a_setting_that_changes_under_way_takes_effect(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words(pictures, run, "steps=2")) == 0
    assert main(words(pictures, run, "steps=4", "optim.betas=[0.8,0.9]", "optim.weight_decay=0.5")) == 0
    stored = torch.load(run / "checkpoints/step-00000004/optimizer.pt", weights_only=True)
    for group in stored["autoencoder"]["param_groups"]:
        assert (tuple(group["betas"]), group["weight_decay"]) == ((0.8, 0.9), 0.5)
    before = (run / "config.yaml").read_text()
    assert main(words(pictures, run, "steps=3")) == 2
    assert (run / "config.yaml").read_text() == before, "refused settings are not written"


@pytest.mark.usefixtures("no_finish")
def test_a_damaged_checkpoint_is_passed_over(pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(words(pictures, run, "steps=4")) == 0
    damaged = run / "checkpoints/step-00000004/autoencoder.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-10] ^= 1
    damaged.write_bytes(content)
    (run / "checkpoints/step-00000009.tmp").mkdir()
    assert main(words(pictures, run, "steps=4")) == 0
    error = capfd.readouterr().err
    assert "autoencoder.safetensors has another checksum" in error and "resuming" in error and "step 2 of 4" in error
    for checkpoint in (run / "checkpoints").glob("step-????????"):
        (checkpoint / "optimizer.pt").unlink()
    assert main(words(pictures, run, "steps=4")) == 2
    assert "every checkpoint in" in capfd.readouterr().err
    assert (run / "checkpoints/step-00000004/autoencoder.safetensors").is_file()


@pytest.mark.usefixtures("no_finish")
def test_training_is_fused_and_in_the_faster_memory_format_throughout(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_ae_train import loop

    steps: list[loop.TrainStep] = []

    class Watched(loop.TrainStep):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            steps.append(self)

    monkeypatch.setattr(loop, "TrainStep", Watched)
    assert main(words(pictures, tmp_path / "run", "steps=2")) == 0
    (step,) = steps
    old = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    layout = torch.contiguous_format if old else torch.channels_last
    for network, optimizer in (
        (step.bare_reconstructor, step.optimizers.autoencoder),
        (step.objectives["gan"].adversary, step.optimizers.adversaries["gan"]),
    ):
        assert optimizer.defaults["fused"]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [tensor for tensor in (*network.parameters(), *moments) if tensor.ndim == 4]
        assert len(tensors) > 6 and all(t.is_contiguous(memory_format=layout) for t in tensors)


@pytest.mark.usefixtures("no_finish")
def test_a_full_disk_is_said_without_a_traceback(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_ae_train.log import Log

    original = Log.write

    def full_at_4(self: Log, event: str, step: int, values: dict[str, object]) -> None:
        if step == 4:
            raise OSError(28, "No space left on device", str(self.path))
        original(self, event, step, values)

    monkeypatch.setattr(Log, "write", full_at_4)
    assert main(words(pictures, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "log.jsonl: No space left on device" in error and "the checkpoint of step 2 is kept" in error
    assert "Traceback" not in error


def test_a_changed_recipe_is_refused_with_its_keys(
    finished: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ("model.latent_channels=5", "seed=3", "log.every=3", "optim.kind=muon")
    assert main(words(pictures, finished, *changed)) == 2
    error = capsys.readouterr().err
    assert "optim.kind: adamw in" in error
    assert "model.latent_channels: 4 in" in error and "seed: 0 in" in error and "log.every" not in error
    assert "Traceback" not in error


@pytest.mark.parametrize("word", ["gan.weight=0", "ema.decay=0"])
def test_a_network_switched_off_under_way_is_refused_before_anything_is_written(
    finished: Path, pictures: Path, tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "config.yaml").read_text()
    assert main(words(pictures, run, "steps=8", word)) == 2
    assert word.partition("=")[0] in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    # another value of what stays on is no other recipe
    other = "gan.weight=0.2" if word.startswith("gan") else "ema.decay=0.5"
    assert main(words(pictures, run, "steps=7", other)) == 0


@pytest.mark.usefixtures("no_finish")
def test_an_interrupted_run_says_how_to_go_on(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_ae_train.step import TrainStep

    original = TrainStep.__call__

    def stop_at_3(self: TrainStep, step: int, *rest: object) -> object:
        if step == 3:
            raise KeyboardInterrupt
        return original(self, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainStep, "__call__", stop_at_3)
    run = tmp_path / "run"
    assert main(words(pictures, run)) == 130
    assert "the checkpoint of step 2 is kept; the same command resumes from it" in capsys.readouterr().err
    monkeypatch.setattr(TrainStep, "__call__", original)
    assert main(words(pictures, run)) == 0


def test_divergence_stops_the_run_and_leaves_good_checkpoints(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(words(pictures, run, "optim.lr=1e30", "optim.warmup=3", "gan.weight=0")) == 2
    error = capsys.readouterr().err
    assert "diverged" in error and "optim.lr" in error and "Traceback" not in error
    assert "gradients were not finite and changed nothing: step" in error
    skipped = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if '"skipped"' in line]
    assert all(event["last_sample"] == event["step"] * 4 - 1 for event in skipped if event["event"] == "skipped")
    for path in run.glob("checkpoints/*/*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    for line in (run / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_held_out_file_that_cannot_be_read_is_named(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    shutil.copy(pictures / "00.png", held_out)
    (held_out / "torn.png").write_bytes((pictures / "01.png").read_bytes()[:300])
    run = tmp_path / "run"
    assert main(words(pictures, run, "steps=1", f"data.eval_source={held_out}")) == 2
    error = capfd.readouterr().err
    assert "data.max_bad_fraction: 1 of the first 2 images" in error and "These are held-out images" in error
    assert main(words(pictures, run, "steps=1", f"data.eval_source={held_out}", "data.max_bad_fraction=0.5")) == 0
    assert "held-out image left out" in (error := capfd.readouterr().err) and "torn.png" in error
    assert json.loads((run / "results.json").read_text())["held_out"]["after"]["n"] == 1


def test_going_on_from_a_diffusers_folder(finished: Path, pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'tuned'}\ninit_from: {finished / 'export'}\nsteps: 1\nbatch_size: 2\n"
        f"data: {{source: {pictures}, resolution: 16, num_workers: 0, eval_fraction: 0.25}}\n"
        "loss: {perceptual: 0}\ngan: {weight: 0}\noptim: {lr: 1.0e-9, warmup: 0}\n"
    )
    assert main(["train", str(path)]) == 0
    before = AutoencoderKL.from_pretrained(finished / "export").state_dict()
    after = AutoencoderKL.from_pretrained(tmp_path / "tuned/export").state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)


def test_decoder_only_keeps_latents_and_scaling(finished: Path, pictures: Path, tmp_path: Path) -> None:
    """From a published first stage with its own scaling: what was trained on its latents must go on fitting."""
    start = AutoencoderKL.from_pretrained(finished / "export").eval()
    start.register_to_config(scaling_factor=0.18215, shift_factor=None, latents_mean=[0.0] * 4, latents_std=[2.0] * 4)
    start.save_pretrained(tmp_path / "start")
    path = tmp_path / "tune.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'tuned'}\ninit_from: {tmp_path / 'start'}\ntrain: decoder\nsteps: 3\nbatch_size: 2\n"
        f"data: {{source: {pictures}, resolution: 16, num_workers: 0, eval_fraction: 0.25}}\nlog: {{every: 1}}\n"
        "loss: {perceptual: 0}\noptim: {warmup: 0}\nema: {decay: 0.5}\n"
        f"gan: {{start: 0, discriminator_warmup: 1, warmup: 0, channels: 8, layers: 1, init_from: {finished}}}\n"
    )
    assert main(["train", str(path)]) == 0
    tuned = AutoencoderKL.from_pretrained(tmp_path / "tuned/export").eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before, after = (model.encode(images).latent_dist for model in (start, tuned))
        assert torch.equal(before.mean, after.mean) and torch.equal(before.logvar, after.logvar)
        assert not torch.allclose(start.decode(before.mean).sample, tuned.decode(after.mean).sample)
    assert (tuned.config.scaling_factor, tuned.config.shift_factor) == (0.18215, 0.0)
    assert tuned.config.latents_std == [2.0] * 4
    assert "its\nlatents are the same" in (tmp_path / "tuned/export/README.md").read_text()
    # the discriminator began as the one that the other run had ended with
    logs = [json.loads(line) for line in (tmp_path / "tuned/log.jsonl").read_text().splitlines()]
    first = next(line for line in logs if line["event"] == "train")
    assert first["logit_gap"] != 0 and first["verdict"].startswith("the discriminator learns alone")
    assert main(["train", str(path), "gan.channels=4", f"output_dir={tmp_path / 'other'}"]) == 2


def test_the_discriminator_of_a_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_ae.config import UserError, load_settings
    from latent_ae.models.build import build_autoencoder
    from latent_ae.objectives import GAN
    from latent_ae_train.settings import TrainSettings

    def discriminator(settings: TrainSettings) -> torch.nn.Module:
        model = settings.model.model_copy(update={"block_out_channels": (8, 8), "norm_num_groups": 4})
        autoencoder = build_autoencoder(model, sample_size=16)
        return GAN.build(settings.gan, settings.facts(), autoencoder, torch.device("cpu")).adversary

    stored = load_file(finished / "checkpoints/step-00000006/discriminator.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file: str(finished / "export" / file) if name == "user/cached" else None,
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in (finished, finished / "checkpoints/step-00000006", finished / "export", "user/cached"):
        settings = load_settings(TrainSettings, None, ["gan.channels=8", "gan.layers=1", f"gan.init_from={place}"])
        network = discriminator(settings)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in network.state_dict().items())
    small = ["gan.channels=8", "gan.layers=1"]
    gray = [*small, "model.in_channels=1", "model.out_channels=1"]
    for place, words_, said in (
        (finished, [], "another shape: set gan.channels=8 gan.layers=1$"),
        # their weights have the same names and shapes
        (finished / "export", [*small, "gan.norm=batch"], "another shape: set gan.norm=group$"),
        (finished / "export", gray, "is of images of 3 channels, and these have 1"),
        (tmp_path, [], "neither a checkpoint nor a run nor an export with a discriminator"),
        ("user/missing", [], "user/missing is not a folder here .* the hub gives no discriminator.safetensors of it"),
    ):
        settings = load_settings(TrainSettings, None, [*words_, f"gan.init_from={place}"])
        with pytest.raises(UserError, match=said):
            discriminator(settings)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.resolution=17", "data.resolution: 17 is not a multiple of"),
        ("validate.crop_px=15", "validate.crop_px: 15 is not a multiple of"),
        ("loss.kl=0", "takes images of 3 channels and gives 1"),
    ],
)
def test_a_start_that_does_not_fit(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: list[str], word: str, expected: str
) -> None:
    out_channels = 1 if "channels" in expected else 3
    AutoencoderKL(
        in_channels=3,
        out_channels=out_channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "start")
    path = tmp_path / "tune.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'tuned'}\ninit_from: {tmp_path / 'start'}\nsteps: 1\nbatch_size: 2\n"
        f"data: {{source: {pictures}, resolution: 16, num_workers: 0}}\n"
        "loss: {perceptual: 0}\ngan: {weight: 0}\n"
    )
    assert main(["train", str(path), word, *dry]) == 2
    assert expected in capsys.readouterr().err


def test_bf16_and_a_tracker(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    more = ("precision=bf16", "report_to=[tensorboard]", "steps=1", "batch_size=1", "log.every=1", "gan.start=0")
    assert main(words(pictures, run, *more)) == 0
    assert list(run.rglob("events.out.tfevents*"))
    assert AutoencoderKL.from_pretrained(run / "export").dtype == torch.float32


def test_export_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # a checkpoint is enough: it may lie anywhere, without its run
    shutil.copytree(finished / "checkpoints/step-00000006", tmp_path / "kept")
    assert main(["export", str(tmp_path / "kept"), str(tmp_path / "vae")]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    places = [printed.err.index(name) for name in STAGES]
    assert places == sorted(places)
    ours, theirs = (AutoencoderKL.from_pretrained(folder) for folder in (tmp_path / "vae", finished / "export"))
    assert ours.config.scaling_factor == pytest.approx(facts["scaling_factor"])
    assert ours.config.scaling_factor == pytest.approx(theirs.config.scaling_factor, rel=1e-6)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    file = "discriminator.safetensors"
    folders = (tmp_path / "vae", finished / "export", finished / "checkpoints/step-00000006")
    assert len({(folder / file).read_bytes() for folder in folders}) == 1
    assert facts["discriminator"] == {"in_channels": 3, "channels": 8, "layers": 1, "norm": "group", "blur": False}
    assert main(["export", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "neither a run with a complete checkpoint nor a checkpoint" in capsys.readouterr().err


def test_an_export_for_a_family_of_pipelines(
    finished: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # refused before the latents of hundreds of images are measured
    monkeypatch.setattr("latent_ae_train.finish.measure_latents", None)
    for more in (["--for", "flux"], ["--for", "sd", "--latents-mean-std"]):
        assert main(["export", str(finished), str(tmp_path / "vae"), *more]) == 2
        error = capsys.readouterr().err
        assert f"does not fit {more[1]}" in error and "Traceback" not in error
    assert not (tmp_path / "vae").exists()
    monkeypatch.undo()
    assert main(["export", str(finished), str(tmp_path / "vae"), "--for", "sdxl", "--latents-mean-std"]) == 0
    printed = capsys.readouterr()
    facts, config = json.loads(printed.out), json.loads((tmp_path / "vae/config.json").read_text())
    measured = json.loads((finished / "results.json").read_text())["latents"]
    assert config["latents_mean"] == facts["latents_mean"] == pytest.approx(measured["channel_mean"], abs=1e-6)
    assert config["latents_std"] == pytest.approx(measured["channel_std"], rel=1e-6)
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, 0.0)
    assert "sdxl: the factor is 2" in printed.err and facts["pipeline"] == "sdxl" and facts["remarks"]
    card = (tmp_path / "vae/README.md").read_text()
    assert "z * std + mean" in card and "scaling_factor" not in card
    # a wish in the settings: before the first step, of a shape in the settings or of init_from's
    shaped = words(pictures, tmp_path / "run", "export_for=sd3")
    loaded = [word for word in shaped if not word.startswith("model.")] + [
        "model={}",
        f"init_from={finished / 'export'}",
    ]
    for wish in (shaped, loaded):
        assert main(wish) == 2
        assert "model.latent_channels=16" in capsys.readouterr().err
        assert not (tmp_path / "run/checkpoints").exists()


def test_dry_run_prints_settings_and_plan(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main([*words(pictures, run, "micro_batch_size=2"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    settings, plan = out[: out.index("autoencoder:")], out[out.index("autoencoder:") :]
    assert yaml.safe_load(settings)["micro_batch_size"] == 2
    assert "global batch:  4 = 1 process(es) x 2 micro-batch x 2 accumulation" in plan
    assert not run.exists()


@pytest.mark.usefixtures("no_finish")
def test_too_many_unreadable_files_stop_the_run(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    for index in range(8):
        (folder / f"broken{index}.png").write_bytes(b"\x89PNG not really")
    assert main(words(folder, tmp_path / "run", f"data.eval_source={pictures}")) == 2
    error = capsys.readouterr().err
    assert "skipped" in error and "broken" in error and "data.max_bad_fraction" in error and "Traceback" not in error
    assert main(words(folder, tmp_path / "run2", "data.max_bad_fraction=1", "steps=2")) == 0


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "latent-ae train quickstart" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "no such command: trian" in capsys.readouterr().err
    assert main(["eval", "--help"]) == 0
    assert "Example" in capsys.readouterr().out
    for command in ("train", "export", "encode", "weights"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert "example" in capsys.readouterr().out
