"""Images -> what their latents are drawn from, the draw, and what it costs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latent_ae.models.registry import family_of


class Drawn(NamedTuple):
    """A sample of the posterior q(z | x); all float32."""

    latent: Tensor
    """What the decoder takes, N x c x h x w."""
    mean: Tensor
    """Mean of a Gaussian posterior; without one the latent, of a codebook before quantisation."""
    logvar: Tensor | None
    """Log-variance of a Gaussian posterior, like `mean`."""
    rates: tuple[Tensor, ...]
    """KL(q || p) in nats of each latent dimension, N x c x h x w, for each level of the latent; behind a flow one
    sample's estimate. Empty where nothing is random."""
    log_ratio: Tensor
    """log p(z) - log q(z | x) of this sample, N, nats; 0 where nothing is random."""


def moments_of(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a latent is drawn from, float32: the posterior's mean and log-variance, or the latent and None.

    `module` is an instance of one of `registry.FAMILIES`; of a VQModel it is the latent before quantisation.
    """
    return family_of(module).encode(module, images)


def draw(module: nn.Module, images: Tensor, noise: Tensor | None) -> Drawn:
    """Samples the posterior with `noise` (standard normal, shaped like the latent); None takes its mode.

    A class of ours whose posterior is more than one Gaussian has a method `draw` of the same meaning.
    """
    return drawer(module, images)(noise)


def drawer(module: nn.Module, images: Tensor) -> Callable[[Tensor | None], Drawn]:
    """`draw` from the same images many times, which are encoded once where the class allows it."""
    if hasattr(module, "draw"):

        def own(noise: Tensor | None) -> Drawn:
            drawn: Drawn = module.draw(images, noise)
            return drawn

        return own
    mean, logvar = moments_of(module, images)

    def plain(noise: Tensor | None) -> Drawn:
        if logvar is None:
            return Drawn(mean, mean, None, (), mean.new_zeros(len(mean)))
        latent = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return Drawn(latent, mean, logvar, (kl_per_dimension(mean, logvar),), log_ratio(latent, logvar, noise))

    return plain


@torch.no_grad()
def log_ratio(
    latent: Tensor,
    logvar: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | float = 0.0,
    prior_logvar: Tensor | float = 0.0,
) -> Tensor:
    """log p(z) - log q(z | x), N, of Gaussians: z = mean + exp(logvar / 2) noise, and the prior's two moments."""
    prior = torch.as_tensor(prior_logvar, device=latent.device, dtype=latent.dtype)
    distance = (latent - prior_mean).square() * torch.exp(-prior) + prior
    own = logvar if noise is None else logvar + noise.square()
    return 0.5 * (own - distance).flatten(1).sum(1, dtype=torch.float64).float()


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of each latent dimension in nats, N x c x h x w (Kingma and Welling 2014)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
