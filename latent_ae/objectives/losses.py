"""Losses as pure functions of float32 tensors. Every name or docstring says how the result is normalised."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PixelLoss = Literal["l1", "l2", "charbonnier"]
AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]
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


def kl_loss(rates: Sequence[Tensor], image_elements: int) -> Tensor:
    """KL in nats summed over a sample's latent, divided by its C x H x W image elements, averaged over samples.

    `rates` holds the KL of each latent dimension, N x c x h x w, for each level of the latent.
    Latent diffusion sums the pixel loss and the KL over a sample and weighs the KL with 1e-6. Dividing both sums by
    the image's elements leaves that ratio, so with a per-element pixel loss the weight 1e-6 means the same here.
    """
    return torch.stack([rate.sum() for rate in rates]).sum() / (rates[0].shape[0] * image_elements)


def free_bits_loss(rates: Sequence[Tensor], image_elements: int, floor: float) -> tuple[Tensor, Tensor]:
    """`kl_loss` in which a channel below `floor` nats per latent dimension counts as `floor`, and the share of those.

    Free bits of Kingma et al. 2016 (section 3 and appendix C.8): sum over channels of max(floor, KL), so a channel has
    no gradient while it tells less. KL is a sample's mean over the channel's positions; the paper's mean over the
    minibatch as well would make the gradient depend on how a batch is split over passes and processes.
    """
    channels = [rate.mean((2, 3)) for rate in rates]
    elements = rates[0].shape[0] * image_elements
    terms = [
        means.clamp(min=floor).sum() * (rate[0, 0].numel() / elements)
        for means, rate in zip(channels, rates, strict=True)
    ]
    return torch.stack(terms).sum(), (torch.cat(channels, 1).detach() < floor).float().mean()


def capacity_loss(rates: Sequence[Tensor], image_elements: int, capacity: float) -> Tensor:
    """|KL - C| of each sample's whole latent, divided by the image's elements, averaged over samples; C in nats.

    Burgess et al. 2018, eq. 8. Of each sample, as their equation has it, and not of the batch's mean: that would make
    the gradient depend on how a batch is split over passes and processes.
    """
    totals = torch.stack([rate.flatten(1).sum(1) for rate in rates]).sum(0)
    return (totals - capacity).abs().mean() / image_elements


def alignment_loss(
    projected: Tensor, features: Tensor, cosine_margin: float, distance_margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """VA-VAE's marginal cosine and marginal distance matrix terms (Yao et al. 2025, eq. 2 and 3); and the mean cosine.

    Of projected latents and a vision model's features, both N x C x h x w. Cosine: the mean over samples and positions
    of relu(1 - margin - cos(z, f)). Distance: the mean over samples and pairs of positions i, j of
    relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).
    """
    z, f = (F.normalize(x.flatten(2), dim=1) for x in (projected, features))
    cosines = (z * f).sum(1)
    distances = (z.mT @ z - f.mT @ f).abs()
    cosine = F.relu(1.0 - cosine_margin - cosines).mean()
    return cosine, F.relu(distances - distance_margin).mean(), cosines.detach().mean()


def generator_loss(kind: AdversarialLoss, fake_logits: Tensor) -> Tensor:
    """What the autoencoder minimises, mean over logits.

    hinge: -D(fake) (Lim and Ye 2017). vanilla: -D(fake) too, as in taming-transformers and latent diffusion, where
    the word names the discriminator's loss. non_saturating: softplus(-D(fake)) (Goodfellow et al. 2014, section 3).
    """
    return F.softplus(-fake_logits).mean() if kind == "non_saturating" else -fake_logits.mean()


def discriminator_loss(kind: AdversarialLoss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator minimises, half the sum of the means over real and fake logits, as in latent diffusion.

    hinge: relu(1 - D(real)), relu(1 + D(fake)). vanilla and non_saturating: the cross entropy softplus(-D(real)),
    softplus(D(fake)).
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Half the squared gradient norm of D at real images, mean over samples (Mescheder et al. 2018, eq. 9).

    A sample's D is the mean of its patches' logits, so that the penalty does not grow with the number of patches.
    `images` must require a gradient and be what `real_logits` were computed from.
    """
    judged = real_logits.flatten(1).mean(1).sum()
    (gradient,) = torch.autograd.grad(judged, images, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


def lecam_loss(real_logits: Tensor, fake_logits: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al. 2021, eq. 4): logits are drawn to the other side's running average.

    relu as in the authors' code and in taming's successors: only the approach beyond the average is penalised.
    """
    return F.relu(real_logits - fake_average).square().mean() + F.relu(real_average - fake_logits).square().mean()


ADAPTIVE_EPS = 1e-4
"""As latent diffusion has it: it stands beside the adversarial gradient, whose units are the same there and here."""


def adaptive_ratio(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, cap: float) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at the last layer, clamped to [0, cap].

    Esser et al. 2021, eq. 7, in per-element means as all losses here are. Latent diffusion's
    `calculate_adaptive_weight` sums the reconstruction over a sample's C x H x W elements and takes the mean of the
    logits, so its ratio is C H W times this one, and its clamp at 1e4 is `cap = 1e4 / (C H W)`.

    Args:
        reconstruction_gradient: of the reconstruction losses (per-element means) with respect to the layer's weight.
        adversarial_gradient: of the mean of -D(r) with respect to the same weight, without any weight of its own.
        cap: the largest ratio.

    Returns:
        A scalar; NaN where a gradient or the ratio is not finite.
    """
    norm = adversarial_gradient.norm()
    ratio = reconstruction_gradient.norm() / (norm + ADAPTIVE_EPS)
    # infinity must not pass for the cap, nor below the line for 0: the step passes over what is not finite
    return torch.where(ratio.isfinite() & norm.isfinite(), ratio.clamp(0.0, cap), torch.nan)
