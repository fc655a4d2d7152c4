"""Evaluations of a few small photographs."""

from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image

from latent_ae_eval.recon.settings import ReconSettings

SMALL = {"resize_px": None, "crop_px": 32, "lpips": (), "num_workers": 0}


def write_photos(folder: Path, count: int, side: int = 40, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    photo, rng = skimage.data.astronaut(), np.random.default_rng(seed)
    for number in range(count):
        y, x = rng.integers(0, 512 - side, 2)
        Image.fromarray(photo[y : y + side, x : x + side]).save(folder / f"{number:03d}.png")
    return folder


def settings_with(**changes) -> ReconSettings:
    return ReconSettings(**{**SMALL, "frechet": (), **changes})


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Fréchet distance (Dowson and Landau 1982). torch-fidelity takes a square root of 2048 x 2048 numbers, which
    takes most of a minute. Its trace is the sum of the singular values of the product of the centred features."""
    left, right = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    shared = torch.linalg.svdvals(left @ right.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + left.square().sum() + right.square().sum() - 2 * shared)
