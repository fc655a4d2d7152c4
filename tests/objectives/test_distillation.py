"""Distillation from a larger first stage: what is matched, its gradient, its convention, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.models.build import build_autoencoder
from latent_ae.models.settings import ModelSettings
from latent_ae.objectives.distillation import Distillation, Teacher
from latent_ae_train.build import build_objectives, starting_autoencoder
from latent_ae_train.settings import TrainSettings
from tests.runs import SHAPES, difference_of_the_third_step, differing_tensors, family_words
from tests.teacher import BLOCKS, SCALE, SHIFT, save_teacher
from tests.tiny import GAN, build_step, micro_batches, moved, settings_for, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "kl")


def student_settings(teacher: Path, kind: str = "AutoencoderTiny", **changes: Any) -> TrainSettings:
    model = {"kind": kind, "config": SHAPES[kind]} if kind != "AutoencoderKL" else {}
    distillation = {"teacher": str(teacher), **changes.pop("distillation", {})}
    return settings_for(model=model, distillation=distillation, **changes)


def teacher_of(settings: TrainSettings) -> Teacher:
    """The teacher that a run with these settings learns from."""
    objectives = build_objectives(settings, starting_autoencoder(settings), torch.device("cpu"))
    return next(one.teacher for one in objectives if isinstance(one, Distillation))


@pytest.mark.parametrize("per_channel", [False, True])
def test_latents_are_what_a_pipeline_feeds(teacher: Path, tmp_path: Path, per_channel: bool) -> None:
    """By the formulas of the stock pipelines, in reverse: they turn what the denoiser gives into raw latents."""
    shift, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 1.5]
    config = {"latents_mean": shift, "latents_std": std, "shift_factor": 5.0} if per_channel else {}
    place = save_teacher(tmp_path / "teacher", **config)
    settings = student_settings(place)
    images, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    mean, latent = teacher_of(settings)(images, noise)
    stock = AutoencoderKL.from_pretrained(place).eval()
    with torch.no_grad():
        posterior = stock.encode(images).latent_dist
    for fed, raw in ((mean, posterior.mean), (latent, posterior.mean + posterior.std * noise)):
        if per_channel:  # StableDiffusionXLPipeline
            back = fed * torch.tensor(std).view(1, 4, 1, 1) / SCALE + torch.tensor(shift).view(1, 4, 1, 1)
        else:  # FluxPipeline
            back = fed / SCALE + SHIFT
        torch.testing.assert_close(back, raw, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mean, latent, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "decode"), [("AutoencoderTiny", "teacher"), ("AutoencoderTiny", "own"), ("AutoencoderKL", "own")]
)
def test_the_gradient_is_that_of_the_loss_written_out(teacher: Path, kind: str, decode: str) -> None:
    """Of one pass over the whole batch, with stock classes; the step takes two passes."""
    settings = student_settings(
        teacher,
        kind,
        distillation={"decode": decode, "latents": 0.7},
        batch_size=4,
        micro_batch_size=2,
        optim={"lr": 1e-30},
    )
    step = build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    student = step.bare_reconstructor.autoencoder
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in student.named_parameters()})
    )
    taught_by = step.objectives["distillation"].teacher
    frozen = weights(taught_by)
    means = step(0, micro_batches(0, settings))
    (batch,) = micro_batches(0, settings.model_copy(update={"micro_batch_size": None}))
    stock = AutoencoderKL.from_pretrained(teacher).eval()
    with torch.no_grad():
        posterior = stock.encode(batch.images).latent_dist
    target = (posterior.mean - SHIFT) * SCALE
    encoded = student.encode(batch.images)
    if kind == "AutoencoderKL":
        mean = encoded.latent_dist.mean
        latent = mean + encoded.latent_dist.std * batch.noise
    else:
        mean = latent = encoded.latents
    if decode == "teacher":
        latent = (posterior.mean + posterior.std * batch.noise - SHIFT) * SCALE
    distance = (mean - target).square().sum() / target.numel()
    loss = (student.decode(latent).sample - batch.images).abs().mean() + 0.7 * distance
    student.zero_grad()
    loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert float(means["distillation"]) == pytest.approx(float(distance.detach()), rel=1e-5)
    assert frozen and not moved(frozen, weights(taught_by))
    assert all(p.grad is None and not p.requires_grad for p in taught_by.parameters())


def test_off_means_nothing_is_there() -> None:
    step = build_step(settings_for())
    assert "distillation" not in step.objectives and "distillation" not in step(0, micro_batches(0, step.settings))


def test_a_fixed_encoder_is_left_alone(teacher: Path) -> None:
    """The decoder still learns from the teacher's latents, with everything else that shapes them."""
    changes = {"train": "decoder", "latents": {"noise": 0.5, "min_channels": 2, "equivariance": 0.5}, "gan": GAN}
    step = build_step(student_settings(teacher, **changes))
    before = weights(step.bare_reconstructor.autoencoder)
    logs = [step(number, micro_batches(number, step.settings)) for number in range(4)]
    names = moved(before, weights(step.bare_reconstructor.autoencoder))
    assert names and all(name.startswith("decoder.") for name in names)
    assert not any("distillation" in log for log in logs)


