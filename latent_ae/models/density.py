"""A mixture of Gaussians on features of latents and reconstructions, in the manner of DAGMM (Zong et al. 2018)."""

import math
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from latent_ae.models.companions import stored_companion

FOLDER = "density"
"""Folder of a Density in an export."""
ERRORS = 2
"""Number of features of a reconstruction."""
FLOOR = 1e-3
"""Part of the variance of all that is added to the variances of each Gaussian, so that none shrinks to a point beside
the others. Nothing here keeps all of them from shrinking together: `Density.penalty` does."""
FIRST = 20
"""Updates in which features belong to Gaussians by fixed directions, since Gaussians that are all alike stay so."""
LEAST_MASS = 1e-3
"""Smallest mass of a Gaussian in the penalty, where a sample of one without any would have a gradient without bound."""
SHARPNESS = 3.0
"""Factor of these directions."""


class Density(ModelMixin, ConfigMixin):
    """A mixture of Gaussians with full covariances, whose parameters follow the features that pass (online EM).

    The features are the mean of each latent channel over its positions and the two of `reconstruction_features`.
    `moments` and `update` are an EM step on running averages (Cappe and Moulines 2009). DAGMM has an estimation network
    guess to which Gaussian a sample belongs; here the mixture itself says so.

    Args:
        components: Number of Gaussians K.
        latent_channels: Channels of the latents.

    Raises:
        ValueError: If there is no Gaussian.
    """

    masses: Tensor
    means: Tensor
    covariances: Tensor
    updates: Tensor

    @register_to_config
    def __init__(self, components: int = 4, latent_channels: int = 4):
        super().__init__()
        if components < 1:
            raise ValueError(f"components {components} must be positive")
        size = latent_channels + ERRORS
        self.register_buffer("masses", torch.zeros(components))
        self.register_buffer("means", torch.zeros(components, size))
        self.register_buffer("covariances", torch.eye(size).repeat(components, 1, 1))
        self.register_buffer("updates", torch.zeros(()))
        directions = torch.randn(size, components, generator=torch.Generator().manual_seed(0)) * size**-0.5
        self.register_buffer("directions", directions, persistent=False)

    @staticmethod
    def features(latent: Tensor, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the features of images, (N, c + 2) float32.

        Args:
            latent: (N, c, h, w), raw.
            images: (N, C, H, W).
            reconstruction: The same shape.
        """
        errors = reconstruction_features(images, reconstruction)
        return torch.cat([latent.float().mean((2, 3)), errors.float()], 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return minus the log-density in nats, (N,), of features, (N, c + 2)."""
        return -self._joint(features).logsumexp(1)

    def penalty(self, features: Tensor) -> Tensor:
        """Return values whose mean has the gradient of DAGMM's penalty on small variances (Zong et al. 2018, 3.4).

        The penalty is sum_kj 1 / S_kjj, where S_k is the covariance of the samples of a batch weighted by the
        probabilities g_nk that they belong to Gaussian k. With g held fixed its gradient is that of the mean over
        samples of -sum_kj g_nk / p_k (f_nj - m_kj)^2 / S_kjj^2, in which g, the masses p, the means m and S are held
        fixed. Here p, m and S are the running averages, so the gradient does not depend on how a batch is split. The
        sum is over latent channels alone: features of reconstructions vary little by nature, and it would drive them
        apart.

        Args:
            features: f, (N, c + 2).

        Returns:
            (N,); only the gradient has a meaning.
        """
        channels = features.shape[1] - ERRORS
        with torch.no_grad():
            belongs = self._joint(features).softmax(1) / self._weights().clamp(min=LEAST_MASS)
            variances = self._covariances().diagonal(dim1=1, dim2=2)[:, :channels]
        apart = features[:, None, :channels] - self.means[:, :channels]
        return -torch.einsum("nk,nkd->n", belongs, apart.square() / variances.square())

    @torch.no_grad()
    def moments(self, features: Tensor) -> dict[str, Tensor]:
        """Return what `update` takes: for each Gaussian the mean over samples of 1, f - m and (f - m) (f - m)^T.

        Each is weighted by the probability that the sample belongs to the Gaussian, and m is the Gaussian's mean.

        Args:
            features: f, (N, D).
        """
        joint = self._joint(features)
        spread = self._spread()
        centre = (self._weights()[:, None] * self.means).sum(0)
        first = SHARPNESS * ((features - centre) / spread.sqrt()) @ self.directions
        belongs = torch.where(self.updates < FIRST, first, joint).softmax(1)
        apart = features[:, None] - self.means
        return {
            "mass": belongs.mean(0),
            "shift": torch.einsum("nk,nkd->kd", belongs, apart) / len(features),
            "square": torch.einsum("nk,nkd,nke->kde", belongs, apart, apart) / len(features),
        }

    @torch.no_grad()
    def update(self, moments: dict[str, Tensor], decay: float) -> None:
        """Let the parameters follow the moments of a batch.

        Args:
            moments: Those of `moments`, means over the whole batch.
            decay: Part of the running averages that stays.
        """
        masses = decay * self.masses + (1.0 - decay) * moments["mass"]
        # the part of each Gaussian's average that is new
        part = ((1.0 - decay) * moments["mass"] / masses.clamp(min=1e-12))[:, None]
        share = moments["mass"].clamp(min=1e-12)[:, None]
        shift, square = moments["shift"] / share, moments["square"] / share[:, None]
        moved = part * shift
        kept, new = (1.0 - part)[:, None] * self.covariances, part[:, None] * square
        covariances = kept + new - moved[:, :, None] * moved[:, None]
        # far from the first means, which are 0, squares would cancel: the first update moves all means to the mean of
        # the batch, and the covariances are those of the second batch
        means = torch.where(self.updates == 0, moments["shift"].sum(0), self.means + moved)
        covariances = torch.where(self.updates == 1, square - shift[:, :, None] * shift[:, None], covariances)
        self.covariances.copy_(torch.where(self.updates == 0, self.covariances, covariances))
        self.means.copy_(means)
        self.masses.copy_(masses)
        self.updates.add_(1.0)

    def _weights(self) -> Tensor:
        return (self.masses + 1e-8) / (self.masses + 1e-8).sum()

    def _spread(self) -> Tensor:
        """Return the variance of each feature under the mixture, (D,)."""
        weights = self._weights()[:, None]
        centre = (weights * self.means).sum(0)
        inside = self.covariances.diagonal(dim1=1, dim2=2)
        return (weights * (inside + (self.means - centre).square())).sum(0).clamp(min=1e-8)

    def _covariances(self) -> Tensor:
        return self.covariances + torch.diag(FLOOR * self._spread())

    def _joint(self, features: Tensor) -> Tensor:
        """Return the log-density of features, (N, D), together with each Gaussian, (N, K)."""
        with torch.autocast(features.device.type, enabled=False):
            factor, _ = torch.linalg.cholesky_ex(self._covariances())  # the check of `cholesky` waits for the device
            apart = (features[:, None] - self.means).transpose(0, 1)  # (K, N, D)
            scaled = torch.linalg.solve_triangular(factor, apart.transpose(1, 2), upper=False)
            logdet = factor.diagonal(dim1=1, dim2=2).log().sum(1)
            constant = 0.5 * features.shape[1] * math.log(2.0 * math.pi)
            logs = -0.5 * scaled.square().sum(1) - (logdet + constant)[:, None]
            return logs.T + self._weights().log()


def reconstruction_features(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Return DAGMM's features of a reconstruction (Zong et al. 2018, section 3.2).

    Args:
        images: (N, C, H, W).
        reconstruction: The same shape.

    Returns:
        (N, 2) float64: the logarithm of the relative Euclidean distance |x - x'| / |x|, and the cosine similarity. The
        paper takes the distance itself.
    """
    x, y = images.double().flatten(1), reconstruction.double().nan_to_num(nan=-1.0).flatten(1)
    norms = x.norm(dim=1), y.norm(dim=1)
    tiny = 1e-6
    distance = ((x - y).norm(dim=1) / norms[0].clamp(min=tiny)).clamp(min=tiny).log()
    return torch.stack([distance, (x * y).sum(1) / (norms[0] * norms[1]).clamp(min=tiny)], 1)


def stored_density(export: str | Path, revision: str | None = None) -> Density | None:
    """Return the density of an export; None if it has none. Arguments and errors: `stored_companion`."""
    return stored_companion(Density, FOLDER, export, revision)
