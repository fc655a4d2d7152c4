"""DISTS against torchmetrics' network, with the same weights."""

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.dists as theirs
import torchvision
from PIL import Image
from safetensors.torch import load_file

from latent_ae.config import UserError
from latent_ae.pretrained import dists
from latent_ae.pretrained.weights import weight_file
from latent_ae_eval.recon.measure import evaluate_reconstruction
from tests.eval.small import settings_with, write_photos


@pytest.fixture
def reference(lpips_vgg, monkeypatch) -> theirs.DISTSNetwork:
    """torchmetrics' network; the weights of VGG16 are ours, because its own would come from a hub."""
    vgg16 = torchvision.models.vgg16()
    vgg16.load_state_dict(load_file(weight_file("vgg16")), strict=False)
    monkeypatch.setattr(theirs, "vgg16", lambda weights: vgg16)
    return theirs.DISTSNetwork().eval()


def test_distances_are_those_of_torchmetrics(tmp_path, reference):
    photos = write_photos(tmp_path / "photos", 2, side=40)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(photos.iterdir())])
    given = pixels.permute(0, 3, 1, 2).float() / 255
    made = (0.7 * given + 0.2).mul(255).round() / 255
    blurred = torch.nn.functional.avg_pool2d(given, 3, 1, 1)
    measured = dists.DISTS().compare(2 * given - 1, [2 * made - 1, 2 * blurred - 1, 2 * given - 1])
    for values, images in zip(measured, (made, blurred), strict=False):
        expected = reference(given, images)
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5)
        assert expected.min() > 0.01
    assert measured[2].abs().max() < 1e-5
    settings = settings_with(dists=True, crop_px=None)
    result = evaluate_reconstruction(lambda images: 0.7 * images + 0.1, photos, settings)
    assert result["metrics"]["mode"]["dists"] == pytest.approx(float(measured[0].mean()), abs=1e-4)


def test_the_weights_of_the_channels_are_needed(monkeypatch):
    monkeypatch.setattr(dists, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"dists: needs torchmetrics 1.8 .*pip install '.\[dists\]' in"):
        dists._channel_weights()
