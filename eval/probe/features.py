"""Features of images in files, scaled for classifiers: latents, pixels, and principal components of those."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.rng import spread
from latent_ae.data.sources import StoredImages
from latent_ae.models.loading import FirstStage
from latent_ae_eval.jobs import batches, images_for, watched
from latent_ae_eval.probe.classifiers import BLOCK
from latent_ae_eval.probe.settings import ProbeSettings
from latent_ae_eval.storage import FeatureFile

FEATURES = ("latent", "latent_pooled", "pixels", "pixels_pca")
PCA_IMAGES = 2000


def several_sizes(a: Sequence[int], b: Sequence[int]) -> str:
    return (
        f"images of {a[2]} x {a[1]} px and of {b[2]} x {b[1]} px: a probe needs one size; "
        "set crop_px, and resize_px to resize them first"
    )


class ImageFeatures:
    """Features of images in files, a row per readable image."""

    def __init__(
        self, stem: Path, stage: FirstStage, settings: ProbeSettings, device: torch.device, data: str, progress: bool
    ):
        self.stage, self.settings, self.device, self.data, self.progress = stage, settings, device, data, progress
        self.files = {kind: FeatureFile(stem.with_name(f"{stem.name}-{kind}.f32")) for kind in FEATURES[:3]}
        self.rows: list[int] = []
        self.shape: Sequence[int] = ()

    def write(self, source: StoredImages, what: str) -> list[str]:
        """Returns what could not be read."""
        bad: list[str] = []
        images = images_for(self.stage, source, self.settings, self.data)
        seen = watched(images, len(source), f"probe: {what}", bad, self.progress)
        for items, batch in batches(seen, self.settings.batch_size, self.device):
            if self.shape and self.shape != batch.shape[1:]:
                raise UserError(several_sizes(self.shape, batch.shape[1:]))
            self.shape = batch.shape[1:]
            latent = self.stage.encode(batch.to(self.device)).mean
            made = {"latent": latent.flatten(1), "latent_pooled": latent.mean((2, 3)), "pixels": batch.flatten(1)}
            for kind, values in made.items():
                self.files[kind].append(values.cpu().numpy())
            self.rows += [item.index for item in items]
        return bad


def add_components(scratch: Path, files: Sequence[dict[str, FeatureFile]]) -> None:
    """Principal components of the training images' pixels, for both parts."""
    train = files[0]["pixels"]
    chosen = spread(0, train.count, PCA_IMAGES)
    x = torch.from_numpy(train.rows(chosen)).double()
    mean = x.mean(0)
    x -= mean
    count = min(files[0]["latent"].dimensions, len(x) - 1, x.shape[1])
    if x.shape[1] < len(x):
        _, directions = torch.linalg.eigh(x.T @ x)
        directions = directions[:, -count:]
    else:  # the smaller of both products
        values, u = torch.linalg.eigh(x @ x.T)
        directions = x.T @ (u[:, -count:] / values[-count:].clamp(min=1e-12 * float(values[-1])).sqrt())
    for part, name in zip(files, ("train", "test"), strict=True):
        file = FeatureFile(scratch / f"{name}-pixels_pca.f32")
        for first in range(0, part["pixels"].count, BLOCK):
            rows = np.arange(first, min(first + BLOCK, part["pixels"].count))
            block = torch.from_numpy(part["pixels"].rows(rows)).double() - mean
            file.append((block @ directions).float().numpy())
        part["pixels_pca"] = file


class Scaled:
    """Features of both parts, centred and scaled by what the training images say."""

    def __init__(self, train: FeatureFile, test: FeatureFile, scale: str, device: torch.device):
        self.files, self.device = (train, test), device
        total, squares, count = np.zeros(train.dimensions), np.zeros(train.dimensions), train.count
        for first in range(0, count, BLOCK):
            total += train.rows(np.arange(first, min(first + BLOCK, count))).sum(0, dtype=np.float64)
        self.mean = total / count
        for first in range(0, count, BLOCK):  # about the mean: squares of nearly equal numbers would cancel
            rows = train.rows(np.arange(first, min(first + BLOCK, count)))
            squares += np.square(rows - self.mean).sum(0)
        variance = squares / count
        if scale == "global":
            variance = np.full_like(variance, variance.mean())
        # features that never vary say nothing, and stay 0
        self.factor = np.where(variance > 0, 1 / np.sqrt(np.where(variance > 0, variance, 1) * len(variance)), 0)

    def rows(self, part: int, rows: np.ndarray) -> Tensor:
        """(N, D) float32 on the device."""
        scaled = (self.files[part].rows(rows) - self.mean) * self.factor
        return torch.from_numpy(scaled.astype(np.float32)).to(self.device)
