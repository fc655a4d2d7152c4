"""Whole measurements of latents, of tiny real models some of which are broken on purpose."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data.images import to_tensor
from latent_ae.data.rng import posterior_noise, spread
from latent_ae.models.build import build_autoencoder
from latent_ae.models.registry import FAMILIES
from latent_ae.models.settings import ModelSettings
from latent_ae_eval.latents.health import effective_rank
from latent_ae_eval.latents.measure import evaluate_latents
from tests.distributed.launch import DISTRIBUTED, launch
from tests.eval.latents_small import SETTINGS, settings_with
from tests.tiny_models import TRAINED, tiny

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    photo, rng = skimage.data.astronaut(), np.random.default_rng(0)
    for number in range(21):
        y, x = rng.integers(0, 512 - 40, 2)
        Image.fromarray(photo[y : y + 40, x : x + 40]).save(folder / f"{number:03d}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    return folder


def linear(channels: int = 4, levels: int = 2) -> torch.nn.Module:
    """A start that reconstructs like a linear codec: its latents are local means and differences of colours."""
    shape = {"block_out_channels": [32] * levels, "layers_per_block": 1, "norm_num_groups": 8, "init": "linear"}
    settings = ModelSettings(latent_channels=channels, mid_block_add_attention=False, **shape)
    return build_autoencoder(settings, sample_size=32).eval()


def finding(result: dict, name: str) -> dict:
    (found,) = [one for one in result["findings"] if one["name"] == name]
    return found


def batch_of(photos: Path) -> torch.Tensor:
    """The images as the measurement sees them, by Pillow and slices."""
    arrays = [np.asarray(Image.open(path))[4:36, 4:36] for path in sorted(photos.glob("0*.png"))]
    return torch.stack([to_tensor(array) for array in arrays])


def test_figures_are_those_of_diffusers_and_numpy(photos):
    model = linear()
    result = evaluate_latents(model, photos, SETTINGS)
    with torch.no_grad():
        posterior = model.encode(batch_of(photos)).latent_dist
    # the unreadable file has a number, too, after the others
    noise = posterior_noise(0, range(21), posterior.mean.shape[1:])
    samples = (posterior.mean + posterior.std * noise).double().transpose(0, 1).flatten(1).numpy()
    means = posterior.mean.double().transpose(0, 1).flatten(1).numpy()
    health, latents = result["health"], result["latents"]
    assert result["data"]["num_images"] == 21 and len(result["data"]["skipped"]) == 1
    np.testing.assert_allclose(latents["channel_covariance"], np.cov(samples, bias=True), rtol=1e-4, atol=1e-6)
    assert latents["scaling_factor"] == pytest.approx(1 / samples.std(), rel=1e-5)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    assert health["kl_nats_per_dim"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert health["kl_nats_per_image"] == pytest.approx(float(kl.sum() / 21), rel=1e-4)
    assert health["effective_rank"] == pytest.approx(effective_rank(np.cov(means)), rel=1e-4)
    assert health["posterior_std"] == pytest.approx(float(posterior.var.mean().sqrt()), rel=1e-4)
    assert health["noise_share"] == pytest.approx(float(posterior.var.double().mean()) / samples.var(), rel=1e-4)
    for name, values in (("latents", posterior.mean + posterior.std * noise), ("images", batch_of(photos))):
        assert health["spectrum"][name]["high_share"] == pytest.approx(high_share(values.numpy()), rel=1e-4), name
    for row, own in zip(health["channels"], samples, strict=True):
        assert row["std"] == pytest.approx(own.std(), rel=1e-4) and not row["dead"]
        distance = np.abs(own - own.mean()) / own.std()
        assert row["farthest_stds"] == pytest.approx(distance.max(), rel=0.01)
        assert row["outliers"] == pytest.approx((distance > 5).mean(), abs=1e-3)
    scaled = (samples - samples.mean()) / samples.std()
    mean, covariance = scaled.mean(1), np.cov(scaled, bias=True)
    roots = np.sqrt(np.linalg.eigvalsh(covariance))
    assert health["frechet_to_normal"] == pytest.approx((mean**2).sum() + ((roots - 1) ** 2).sum(), rel=1e-4)


def high_share(values: np.ndarray) -> float:
    """Of the power up to Nyquist's frequency, above half of it; each channel windowed and freed of its mean."""
    side = values.shape[-1]
    window = np.outer(*[np.sin(np.pi * np.arange(side) / side) ** 2] * 2)
    centred = values - (values * window).sum((2, 3), keepdims=True) / window.sum()
    power = (np.abs(np.fft.fft2(centred * window)) ** 2).sum((0, 1))
    frequency = 2 * np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    return power[(frequency > 0.5) & (frequency <= 1)].sum() / power[(frequency > 0) & (frequency <= 1)].sum()


