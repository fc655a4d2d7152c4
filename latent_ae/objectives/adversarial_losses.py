"""The losses of generator and discriminator, and the discriminator's regularisers, as functions of logits."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]


def generator_loss(kind: AdversarialLoss, fake_logits: Tensor) -> Tensor:
    """Return the loss that the autoencoder minimises, mean over logits.

    Args:
        kind: hinge: -D(fake) (Lim and Ye 2017). vanilla: -D(fake) too, as in taming-transformers and latent diffusion,
            where the word names the discriminator's loss. non_saturating: softplus(-D(fake)) (Goodfellow et al. 2014,
            section 3).
        fake_logits: Logits of reconstructions, of any shape.
    """
    return F.softplus(-fake_logits).mean() if kind == "non_saturating" else -fake_logits.mean()


def discriminator_loss(kind: AdversarialLoss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the loss that the discriminator minimises: half the sum of the means over real and fake logits.

    Args:
        kind: hinge: relu(1 - D(real)), relu(1 + D(fake)). vanilla and non_saturating: the cross entropy
            softplus(-D(real)), softplus(D(fake)). As in latent diffusion.
        real_logits: Logits of real images, of any shape.
        fake_logits: Logits of reconstructions.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Return half the squared gradient norm of D at real images, mean over samples (Mescheder et al. 2018, eq. 9).

    The D of a sample is the mean of its patches' logits, so that the penalty does not grow with the number of patches.

    Args:
        real_logits: (N, ...) logits computed from `images`.
        images: (N, C, H, W) that require a gradient.
    """
    total = real_logits.flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(total, images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def lecam_loss(real_logits: Tensor, fake_logits: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """Return LeCam's regularisation (Tseng et al. 2021, eq. 4): logits are drawn to the other side's running average.

    With relu, as in the authors' code and in successors of taming: only logits beyond that average are penalised.

    Args:
        real_logits: Logits of real images, of any shape.
        fake_logits: Logits of reconstructions.
        real_average: Running average of the logits of real images, a scalar.
        fake_average: The same of reconstructions.
    """
    return F.relu(real_logits - fake_average).square().mean() + F.relu(real_average - fake_logits).square().mean()
