"""The posterior of images: its moments, samples from it, and their KL and log-ratio to the prior."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latent_ae.models.registry import family_of


class Drawn(NamedTuple):
    """A sample of the posterior q(z | x). All tensors are float32."""

    latent: Tensor
    """The sample, which the decoder takes, (N, c, h, w)."""
    mean: Tensor
    """Mean of a Gaussian posterior; otherwise the latent, which is not quantised yet if there is a codebook."""
    logvar: Tensor | None
    """Log-variance of a Gaussian posterior, shaped like `mean`; otherwise None."""
    rates: tuple[Tensor, ...]
    """KL(q || p) of each latent dimension in nats, (N, c, h, w), for each level of the latent; a flow gives an estimate
    from the sample. Empty if the latent is not random."""
    log_ratio: Tensor
    """log p(z) - log q(z | x) of the sample in nats, (N,); 0 if the latent is not random."""


def moments_of(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the posterior's mean and log-variance, or the latent and None if there is no Gaussian posterior.

    Args:
        module: An instance of one of `registry.FAMILIES`.
        images: (N, C, H, W) in [-1, 1], whose sides are multiples of the factor.

    Returns:
        (N, c, h, w) float32 each; the latent of a VQModel is not quantised yet.
    """
    return family_of(module).encode(module, images)


def draw(module: nn.Module, images: Tensor, noise: Tensor | None) -> Drawn:
    """Sample the posterior.

    A class of this project whose posterior is not one Gaussian has a method `draw`, which is called.

    Args:
        module: An instance of one of `registry.FAMILIES`.
        images: (N, C, H, W) in [-1, 1], whose sides are multiples of the factor.
        noise: Standard normal, shaped like the latent; None takes the mode.
    """
    return drawer(module, images)(noise)


def drawer(module: nn.Module, images: Tensor) -> Callable[[Tensor | None], Drawn]:
    """Return a function of noise that samples like `draw`, and encodes the images only once if the class allows it."""
    # an AutoencoderTiny's encoder may be another first stage
    owner = next((one for one in (module, getattr(module, "encoder", None)) if hasattr(one, "draw")), None)
    if owner is not None:

        def own(noise: Tensor | None) -> Drawn:
            drawn: Drawn = owner.draw(images, noise)
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
    """Return log p(z) - log q(z | x) of Gaussians for z = mean + exp(logvar / 2) noise, in nats.

    Args:
        latent: z, (N, c, h, w).
        logvar: Log-variance of the posterior, (N, c, h, w).
        noise: The standard normal noise of z, (N, c, h, w); None stands for 0.
        prior_mean: Mean of the prior.
        prior_logvar: Log-variance of the prior.

    Returns:
        (N,) float32.
    """
    prior = torch.as_tensor(prior_logvar, device=latent.device, dtype=latent.dtype)
    distance = (latent - prior_mean).square() * torch.exp(-prior) + prior
    own = logvar if noise is None else logvar + noise.square()
    return 0.5 * (own - distance).flatten(1).sum(1, dtype=torch.float64).float()


def kl_per_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of each dimension in nats (Kingma and Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
