"""The KL term, with free bits and with a capacity."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
