"""Runs that train an AutoencoderTiny as the decoder of an AutoencoderKL's latents."""

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
from latent_ae.latents.encode import encode_images
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.loading import load, load_first_stage
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.settings import ReconSettings
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.export import export
from latent_ae_train.settings import TrainSettings
from tests.runs import words
from tests.tiny_models import TWO
from tests.tiny_models import pictures as random_images

SIDE = 16
SCALED = {"scaling_factor": 0.4, "shift_factor": 0.1}
NEW = ("decoder.kind=AutoencoderTiny", "decoder.block_out_channels=[8,8]", "decoder.layers_per_block=[1,1]")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    AutoencoderKL(**TWO | SCALED).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latent_ae_train.finish.STATISTICS_CROPS", 16)


def command(images: Path, original: Path, run: Path, *more: str) -> list[str]:
    kept = [word for word in words(images, run) if not word.startswith(("model.", "gan."))]
    return [*kept, f"init_from={original}", "gan.weight=0", *NEW, "steps=2", "checkpoint.every=1", *more]


@pytest.fixture(scope="module")
def run(original: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its export was checked in a fresh process."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(command(pictures, original, folder, "validate.every=2")) == 0
    return folder


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scaled_mode(original: Path, images: torch.Tensor) -> torch.Tensor:
    """The input of a diffusion model, by stock diffusers alone."""
    vae = AutoencoderKL.from_pretrained(original).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return (vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode() - 0.1) * 0.4


def test_the_export_is_a_stock_decoder_beside_the_original(run: Path, original: Path) -> None:
    folder = run / "export"
    vae, kept = AutoencoderTiny.from_pretrained(folder), AutoencoderKL.from_pretrained(folder / "encoder")
    assert equal(kept.state_dict(), AutoencoderKL.from_pretrained(original).state_dict())
    assert kept.config.scaling_factor == 0.4 and kept.config.shift_factor == 0.1
    assert vae.config.scaling_factor == 1.0 and vae.config.shift_factor == 0.0
    assert list(vae.config.decoder_block_out_channels) == [8, 8] and list(vae.config.num_decoder_blocks) == [1, 1]
    assert not any(weight.any() for weight in vae.encoder.state_dict().values())
    results = json.loads((run / "results.json").read_text())
    assert results["export"]["max_abs_difference"] < 1e-6
    stage, images = load_first_stage(str(run)), random_images(SIDE)
    latents = stage.encode(images).mean
    assert torch.equal(latents, (load(original, device="cpu").encode(images).mean - 0.1) * 0.4)
    torch.testing.assert_close(latents, scaled_mode(original, images), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(stage.decode(latents), vae.decode(latents).sample)
        assert torch.equal(stage.reconstruct(images), vae.decode(latents).sample)
    card = (folder / "README.md").read_text()
    assert "Its own encoder is zero" in card and "original = AutoencoderKL.from_pretrained('export/encoder', " in card


def test_the_card_has_code_that_works(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the card reconstructs what it says."""
    code = (run / "export/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run)
    place: dict[str, Any] = {"images": random_images(SIDE)}
    torch.manual_seed(0)
    exec(code, place)
    torch.manual_seed(0)
    drawn = AutoencoderKL.from_pretrained("export/encoder").encode(random_images(SIDE)).latent_dist.sample()
    expected = AutoencoderTiny.from_pretrained("export").decode((drawn - 0.1) * 0.4).sample
    torch.testing.assert_close(place["images"], expected, rtol=0, atol=1e-6)


def test_eval_measures_the_original_encoder_with_the_new_decoder(run: Path, original: Path, pictures: Path) -> None:
    vae = AutoencoderTiny.from_pretrained(run / "export")

    @torch.no_grad()
    def by_hand(images: torch.Tensor) -> torch.Tensor:
        return vae.decode(scaled_mode(original, images)).sample

    settings = ReconSettings(crop_px=16, resize_px=None, lpips=(), frechet=(), num_workers=0, limit=3)
    results = [evaluate_reconstruction(model, str(pictures), settings) for model in (str(run / "export"), by_hand)]
    ours, by_stock = (result["metrics"] for result in results)
    assert ours == by_stock and ours["mode"]["psnr"] > 3
    sides = results[0]["cost"]["parameters"]
    whole = AutoencoderKL.from_pretrained(original)
    assert sides["decoder"] == sum(weight.numel() for weight in vae.decoder.parameters())
    assert sides["encoder"] == sum(w.numel() for part in (whole.encoder, whole.quant_conv) for w in part.parameters())


def test_a_run_that_was_killed_ends_with_the_same_bits(
    run: Path, original: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its encoder; and not with another one."""
    again = shutil.copytree(run, tmp_path / "again")
    for name in ("checkpoints/step-00000002", "export", "results.json"):
        shutil.rmtree(again / name) if (again / name).is_dir() else (again / name).unlink()
    other = shutil.copytree(again, tmp_path / "other")
    assert main(command(pictures, original, again, "validate.every=2")) == 0
    ends = [folder / "checkpoints/step-00000002" for folder in (run, again)]
    for file in ("autoencoder", "ema", "encoder/diffusion_pytorch_model"):
        assert equal(*(load_file(end / f"{file}.safetensors") for end in ends))
    assert not equal(*(load_file(run / f"checkpoints/step-0000000{n}/autoencoder.safetensors") for n in (1, 2)))
    config = original / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"scaling_factor": 0.4', '"scaling_factor": 0.5'))
    capsys.readouterr()
    assert main(command(pictures, original, other, "validate.every=2")) == 2
    config.write_text(before)
    assert (
        f"not the one with which {other / 'checkpoints/step-00000001'} was trained: restore it"
        in capsys.readouterr().err
    )


def test_a_checkpoint_exports_and_a_later_run_goes_on_from_the_export(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run, tmp_path / "out")
    first, second = (load_first_stage(str(folder)) for folder in (run / "export", tmp_path / "out"))
    assert first.sha256 == second.sha256
    later = [word for word in command(pictures, run / "export", tmp_path / "later") if word not in NEW]
    capsys.readouterr()
    assert main(later) == 2
    assert "only the decoder is trained here: set it to decoder" in capsys.readouterr().err
    assert main([*later, "train=decoder"]) == 0
    last, images = load_first_stage(str(tmp_path / "later/export")), random_images(SIDE)
    assert torch.equal(last.encode(images).mean, first.encode(images).mean)
    assert not torch.equal(
        last.decode(images[:, :1].repeat(1, 4, 1, 1)), first.decode(images[:, :1].repeat(1, 4, 1, 1))
    )


def test_what_is_missing_is_said(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And that latents of such a model are scaled is no lack of a scaling."""
    encode_images(run / "export", pictures, tmp_path / "latents", EncodeSettings(resolution=SIDE, device="cpu"))
    assert "measure" not in capsys.readouterr().err
    alone = shutil.copytree(run / "export", tmp_path / "alone")
    shutil.rmtree(alone / "encoder")
    with pytest.raises(UserError, match=r"its own encoder is zero, .* is missing \(.*alone/encoder\)"):
        load_first_stage(str(alone))
    words = command(pictures, run / "export", tmp_path / "new", "decoder.latents=/nowhere", "--dry-run")
    assert main(words) == 2
    assert "decoder.latents: /nowhere holds no latents" in capsys.readouterr().err


def test_a_run_on_stored_latents_decodes_them_scaled(
    original: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder is not in memory, and a run that was killed ends with the same bits."""
    cache, run = tmp_path / "latents", tmp_path / "run"
    encode_images(original, pictures, cache, EncodeSettings(resolution=SIDE, stored="fp32", device="cpu"))
    words = command(pictures, original, run, f"decoder.latents={cache}", "validate.every=2")
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "decoder:       AutoencoderTiny with 4,595 parameters, in place of 26,231" in said
    assert f"encoder:       not in memory; its latents are read from {cache}" in said
    settings = load_settings(TrainSettings, None, words[2:])
    start = starting_autoencoder(settings)
    assert not any(name.startswith("encoder.") for name, _ in start.named_parameters())
    raw = torch.randn(2, 4, 8, 8)
    (scaling,) = set(start.encoder.scalings.values())
    torch.testing.assert_close(scaling.scaled(raw), (raw - 0.1) * 0.4)
    assert main(words) == 0
    assert equal(*(AutoencoderKL.from_pretrained(one).state_dict() for one in (original, run / "export/encoder")))
    again = shutil.copytree(run, tmp_path / "again")
    for name in ("checkpoints/step-00000002", "export"):
        shutil.rmtree(again / name)
    assert main([*words, f"output_dir={again}"]) == 0
    ends = [folder / "checkpoints/step-00000002/autoencoder.safetensors" for folder in (run, again)]
    assert equal(*map(load_file, ends))
