"""Inception v3 with random weights that keep the signal's size, stored as torch-fidelity's own command reads them."""

import io
from pathlib import Path
from typing import Any

import torch
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
