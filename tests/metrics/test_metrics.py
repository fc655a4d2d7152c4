"""Reconstruction metrics against scikit-image and the lpips package, on the same 8-bit pixels."""

import json
import math
import random

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from latent_ae.config import UserError
from latent_ae.data.images import to_tensor
from latent_ae.metrics.distances import Gaussian, frechet_distance
from latent_ae.metrics.similarity import (
    PSNR_CAP_DB,
    ReconstructionMetrics,
    bootstrap_interval,
    compare,
    ms_ssim,
    psnr,
    ssim,
    summarise,
)
from tests.lpips_package import lpips_package


def pairs(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 NCHW: crops of a photograph, and the same with noise, blur-like shift and strong error."""
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[:channels]
    a = torch.stack([photo[:, y : y + 60, x : x + 45] for y, x in ((0, 100), (120, 200), (250, 30), (300, 300))])
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 10.0, 40.0, 200.0]).view(-1, 1, 1, 1)
    return a, (a + noise * scale).round().clamp(0, 255).to(torch.uint8)


def floats(images: torch.Tensor) -> torch.Tensor:
    return torch.stack([to_tensor(image.permute(1, 2, 0).numpy()) for image in images])


def measure(a: torch.Tensor, b: torch.Tensor, nets=(), order=None) -> ReconstructionMetrics:
    try:
        metrics = ReconstructionMetrics("cpu", nets)
    except UserError as error:
        pytest.skip(f"{str(error).splitlines()[0]} docs/weights.md says how.")
    for index in order or range(len(a)):
        metrics.update([index], [f"{index}.png"], a[index : index + 1], b[index : index + 1])
    return metrics


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_equal_scikit_image(channels):
    a, b = pairs(channels)
    for measured, x, y in zip(zip(psnr(a, b).tolist(), ssim(a, b).tolist(), strict=True), a, b, strict=True):
        x, y = x.numpy(), y.numpy()
        assert measured[0] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), rel=1e-12)
        expected = structural_similarity(
            x, y, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert measured[1] == pytest.approx(expected, abs=1e-9)


def reference_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2003 with SciPy's filters: float64 CHW in [0, 1]."""
    product = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        if scale:
            height, width = (side // 2 * 2 for side in x.shape[1:])
            x, y = (z[:, :height, :width].reshape(3, height // 2, 2, width // 2, 2).mean((2, 4)) for z in (x, y))

        def smooth(z):
            return gaussian_filter(z, (0, 1.5, 1.5), truncate=3.5)[:, 5:-5, 5:-5]

        variances = smooth(x * x) - smooth(x) ** 2, smooth(y * y) - smooth(y) ** 2
        covariance = smooth(x * y) - smooth(x) * smooth(y)
        value = (2 * covariance + 0.03**2) / (sum(variances) + 0.03**2)
        if scale == 4:
            value = value * (2 * smooth(x) * smooth(y) + 0.01**2) / (smooth(x) ** 2 + smooth(y) ** 2 + 0.01**2)
        product *= max(value.mean(), 0) ** weight
    return product


def test_ms_ssim_equals_its_definition_and_is_near_torchmetrics():
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    a = torch.stack([photo[:, :193, 100:278], photo[:, 300:493, 300:478]])
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    b = (a + noise * torch.tensor([5.0, 60.0]).view(2, 1, 1, 1)).round().clamp(0, 255).to(torch.uint8)
    measured = ms_ssim(a, b)
    expected = [reference_ms_ssim(x.numpy() / 255, y.numpy() / 255) for x, y in zip(a, b, strict=True)]
    assert measured.tolist() == pytest.approx(expected, abs=1e-9)
    # torchmetrics counts windows over mirrored borders
    theirs = multiscale_structural_similarity_index_measure(
        a.double() / 255, b.double() / 255, data_range=1.0, reduction="none"
    )
    torch.testing.assert_close(measured, theirs, rtol=0, atol=5e-3)
    assert ms_ssim(a, a).tolist() == [1.0, 1.0]


def test_ms_ssim_needs_176_px_and_never_takes_a_root_of_a_negative():
    a = torch.randint(0, 256, (1, 3, 176, 176), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert 0 <= float(ms_ssim(a, 255 - a)) < 0.01 and ms_ssim(a[..., 1:, :], a[..., 1:, :]).isnan().all()


def test_several_kinds_are_measured_as_each_alone(lpips_vgg):
    a, b = pairs()
    a, b = floats(a), floats(b)
    together = compare(a, {"one": b, "two": a}, {"vgg": lpips_vgg})
    for kind, made in (("one", b), ("two", a)):
        alone = compare(a, {kind: made}, {"vgg": lpips_vgg}).metrics[kind]
        for key, values in together.metrics[kind].items():
            torch.testing.assert_close(values, alone[key], rtol=1e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(together.metrics["one"]["lpips_vgg"].float(), lpips_vgg(a, b), rtol=1e-4, atol=1e-6)
    features = together.features["vgg"]
    assert [part.shape for part in features] == [(4, 512)] * 3
    torch.testing.assert_close(features[0], features[2], rtol=1e-4, atol=1e-5)


def test_floats_are_compared_as_floats_where_a_protocol_says_so(lpips_vgg):
    a, b = (floats(images) for images in pairs())
    b = b * 1.3 + 0.001  # out of range, and between levels
    compared = compare(a, {"": b}, {"vgg": lpips_vgg}, similarity_of="floats").metrics[""]
    torch.testing.assert_close(compared["lpips_vgg"].float(), lpips_vgg(a, b), rtol=1e-4, atol=1e-6)
    for value, x, y in zip(compared["ssim"].tolist(), a.double().numpy(), b.clamp(-1, 1).double().numpy(), strict=True):
        expected = structural_similarity(
            x, y, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=2
        )
        assert value == pytest.approx(expected, abs=1e-9)
    # what the protocol's source calls; its mean also counts windows over mirrored borders
    theirs = structural_similarity_index_measure(b.double(), a.double(), data_range=(-1.0, 1.0), reduction="none")
    torch.testing.assert_close(compared["ssim"], theirs, rtol=0, atol=0.02)


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.02), pytest.approx(values.mean() + half, abs=0.02))
    assert bootstrap_interval(values) == [low, high] != bootstrap_interval(values, seed=1)


def test_the_frechet_distance_of_lpips_features_is_named_after_them(lpips_vgg):
    a, b = (floats(images) for images in pairs())
    metrics = ReconstructionMetrics("cpu", lpips={"vgg": lpips_vgg})
    metrics.update([0, 1], "ab", a[:2], b[:2])
    metrics.update([2, 3], "cd", a[2:], b[2:])
    x, y = compare(a, {"": b}, {"vgg": lpips_vgg}).features["vgg"]
    expected = frechet_distance(*Gaussian.of(x.numpy()).moments(), *Gaussian.of(y.numpy()).moments())
    summary = metrics.summary()
    assert summary["frechet_vgg16"] == pytest.approx(expected, rel=1e-4) and "fid" not in summary


def test_identical_and_opposite_images():
    black, white = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert psnr(black, black).item() == PSNR_CAP_DB and ssim(black, black).item() == 1.0
    assert psnr(black, white).item() == 0.0 and ssim(black, white).item() == pytest.approx(1e-4, rel=1e-3)


def test_images_below_the_window_are_nan_and_the_smallest_above_is_not():
    a = torch.randint(0, 256, (2, 3, 10, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert ssim(a, a).isnan().all()
    b = torch.randint(0, 256, (2, 3, 11, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ssim(b, b), torch.ones(2, dtype=torch.float64))


def test_floats_and_unequal_shapes_are_refused():
    a, b = pairs()
    with pytest.raises(ValueError, match="to_uint8"):
        psnr(a.float(), b)
    with pytest.raises(ValueError, match="one shape"):
        ssim(a, b[:1])


def test_pixels_are_rounded_before_they_are_measured():
    a, _ = pairs()
    off = floats(a) + 0.4 / 127.5  # less than half a level: the file would be the same
    assert [row["psnr"] for row in measure(floats(a), off).rows()] == [PSNR_CAP_DB] * 4


def test_lpips_equals_its_package_on_the_rounded_pixels():
    a, b = pairs()
    metrics = measure(floats(a), floats(b), nets=("vgg", "alex"))
    for net in ("vgg", "alex"):
        package = lpips_package(metrics.lpips[net])
        with torch.no_grad():
            expected = package(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten().tolist()
        assert [row[f"lpips_{net}"] for row in metrics.rows()] == pytest.approx(expected, abs=1e-5)
        assert metrics.summary()[f"lpips_{net}"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_summary_does_not_depend_on_batches_order_or_duplicates():
    a, b = (floats(images) for images in pairs())
    whole = ReconstructionMetrics("cpu", ())
    whole.update(range(4), ["0.png", "1.png", "2.png", "3.png"], a, b)
    shuffled = measure(a, b, order=random.Random(0).sample([0, 1, 2, 3, 3, 0], 6))
    assert shuffled.rows() == whole.rows() and shuffled.summary() == whole.summary()
    assert whole.summary()["n"] == 4
    assert whole.summary()["psnr"] == pytest.approx(np.mean([row["psnr"] for row in whole.rows()]), rel=1e-12)


def test_a_collapsed_reconstruction_is_named_not_measured():
    a, b = (floats(images) for images in pairs())
    b[1, 0, 3, 3] = math.nan
    summary = measure(a, b).summary()
    assert summary["notes"][0] == "psnr: 1 of 4 images left out, their reconstruction holds NaN or infinity"
    json.dumps(measure(a, b).rows(), allow_nan=False)


@pytest.mark.parametrize(
    ("shape", "lacking", "note"),
    [
        ((2, 5, 40, 40), ["lpips_alex"], "1 or 3 channels and they have 5"),
        ((2, 3, 30, 40), ["lpips_alex"], "shorter than 31 px"),
        ((2, 1, 10, 40), ["ssim", "lpips_alex"], "shorter than 11 px"),
    ],
)
def test_what_cannot_be_measured_is_left_out_with_the_reason(shape, lacking, note):
    a = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    summary = measure(a, -a, nets=("alex",)).summary()
    assert [key for key in ("psnr", "ssim", "lpips_alex") if summary[key] is None] == lacking
    assert any(note in text for text in summary["notes"])
    json.dumps(summary, allow_nan=False)


def test_one_channel_counts_as_gray_for_lpips():
    a, b = (floats(images) for images in pairs(1))
    gray = measure(a, b, nets=("alex",))
    shared = ReconstructionMetrics("cpu", lpips=gray.lpips)
    shared.update(range(4), "abcd", a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))
    repeated = [row["lpips_alex"] for row in shared.rows()]
    assert [row["lpips_alex"] for row in gray.rows()] == pytest.approx(repeated, rel=1e-5)


def test_nothing_measured_is_an_empty_summary():
    assert summarise([]) == {"n": 0}


def test_rgba_is_compared_over_the_background_and_alpha_by_itself():
    """Composites by Pillow; invisible colours, of another image here, do not count."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (40, 40, 4), dtype=np.uint8) for _ in range(2))
    a[:20, :, 3] = b[:20, :, 3] = 0
    composites = []
    for rgba in (a, b):
        ground = Image.new("RGBA", (40, 40), (30, 200, 90, 255))
        composites.append(np.asarray(Image.alpha_composite(ground, Image.fromarray(rgba)).convert("RGB")))
    metrics = ReconstructionMetrics("cpu", (), background=(30, 200, 90))
    metrics.update([0], ["a"], *(floats(torch.from_numpy(x).permute(2, 0, 1)[None]) for x in (a, b)))
    (row,) = metrics.rows()
    expected = peak_signal_noise_ratio(composites[0], composites[1])
    assert row["psnr"] == pytest.approx(expected, abs=0.05) and expected < 25
    assert row["psnr_alpha"] == pytest.approx(peak_signal_noise_ratio(a[..., 3], b[..., 3]), abs=1e-6)


def test_bands_are_compared_as_they_are_and_by_groups_for_lpips(lpips_vgg):
    a, b = (torch.cat([x, x[:, 1:].flip(1)], dim=1)[:, :4] for x in pairs())
    metrics = ReconstructionMetrics("cpu", lpips={"vgg": lpips_vgg}, bands=((3, 1, 0), (2,)))
    metrics.update(range(4), "abcd", floats(a), floats(b))
    x, y = a.float() / 127.5 - 1, b.float() / 127.5 - 1
    expected = (lpips_vgg(x[:, [3, 1, 0]], y[:, [3, 1, 0]]) + lpips_vgg(x[:, [2]], y[:, [2]])) / 2
    assert [row["lpips_vgg"] for row in metrics.rows()] == pytest.approx(expected.tolist(), abs=1e-6)
    assert metrics.rows()[2]["psnr"] == pytest.approx(peak_signal_noise_ratio(a[2].numpy(), b[2].numpy()), abs=1e-6)
    assert "psnr_alpha" not in metrics.rows()[0] and "frechet_vgg16" not in metrics.summary()