def test_decoding_changed_latents(photos):
    model = linear()
    shifted(model.encoder.conv_out)  # so that nothing is equal by symmetry
    shifted(model.decoder.conv_in)
    result = evaluate_latents(model, photos, SETTINGS)
    chosen = spread(0, 22, 6)
    readable = chosen != 21
    images = batch_of(photos)[chosen[readable]]

    def decibels(a, b):
        a, b = (((x.clamp(-1, 1) + 1) * 127.5).round().double() for x in (a, b))
        return float((10 * torch.log10(255**2 / (a - b).square().flatten(1).mean(1))).mean())

    with torch.no_grad():
        latents = model.encode(images).latent_dist.mode()
        turned = torch.rot90(images, 1, (2, 3))
        (row,) = [row for row in result["health"]["transforms"] if row["transform"] == "turned by 90 degrees"]
        made = model.decode(torch.rot90(latents, 1, (2, 3))).sample
        assert row["psnr_in_latents"] == pytest.approx(decibels(turned, made), abs=0.01)
        assert row["psnr_in_images"] == pytest.approx(decibels(turned, model(turned).sample), abs=0.01)
        plain = torch.rot90(model.decode(latents).sample, 1, (2, 3))
        assert row["psnr_apart"] == pytest.approx(decibels(plain, made), abs=0.01)
        noise = posterior_noise(2**32, np.flatnonzero(readable).tolist(), latents.shape[1:])
        for row in result["health"]["noise"]:
            noised = latents + row["sigma"] * result["latents"]["std"] * noise
            assert row["psnr"] == pytest.approx(decibels(images, model.decode(noised).sample), abs=0.01)
    assert [row["sigma"] for row in result["health"]["noise"]] == [0.0, 0.1, 0.5]


def test_lpips_is_that_of_noised_images(photos, lpips_vgg):
    model = linear()
    result = evaluate_latents(model, photos, settings_with(lpips="vgg", num_decoded=1, noise=(0.0, 0.5)))
    image, found = batch_of(photos)[spread(0, 22, 1)], []
    with torch.no_grad():
        latents = model.encode(image).latent_dist.mode()
        noise = posterior_noise(2**32, range(1), latents.shape[1:])
        for row in result["health"]["noise"]:
            made = model.decode(latents + row["sigma"] * result["latents"]["std"] * noise).sample.clamp(-1, 1)
            found.append(row["lpips_vgg"])
            assert found[-1] == pytest.approx(float(lpips_vgg(image, made)), rel=1e-3)
    assert found[1] > found[0] + 0.05


def test_images_that_are_too_small_for_lpips_get_a_note(photos):
    result = evaluate_latents(linear(), photos, settings_with(lpips="alex", num_decoded=2, crop_px=16))
    assert "LPIPS is missing: lpips=alex needs sides of 31 px" in result["notes"]
    assert all("lpips_alex" not in row and row["psnr"] > 10 for row in result["health"]["noise"])


def shifted(convolution: torch.nn.Conv2d, by: int = 1) -> None:
    """What it reads is shifted by a pixel, up and to the left; -1 shifts it back."""
    with torch.no_grad():
        convolution.weight.copy_(torch.roll(convolution.weight, (by, by), (2, 3)))


