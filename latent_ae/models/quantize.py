"""Vector quantisation: the nearest codes of a latent (van den Oord et al. 2017), and the gradient that passes them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.models.fsq import bounded


class Relaxation(NamedTuple):
    """How a sample of a distribution over codes is made differentiable: a softmax in place of a maximum."""

    gumbel: Tensor
    """Standard Gumbel noise on the logits, (N, codes, h, w)."""
    temperature: float
    """The logits with their noise are divided by it; towards 0 the sample becomes a single code."""


class Quantiser(NamedTuple):
    """How training replaces latents by codes.

    The codes themselves are in every case those that a stock VQModel takes; what differs is the gradient, and what the
    losses of codes compare.
    """

    normalised: bool = False
    """Whether latents and codes are compared as vectors of length 1; the codebook must hold such codes."""
    rotation: bool = False
    """Whether the gradient passes through a rotation of latents into codes, in place of straight through."""
    levels: tuple[int, ...] = ()
    """Levels of each channel of finite scalar quantisation, whose codebook is `fsq.grid`; empty without it."""
    relaxation: Relaxation | None = None
    """How codes are drawn from the distribution of a `DiscreteVAE`; None takes the most likely ones."""


PLAIN = Quantiser()
"""Any codes, and a gradient that passes straight through."""


class Codes(NamedTuple):
    """The codes of a quantised latent."""

    indices: Tensor
    """(N, h, w) int64."""
    vectors: Tensor
    """(N, c, h, w); gradients flow from here to the codebook."""
    latent: Tensor
    """(N, c, h, w), the latent as it is compared with codes: of length 1 at each position if the codes are; gradients
    flow from here to the encoder."""
    codebook: Tensor
    """(codes, c), all codes; gradients flow from here to the codebook."""


def quantised(latent: Tensor, codebook: Tensor, how: Quantiser = PLAIN) -> tuple[Tensor, Codes]:
    """Replace the vector at each position of a latent by its nearest code.

    Nearest is by Euclidean distance to the latent as it is, as in a stock VQModel. For codes of length 1 that is the
    code with the largest cosine, whatever the latent's length.

    Args:
        latent: (N, c, h, w).
        codebook: (codes, c).
        how: What gradients pass, and what is compared.

    Returns:
        The quantised latent, (N, c, h, w), from which gradients flow to `latent` as `how` says; and the codes.
    """
    places = latent.detach().movedim(1, -1)
    indices = torch.cdist(places.flatten(0, 2), codebook.detach()).argmin(1).view(places.shape[:3])
    if how.normalised:
        latent, codebook = F.normalize(latent, dim=1), _along_the_sphere(codebook)
    vectors = F.embedding(indices, codebook).movedim(-1, 1).contiguous()
    codes = Codes(indices, vectors, latent, codebook)
    if how.levels:
        return _with_gradient_of(bounded(latent, how.levels), vectors), codes
    if how.rotation:
        return _with_gradient_of(rotated(latent, vectors), vectors), codes
    return _with_gradient_of(latent, vectors), codes


def exactly_nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the numbers of the nearest codes, (N, h, w), for vectors, (N, c, h, w), and a codebook, (codes, c).

    Distances are sums of squared differences, so that a vector that is a code gets this code, however near others are:
    those of a matrix product, which are faster, are off by rounding. Training chooses codes by these.
    """
    places = vectors.movedim(1, -1)
    distances = torch.cdist(places.flatten(0, 2), codebook, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(1).view(places.shape[:3])


def rotated(latent: Tensor, vectors: Tensor) -> Tensor:
    """Rotate and scale each vector of a latent into its code, by a matrix that counts as constant.

    With u and v the directions of latent and code and w that of u + v, the rotation is I - 2 w w^T + 2 v u^T, and the
    scale is the ratio of their lengths (Fifty et al. 2024, "Restructuring vector quantization with the rotation
    trick", section 4.2), so a gradient keeps its angle to the vector. If the two directions are opposite, there is no
    w, and the rotation is the reflection I - 2 u u^T.

    Args:
        latent: (N, c, h, w).
        vectors: (N, c, h, w), the codes; no gradient flows there.

    Returns:
        (N, c, h, w), which equals `vectors` up to rounding.
    """
    given, target = latent.detach(), vectors.detach()
    u, v = F.normalize(given, dim=1), F.normalize(target, dim=1)
    w = F.normalize(u + v, dim=1)
    scale = target.norm(dim=1, keepdim=True) / given.norm(dim=1, keepdim=True).clamp(min=1e-12)
    along_w, along_u = ((latent * axis).sum(1, keepdim=True) for axis in (w, u))
    return scale * (latent - 2 * along_w * w + 2 * along_u * v)


def _along_the_sphere(codebook: Tensor) -> Tensor:
    """Return codes of length 1 as they are; of their gradient the part passes that does not change the length."""
    return _with_gradient_of(F.normalize(codebook, dim=1), codebook)


def _with_gradient_of(source: Tensor, values: Tensor) -> Tensor:
    """Return `values`, bit for bit, from which gradients flow to `source` only."""
    return values.detach() + (source - source.detach())
