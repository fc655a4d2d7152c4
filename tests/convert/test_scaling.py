"""Scaling comes from the user, the file or a measurement, from one of them only, and is never guessed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.convert import scaling
from latent_ae.convert.convert import convert_first_stage
from latent_ae.convert.known import KNOWN
from latent_ae.convert.settings import ConvertSettings
from latent_ae.data.images import to_tensor
from tests.convert.originals import LDM, randomised
from tests.convert.other_originals import Flux2
from tests.tiny_models import tiny


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of four latent channels at an eighth of the side, like Stable Diffusion's."""
    path = tmp_path_factory.mktemp("kl") / "kl.safetensors"
    save_file(randomised(LDM(widths=(32,) * 4, attention=(False,) * 4)).state_dict(), path)
    return path


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_question_names_what_was_published_for_the_shape(kl: Path, tmp_path: Path) -> None:
    """But no shape is a proof: first stages tuned end to end are taken for a drop-in of the original and are none
    (REPA-E #23, musubi-tuner #671).
    """
    with pytest.raises(UserError) as told:
        convert_first_stage(kl, tmp_path / "out")
    lines = str(told.value).splitlines()
    assert "never" not in lines[0] and "--measure DATA" in lines[0]
    assert [line.strip() for line in lines[2:]] == [
        "Stable Diffusion 1 and 2, their fine-tunes sd-vae-ft-ema and -mse: scaling_factor=0.18215 shift_factor=0",
        "Stable Diffusion XL: scaling_factor=0.13025 shift_factor=0",
    ]
    assert "another model may have it" in lines[1]  # an end-to-end tuned one has, with other latents


def test_va_vae_without_its_statistics_is_told_where_they_are(tmp_path: Path) -> None:
    """Without latents_mean and latents_std a diffusion model reaches an FID of 130 (LightningDiT #34)."""
    shape = {"widths": (32,) * 5, "attention": (False,) * 4 + (True,), "latents": 32}
    save_file(randomised(LDM(**shape)).state_dict(), tmp_path / "vavae.safetensors")
    with pytest.raises(UserError, match=r"VA-VAE f16 d32: --statistics latents_stats.pt"):
        convert_first_stage(tmp_path / "vavae.safetensors", tmp_path / "out")
    mean, std = torch.randn(1, 32, 1, 1), torch.rand(1, 32, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    convert_first_stage(tmp_path / "vavae.safetensors", tmp_path / "out", statistics=tmp_path / "latents_stats.pt")
    config = AutoencoderKL.from_pretrained(tmp_path / "out").config
    assert config.latents_mean == mean.flatten().tolist() and config.latents_std == std.flatten().tolist()
    assert (config.scaling_factor, config.shift_factor) == (1.0, 0.0)
    written = convert_first_stage(tmp_path / "out", tmp_path / "back.pt", to="ldm")["written"]
    again = torch.load(written[1], weights_only=True)
    assert torch.equal(again["mean"], mean) and torch.equal(again["std"], std)


def test_playgrounds_statistics_are_in_its_file(kl: Path, tmp_path: Path) -> None:
    statistics = {"edm_mean": torch.tensor([[[[0.5]], [[1]], [[2]], [[3]]]]), "edm_std": torch.full((1, 4, 1, 1), 2.0)}
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in load_file(kl).items()}
    save_file(tensors | statistics, tmp_path / "playground.safetensors")
    result = convert_first_stage(tmp_path / "playground.safetensors", tmp_path / "out")
    assert result["scaling"] == "edm_mean and edm_std in the file"
    config = config_of(tmp_path / "out")
    assert config["latents_mean"] == [0.5, 1.0, 2.0, 3.0] and config["latents_std"] == [2.0] * 4
    assert config["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"scaling_factor": 0.2}, "scaling_factor is given without shift_factor; give both, shift_factor=0"),
        ({"shift_factor": 0.2}, "shift_factor belongs to a scaling_factor"),
        ({"latents_mean": (1.0,) * 4}, "latents_mean and latents_std belong together"),
        ({"latents_mean": (1.0,) * 3, "latents_std": (1.0,) * 3}, "latents_mean has 3 values for 4 latent channels"),
        (
            {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4, "scaling_factor": 2.0},
            "stand in place of scaling_factor and shift_factor; leave one of the two out",
        ),
        (
            {"scaling_factor": 0.0, "shift_factor": 0.0},
            r"scaling_factor has 0 \(as said\), which would destroy",
        ),
        ({"scaling_factor": -1.0, "shift_factor": 0.0}, "scaling_factor has -1 .* it takes finite numbers above 0"),
        ({"latents_mean": (0.0,) * 4, "latents_std": (1.0, 0.0, 1.0, 1.0)}, "latents_std has 0 .* numbers above 0"),
    ],
)
def test_words_that_cannot_scale_latents_are_refused(words: dict, told: str, kl: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        convert_first_stage(kl, tmp_path / "out", ConvertSettings(**words))


@pytest.mark.parametrize(
    ("statistics", "told"),
    [
        (
            {"mean": torch.full((4,), float("nan")), "std": torch.ones(4)},
            r"latents_mean has nan \(statistics in s",
        ),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "latents_std has 0 "),
        ({"mean": torch.zeros(4), "var": -torch.ones(4)}, "latents_std has nan "),
        ({"mean": torch.zeros(4), "std": torch.full((4,), float("inf"))}, "latents_std has inf "),
    ],
)
def test_statistics_that_would_destroy_latents_are_refused(
    statistics: dict, told: str, kl: Path, tmp_path: Path
) -> None:
    torch.save(statistics, tmp_path / "s.pt")
    with pytest.raises(UserError, match=told):
        convert_first_stage(kl, tmp_path / "out", statistics=tmp_path / "s.pt")
    assert not (tmp_path / "out").exists()


