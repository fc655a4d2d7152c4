"""Validation during training: the evaluator's metrics, on all processes, each image once."""

import json
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from latent_ae.data.images import bicubic_down_up, to_tensor
from latent_ae.data.rng import spread
from latent_ae.metrics.similarity import compare
from latent_ae_train.validate import figures
from tests.distributed.launch import DISTRIBUTED, launch


def test_two_processes_validate_like_one_and_like_the_evaluator(tmp_path, lpips_vgg):
    photo, rng, arrays = skimage.data.astronaut(), np.random.default_rng(0), []
    for number in range(102):  # of three classes; half of them are measured: odd, and enough for a Fréchet distance
        y, x = rng.integers(0, 480, 2)
        arrays.append(photo[y : y + 32, x : x + 32])
        path = tmp_path / f"photos/{number // 34}/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays[-1]).save(path)
    arrays = [arrays[index] for index in spread(0, 102, 51)]
    script, summaries = DISTRIBUTED / "validate_on_processes.py", []
    for processes in (1, 2):
        out = tmp_path / f"on{processes}"
        done = launch(processes, script, str(tmp_path / "photos"), str(out))
        assert done.returncode == 0, done.stderr
        summaries += [json.loads(Path(f"{out}.rank{rank}.json").read_text()) for rank in range(processes)]
        with Image.open(f"{out}.png") as preview:
            assert preview.height > preview.width  # six rows of three
    choices = [summary.pop("choice") for summary in summaries]
    assert choices[0] == choices[1] == choices[2] and choices[0]["of"] == 102
    alone, first, second = summaries
    assert first == second == pytest.approx(alone, rel=1e-6)
    assert alone["n"] == 51 and set(alone) == {"n", "psnr", "ssim", "lpips_vgg", "frechet_vgg16"}
    assert (tmp_path / "on1.png").read_bytes() == (tmp_path / "on2.png").read_bytes()
    columns: dict[str, list[float]] = {}
    for array in arrays:
        image = to_tensor(array)[None]
        for key, values in compare(image, {"": bicubic_down_up(image, 4)}, {"vgg": lpips_vgg}).metrics[""].items():
            columns.setdefault(key, []).append(float(values))
    for key in ("psnr", "ssim", "lpips_vgg"):
        assert alone[key] == pytest.approx(np.mean(columns[key]), rel=1e-5)


def test_a_preview_says_how_good_its_images_are():
    assert figures({"psnr": 29.487, "lpips_vgg": 0.1904, "lpips_alex": 0.5}) == "29.49 dB, LPIPS 0.190"
    assert figures({"psnr": 29.487}) == "29.49 dB" and figures({"psnr": None}) == "no figures"
