"""The likelihood p(x | z) of a variational autoencoder: what a decoder's image says of the pixels, in nats.

All take images in [-1, 1], as everywhere; a level of 8 bits is 2/255 wide.
"""

import json
import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import UserError

LikelihoodKind = Literal["bernoulli", "gaussian", "logistic"]
LIKELIHOODS: tuple[LikelihoodKind, ...] = ("bernoulli", "gaussian", "logistic")
HALF_LEVEL = 1.0 / 255.0
FILE = "likelihood.json"
"""In an exported folder."""


class Likelihood(NamedTuple):
    """A family of distributions around a decoder's image."""

    kind: LikelihoodKind
    scale: float | None
    """Standard deviation (gaussian) or scale (logistic), in [-1, 1] units; None for bernoulli."""


def log_likelihood(
    kind: LikelihoodKind, image: Tensor, target: Tensor, logvar: Tensor, *, discretised: bool = False
) -> Tensor:
    """log p(target | image) of each element in nats; `logvar` is twice the logarithm of the scale.

    bernoulli: the target's (t + 1) / 2 under the logit 2 x image, so that the image meant is tanh(image), which the
    clamped image resembles (Kingma and Welling 2014, appendix C.1, for binary data). gaussian: the density (appendix
    C.2), in nats per [-1, 1] unit, or with `discretised` the probability of the target's level of 8 bits. logistic:
    that probability (Kingma et al. 2016, section 2.4; Salimans et al. 2017, eq. 2). The first and the last level take
    the tails.
    """
    if kind == "bernoulli":
        one = 0.5 * (target + 1.0)
        return one * F.logsigmoid(2.0 * image) + (1.0 - one) * F.logsigmoid(-2.0 * image)
    inverse = torch.exp(-0.5 * logvar)
    if kind == "gaussian" and not discretised:
        return -0.5 * (((target - image) * inverse).square() + logvar + math.log(2.0 * math.pi))
    above, below = (target - image + HALF_LEVEL) * inverse, (target - image - HALF_LEVEL) * inverse
    if kind == "logistic":
        # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), and a - b is the same everywhere
        log_width = torch.log(-torch.expm1(-2.0 * HALF_LEVEL * inverse))
        inside = F.logsigmoid(above) + F.logsigmoid(-below) + log_width
        first, last = F.logsigmoid(above), F.logsigmoid(-below)
    else:
        # in the lower tail, where the logarithm of the distribution function is exact
        mirrored = above + below > 0
        high, low = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
        top = torch.special.log_ndtr(high)
        inside = top + torch.log(-torch.expm1(torch.special.log_ndtr(low) - top))
        first, last = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    edge = 1.0 - HALF_LEVEL
    return torch.where(target < -edge, first, torch.where(target > edge, last, inside))


def bits_per_dimension(nats: Tensor, kind: LikelihoodKind, *, discretised: bool = False) -> Tensor:
    """A negative log-likelihood per element in bits; a density counts as if it were level over a level of 8 bits."""
    density = kind == "gaussian" and not discretised
    return nats / math.log(2.0) - (math.log2(2.0 * HALF_LEVEL) if density else 0.0)


def read_likelihood(folder: Path) -> Likelihood | None:
    """What training wrote into an exported folder or checkpoint; None where it had no likelihood. Raises UserError."""
    place, state = folder / FILE, folder / "state.json"
    try:
        if place.is_file():
            found = json.loads(place.read_text(encoding="utf-8"))
        else:
            found = json.loads(state.read_text(encoding="utf-8")).get("likelihood") if state.is_file() else None
        if found is None:
            return None
        kind, scale = found["kind"], found["scale"]
        if kind not in LIKELIHOODS or (kind == "bernoulli") != (scale is None):
            raise ValueError(f"no likelihood is known as {kind!r} with scale {scale!r}")
        if scale is not None and not 0.0 < float(scale) < math.inf:
            raise ValueError(f"a scale must be a positive number, not {scale!r}")
        return Likelihood(kind, None if scale is None else float(scale))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read the likelihood of {folder}: {' '.join(str(error).split())[:200]}") from error
