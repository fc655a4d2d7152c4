"""Losses as pure functions of float32 tensors. Every name or docstring says how the result is normalised."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PixelLoss = Literal["l1", "l2", "charbonnier"]
AdversarialLoss = Literal["hinge", "vanilla"]
CHARBONNIER_EPS = 1e-3


def pixel_loss(kind: PixelLoss, reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of |d|, d^2 or sqrt(d^2 + eps^2) - eps (Charbonnier et al. 1994), d in [-1, 1] units."""
    if kind == "l1":
        return F.l1_loss(reconstruction, target)
    if kind == "l2":
        return F.mse_loss(reconstruction, target)
    difference = reconstruction - target
    return (torch.sqrt(difference.square() + CHARBONNIER_EPS**2) - CHARBONNIER_EPS).mean()


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each latent dimension in nats, N x c x h x w (Kingma and Welling 2014)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def kl_loss(mean: Tensor, logvar: Tensor, image_elements: int) -> Tensor:
    """KL in nats summed over a sample's latent, divided by its C x H x W image elements, averaged over samples.

    Latent diffusion sums the pixel loss and the KL over a sample and weighs the KL with 1e-6. Dividing both sums by
    the image's elements leaves that ratio, so with a per-element pixel loss the weight 1e-6 means the same here.
    """
    return kl_per_dimension(mean, logvar).sum() / (mean.shape[0] * image_elements)


def generator_loss(kind: AdversarialLoss, fake_logits: Tensor) -> Tensor:
    """What the autoencoder minimises, mean over logits.

    hinge: -D(fake) (Lim and Ye 2017). vanilla: softplus(-D(fake)), the non-saturating form (Goodfellow et al. 2014).
    """
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def discriminator_loss(kind: AdversarialLoss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises, half the sum of the means over real and fake logits, as in latent diffusion."""
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def lecam_loss(real_logits: Tensor, fake_logits: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021, eq. 4): logits are drawn to the other side's running average.

    relu as in the authors' code and in taming's successors: only the approach beyond the average is penalised.
    """
    return F.relu(real_logits - fake_average).square().mean() + F.relu(real_average - fake_logits).square().mean()


def adaptive_ratio(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, cap: float) -> Tensor:
    """|grad of reconstruction| / |grad of adversarial| at the last layer (Esser et al. 2021, eq. 7), in [0, cap]."""
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-6)
    return ratio.clamp(0.0, cap)