def test_a_batch_norm_that_would_destroy_latents_is_refused(tmp_path: Path) -> None:
    weights = Flux2().state_dict()
    weights["bn.running_var"][0] = float("nan")
    save_file(weights, tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match=r"latents_std has nan \(the batch norm in the file\)"):
        convert_first_stage(tmp_path / "ae.safetensors", tmp_path / "out")


def test_words_for_each_channel_of_an_rae_become_statistics_of_its_latents() -> None:
    model = tiny("AutoencoderRAE")
    count = model.config.encoder_hidden_size
    with pytest.raises(UserError, match=f"latents_mean has 3 values for {count} latent channels"):
        scaling.said(ConvertSettings(latents_mean=(0.0,) * 3, latents_std=(1.0,) * 3), model)
    numbers = tuple(float(number) for number in range(1, count + 1))
    said = scaling.said(ConvertSettings(latents_mean=numbers, latents_std=numbers), model)
    images, whole = torch.rand(1, 3, 32, 32), torch.tensor(numbers)[:, None, None]
    plain = scaling.said(ConvertSettings(latents_mean=(0.0,) * count, latents_std=(1.0,) * count), model)
    with torch.no_grad():
        scaling.apply(model, plain)
        before = model.eval().encode(images).latent
        scaling.apply(model, said)
        torch.testing.assert_close(model.encode(images).latent, (before - whole) / whole, rtol=1e-3, atol=1e-4)


def test_statistics_of_another_shape_are_not_an_raes(tmp_path: Path) -> None:
    torch.save({"mean": torch.zeros(64), "var": torch.ones(64)}, tmp_path / "stat.pt")
    with pytest.raises(UserError, match=r"a mean of the shape \(64,\); an RAE with latents of \d+ channels needs"):
        scaling.read_statistics(tmp_path / "stat.pt", tiny("AutoencoderRAE").config)


