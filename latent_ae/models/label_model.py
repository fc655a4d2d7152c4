"""A generative model of the latents of a first stage and of labels: M2 of semi-supervised learning."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from latent_ae.models.companions import stored_companion

FOLDER = "label_model"
"""Folder of a LabelModel in an export."""
LOG_VARIANCE = (-12.0, 8.0)
"""Range to which log-variances are clamped."""
FEWEST_NORMALISED = 4
"""Fewest values of a latent that are normalised: nothing would be left of one, and of two only which is the larger."""


class LabelModel(ModelMixin, ConfigMixin):
    """p(z, y, s) = p(y) p(s) p(z | y, s) for a latent z, a label y and a style s (M2 of Kingma et al. 2014, 2.1).

    p(y) is uniform, p(s) standard normal and p(z | y, s) a diagonal Gaussian. The posterior is q(y | z) q(s | z, y).
    Together with a first stage, p(x | z), this is the stacked model M1 + M2. Each of the three networks has one hidden
    layer, as published; they see each sample's latent normalised to mean 0 and deviation 1 over its own values, if it
    has at least FEWEST_NORMALISED.

    Args:
        num_classes: Number of labels K.
        latent_shape: (c, h, w) of the latents.
        style_size: Number of dimensions of s.
        width: Units of each hidden layer.
        class_names: Names of the labels.
        labels_per_class: Number of labels of each class that it was trained with; None means all.
        draw: Number of their random choice (`data.labels.few_labels`).

    Raises:
        ValueError: If there are fewer than two classes.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        latent_shape: tuple[int, int, int] = (4, 8, 8),
        style_size: int = 50,
        width: int = 500,
        class_names: tuple[str, ...] | None = None,
        labels_per_class: int | None = None,
        draw: int = 0,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes {num_classes} must be at least 2")
        size = math.prod(latent_shape)
        self.latent_shape, self.num_classes, self.style_size = tuple(latent_shape), num_classes, style_size
        self.classifier = _network(size, width, num_classes)
        self.encoder = _network(size + num_classes, width, 2 * style_size)
        self.decoder = _network(style_size + num_classes, width, 2 * size)

    def classify(self, latent: Tensor) -> Tensor:
        """Return log q(y | z), (N, K), for latents, (N, c, h, w)."""
        return self.classifier(_normalised(latent)).log_softmax(1)

    def forward(self, latent: Tensor, noise: Tensor) -> Tensor:
        """Return what the bounds of the paper are made of, for all labels at once.

        Args:
            latent: z, (N, c, h, w).
            noise: Standard normal noise of the style, (N, style_size), the same for all labels.

        Returns:
            (N, 2, K) float32: log q(y | z), and -L(z, y), the bound on log p(z, y) in nats (eq. 6).
        """
        latent = latent.float()
        with torch.autocast(latent.device.type, enabled=False):  # bfloat16 would round z
            z = _normalised(latent)
            labels = torch.eye(self.num_classes, device=z.device).expand(len(z), -1, -1)
            every = z[:, None].expand(-1, self.num_classes, -1)
            mean, logvar = _gaussian(self.encoder(torch.cat([every, labels], 2)))
            style = mean + torch.exp(0.5 * logvar) * noise[:, None]
            rate = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(2)
            density = _log_density(latent.flatten(1)[:, None], *_gaussian(self.decoder(torch.cat([style, labels], 2))))
            return torch.stack([self.classify(latent), density - math.log(self.num_classes) - rate], 1)

    def sample(self, labels: Tensor, style: Tensor) -> Tensor:
        """Return the mean of p(z | y, s), (N, c, h, w).

        Args:
            labels: y, (N,) integers.
            style: s, (N, style_size), standard normal for samples of p(z | y).
        """
        known = F.one_hot(labels, self.num_classes).to(style.dtype)
        mean, _ = _gaussian(self.decoder(torch.cat([style, known], 1)))
        return mean.unflatten(1, self.latent_shape)


def _network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))


def _normalised(latent: Tensor) -> Tensor:
    flat = latent.float().flatten(1)
    return F.layer_norm(flat, flat.shape[1:]) if flat.shape[1] >= FEWEST_NORMALISED else flat


def _gaussian(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = moments.chunk(2, -1)
    return mean, logvar.clamp(*LOG_VARIANCE)


def _log_density(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the log-density of diagonal Gaussians, summed over the last dimension, in nats."""
    return -0.5 * ((x - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def stored_label_model(export: str | Path, revision: str | None = None) -> LabelModel | None:
    """Return the label model of an export; None if it has none. Arguments and errors: `stored_companion`."""
    return stored_companion(LabelModel, FOLDER, export, revision)
