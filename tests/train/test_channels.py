"""The example of docs/channels.md: its images, and a run of two steps on RGBA and on five bands, measured."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.data.images import bicubic_down_up
from latent_ae.data.loader import open_images
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.settings import ReconSettings
from latent_ae_train.settings import TrainSettings
from latent_ae_train.validate import Validator
from tests.runs import words

ROOT = Path(__file__).parents[2]
SHORT = ("data.flip=false", "gan.weight=0", "steps=2", "batch_size=2", "checkpoint.every=2", "validate.every=2")
BACKGROUND = (30, 200, 90)


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("channels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["channels.py", str(out), "8"])
        runpy.run_path(str(ROOT / "examples/channels.py"), run_name="__main__")
    return out


def train(source: Path, run: Path, count: int, *more: str) -> Path:
    shape = (f"model.in_channels={count}", f"model.out_channels={count}", "model.init=default")
    kept = [word for word in words(source, run, *shape, *SHORT, *more) if not word.startswith("loss.perceptual=")]
    assert main(kept) == 0
    return run


def test_rgba_is_trained_exported_and_measured_over_a_background(
    channels: Path, tmp_path: Path, lpips_vgg: LPIPS
) -> None:
    """The metrics are compared with Pillow's composites of what stock diffusers reconstructs."""
    more = ("loss.backgrounds=[black,[30,200,90],random]", "loss.alpha=0.5", "gan.weight=0.5", "gan.start=0")
    run = train(channels / "rgba", tmp_path / "run", 4, *more)
    results = json.loads((run / "results.json").read_text())
    assert results["held_out"]["after"]["psnr_alpha"] > 0 and results["export"]["max_abs_difference"] <= 1e-5
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (trained,) = (line for line in log if line["event"] == "train")
    assert {"l1", "lpips", "alpha", "generator"} <= trained.keys() and min(trained["lpips"], trained["alpha"]) > 0

    out = tmp_path / "out"
    options = ["resize_px=null", "crop_px=null", "lpips=[]", "frechet=[]", "num_workers=0", "background=[30,200,90]"]
    assert main(["eval", "recon", str(run), str(channels / "rgba"), "--out", str(out), *options]) == 0
    result = json.loads((out / "result.json").read_text())
    assert "four channels are taken as RGBA: metrics are of images over background=[30, 200, 90]" in result["notes"][0]
    stock = AutoencoderKL.from_pretrained(run / "export").eval()
    assert stock.config.in_channels == stock.config.out_channels == 4
    whole, opacity = [], []
    for path in sorted((channels / "rgba").iterdir()):
        given = np.asarray(Image.open(path))
        x = torch.from_numpy(given / 127.5 - 1).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            y = stock.decode(stock.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0).numpy()
        made = np.rint((y.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        ground = Image.new("RGBA", given.shape[1::-1], (*BACKGROUND, 255))
        seen = [np.asarray(Image.alpha_composite(ground, Image.fromarray(one)))[..., :3] for one in (given, made)]
        whole.append(peak_signal_noise_ratio(*seen))
        opacity.append(peak_signal_noise_ratio(given[..., 3], made[..., 3]))
    assert result["metrics"]["mode"]["psnr"] == pytest.approx(np.mean(whole), abs=0.02)
    assert result["metrics"]["mode"]["psnr_alpha"] == pytest.approx(np.mean(opacity), abs=0.02)


def test_previews_show_the_first_group_of_bands_without_any_perceptual_loss(channels: Path, tmp_path: Path) -> None:
    shape = ["model.in_channels=4", "model.out_channels=4", "data.resolution=64", "loss.perceptual=0"]
    shape += ["validate.preview_images=2"]
    settings = load_settings(TrainSettings, None, [*shape, f"data.source={channels / 'rgba'}", "loss.bands=[[3]]"])
    held_out = open_images(settings.data, "held_out")
    validator = Validator(settings, Accelerator(cpu=True), held_out, 4, 4, None)
    validator.measure(lambda images, _: images, tmp_path / "preview.png")
    rows = [[image[3:], image[3:], bicubic_down_up(image[None], 4)[0, 3:]] for image in validator.some(2)]
    labels = ["input", "reconstruction, 100.00 dB", "bicubic /4"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "preview.png")), np.asarray(picture_grid(rows, labels)))


def test_five_bands_are_trained_with_lpips_of_groups(channels: Path, tmp_path: Path, lpips_vgg: LPIPS) -> None:
    bands = np.load(channels / "bands/000.npy")
    assert bands.dtype == np.uint16 and bands.shape == (64, 64, 5) and bands.std() > 1000
    run = train(channels / "bands", tmp_path / "run", 5, "loss.bands=[[4],[2,1,0]]")
    results = json.loads((run / "results.json").read_text())
    assert results["export"]["max_abs_difference"] <= 1e-5 and results["held_out"]["after"]["psnr"] > 5
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(line["lpips"] > 0 for line in log if line["event"] == "train")
    assert AutoencoderKL.from_pretrained(run / "export").config.in_channels == 5
    assert results["held_out"]["after"]["lpips_vgg"] > 0
    small = {"resize_px": None, "crop_px": 12, "limit": 2, "num_workers": 0}
    measured = ReconSettings(bands=((4,),), lpips=("vgg",), frechet=("vgg16",), **small)
    result = evaluate_reconstruction(run, channels / "bands", measured, out=tmp_path / "out")
    assert result["protocol"]["bands"] == [[4]]  # results of other groups are not compared with it
    assert result["notes"][0].startswith("mode_lpips_vgg: 2 of 2 images left out, a side is shorter than ")
    assert "frechet_vgg16: vgg16 sees one picture of an image, and bands makes groups" in result["notes"][1]
    for path in (run / "previews/step-00000002.png", tmp_path / "out/pairs.png"):
        picture = np.asarray(Image.open(path))  # the first group is a single band
        assert (picture.max(2) == picture.min(2)).all() and picture.std() > 10, path
    with pytest.raises(UserError, match="bands: 5, and the channels of .* are 0 to 4"):
        evaluate_reconstruction(run, channels / "bands", measured.model_copy(update={"bands": ((0,), (5,))}))
