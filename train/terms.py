"""The terms of the autoencoder's loss that need no discriminator, and what each says in the log."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from latent_ae.models.likelihood import LIKELIHOODS, log_likelihood
from latent_ae.models.reconstruct import Reconstruction
from latent_ae.objectives.alignment import alignment_loss
from latent_ae.objectives.kl import capacity_loss, free_bits_loss, kl_loss
from latent_ae.objectives.reconstruction import PixelLoss, pixel_loss

from .loss_config import AlignmentSettings, LossSettings
from .micro_batch import MicroBatch
from .step_state import StepState

ACTIVE_NATS = 0.01
"""KL per latent dimension from which on a channel says anything of the image."""


def image_losses(
    loss: LossSettings,
    perceptual_net: nn.Module | None,
    image: Tensor,
    batch: MicroBatch,
    logvar: Tensor | None,
    autocast: torch.autocast,
) -> tuple[dict[str, Tensor], Tensor]:
    """The weighted sum of the pixel and perceptual losses, and both apart.

    `logvar` is that of the likelihood where it is learned, `autocast` for the perceptual net.
    """
    means: dict[str, Tensor] = {}
    terms: list[Tensor] = []
    if loss.pixel_weight:
        if loss.pixel in LIKELIHOODS:
            known = image.new_full((), 2.0 * math.log(loss.scale)) if logvar is None else logvar
            pixel = -log_likelihood(loss.pixel, image, batch.images, known).mean()
        else:
            pixel = pixel_loss(cast(PixelLoss, loss.pixel), image, batch.images)
        means[loss.pixel] = pixel.detach()
        terms.append(loss.pixel_weight * pixel)
    if loss.perceptual and perceptual_net is not None:
        rows = batch.perceptual_rows
        # a sum over the chosen rows, scaled as if every row had been looked at: the mean over the global
        # batch is then the same however it is split
        perceptual = image.new_zeros(())
        if range(*rows.indices(len(image))):
            with autocast:
                distances = perceptual_net(image[rows], batch.images[rows])
            perceptual = distances.sum() * (loss.perceptual_every / len(image))
            terms.append(loss.perceptual * perceptual)
        means["lpips"] = perceptual.detach()
    return means, torch.stack(terms).sum() if terms else (image * 0.0).sum()


def rate_loss(
    loss: LossSettings, rates: Sequence[Tensor], image_elements: int, capacity: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The KL term before its weight; `rates` is that of each level of the latent (`posterior.Drawn`).

    `capacity` is that of this step (loss.kl_capacity), in nats per image.
    """
    objective = kl = kl_loss(rates, image_elements)
    dimensions = sum(rate[0].numel() for rate in rates)
    means = {"kl": kl.detach(), "kl_per_dimension": kl.detach() * (image_elements / dimensions)}
    # of the micro-batch; in the log they are averaged over passes and processes
    active = [(rate.detach().mean((0, 2, 3)) >= ACTIVE_NATS).float() for rate in rates]
    means["active_channels"] = torch.cat(active).mean()
    if len(rates) > 1:
        means |= {f"kl_level_{n}": kl_loss([rate.detach()], image_elements) for n, rate in enumerate(rates, start=1)}
        means |= {f"active_level_{n}": part.mean() for n, part in enumerate(active, start=1)}
    if loss.free_bits:
        objective, means["kl_free"] = free_bits_loss(rates, image_elements, loss.free_bits)
    if loss.kl_capacity:
        objective = capacity_loss(rates, image_elements, capacity)
        means["kl_capacity"] = torch.full_like(kl.detach(), capacity)
    return objective, means


def aligning_gradient(
    alignment: AlignmentSettings,
    state: StepState,
    area: float,
    result: Reconstruction,
    features: Tensor,
    layer: Tensor,
    layers: list[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted gradient of the alignment at the projected latent, and what to log.

    `area`: what the image losses of this step count for, of full size; the adaptive weight follows them.

    For the adaptive weight, the backward pass will put the image losses' gradient at `layer`, the encoder's last, into
    `layers` when it comes by the latent: the cost is that of one convolution's weight gradient.
    """
    assert result.projected is not None
    projected = result.projected.detach().requires_grad_()
    cosine, distance, similarity = alignment_loss(
        projected, features, alignment.cosine_margin, alignment.distance_margin
    )
    (gradient,) = torch.autograd.grad(cosine + distance, projected)
    means = {
        "alignment_cosine": cosine.detach(),
        "alignment_distance": distance.detach(),
        "alignment_similarity": similarity,
    }
    if not alignment.adaptive:
        return alignment.weight * gradient, means
    latent = result.latent
    (means["encoder_alignment"],) = torch.autograd.grad(result.projected, layer, gradient, retain_graph=True)
    result.to_decode.register_hook(
        lambda slope: layers.extend(torch.autograd.grad(latent, layer, slope, retain_graph=True))
    )
    return alignment.weight * area * state.alignment_weight * gradient, means