def test_a_student_takes_the_place_of_its_teacher(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line to stock diffusers: it encodes the teacher's latents and decodes them."""
    place, run = save_teacher(tmp_path / "teacher"), tmp_path / "run"
    more = (f"distillation.teacher={place}", "steps=300", "optim.lr=1e-2", "gan.weight=0", "ema.decay=0.9")
    often = ("checkpoint.every=150", "checkpoint.keep=9", "validate.every=150", "log.every=10")
    assert main(family_words(pictures, run, "AutoencoderTiny", *more, *often)) == 0
    stock = AutoencoderTiny.from_pretrained(run / "export").eval()
    assert (stock.config.scaling_factor, stock.config.shift_factor) == (1.0, 0.0)
    shape = {key: tuple(value) for key, value in SHAPES["AutoencoderTiny"].items()}
    torch.manual_seed(0)
    fresh, kl = AutoencoderTiny(**shape), AutoencoderKL.from_pretrained(place)
    image = torch.from_numpy(picture(pictures)).movedim(-1, 0)[None].float() / 127.5 - 1
    with torch.no_grad():
        latent = (kl.encode(image).latent_dist.mean - SHIFT) * SCALE
        encoded, decoded = (
            [float((made - wanted).square().mean()) for made in pair]
            for wanted, pair in (
                (latent, [model.encode(image).latents for model in (stock, fresh)]),
                (image, [model.decode(latent).sample for model in (stock, fresh)]),
            )
        )
    assert encoded[0] < 0.45 * float(latent.var()) and encoded[0] < 0.4 * encoded[1]
    assert decoded[0] < 0.25 * decoded[1]
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    distances = [event["distillation"] for event in events if event["event"] == "train"]
    assert distances[-1] < 0.6 * distances[0]
    last = run / "checkpoints/step-00000300"
    assert not any("module" in name or "teacher" in name for name in load_file(last / "autoencoder.safetensors"))
    assert sorted(path.name for path in last.glob("*.safetensors")) == [*("autoencoder.safetensors", "ema.safetensors")]
    # an export of the checkpoint keeps the convention, and so does a student that begins with another's weights
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    assert AutoencoderTiny.load_config(tmp_path / "again")["scaling_factor"] == 1.0
    assert main(["export", str(run), str(tmp_path / "again"), "--latents-mean-std"]) == 2
    assert f"are those of {place}" in capsys.readouterr().err
    stock.register_to_config(scaling_factor=0.5, shift_factor=0.2)
    stock.save_pretrained(tmp_path / "scaled")
    begun = student_settings(place).model_copy(update={"init_from": str(tmp_path / "scaled")})
    student = starting_autoencoder(begun)
    build_objectives(begun, student, torch.device("cpu"))
    assert student.config.scaling_factor == 1.0
    assert student.config.shift_factor == 0.0


def picture(pictures: Path) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(pictures / "00.png").convert("RGB"))[:28, :40].copy()


