"""Inception v3 with random weights that keep the signal's size, stored as torch-fidelity's own command reads them."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Empty(FeatureExtractorInceptionV3):
    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> None:
        """The constructor insists on loading something; it is made below instead."""


def random_inception(path: Path) -> Path:
    """Writes the state dict."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Empty("random", ["2048"], feature_extractor_weights_path=nothing)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def pytorch_fid(weights: Path | str, images: torch.Tensor) -> torch.Tensor:
    """The features of (N, 3, H, W) uint8 images as pytorch-fid computes them.

    It takes ToTensor, F.interpolate without corners or antialiasing, and 2 x - 1. At 299 px torch-fidelity's own resize
    does nothing, so its network can be given the result by way of its layers.
    """
    network = FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=str(weights))
    x = 2 * F.interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
    for name, layer in list(network.named_children())[:-1]:
        assert name != "fc"
        x = layer(x)
    return x.flatten(1)
