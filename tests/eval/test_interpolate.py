"""Paths through latent space, against the circle and a direct computation with diffusers."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae_eval.interpolate.measure import interpolate
from latent_ae_eval.interpolate.settings import InterpolateSettings
from latent_ae_eval.paths import angle, linear, spherical
from tests.tiny_models import tiny_autoencoder

QUICK = InterpolateSettings(steps=5, frames=2, num_workers=0, lpips=None)


@pytest.mark.parametrize("degrees", [0.2, 30.0, 90.0, 179.0])
def test_the_spherical_path_runs_evenly_along_the_circle(degrees):
    omega, t = math.radians(degrees), torch.linspace(0, 1, 7, dtype=torch.float64)
    a, b = torch.tensor([[2.0], [0.0]]), torch.tensor([[2 * math.cos(omega)], [2 * math.sin(omega)]])
    expected = torch.stack([2 * torch.cos(t * omega), 2 * torch.sin(t * omega)], 1)
    torch.testing.assert_close(spherical(a, b, t)[..., 0].double(), expected, atol=2e-5, rtol=0)
    assert angle(a, b) == pytest.approx(omega, rel=1e-4)


def test_norms_that_differ_are_reached_at_both_ends():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    path = spherical(a, b, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(path, torch.stack([a, (a + b) * math.sqrt(0.5), b]))


@pytest.mark.parametrize("b", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
def test_parallel_opposite_and_zero_ends_are_joined_by_a_line(b):
    a, b, t = torch.tensor([1.0, 2.0]), torch.tensor(b), torch.linspace(0, 1, 5)
    assert torch.equal(spherical(a, b, t), linear(a, b, t))
    torch.testing.assert_close(linear(a, b, t), torch.stack([a + s * (b - a) for s in t]))


@pytest.mark.parametrize("centred", ["channels", "none"])
def test_the_paths_are_those_of_the_centred_latents(model, photos, tmp_path, centred):
    settings = QUICK.model_copy(update={"images": (3, "größe <0>.png"), "crop_px": 32, "centre": centred})
    result = interpolate(model, photos, settings, out=tmp_path)
    assert result["data"]["images"] == ["größe <3>.png", "größe <0>.png"] and len(result["pairs"]) == 1
    autoencoder = tiny_autoencoder().eval()
    ends = []
    for number in (3, 0):
        with Image.open(Path(photos) / f"größe <{number}>.png") as picture:
            (width, height), box = picture.size, 32
            crop = picture.crop(((width - box) // 2, (height - box) // 2, (width + box) // 2, (height + box) // 2))
            pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(box, box, 3)
        with torch.no_grad():
            ends.append(autoencoder.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean[0].double())
    a, b = ends
    centre = torch.stack(ends).mean((0, 2, 3)).view(-1, 1, 1) * (centred == "channels")
    a, b = a - centre, b - centre
    omega = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    assert result["pairs"][0]["latents"]["angle_degrees"] == pytest.approx(math.degrees(omega), rel=1e-4)
    middles = {"linear": (a + b) / 2, "spherical": (a + b) * math.sin(omega / 2) / math.sin(omega)}
    with torch.no_grad():
        faded = sum(autoencoder.decode((x + centre)[None].float()).sample.clamp(-1, 1) for x in (a, b)) / 2
        for kind, middle in middles.items():
            made = autoencoder.decode((middle + centre)[None].float()).sample.clamp(-1, 1)
            levels = ((made - faded) * 127.5).square().mean().sqrt()
            figures = result["pairs"][0]["paths"][kind]
            assert figures["middle_from_cross_fade"] == pytest.approx(float(levels), abs=0.3)  # 8 bits
            assert figures["length"] is None
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))


def test_the_animation_goes_there_and_back(model, photos, tmp_path):
    interpolate(model, photos, QUICK.model_copy(update={"images": (0, 1), "frames": 4}), out=tmp_path)
    with Image.open(tmp_path / "animation.webp") as picture:
        assert picture.n_frames == 8 and picture.info["loop"] == 0
        frames = []
        for number in range(8):
            picture.seek(number)
            frames.append(torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).float())

    def apart(i: int, j: int) -> float:
        return float((frames[i] - frames[j]).abs().mean())

    assert all(apart(3 - i, 5 + i) < 1.5 < apart(i, 4) for i in range(3))  # the way back shows the way there
    assert 1.5 * apart(0, 1) < apart(1, 2), "slower near the images"
    assert (tmp_path / "report.html").read_text().count("data:image/webp") == 1


def test_a_path_in_lpips_is_never_shorter_than_the_direct_one(model, photos, lpips_vgg):
    result = interpolate(model, photos, QUICK.model_copy(update={"lpips": "vgg", "images": (0, 1, 2)}))
    assert [(pair["from"][7], pair["to"][7]) for pair in result["pairs"]] == [("0", "1"), ("1", "2"), ("2", "0")]
    assert result["data"]["size_px"] == [32, 32]  # the largest square of all, and of the factor
    for pair in result["pairs"]:
        for figures in pair["paths"].values():
            assert figures["length"] >= 1 - 1e-6 and 1 <= figures["largest_step"] <= 4
    means = [pair["paths"]["linear"]["length"] for pair in result["pairs"]]
    assert result["means"]["linear"]["length"] == pytest.approx(sum(means) / 3)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["images=[0,9]"], "no number 9; "),
        (["images=[0,größe1.png]"], "holds no größe1.png; give a number, or a name like größe <1>.png"),
        (["images=[0,0]"], "has the same image twice"),
        (["steps=4"], "use 5"),
        (["crop_px=30"], "not a multiple of the model's factor 4; use 28"),
        (["step=4"], "did you mean steps?"),
    ],
)
def test_mistakes_are_named(model, photos, tmp_path, capsys, words, complaint):
    assert main(["eval", "interpolate", model, photos, "--out", str(tmp_path), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_a_function_has_no_latents(photos):
    with pytest.raises(UserError, match="needs latents"):
        interpolate(lambda images: images, photos, QUICK)


def test_several_processes_are_refused(model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate launch and torchrun do
    assert main(["eval", "interpolate", model, photos, "--out", str(tmp_path)]) == 2
    assert "runs on one process, and 2 were launched" in capsys.readouterr().err
