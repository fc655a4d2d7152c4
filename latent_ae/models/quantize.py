"""Vector quantisation (van den Oord et al. 2017): nearest codes."""

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
