"""Protocols against the arithmetic of their sources, by the libraries that these call, on a few small photographs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image.ssim import structural_similarity_index_measure
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.protocols import PROTOCOLS
from latent_ae_eval.recon.settings import ReconSettings
from tests.eval.small import frechet, write_photos
from tests.inception import pytorch_fid
from tests.lpips_package import lpips_package

Array = np.ndarray


def model(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to reconstructions that differ, overshoot, and lie between levels."""
    return 1.1 * images + 0.1 * torch.sin(9 * images.roll(1, -1)) + 0.003


class Measured(NamedTuple):
    """What a source computes of one image."""

    psnr: float
    ssim: float
    lpips: float | None
    pixels: tuple[Array, Array]
    """HWC uint8 files of the original and its reconstruction, of which FID is computed."""


def hwc(images: torch.Tensor) -> Array:
    return images[0].permute(1, 2, 0).numpy()


def lavinal712(picture: Image.Image, lpips: Callable) -> Measured:
    """eval.py"""
    transform = transforms.Compose(
        [
            transforms.Resize(41),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5], inplace=True),
        ]
    )
    x = transform(picture)[None]
    x_hat = model(x)
    given, made = (((hwc(images) + 1.0) / 2.0).clip(0.0, 1.0) for images in (x, x_hat))
    psnr = peak_signal_noise_ratio(given, made, data_range=1.0)
    ssim = structural_similarity(given, made, channel_axis=-1, data_range=1.0)
    files = tuple((image * 255.0).astype(np.uint8) for image in (given, made))
    return Measured(psnr, ssim, float(lpips(x, x_hat)), files)


def uae(picture: Image.Image, lpips: Callable) -> Measured:
    """src/stage1_sample_ddp.py, src/eval/ref_iqa.py"""
    scale = 41 / min(picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.BICUBIC)
    array = np.array(picture)
    top, left = ((side - 32) // 2 for side in array.shape[:2])
    given = array[top : top + 32, left : left + 32]
    recon = ((model(2 * to_tensor(given)[None] - 1) + 1) / 2).clamp(0, 1)
    made = recon.mul(255).permute(0, 2, 3, 1).to(dtype=torch.uint8).numpy()[0]
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255.0 for image in (given, made))
    mse = torch.clamp(torch.mean((x - y) ** 2, dim=[1, 2, 3]), min=1e-10)
    psnr = float(20.0 * torch.log10(1 / torch.sqrt(mse)))
    ssim = float(structural_similarity_index_measure(target=x, preds=y, data_range=1.0, reduction="none"))
    return Measured(psnr, ssim, None, (given, made))


def omnidoc(picture: Image.Image, lpips: Callable) -> Measured:
    """example_recon.py, eval_metrics.py; piq's SSIM is that of Wang et al. 2004, of windows inside the image"""
    given = np.array(picture)
    recon = model(to_tensor(picture)[None] * 2 - 1).clamp(-1, 1)
    made = hwc(((recon + 1) / 2 * 255).round().to(torch.uint8))
    x, y = (to_tensor(image)[None] for image in (given, made))
    psnr = -10 * math.log10(float(((x - y) ** 2).mean()) + 1e-8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    ssim = structural_similarity(given, made, channel_axis=-1, **options)
    return Measured(psnr, ssim, float(lpips(y * 2 - 1, x * 2 - 1)), (given, made))


def tokenbench(picture: Image.Image, lpips: Callable) -> Measured:
    """cosmos_tokenizer/utils.py (tensor2numpy) and token_bench/metrics_cli.py"""
    given = np.array(picture)
    output = ((model(to_tensor(picture)[None] * 2 - 1) + 1.0) / 2.0).clamp(0, 1)
    made = (hwc(output) * 255.0 + 0.5).astype(np.uint8)
    a, b = given.astype(np.float32), made.astype(np.float32)
    psnr = float(20 * np.log10(255.0 / (np.sqrt(((a - b) ** 2).mean()) + np.finfo(np.float32).eps)))
    ssim = structural_similarity(a, b, data_range=255.0, channel_axis=-1)
    x, y = (torch.from_numpy(2 * (z / 255.0 - 0.5)).float().permute(2, 0, 1)[None] for z in (given, made))
    return Measured(psnr, ssim, float(lpips(x, y)), (given, made))


@pytest.mark.parametrize("source", [lavinal712, uae, omnidoc, tokenbench], ids=lambda source: source.__name__)
def test_metrics_are_those_of_the_source(tmp_path, source, inception, lpips_vgg):
    name = source.__name__
    whole = PROTOCOLS[name].crop_px is None
    photos = write_photos(tmp_path / "photos", 2, side=40 if whole else 75)
    changes = {"frechet": () if name == "tokenbench" else ("inception",), "inception_weights": inception}
    changes |= {} if whole else {"resize_px": 41, "crop_px": 32}
    settings = ReconSettings(protocol=name, num_workers=0, reference_cache=False, **changes)
    result = evaluate_reconstruction(model, photos, settings)
    package = lpips_package(lpips_vgg)
    expected = [source(Image.open(path), package) for path in sorted(photos.iterdir())]
    for row, one in zip(result["images"], expected, strict=True):
        assert row["mode_psnr"] == pytest.approx(one.psnr, abs=2e-3)
        assert row["mode_ssim"] == pytest.approx(one.ssim, abs=1e-5)
        assert row.get("mode_lpips_vgg") == (None if one.lpips is None else pytest.approx(one.lpips, abs=1e-5))
    if name == "tokenbench":  # it measures no FID
        return
    given, made = (torch.from_numpy(np.stack([one.pixels[i] for one in expected])).permute(0, 3, 1, 2) for i in (0, 1))
    if name == "uae":
        network = FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=inception)
        features = [network(images)[0] for images in (given, made)]
    else:
        features = [pytorch_fid(inception, images) for images in (given, made)]
    (key,) = (key for key in result["metrics"]["mode"] if key.startswith("frechet_inception_"))
    assert result["metrics"]["mode"][key] == pytest.approx(frechet(*(x.double() for x in features)), rel=2e-3)


def test_the_protocol_without_code_is_put_together_from_one_with_code():
    told = {"source", "remarks"}
    assert PROTOCOLS["coco5k"].model_dump(exclude=told) == PROTOCOLS["ldm"].model_dump(exclude=told)
    assert "no code was published" in PROTOCOLS["coco5k"].remarks
    assert PROTOCOLS["lavinal712"].latents == ("sample",) and PROTOCOLS["lavinal712"].resize_px == 256
    assert all(PROTOCOLS[name].latents == ("mode",) for name in ("uae", "omnidoc", "tokenbench"))