@pytest.mark.trained
@pytest.mark.usefixtures("no_finish")
def test_it_resumes_and_splits_alike_and_another_teacher_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = save_teacher(tmp_path / "teacher")
    more = (f"distillation.teacher={place}", "optim.schedule=constant", "micro_batch_size=2", "ema.decay=0.5")
    whole, parts, two = tmp_path / "whole", tmp_path / "parts", tmp_path / "two"
    assert main(family_words(pictures, whole, "AutoencoderTiny", *more)) == 0
    assert main(family_words(pictures, parts, "AutoencoderTiny", *more, "steps=2")) == 0
    shutil.copytree(parts, two)
    # the same weights from elsewhere are the same teacher
    place.rename(tmp_path / "moved")
    more = (f"distillation.teacher={tmp_path / 'moved'}", *more[1:])
    assert main(family_words(pictures, parts, "AutoencoderTiny", *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(whole / last, parts / last) == []
    assert difference_of_the_third_step(two, family_words(pictures, two, "AutoencoderTiny", *more)) < 1e-5
    other = save_teacher(tmp_path / "other", seed=1)
    before = (parts / last / "state.json").read_text()
    for word, said in (
        (f"distillation.teacher={other}", f"{json.loads(before)['teacher_sha256']}, this teacher's have"),
        ("distillation.teacher=null", "distillation.teacher: "),
    ):
        assert main(family_words(pictures, parts, "AutoencoderTiny", *more, "steps=8", word)) == 2
        assert said in capsys.readouterr().err


def test_a_teacher_behind_a_flow_gives_its_mode_whatever_the_noise(tmp_path: Path) -> None:
    network = build_autoencoder(
        ModelSettings(kind="FlowAutoencoderKL", config=SHAPES["FlowAutoencoderKL"]), sample_size=16
    )
    network.save_pretrained(tmp_path)
    settings = student_settings(tmp_path)
    teacher, images = teacher_of(settings), torch.rand(2, 3, 16, 16)
    made = [teacher(images, torch.full((2, 4, 8, 8), value)) for value in (-1.0, 1.0)]
    with torch.no_grad():
        mode = network.eval().encode(images).latent
    assert torch.equal(made[0][0], made[1][0]) and torch.allclose(made[0][0], mode, atol=1e-6)
    assert not torch.allclose(made[0][1], made[1][1], atol=0.1)


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        (
            {"latent_channels": 3},
            "AutoencoderTiny",
            "has latents of 3 x 8 x 8 for 16 px, this AutoencoderTiny of 4 x",
        ),
        (
            {"block_out_channels": (8,)},
            "AutoencoderTiny",
            r"\(AutoencoderKL\) has latents of 4 x 16 x 16 for 16 px, this",
        ),
        ({"in_channels": 1, "out_channels": 1}, "AutoencoderTiny", r"sees 1 channels, this AutoencoderTiny 3"),
        ({}, "VQModel", "the latents of this VQModel are codes"),
        ({}, "FlowAutoencoderKL", "the posterior of this FlowAutoencoderKL has no mean"),
        ({}, "HierarchicalVAE", "the posterior of this HierarchicalVAE has no mean"),
        (
            {},
            "AutoencoderKLFlux2",
            "distillation.decode: teacher leaves the posterior's width of this Auto",
        ),
    ],
)
def test_what_cannot_be_its_student_is_refused(tmp_path: Path, config: dict[str, Any], kind: str, said: str) -> None:
    levels = len(config.get("block_out_channels", "ab"))
    blocks = {key: value[:levels] for key, value in BLOCKS.items()}
    settings = student_settings(save_teacher(tmp_path / "teacher", **blocks, **config), kind)
    with pytest.raises(UserError, match=said):
        teacher_of(settings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train=encoder"], "distillation.decode: teacher moves the decoder"),
        (["train=decoder", "distillation.decode=own"], "distillation.decode: own, and train leaves the encoder"),
        (["alignment.model=."], "alignment.model: shapes latents"),
        (["distillation.latents=0"], "distillation.latents"),
    ],
)
def test_settings_that_contradict_are_refused(teacher: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_settings(TrainSettings, "tiny-distilled", [f"distillation.teacher={teacher}", *words])


def test_a_missing_teacher_is_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny-distilled", "data.num_workers=0", "loss.perceptual=0"]) == 2
    assert (
        f"distillation.teacher: no such model folder: runs/quickstart/export (from {tmp_path}); "
        "`latent-ae train quickstart` makes it\n"
    ) in capsys.readouterr().err