@pytest.mark.parametrize("words", [None, {"scaling_factor": 0.5, "shift_factor": 0.0}])
def test_latent_diffusions_scale_by_std_is_in_its_checkpoint(words: dict | None, kl: Path, tmp_path: Path) -> None:
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in load_file(kl).items()}
    torch.save({"state_dict": tensors | {"scale_factor": torch.tensor(0.75)}}, tmp_path / "a.ckpt")
    result = convert_first_stage(tmp_path / "a.ckpt", tmp_path / "out", ConvertSettings(**words) if words else None)
    assert result["scaling"] == ("as said" if words else "scale_factor in the file")
    config = config_of(tmp_path / "out")
    assert (config["scaling_factor"], config["shift_factor"]) == (0.5 if words else 0.75, 0.0)


def test_two_sources_are_refused(kl: Path, tmp_path: Path) -> None:
    settings = ConvertSettings(scaling_factor=1.0, shift_factor=0.0)
    with pytest.raises(UserError, match="scaling is given twice"):
        convert_first_stage(kl, tmp_path / "out", settings, measure="photos")
    with pytest.raises(UserError, match="a file of an original layout holds no scaling"):
        convert_first_stage(kl, tmp_path / "out.safetensors", settings, to="ldm")


def test_scaling_is_measured_over_samples_of_the_posterior(kl: Path, tmp_path: Path) -> None:
    """Against the mean and the deviation of these very latents, computed here at once."""
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(3)
    for number in range(6):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    settings = ConvertSettings(resolution=32, batch_size=4, num_workers=0, device="cpu", seed=5)
    result = convert_first_stage(kl, tmp_path / "out", settings, measure=str(tmp_path / "images"))
    model = AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    files = sorted((tmp_path / "images").iterdir())
    images = torch.stack([to_tensor(_array(file)) for file in files])
    noise, latents = torch.Generator().manual_seed(5), []
    with torch.no_grad():
        for batch in images.split(4):
            posterior = model.encode(batch).latent_dist
            latents.append(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise))
    values = torch.cat(latents).double()
    assert result["scaling"] == f"measured on {tmp_path / 'images'}"
    assert result["config"]["shift_factor"] == pytest.approx(float(values.mean()), abs=1e-5)
    assert result["config"]["scaling_factor"] == pytest.approx(1 / float(values.std(correction=0)), rel=1e-5)


def _array(file: Path) -> Any:
    import numpy as np

    return np.asarray(Image.open(file))


def test_the_command_prints_json_into_a_pipe_and_a_table_on_a_terminal(
    kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(kl), str(tmp_path / "out"), "scaling_factor=0.18215", "shift_factor=0", "--for", "sd"]
    assert main(words) == 0
    out, error = capsys.readouterr()
    result = json.loads(out)
    assert result["max_abs_difference"] == {"tensors": 0.0, "reconstruction": 0.0}
    assert result["config"]["scaling_factor"] == 0.18215 and result["scaling"] == "as said"
    assert "reading" in error and "reading it again with diffusers' AutoencoderKL" in error
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back.ckpt"), "--to", "ldm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "max_abs_difference.tensors" in lines[-2] and lines[-2].split()[-1] == "0"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("kl out --for flux scaling_factor=1 shift_factor=0", "latent_channels is 4, its denoisers take 16"),
        ("kl out", "does not say how its latents are scaled"),
        ("kl out.safetensors", "out.safetensors is the name of a file: give a new folder, or the layout"),
        ("kl out --to ldm", "the file that --to ldm writes ends in .safetensors"),
        ("here back", "here is a folder already; name the layout of the file to write: --to flux2|flux|ldm"),
        ("here back.pt --to ldm", "has no config.json, nor have export or vae, vqvae, movq in it"),
        ("kl out --scaling-factor 1", "give scaling_factor=1 in place of --scaling-factor 1"),
        ("kl out ema=true scaling_factor=1 shift_factor=0", "ema: "),
    ],
)
def test_a_mistake_ends_in_one_message(
    words: str, told: str, kl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert main(["convert", *[str(kl) if word == "kl" else word for word in words.split()]]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]


def test_each_published_value_has_a_source() -> None:
    assert len(KNOWN) >= 12 and all(row.source and row.words for row in KNOWN)
