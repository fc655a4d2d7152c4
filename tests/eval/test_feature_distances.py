"""Distances in features of DINOv2 and CLIP, and precision and recall, against SciPy and plain sums."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.pretrained.image_features import ClipFeatures, DinoFeatures
from latent_ae_eval import evaluate
from latent_ae_eval.recon.measure import evaluate_reconstruction
from tests.eval.small import settings_with, write_photos
from tests.tiny_models import tiny
from tests.tiny_vision import save_clip, save_vision_model

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("vision")
    save_vision_model(folder / "dinov2", patch_size=56, image_size=112)
    save_clip(folder / "clip")
    return {"dinov2_model": str(folder / "dinov2"), "clip_model": str(folder / "clip")}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


def discrepancy(a: np.ndarray, b: np.ndarray, kernel, biased: bool) -> float:
    n, own = len(a), [kernel(x, x) for x in (a, b)]
    across = kernel(a, b)  # of an image and its own reconstruction, on the diagonal
    first, second, crossed = (k.mean() if biased else (k.sum() - np.trace(k)) / (n * (n - 1)) for k in (*own, across))
    return first + second - 2 * crossed


def polynomial(u, v):
    return (u @ v.T / u.shape[1] + 1) ** 3


def gaussian(u, v):
    return np.exp(-np.square(u[:, None] - v[None]).sum(2) / 200)


def share_within(points: np.ndarray, centres: np.ndarray) -> float:
    radii = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=2), axis=1)[:, 3]
    return (np.linalg.norm(points[:, None] - centres[None], axis=2) <= radii).any(1).mean()


def test_distances_are_those_of_features_by_plain_sums(tmp_path, folders):
    photos, model = write_photos(tmp_path / "photos", 52, side=32), tiny("AutoencoderKL").eval()
    names = ("dinov2", "clip")
    settings = settings_with(frechet=names, precision_recall=names, latents=("mode",), **folders)
    result = evaluate_reconstruction(model, photos, settings)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(photos.iterdir())])
    pixels = pixels.permute(0, 3, 1, 2)
    with torch.no_grad():
        made = model.decode(model.encode(pixels / 127.5 - 1).latent_dist.mode()).sample.clamp(-1, 1)
    levels = ((made + 1) * 127.5).round().to(torch.uint8)
    values, intervals = result["metrics"]["mode"], result["intervals"]["mode"]
    for name, network in (("dinov2", DinoFeatures), ("clip", ClipFeatures)):
        features = network(folders[f"{name}_model"])
        key = f"{name}_{features.sha256[:8]}"
        assert result["networks"][name] == features.sha256
        a, b = (features(images).double().numpy() for images in (pixels, levels))
        assert values[f"frechet_{key}"] == pytest.approx(frechet(a, b), rel=1e-3)
        kid, cmmd = discrepancy(a, b, polynomial, biased=False), 1000 * discrepancy(a, b, gaussian, biased=True)
        assert values[f"kernel_{key}"] == pytest.approx(kid if name == "dinov2" else cmmd, rel=1e-3)
        assert values[f"precision_{key}"] == pytest.approx(share_within(b, a))
        assert values[f"recall_{key}"] == pytest.approx(share_within(a, b))
        for metric in ("frechet", "kernel", "precision", "recall"):
            low, high = intervals[f"{metric}_{key}"]
            assert low <= values[f"{metric}_{key}"] <= high and (low < high or metric in ("precision", "recall"))
    assert not {"fid", "fd_dinov2", "cmmd"} & set(values)  # the networks are not the published ones


def test_published_sizes_give_published_names_also_for_midpoints(tmp_path, folders, monkeypatch):
    monkeypatch.setattr("latent_ae.pretrained.image_features._agrees", lambda network, *published: True)
    photos, model = write_photos(tmp_path / "photos", 5), tiny("AutoencoderKL")
    settings = settings_with(frechet=("dinov2", "clip"), precision_recall=("dinov2",), latents=("mode",), **folders)
    result = evaluate_reconstruction(model, photos, settings)
    values = result["metrics"]["mode"]
    assert {"fd_dinov2", "kd_dinov2", "frechet_clip", "cmmd", "precision_dinov2", "recall_dinov2"} <= set(values)
    assert any(note.startswith("fd_dinov2: N = 5 is under 16: biased upwards") for note in result["notes"])
    ifid = {"frechet": ("dinov2",), "dinov2_model": folders["dinov2_model"], "neighbours": 2, "crop_px": 32}
    metrics = evaluate("ifid", model, photos, num_workers=0, **ifid)["metrics"]
    assert metrics["reconstructions"]["fd_dinov2"] > 0 and metrics["midpoints"]["fd_dinov2"] > 0


def test_features_without_a_folder_are_named_before_anything_is_read(tmp_path, capsys):
    words = ["frechet=[dinov2]", f"clip_model={tmp_path}", "precision_recall=[vgg16]"]
    assert main(["eval", "recon", "nowhere", "photos", *words]) == 2
    said = capsys.readouterr().err
    for message in (
        "dinov2_model: frechet names dinov2, which needs a folder",
        "clip_model: is used by frechet, which does not name clip",
        "precision_recall: measures features of frechet, which lacks vgg16",
    ):
        assert message in said
    assert "Traceback" not in said
