"""The loss of a codebook, and how much of it is in use (van den Oord et al. 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
