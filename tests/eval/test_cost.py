"""What a first stage costs, and how it shifts colours: against numbers that are known without running anything."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latent_ae.models.loading import first_stage
from latent_ae_eval.cost import conditions, cost_lines
from latent_ae_eval.recon.cost import Costs, Stopwatch, bits_per_pixel, cost, parameters_by_side
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.report import recon_text
from tests.eval.small import settings_with, write_photos
from tests.report.html_reader import read
from tests.tiny_models import CONFIGS, MEASURED, TRAINED, tiny

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")


def adds_two_levels_to_red(images: torch.Tensor) -> torch.Tensor:
    return images + torch.tensor([2 / 127.5, 0.0, -0.4 / 127.5])[:, None, None]  # 0.4 of a level is rounded away


def gray_photos(folder, count: int):
    folder.mkdir()
    for level in range(count):  # none so bright that two more levels do not fit
        Image.fromarray(np.full((32, 32, 3), 40 + level, np.uint8)).save(folder / f"{level:02d}.png")
    return folder


def test_two_levels_more_of_red_are_a_shift_of_two(tmp_path):
    photos = gray_photos(tmp_path / "photos", 20)
    result = evaluate_reconstruction(adds_two_levels_to_red, photos, settings_with(), out=tmp_path / "out")
    shifts = {key: value for key, value in result["metrics"]["mode"].items() if key.startswith("shift_")}
    assert shifts == {"shift_red": 2.0, "shift_green": 0.0, "shift_blue": 0.0}
    assert result["intervals"]["mode"]["shift_red"] == [2.0, 2.0]  # it is the same in every image
    assert {row["mode_shift_red"] for row in result["images"]} == {2.0}
    (line,) = (line for line in recon_text(result).splitlines() if line.startswith("red shift (levels)"))
    assert line.split()[-5:] == ["mode", "2.00", "2.00", "–", "2.00"]


def test_the_shift_is_the_mean_difference_of_the_pixels_and_its_interval_holds_it(tmp_path):
    photos = write_photos(tmp_path / "photos", 24, side=32)
    result = evaluate_reconstruction(lambda images: 0.9 * images, photos, settings_with())
    differences = []
    for path in sorted(photos.iterdir()):
        pixels = np.asarray(Image.open(path)).astype(np.float64)
        differences.append((np.floor(0.9 * (pixels - 127.5) + 128) - pixels).mean((0, 1)))
    for channel, name in enumerate(("red", "green", "blue")):
        values = np.array(differences)[:, channel]
        low, high = result["intervals"]["mode"][f"shift_{name}"]
        # a few products lie on a half, where float32 may round to the other side
        assert result["metrics"]["mode"][f"shift_{name}"] == pytest.approx(values.mean(), abs=0.05)
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        assert low == pytest.approx(values.mean() - half, abs=half / 2) and high - low == pytest.approx(
            2 * half, rel=0.3
        )


@pytest.mark.parametrize("name", [*TRAINED, *MEASURED])
def test_each_parameter_is_on_one_side(name):
    module = tiny(name)
    sides = parameters_by_side(module)
    assert sum(sides.values()) == sum(parameter.numel() for parameter in module.parameters())
    assert sides["encoder"] > 0 and sides["decoder"] > 0
    others = {name: {"codebook"} for name in ("VQModel", "DiscreteVAE", "VQVAE2")} | {"FlowAutoencoderKL": {"flow"}}
    assert set(sides) - {"encoder", "decoder"} == others.get(name, set())


def test_convolutions_beside_the_latent_belong_to_the_sides_and_the_codebook_to_neither():
    module = tiny("VQModel")
    sides = parameters_by_side(module)
    assert sides["codebook"] == 16 * 4
    encoder = sum(parameter.numel() for parameter in module.encoder.parameters())
    assert sides["encoder"] == encoder + 4 * 4 + 4  # quant_conv of 1 x 1 with its bias


def test_bits_of_known_shapes():
    assert bits_per_pixel((4, 32, 32), (256, 256), None) == {"fp16": 1.0, "indices": None}  # Stable Diffusion
    assert bits_per_pixel((16, 32, 32), (256, 256), None)["fp16"] == 4.0  # Stable Diffusion 3
    # VQ-VAE-2 on ImageNet: 32 x 32 codes of the top and 64 x 64 of the bottom level, 512 each
    assert bits_per_pixel((320, 32, 32), (256, 256), 512, 5)["indices"] == 9 * (32**2 + 64**2) / 256**2
    # a VQGAN of 1/16 with 1,024 codes: 10 bits for each 256 pixels; a code more needs another bit
    assert bits_per_pixel((256, 16, 16), (256, 256), 1024)["indices"] == 10 / 256
    assert bits_per_pixel((256, 16, 16), (256, 256), 1025)["indices"] == 11 / 256


def test_costs_of_a_codebook_are_measured(tmp_path):
    photos = write_photos(tmp_path / "photos", 5, side=32)
    out = tmp_path / "out"
    result = evaluate_reconstruction(tiny("VQModel"), photos, settings_with(batch_size=2), out=out)
    found = result["cost"]
    assert found == json.loads((out / "result.json").read_text())["cost"]
    assert found["latent_shape"] == [4, 16, 16] and found["bits_per_pixel"] == {"fp16": 16.0, "indices": 1.0}
    # five images are batches of 2, 2 and 1, of which the first is a warm-up
    assert (found["batch_size"], found["image_px"], found["batches"]) == (2, [32, 32], 1)
    times = found["seconds_per_image"]
    assert times["encode"] > 0 and times["decode"] > 0 and times["whole"] == times["encode"] + times["decode"]
    assert times["whole"] * 2 < result["seconds"] + 0.1  # rounded to a tenth
    assert found["peak_memory_bytes"] is None and found["dtype"] == "float32"
    text = read((out / "report.html").read_text()).text
    assert "latent (bits per pixel)" in text and "batches of 2, 32 x 32 px" in text and "4 x 16 x 16" in text
    assert "time (ms per image)" in recon_text(result) and "times: " in recon_text(result)


def test_vidtok_with_finite_scalar_quantisation_has_indices():
    name = "AutoencoderVidTok FSQ"
    if name not in MEASURED:
        pytest.skip("the installed diffusers has no AutoencoderVidTok")
    part = Costs(latents={(1, 32, 32): (2, 16, 16)})
    found = cost(first_stage(tiny(name)), CPU, [part])
    assert CONFIGS[name]["codebook_size"] == 64 and found["bits_per_pixel"]["indices"] == 6 / 4


def test_a_function_has_one_time_and_no_sides(tmp_path):
    photos = write_photos(tmp_path / "photos", 4, side=32)
    result = evaluate_reconstruction(lambda images: images, photos, settings_with(batch_size=2))
    times = result["cost"]["seconds_per_image"]
    assert times["encode"] is None and times["decode"] is None and times["whole"] > 0
    assert [result["cost"][key] for key in ("parameters", "latent_shape", "bits_per_pixel")] == [None] * 3


def test_one_batch_is_a_warm_up_and_no_measurement(tmp_path):
    photos = write_photos(tmp_path / "photos", 2, side=32)
    result = evaluate_reconstruction(tiny("AutoencoderKL"), photos, settings_with(batch_size=2))
    assert result["cost"]["seconds_per_image"] == {"encode": None, "decode": None, "whole": None}
    assert result["cost"]["bits_per_pixel"]["fp16"] == 16.0 and "times: not measured" in recon_text(result)


def test_times_are_medians_over_all_processes_and_the_most_frequent_size():
    many, rare = (8, 64, 64), (3, 64, 64)
    shapes = {many: (4, 8, 8), rare: (4, 8, 8)}
    one = Costs({("encode", many): [0.8, 1.6], ("decode", many): [8.0, 8.0, 80.0], ("encode", rare): [9.0]}, shapes)
    two = Costs({("encode", many): [80.0], ("decode", many): [1.0]}, {many: (4, 8, 8)}, {"decode": 7})
    found = cost(first_stage(tiny("AutoencoderKL")), CPU, [one, two])
    assert found["seconds_per_image"] == {"encode": 0.2, "decode": 1.0, "whole": 1.2}
    assert found["batches"] == 3 and found["batch_size"] == 8 and found["peak_memory_bytes"] == {"decode": 7}


def test_the_first_batch_is_left_out_for_each_kind_that_is_decoded():
    watch, images = Stopwatch(CPU), torch.zeros(2, 3, 8, 8)
    for _ in range(3):
        with watch.lap("encode", images):
            pass
        for _ in range(2):
            with watch.lap("decode", images):
                pass
    seconds = watch.costs().seconds
    assert {name: len(values) for (name, _), values in seconds.items()} == {"encode": 2, "decode": 4}


@pytest.mark.parametrize(
    "section", [None, 3, [], {}, {"seconds_per_image": 3, "parameters": [1]}, {"bits_per_pixel": {"fp16": "x"}}]
)
def test_sections_of_other_versions_have_no_lines(section):
    assert cost_lines(section) == {} and conditions(section) == ""
