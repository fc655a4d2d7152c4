"""Scores that are fitted to normal images: the mixture against scipy, nearest patches against torchvision's VGG16."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import multivariate_normal

from latent_ae.config import UserError, load_settings
from latent_ae.models.density import reconstruction_features
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.pretrained.weights import weight_file
from latent_ae_eval.anomaly.density import REGULARISATION, Mixture
from latent_ae_eval.anomaly.measure import find_anomalies
from latent_ae_eval.anomaly.neighbours import Neighbours
from latent_ae_eval.anomaly.settings import AnomalySettings
from tests.tiny_models import tiny_autoencoder


def test_one_gaussian_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    latents, errors = rng.normal(size=(200, 6)) * [5, 4, 3, 2, 1, 0.5], rng.normal(size=(200, 2))
    mixture = Mixture(1, seed=0)
    mixture.fit(latents, errors)
    # all six components are kept, so a rotation and a scale are all that lies between these and the features
    features = np.concatenate([(latents - latents.mean(0)) @ mixture.directions.T, errors], 1)
    standard = (features - features.mean(0)) / features.std(0)
    covariance = np.cov(standard.T, bias=True) + REGULARISATION * np.eye(8)
    expected = -multivariate_normal(standard.mean(0), covariance).logpdf(standard)
    np.testing.assert_allclose(mixture.energies(latents, errors), expected, rtol=1e-8)
    np.testing.assert_allclose(np.abs(mixture.directions @ mixture.directions.T), np.eye(6), atol=1e-12)


def test_two_clusters_need_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat([[-8.0, 0.0], [8.0, 0.0]], 60, 0)
    latents, errors = centres + rng.normal(size=(120, 2)), rng.normal(size=(120, 2))
    middle, inside = np.zeros((1, 2)), np.array([[8.0, 0.0]])
    for components, found in ((1, False), (2, True)):
        mixture = Mixture(components, seed=0)
        mixture.fit(latents, errors)
        far = mixture.energies(middle, np.zeros((1, 2))) > mixture.energies(inside, np.zeros((1, 2))) + 10
        assert bool(far[0]) is found


def test_features_of_a_reconstruction_are_those_of_dagmm() -> None:
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    found = reconstruction_features(x, y)
    for n in range(3):
        a, b = x[n].flatten().double(), y[n].flatten().double()
        assert float(found[n, 0].exp()) == pytest.approx(float((a - b).norm() / a.norm()))
        assert float(found[n, 1]) == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))


def patches_of_torchvision(images: torch.Tensor) -> torch.Tensor:
    network = torchvision.models.vgg16().features
    weights = load_file(weight_file("vgg16"))
    network.load_state_dict({key.removeprefix("features."): value for key, value in weights.items()})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        found = [network[:16](x), network[:23](x)]
    # a mean over 3 x 3 positions, as far as they are inside
    unfolded = []
    for part in found:
        height, width = part.shape[2:]
        means = torch.zeros_like(part)
        for i in range(height):
            for j in range(width):
                means[:, :, i, j] = part[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].mean((2, 3))
        unfolded.append(means)
    n, c, h, w = unfolded[0].shape
    smaller = unfolded[0].view(n, c, h // 2, 2, w // 2, 2).mean((3, 5))
    return torch.cat([smaller, unfolded[1]], 1)


def test_patches_and_distances_are_those_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    normal, others = (torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))
    search = Neighbours(LPIPS("vgg"), 1000, seed=0)
    expected = patches_of_torchvision(normal)
    torch.testing.assert_close(search.patches(normal), expected, rtol=1e-3, atol=1e-3)
    search.learn(normal)
    bank, queries = (part.movedim(1, -1).flatten(0, 2) for part in (expected, patches_of_torchvision(others)))
    assert search.bank.shape == (2 * 4 * 6, 768)
    distances = torch.stack([(bank - query).norm(dim=1).min() for query in queries]).view(2, 4, 6)
    scores, maps = search.score(others)
    torch.testing.assert_close(scores, distances.amax((1, 2)), rtol=1e-3, atol=1e-3)
    assert maps.shape == (2, 32, 48)
    known, _ = search.score(normal)
    assert (known < 0.01 * scores).all()


def test_the_bank_is_a_uniform_choice() -> None:
    search, counts = Neighbours(LPIPS("vgg"), 3, seed=0), torch.zeros(12)
    numbered = torch.arange(12.0).view(12, 1, 1, 1)
    search.patches = lambda images: images  # type: ignore[method-assign]
    for _ in range(600):
        search.seen, search.bank, search.ranks = 0, torch.empty(0), torch.empty(0)
        for part in numbered.split(5):
            search.learn(part)
        assert search.seen == 12 and len(search.bank.unique()) == 3
        counts[search.bank.flatten().long()] += 1
    assert ((counts - 150).abs() < 5 * (600 * 0.25 * 0.75) ** 0.5).all()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Normal: slopes in noise; abnormal: the same with checks of 4 px."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for place, count in (("normal", 40), ("test/normal", 12), ("test/odd", 12)):
        (folder / place).mkdir(parents=True)
        for number in range(count):
            slope = np.linspace(60, 180, 32)[None, :, None] + rng.normal(0, 6, (32, 32, 3))
            if place.endswith("odd"):
                checks = np.indices((32, 32)).sum(0) // 4 % 2
                slope = slope + 40 * checks[:, :, None]
            Image.fromarray(slope.clip(0, 255).astype(np.uint8)).save(folder / place / f"{number:02d}.png")
    return folder


def test_both_find_what_is_odd(pictures: Path, tmp_path: Path) -> None:
    settings = AnomalySettings(
        normal=str(pictures / "normal"),
        normal_class="normal",
        mixture=1,
        neighbours=200,
        lpips=None,
        num_workers=0,
        rank_by="neighbours",
        num_pictures=1,
    )
    result = find_anomalies(tiny_autoencoder(), pictures / "test", settings, out=tmp_path)
    assert result["scores"]["mixture"]["auroc"] > 0.95 and result["scores"]["neighbours"]["auroc"] == 1
    # half of the normal images fit, and the others give the thresholds
    assert (result["normal"]["variance_from"], result["normal"]["thresholds_from"]) == (20, 20)
    assert result["thresholds"]["mixture"] is not None and result["scores"]["neighbours"]["detection_rate"] == 1
    page = (tmp_path / "report.html").read_text()
    assert "nearest patches" in page and "mixture of Gaussians" in page


def test_values_that_are_not_finite() -> None:
    rng = np.random.default_rng(0)
    latents, errors = rng.normal(size=(40, 6)), rng.normal(size=(40, 2))
    mixture = Mixture(2, seed=0)
    mixture.fit(latents, errors)
    for value in (np.nan, np.inf):
        broken = latents.copy()
        broken[3, 2] = value
        energies = mixture.energies(broken, errors)
        assert np.isfinite(energies).all() and energies.argmax() == 3
        with pytest.raises(UserError, match="mixture: the model gives values that are not finite"):
            Mixture(2, seed=0).fit(broken, errors)


def test_a_mixture_needs_images_of_one_size(pictures: Path, tmp_path: Path) -> None:
    for number in range(12):  # as many pixels, so that their flattened latents have the same length
        Image.new("RGB", (64, 16) if number == 9 else (32, 32)).save(tmp_path / f"{number:02d}.png")
    rest = {"mixture": 1, "lpips": None, "num_workers": 0}
    wrong = "mixture: needs images of one size; .* has 32 x 32 and 09.png has 64 x 16: set resize_px and crop_px"
    with pytest.raises(UserError, match=wrong):
        find_anomalies(tiny_autoencoder(), tmp_path, AnomalySettings(normal=str(pictures / "normal"), **rest))
    with pytest.raises(UserError, match=wrong):
        find_anomalies(tiny_autoencoder(), pictures / "test", AnomalySettings(normal=str(tmp_path), **rest))
    # a function has no latents, and the features of its reconstructions do not depend on the size
    result = find_anomalies(lambda images: 0.9 * images, tmp_path, AnomalySettings(normal=str(tmp_path), **rest))
    assert "mixture" in result["scores"]


def test_mistakes_are_named(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="mixture: is fitted to normal images; give normal=DATA"):
        load_settings(AnomalySettings, None, ["mixture=2"])
    settings = AnomalySettings(normal=str(pictures / "normal"), mixture=11, lpips=None, num_workers=0)
    with pytest.raises(UserError, match="mixture: 11 Gaussians need 22 normal images to fit, and there are 20"):
        find_anomalies(tiny_autoencoder(), pictures / "test", settings)
    for key in ("mixture", "neighbours"):
        ranked = settings.model_copy(update={"mixture": 0, "rank_by": key})
        with pytest.raises(UserError, match=f"{key} will not be measured; .*; it needs {key}=NUMBER and normal=DATA"):
            find_anomalies(tiny_autoencoder(), pictures / "test", ranked)
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(UserError, match="scikit-learn is not installed"):
        Mixture(2, seed=0)
