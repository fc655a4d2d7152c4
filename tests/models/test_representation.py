"""A new AutoencoderRAE: a frozen encoder from a folder, noise while training, statistics of each value at export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderRAE

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data.rng import latent_noise, posterior_noise
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.models.build import build_autoencoder
from latent_ae.models.loading import load_first_stage
from latent_ae.models.registry import scaling_of
from latent_ae.models.settings import ModelSettings
from latent_ae.objectives.class_noise import ClassNoise
from latent_ae_train.data import drawn_batch
from tests.runs import differing_tensors
from tests.tiny import build_step, settings_for
from tests.tiny_vision import save_vision_model

SIDE = 32
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
DECODER = {
    **{"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2},
    "decoder_intermediate_size": 16,
}


def saved_encoder(folder: Path, kind: str = "Dinov2WithRegisters", **changes: Any) -> Any:
    """A tiny random encoder, whose last norm has weights that RAE drops."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1, "patch_size": 14}
    size = {"image_size": 518} if kind.startswith("Dinov2") else {"image_size": 224, "intermediate_size": 3072}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes | size | changes))
        with torch.no_grad():
            for parameter in model.parameters():  # far from zeros and ones
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model.eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    saved_encoder(folder)
    return folder


def model_of(encoder: Path, **config: Any) -> dict[str, Any]:
    return {"kind": "AutoencoderRAE", "encoder": str(encoder), "config": DECODER | config}


