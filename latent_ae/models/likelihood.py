"""The likelihood p(x | z) of a variational autoencoder: distributions of the pixels around a decoder's image, in nats.

All images are in [-1, 1]; a level of 8 bits is 2/255 wide.
"""

import json
import math
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import UserError

LikelihoodKind = Literal["bernoulli", "gaussian", "logistic", "logit_laplace", "logistic_mixture"]
LIKELIHOODS: tuple[LikelihoodKind, ...] = get_args(LikelihoodKind)
SCALED: tuple[LikelihoodKind, ...] = ("gaussian", "logistic")
"""Those with one scale for all values, which is a setting or learned."""
STATED: tuple[LikelihoodKind, ...] = ("logit_laplace", "logistic_mixture")
"""Those with parameters that a decoder of their own gives besides the image."""
MARGIN = 0.1
"""Distance of mapped pixels from 0 and 1 (Ramesh et al. 2021, appendix A.3)."""
INSIDE = 1e-6
"""Least distance from 0 and 1 of a number whose logit is taken."""
HALF_LEVEL = 1.0 / 255.0
FILE = "likelihood.json"
"""Name of the file in an exported folder."""


class Likelihood(NamedTuple):
    """A family of distributions around a decoder's image."""

    kind: LikelihoodKind
    scale: float | None
    """Standard deviation (gaussian) or scale (logistic), in [-1, 1] units; None for bernoulli, which has none, and for
    logit_laplace and logistic_mixture, whose decoders give one for each value."""


def log_likelihood(
    kind: LikelihoodKind, image: Tensor, target: Tensor, logvar: Tensor, *, discretised: bool = False
) -> Tensor:
    """Return log p(target | image) of each element, in nats.

    bernoulli: (target + 1) / 2 has the logit 2 x image, so the mean image is tanh(image), which the clamped image
    resembles (Kingma and Welling 2014, appendix C.1, for binary data). gaussian: the density (appendix C.2), in nats
    per [-1, 1] unit, or with `discretised` the probability of the target's level of 8 bits. logistic: the probability
    of that level (Kingma et al. 2016, section 2.4; Salimans et al. 2017, eq. 2). The first and the last level include
    the tails. logit_laplace: the density of a value whose logit, after the map of [-1, 1] to [0.1, 0.9], has a Laplace
    distribution around the image's (Ramesh et al. 2021, appendix A.3), in nats per [-1, 1] unit: the published
    one, whose unit is the mapped value, is larger by log(2.5).

    Args:
        kind: Family of distributions, but for logistic_mixture (`logistic_mixture.mixture_log_likelihood`).
        image: (N, C, H, W) output of the decoder.
        target: (N, C, H, W) in [-1, 1].
        logvar: Twice the logarithm of the scale, which bernoulli does not use; broadcasts with the image. The scale of
            logit_laplace is in units of the logit.
        discretised: Whether gaussian gives probabilities of levels.

    Returns:
        (N, C, H, W).
    """
    if kind == "bernoulli":
        one = 0.5 * (target + 1.0)
        return one * F.logsigmoid(2.0 * image) + (1.0 - one) * F.logsigmoid(-2.0 * image)
    inverse = torch.exp(-0.5 * logvar)
    if kind == "logit_laplace":
        value, location = into_open_interval(target), into_open_interval(image).clamp(INSIDE, 1.0 - INSIDE)
        distance = (torch.logit(value) - torch.logit(location)).abs() * inverse
        # the slope of the logit, and of the map
        slope = -torch.log(value * (1.0 - value)) + math.log(0.5 - MARGIN)
        return slope - distance - 0.5 * logvar - math.log(2.0)
    if kind == "gaussian" and not discretised:
        return -0.5 * (((target - image) * inverse).square() + logvar + math.log(2.0 * math.pi))
    above, below = (target - image + HALF_LEVEL) * inverse, (target - image - HALF_LEVEL) * inverse
    if kind == "logistic":
        # s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), and a - b is the same everywhere
        log_width = torch.log(-torch.expm1(-2.0 * HALF_LEVEL * inverse))
        inside = F.logsigmoid(above) + F.logsigmoid(-below) + log_width
        first, last = F.logsigmoid(above), F.logsigmoid(-below)
    else:
        # mirrored into the lower tail, where log_ndtr is exact
        mirrored = above + below > 0
        high, low = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
        top = torch.special.log_ndtr(high)
        inside = top + torch.log(-torch.expm1(torch.special.log_ndtr(low) - top))
        first, last = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    edge = 1.0 - HALF_LEVEL
    return torch.where(target < -edge, first, torch.where(target > edge, last, inside))


def into_open_interval(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as mapped pixels in [0.1, 0.9] (Ramesh et al. 2021, appendix A.3)."""
    return 0.5 + (0.5 - MARGIN) * images


def from_open_interval(mapped: Tensor) -> Tensor:
    """Return mapped pixels, between 0 and 1, as images, which are in [-1, 1] for those in [0.1, 0.9]."""
    return (mapped - 0.5) / (0.5 - MARGIN)


def bits_per_dimension(nats: Tensor, kind: LikelihoodKind, *, discretised: bool = False) -> Tensor:
    """Return the bits of negative log-likelihoods in nats; a density is taken as constant within a level of 8 bits.

    Args:
        nats: Negative log-likelihoods per element, of any shape.
        kind: Family of distributions.
        discretised: As for `log_likelihood`.
    """
    density = kind == "logit_laplace" or (kind == "gaussian" and not discretised)
    return nats / math.log(2.0) - (math.log2(2.0 * HALF_LEVEL) if density else 0.0)


def read_likelihood(folder: Path) -> Likelihood | None:
    """Return the likelihood that training wrote into an exported folder or checkpoint; None if there is none.

    Raises:
        UserError: If the file cannot be read or holds no known likelihood.
    """
    place, state = folder / FILE, folder / "state.json"
    try:
        if place.is_file():
            found = json.loads(place.read_text(encoding="utf-8"))
        else:
            found = json.loads(state.read_text(encoding="utf-8")).get("likelihood") if state.is_file() else None
        if found is None:
            return None
        kind, scale = found["kind"], found["scale"]
        if kind not in LIKELIHOODS or (kind in SCALED) != (scale is not None):
            raise ValueError(f"no likelihood is known as {kind!r} with scale {scale!r}")
        if scale is not None and not 0.0 < float(scale) < math.inf:
            raise ValueError(f"a scale must be a positive number, not {scale!r}")
        return Likelihood(kind, None if scale is None else float(scale))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read the likelihood of {folder}: {' '.join(str(error).split())[:200]}") from error
