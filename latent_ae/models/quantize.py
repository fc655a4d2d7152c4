"""Vector quantisation: the nearest codes of a latent (van den Oord et al. 2017)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Codes(NamedTuple):
    """The codes of a quantised latent."""

    indices: Tensor
    """(N, h, w) int64."""
    vectors: Tensor
    """(N, c, h, w); gradients flow from here to the codebook."""


def quantised(latent: Tensor, codebook: Tensor) -> tuple[Tensor, Codes]:
    """Replace the vector at each position of a latent by its nearest code.

    Args:
        latent: (N, c, h, w).
        codebook: (codes, c).

    Returns:
        The quantised latent, (N, c, h, w), whose gradient passes straight through to `latent`; and the codes.
    """
    places = latent.detach().movedim(1, -1)
    indices = torch.cdist(places.flatten(0, 2), codebook.detach()).argmin(1).view(places.shape[:3])
    vectors = F.embedding(indices, codebook).movedim(-1, 1).contiguous()
    return latent + (vectors - latent).detach(), Codes(indices, vectors)