@torch.no_grad()
@pytest.mark.parametrize(("kind", "extra"), [("Dinov2WithRegisters", 5), ("ViTMAE", 1)])
def test_its_features_are_those_of_the_folder(kind: str, extra: int, tmp_path: Path) -> None:
    """The last norm without weights, class token and registers left out; the weights bit for bit."""
    original = saved_encoder(tmp_path, kind)
    model = build_autoencoder(ModelSettings.model_validate(model_of(tmp_path)), sample_size=SIDE).eval()
    own = model.encoder.state_dict()
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in own.items()) and len(own) > 10
    pixels = torch.rand(2, 3, SIDE, SIDE)
    larger = torch.nn.functional.interpolate(pixels, size=224, mode="bicubic", align_corners=False)
    larger = (larger - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    more = {}
    if kind == "ViTMAE":  # no patch is masked, and all stay in order
        original.config.mask_ratio = 0.0
        more = {"noise": torch.arange(256.0).expand(2, -1)}
    original.layernorm.weight.fill_(1)
    original.layernorm.bias.fill_(0)
    tokens = original(larger, **more).last_hidden_state[:, extra:]
    expected = tokens.transpose(1, 2).unflatten(2, (16, 16))
    torch.testing.assert_close(model.encode(pixels).latent, expected, rtol=1e-5, atol=2e-5)
    assert model.decode(expected).sample.shape == pixels.shape


def test_each_sample_has_noise_of_its_own_while_it_trains_and_else_none(encoder: Path) -> None:
    """The numbers are those of (seed, sample), however the batch is split; `encode` adds no noise besides."""
    settings = settings_for(data={"resolution": SIDE}, train="decoder", batch_size=2, seed=3)
    settings = settings.model_copy(update={"model": ModelSettings.model_validate(model_of(encoder, noise_tau=0.8))})
    step = build_step(settings)
    model = step.bare_reconstructor.autoencoder
    noise = ClassNoise.of(model)
    assert noise is not None
    noise.run = settings.facts()
    images, numbers = torch.rand(2, 3, SIDE, SIDE) * 2 - 1, [5, 6]
    batch = drawn_batch(images, posterior_noise(3, numbers, (64, 16, 16)), numbers, [noise])
    (change,) = noise.prepare(batch, 0).transforms
    model.train()
    clean = step.bare_reconstructor(images)
    assert torch.equal(clean.latent, step.bare_reconstructor(images).latent)  # `encode` alone draws nothing
    level, drawn = latent_noise(3, [6], (64, 16, 16), stream=14)
    once = 1 + 1e-5  # by which the class divides where it knows no statistics
    expected = clean.latent[1] * once + 0.8 * level[0] * drawn[0]
    torch.testing.assert_close(change(clean.latent)[1] * once, expected, rtol=1e-5, atol=2e-6)
    with torch.no_grad():  # latents that are scaled: the noise is in units of the features
        model._latents_mean, model._latents_std = torch.full((64, 16, 16), 0.5), torch.rand(64, 16, 16) + 0.5
        scaled = step.bare_reconstructor(images).latent
        other = ClassNoise.of(model)
        assert other is not None
        other.run = settings.facts()
        (change,) = other.prepare(batch, 0).transforms
        torch.testing.assert_close(model._denormalize_latents(change(scaled))[1], expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_each_position_merge() -> None:
    values, parts = torch.randn(6, 3, 2, 2) * 3 + 1, [LatentStatistics(True), LatentStatistics(True)]
    parts[0].update(values[:1])
    parts[0].update(values[1:4])
    parts[1].update(values[4:])
    parts[0].merge(parts[1])
    torch.testing.assert_close(parts[0].positions.mean.float(), values.mean(0))
    torch.testing.assert_close(parts[0].positions.variance.float(), values.var(0, correction=0))


def command(encoder: Path, pictures: Path, run: Path, *more: str) -> list[str]:
    """Two steps of the recipe, smaller."""
    config = [f"model.config.{key}={value}" for key, value in DECODER.items()]
    return [
        *("train", "rae", f"output_dir={run}", f"model.encoder={encoder}", f"data.source={pictures}", *config),
        *("data.eval_source=null", "data.eval_fraction=0.25", f"data.resolution={SIDE}", f"validate.crop_px={SIDE}"),
        *("steps=2", "batch_size=4", "micro_batch_size=2", "optim.warmup=0", "checkpoint.every=1", "log.every=1"),
        *("loss.perceptual=0", "gan.network=patch", "gan.channels=8", "gan.layers=1", "gan.weight=0.5", "gan.start=1"),
        *more,
    ]


def test_the_plan_computes_its_memory(
    encoder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its noise, and a discriminator whose frozen network two modules hold."""
    vision = f"gan.dino_model={save_vision_model(tmp_path / 'vision')}"
    words = command(encoder, pictures, tmp_path / "run", "model.config.noise_tau=0.8", "gan.network=dino", vision)
    words = [word for word in words if not word.startswith(("gan.network=patch", "gan.channels", "gan.layers"))]
    assert main([*words, "gan.dino_px=8", "gan.dino_kernel=5", "--dry-run"]) == 0
    assert "for a micro-batch of 2" in capsys.readouterr().out


def test_a_run_is_exported_for_the_stock_class(
    encoder: Path, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It resumes bit for bit; the scaled latents of the training crops have mean 0 and deviation 1 at each place."""
    monkeypatch.setattr("latent_ae_train.finish.STATISTICS_CROPS", 16)
    whole, last = tmp_path / "whole", "checkpoints/step-00000002"
    assert main(command(encoder, pictures, whole)) == 0
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(resumed / last)
    assert main(command(encoder, pictures, resumed)) == 0
    assert (resumed / "log.previous.jsonl").is_file() and differing_tensors(whole / last, resumed / last) == []
    stock = AutoencoderRAE.from_pretrained(whole / "export").eval()
    stage = load_first_stage(str(whole / "export"))
    raw = load_first_stage(str(whole / last))
    assert scaling_of(stock).inside and stock.config.scaling_factor == 1.0 and stock.config.noise_tau == 0.8
    assert torch.tensor(stock.config.latents_mean).shape == (64, 16, 16)
    images = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        features, latent = raw.encode(images).mean, stage.encode(images).mean
        torch.testing.assert_close(latent, stock.encode(images / 2 + 0.5).latent, rtol=0, atol=1e-6)
        torch.testing.assert_close(stage.reconstruct(images), raw.reconstruct(images), rtol=0, atol=1e-5)
    mean, std = torch.tensor(stock.config.latents_mean), torch.tensor(stock.config.latents_std) + 1e-5
    features = features * (1 + 1e-5)  # the class divides where it knows no statistics, too
    torch.testing.assert_close(latent, (features - mean) / std, rtol=1e-5, atol=2e-5)
    results = json.loads((whole / "results.json").read_text())
    # law of total variance: the mean over places of each channel's mean, and the deviations
    assert torch.tensor(results["latents"]["channel_mean"]).allclose(mean.mean((1, 2)), atol=1e-5)
    variance = (std.square() - 1e-5).mean((1, 2)) + mean.var((1, 2), correction=0)
    torch.testing.assert_close(torch.tensor(results["latents"]["channel_std"]).square(), variance, rtol=1e-3, atol=1e-5)
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [0 < line["class_noise_sigma"] < 0.8 for line in lines if line["event"] == "train"] == [True, True]
    card = (whole / "export/README.md").read_text()
    assert "each value by a mean" in card
    assert main(["encode", str(whole / "export"), str(pictures), str(tmp_path / "latents"), f"resolution={SIDE}"]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.encoder=null"], "model.encoder: an AutoencoderRAE needs one"),
        (["model.encoder=nowhere"], "model.encoder: nowhere has no config.json"),
        (["train=all"], "only the decoder is trained here: set it to decoder"),
        (["data.resolution=40"], "takes images of 32 px only"),
        (["model.config.patch_size=2", "model.config.encoder_input_size=448"], "a grid of 32 x 32 patches"),
        (["model.config.latents_std=[1]"], "is measured at the export: leave it out"),
        (["model.config.encoder_patch_size=7"], "model.encoder gives it: leave it out"),
    ],
)
def test_a_mistake_ends_in_one_message(
    more: list[str], said: str, encoder: Path, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model.config.patch_size=2"] if "data.resolution=40" in more else []
    assert main(command(encoder, pictures, tmp_path / "run", *given, *more)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("Dinov2WithRegisters", {"layer_norm_eps": 1e-3}, "has layer_norm_eps 0.001, and AutoencoderRAE computes with"),
        ("Dinov2WithRegisters", {"num_register_tokens": 2}, "has num_register_tokens 2"),
        ("Dinov2", {}, r"DINOv2 without registers\); AutoencoderRAE knows dinov2_with_registers"),
    ],
)
def test_an_encoder_that_the_class_cannot_compute_is_refused(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    saved_encoder(tmp_path, kind, **changes)
    with pytest.raises(UserError, match=said):
        build_autoencoder(ModelSettings.model_validate(model_of(tmp_path)), sample_size=SIDE)