def test_a_model_of_local_means_follows_every_change(photos):
    """Latents that are local means, decoded by symmetric kernels: the answer is known without measuring."""
    settings = settings_with(num_decoded=22)
    model = linear(channels=3)
    result = evaluate_latents(model, photos, settings)
    for row in result["health"]["transforms"]:
        assert row["psnr_in_images"] == pytest.approx(row["psnr_in_latents"], abs=0.02)
        assert row["psnr_apart"] > (30 if row["transform"] == "half size" else 60)
    assert finding(result, "Scaling and rotating")["state"] == "fine"
    shifted(model.decoder.conv_in)  # latents still follow the image, but the decoder does not follow them
    for row in evaluate_latents(model, photos, settings)["health"]["transforms"]:
        assert row["psnr_in_images"] == pytest.approx(row["psnr_in_latents"], abs=0.02)
        assert row["psnr_apart"] < 30
    other = linear(channels=3)
    shifted(other.encoder.conv_out)  # latents that do not, and a decoder that knows it
    shifted(other.decoder.conv_in, -1)
    result = evaluate_latents(other, photos, settings)
    assert finding(result, "Scaling and rotating")["state"] == "look"
    turned = result["health"]["transforms"][-1]
    assert turned["psnr_in_images"] > turned["psnr_in_latents"] + 3


def collapse(model: torch.nn.Module, channels: list[int]) -> torch.nn.Module:
    """The posterior of these channels becomes N(0, 1) whatever the image."""
    count = model.config.latent_channels
    rows = [*channels, *(count + channel for channel in channels)]
    with torch.no_grad():
        model.quant_conv.weight[rows] = 0
        model.quant_conv.bias[rows] = 0
    return model


def test_a_dead_channel_is_named(photos):
    result = evaluate_latents(collapse(linear(), [2]), photos, SETTINGS)
    assert result["health"]["dead_channels"] == [2]
    found = finding(result, "Dead channels")
    assert found["state"] == "problem" and "Channel 2 is dead" in found["text"]
    assert "model.latent_channels=3" in found["text"]
    row = result["health"]["channels"][2]
    assert row["dead"] and row["kl_nats_per_dim"] == pytest.approx(0, abs=1e-6)
    assert row["posterior_std"] == pytest.approx(1) and row["std"] == pytest.approx(1, abs=0.05)
    assert row["wasserstein_1"] < 0.05 and row["signal_share"] == 0
    # what is sampled there is white noise; the rank counts what depends on the image
    assert result["health"]["effective_rank"] < 3.0001
    assert finding(evaluate_latents(linear(), photos, SETTINGS), "Dead channels")["state"] == "fine"


def test_posterior_collapse_is_named(photos):
    result = evaluate_latents(collapse(linear(), [0, 1, 2, 3]), photos, SETTINGS)
    found = finding(result, "Posterior collapse")
    assert found["state"] == "problem" and "loss.kl" in found["text"]
    assert {one["name"] for one in result["findings"]} == {"Posterior collapse", "Sample"}
    assert result["health"]["effective_rank"] == 0 and result["health"]["kl_nats_per_dim"] == pytest.approx(0, abs=1e-6)
    assert result["health"]["spectrum"]["latents"]["slope"] == pytest.approx(0, abs=0.3)
    assert result["health"]["wasserstein_1"] < 0.03 and result["health"]["frechet_to_normal"] < 0.01


def test_noise_uneven_channels_and_outliers_are_named(photos):
    noisy = linear()
    with torch.no_grad():
        noisy.quant_conv.weight[4:] = 0
        noisy.quant_conv.bias[4:] = -2
    found = evaluate_latents(noisy, photos, SETTINGS)
    assert found["health"]["posterior_std"] == pytest.approx(math.exp(-1), rel=1e-5)
    assert finding(found, "Posterior noise")["state"] == "look"
    uneven = linear()
    with torch.no_grad():
        uneven.quant_conv.weight[1] *= 100
        uneven.quant_conv.bias[1] *= 100
    found = finding(evaluate_latents(uneven, photos, SETTINGS), "Scale")
    assert found["state"] == "look" and "latents_std" in found["text"]
    result = evaluate_latents(linear(), photos, SETTINGS)
    assert finding(result, "Posterior noise")["state"] == finding(result, "Scale")["state"] == "fine"


