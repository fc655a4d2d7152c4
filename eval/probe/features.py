"""Features of images, stored in files and scaled for classifiers: latents, pixels, and their principal components."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.rng import spread
from latent_ae.data.sources import StoredImages
from latent_ae.models.loading import FirstStage
from latent_ae_eval.jobs import batches, images_for, refuse_infinite, watched
from latent_ae_eval.probe.classifiers import BLOCK
from latent_ae_eval.probe.settings import ProbeSettings
from latent_ae_eval.storage import FeatureFile

FEATURES = ("latent", "latent_pooled", "pixels", "pixels_pca")
PCA_IMAGES = 2000
"""Largest number of images from which principal components are computed."""


def several_sizes(a: Sequence[int], b: Sequence[int]) -> str:
    """Return the message about images of two shapes, (C, H, W) each."""
    return (
        f"images of {a[2]} x {a[1]} px and of {b[2]} x {b[1]} px: a probe needs one size; "
        "set crop_px, and resize_px to resize them first"
    )


class ImageFeatures:
    """Files of features with a row per readable image.

    `files` holds them by the kind of feature, `rows` the numbers of the images, `shape` their (C, H, W), and
    `latent_shape` that of the latents.

    Args:
        stem: Beginning of the files' paths.
        stage: The model.
        settings: The framing and batch size.
        device: Where the model runs.
        data: The location of the images.
        progress: Show a progress bar.
    """

    def __init__(
        self, stem: Path, stage: FirstStage, settings: ProbeSettings, device: torch.device, data: str, progress: bool
    ):
        self.stage, self.settings, self.device, self.data, self.progress = stage, settings, device, data, progress
        self.files = {kind: FeatureFile(stem.with_name(f"{stem.name}-{kind}.f32")) for kind in FEATURES[:3]}
        self.rows: list[int] = []
        self.digests: list[str] = []
        self.shape: Sequence[int] = ()
        self.latent_shape: Sequence[int] = ()

    def write(self, source: StoredImages, what: str) -> list[str]:
        """Compute and write the features of a source's images.

        Args:
            source: The images.
            what: What the progress bar calls them.

        Returns:
            `name: reason` of each unreadable image.

        Raises:
            UserError: If images have several sizes.
        """
        bad: list[str] = []
        images = images_for(self.stage, source, self.settings, self.data)
        items_read = watched(images, len(source), f"probe: {what}", bad, self.progress)
        for items, batch in batches(items_read, self.settings.batch_size, self.device):
            if self.shape and self.shape != batch.shape[1:]:
                raise UserError(several_sizes(self.shape, batch.shape[1:]))
            self.shape = batch.shape[1:]
            latent = self.stage.encode(batch.to(self.device)).mean
            refuse_infinite(latent, [item.name for item in items], self.stage, self.data)
            self.latent_shape = latent.shape[1:]
            features = {"latent": latent.flatten(1), "latent_pooled": latent.mean((2, 3)), "pixels": batch.flatten(1)}
            for kind, values in features.items():
                self.files[kind].append(values.cpu().numpy())
            self.rows += [item.index for item in items]
            self.digests += [item.digest for item in items]
        return bad


def add_components(scratch: Path, files: Sequence[dict[str, FeatureFile]]) -> None:
    """Add the coordinates on principal components of the training images' pixels to both parts.

    Args:
        scratch: Folder for the new files.
        files: Features of the training and test images by kind; "pixels_pca" is added.
    """
    train = files[0]["pixels"]
    chosen = spread(0, train.count, PCA_IMAGES)
    x = torch.from_numpy(train.rows(chosen)).double()
    mean = x.mean(0)
    x -= mean
    count = min(files[0]["latent"].dimensions, len(x) - 1, x.shape[1])
    if x.shape[1] < len(x):
        _, directions = torch.linalg.eigh(x.T @ x)
        directions = directions[:, -count:]
    else:  # x x^T is the smaller one of the two products
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
    """Features of both parts, centred and scaled by statistics of the training images.

    Args:
        train: Features of the training images.
        test: Features of the test images.
        scale: "global" or "feature", see `ProbeSettings.scale`.
        device: Where rows go.
    """

    def __init__(self, train: FeatureFile, test: FeatureFile, scale: str, device: torch.device):
        self.files, self.device = (train, test), device
        total, squares, count = np.zeros(train.dimensions), np.zeros(train.dimensions), train.count
        for first in range(0, count, BLOCK):
            total += train.rows(np.arange(first, min(first + BLOCK, count))).sum(0, dtype=np.float64)
        self.mean = total / count
        for first in range(0, count, BLOCK):  # about the mean, because differences of sums of squares would cancel
            rows = train.rows(np.arange(first, min(first + BLOCK, count)))
            squares += np.square(rows - self.mean).sum(0)
        variance = squares / count
        if scale == "global":
            variance = np.full_like(variance, variance.mean())
        # constant features carry no information, and become 0
        self.factor = np.where(variance > 0, 1 / np.sqrt(np.where(variance > 0, variance, 1) * len(variance)), 0)

    def rows(self, part: int, rows: np.ndarray) -> Tensor:
        """Return scaled features, (N, D) float32 on the device.

        Args:
            part: 0 for training, 1 for test images.
            rows: (N,) row numbers.
        """
        scaled = (self.files[part].rows(rows) - self.mean) * self.factor
        return torch.from_numpy(scaled.astype(np.float32)).to(self.device)
