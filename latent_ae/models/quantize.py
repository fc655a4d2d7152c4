"""Vector quantisation (van den Oord et al. 2017): nearest codes, their losses, how many are in use."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Codes(NamedTuple):
    """What a latent was quantised to."""

    indices: Tensor
    """N x h x w, int64."""
    vectors: Tensor
    """N x c x h x w, with the gradient's way to the codebook."""


def quantised(latent: Tensor, codebook: Tensor) -> tuple[Tensor, Codes]:
    """The nearest code of every place, as the decoder gets it, whose gradient goes straight through to `latent`.

    `latent` is N x c x h x w, `codebook` codes x c.
    """
    places = latent.detach().movedim(1, -1)
    indices = torch.cdist(places.flatten(0, 2), codebook.detach()).argmin(1).view(places.shape[:3])
    vectors = F.embedding(indices, codebook).movedim(-1, 1).contiguous()
    return latent + (vectors - latent).detach(), Codes(indices, vectors)


def codebook_loss(latent: Tensor, vectors: Tensor, commitment: float) -> Tensor:
    """Codes drawn to latents, and with weight `commitment` latents to codes (eq. 3); means over latent elements.

    diffusers' own loss has the weight on the other term, for old models' sake.
    """
    return F.mse_loss(vectors, latent.detach()) + commitment * F.mse_loss(latent, vectors.detach())


def code_counts(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code was taken, float32; nobody waits for the device."""
    flat = indices.flatten()
    return torch.zeros(num_codes, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes' frequencies: so many equally frequent codes would carry as much."""
    frequencies = counts / counts.sum().clamp(min=1.0)
    return torch.exp(torch.special.entr(frequencies).sum())