@pytest.mark.parametrize("name", [name for name in TRAINED if FAMILIES[name].one_grid])
def test_every_class_of_first_stage_is_measured(name, photos, tmp_path):
    result = evaluate_latents(tiny(name), photos, settings_with(limit=3), out=tmp_path / "out")
    health = result["health"]
    assert result["data"]["num_images"] == 3 and len(health["transforms"]) == 3 and len(health["noise"]) == 3
    if FAMILIES[name].latent == "posterior":
        assert health["kl_nats_per_dim"] > 0
    else:
        assert not any("kl" in key or "posterior" in key for key in [*health, *health["channels"][0]])
        said = {"FlowAutoencoderKL": "is not Gaussian", "DiscreteVAE": "without KL and spread"}.get(
            name, "no posterior"
        )
        assert any(said in note for note in result["notes"])
    assert any("before quantisation" in note for note in result["notes"]) == (name == "VQModel")
    page = (tmp_path / "out/latents.html").read_text()
    assert all(one["name"] in page for one in result["findings"]) and "<svg" in page and "mathdefault" not in page
    assert json.loads((tmp_path / "out/result.json").read_text()) == json.loads(json.dumps(result))


def test_a_constant_channel_of_a_deterministic_model_is_dead(photos):
    model = tiny("AutoencoderTiny")
    last = [module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight[1] = 0
    result = evaluate_latents(model, photos, SETTINGS)
    assert result["health"]["dead_channels"] == [1]
    assert "Channel 1 is constant" in finding(result, "Dead channels")["text"]


def test_two_processes_give_the_figures_of_one(photos, tmp_path):
    linear().save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(photos), str(tmp_path / "out")]
    done = launch(2, DISTRIBUTED / "latents_on_processes.py", *arguments)
    assert done.returncode == 0, done.stderr
    one = json.loads(json.dumps(evaluate_latents(str(tmp_path / "model"), photos, SETTINGS)))
    assert one["data"]["skipped"] == ["broken.png: " + one["data"]["skipped"][0].split(": ", 1)[1]]
    for rank in (0, 1):
        other = json.loads((tmp_path / f"out.rank{rank}.json").read_text())
        assert other["processes"] == 2
        for key in ("latents", "health", "findings", "data"):
            assert other[key] == one[key], key  # bit for bit


def test_mistakes_are_named(photos, tmp_path, capsys):
    with pytest.raises(UserError, match="has no latents"):
        evaluate_latents(lambda images: images, photos, SETTINGS)
    with pytest.raises(UserError, match="levels on several grids"):
        evaluate_latents(tiny("HierarchicalVAE"), photos, SETTINGS)
    with pytest.raises(UserError, match="crop_px: 33 is not a multiple"):
        evaluate_latents(linear(), photos, settings_with(crop_px=33))
    with pytest.raises(UserError, match="max_bad_fraction: 1 of the first 22"):
        evaluate_latents(linear(), photos, settings_with(max_bad_fraction=0.01))
    broken = linear()
    with torch.no_grad():
        broken.quant_conv.bias[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        evaluate_latents(broken, photos, SETTINGS)
    assert main(["eval", "latents", str(tmp_path), str(photos), "noise=[-1]", "crop=3"]) == 2
    error = capsys.readouterr().err
    assert "noise" in error and "crop_px" in error and "Traceback" not in error


def test_the_command(photos, tmp_path, capsys):
    linear().save_pretrained(tmp_path / "model")
    words = ["num_decoded=2", "crop_px=32", "resize_px=null", "lpips=null", "num_workers=0", "max_bad_fraction=1"]
    assert main(["eval", "latents", str(tmp_path / "model"), str(photos), "--out", str(tmp_path / "out"), *words]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["format"] == "latent-ae latents 1"
    assert "image/s" in printed.err and "skipped 1 of 22" in printed.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["latents.html", "result.json"]


def test_odd_latents_are_not_halved_and_whole_images_are(photos):
    result = evaluate_latents(linear(), photos, settings_with(crop_px=30, num_decoded=2))
    assert "half size" not in {row["transform"] for row in result["health"]["transforms"]}
    assert any("half size was left out" in note for note in result["notes"])
    result = evaluate_latents(linear(), photos, settings_with(crop_px=None, num_decoded=2))
    assert len(result["health"]["transforms"]) == 3
    assert not evaluate_latents(linear(), photos, settings_with(num_decoded=0))["health"].get("noise")


def test_only_images_that_were_decoded_are_counted(photos):
    result = evaluate_latents(linear(), photos, settings_with(num_decoded=50, noise=()))
    assert result["health"]["num_decoded"] == 21 and result["health"]["noise"] == []
