"""What diffusion models and priors learn from here: pictures, a first stage, its latents.

The project is imported in the fixtures, because tests/conftest.py must come first (see `tests.distributed.warm`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from latent_ae.latents.cache import LatentCache


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Smooth pictures of two classes: warm ones and cold ones; 80 to train on and 64 held out."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 64)):
        for number in range(count):
            tint = np.array([1, 0.6, 0.2]) if number % 2 else np.array([0.2, 0.6, 1])
            corners = Image.fromarray((rng.random((2, 2, 1)) * tint * 255).astype(np.uint8))
            path = folder / split / ("cold", "warm")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            corners.resize((16, 16), Image.Resampling.BILINEAR).save(path)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A first stage that reconstructs without training: the linear start."""
    from latent_ae.models.build import build_autoencoder
    from latent_ae.models.settings import ModelSettings

    folder = tmp_path_factory.mktemp("model")
    shape = {"block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4, "init": "linear"}
    vae = build_autoencoder(ModelSettings(**shape), sample_size=16)
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.0)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def latents(model, images, tmp_path_factory) -> LatentCache:
    from latent_ae.latents.cache import open_latents
    from latent_ae.latents.encode import encode_images
    from latent_ae_eval.generation.settings import DiffusionSettings
    from tests.eval.generation.small import SMALL

    folder = tmp_path_factory.mktemp("latents")
    encode_images(model, images, folder, DiffusionSettings(**SMALL).encoding("train"))
    return open_latents(folder)
