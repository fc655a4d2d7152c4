"""Mixtures of discretised logistic distributions, one for each pixel, whose parameters a decoder gives.

Salimans et al. 2017 (PixelCNN++, section 2.1 and 2.2), the likelihood of NVAE and of very deep VAEs. A pixel chooses
one of K components, which it has for all of its channels. Given the component, a channel is logistic around a mean that
is linear in the channels before it, and has the probability of its level of 8 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from latent_ae.models.likelihood import log_likelihood

LEAST_LOG_SCALE = -7.0
"""Least logarithm of a scale, in [-1, 1] units."""
FIRST_LOG_SCALE = -2.0
"""Logarithm of a scale before training."""


class LogisticMixture(NamedTuple):
    """The mixture of each pixel. All images are in [-1, 1]; C channels have P = C (C - 1) / 2 pairs."""

    logits: Tensor
    """(N, K, H, W), logarithms of the components' weights, not normalised."""
    means: Tensor
    """(N, C, K, H, W), means of the channels where those before them are 0."""
    log_scales: Tensor
    """(N, C, K, H, W), natural logarithms of the scales."""
    slopes: Tensor
    """(N, P, K, H, W) in [-1, 1], what a channel's mean adds for each channel before it, times that one: the pairs are
    (2, 1), (3, 1), (3, 2), ..."""

    def shifted_means(self, known: Tensor) -> Tensor:
        """Return the means given the channels before each.

        Args:
            known: (N, C, 1 or K, H, W), values of the channels.

        Returns:
            (N, C, K, H, W).
        """
        means = list(self.means.unbind(1))
        pairs = iter(self.slopes.unbind(1))
        for channel in range(1, len(means)):
            for before in range(channel):
                means[channel] = means[channel] + next(pairs) * known[:, before]
        return torch.stack(means, 1)


def parameters_per_component(channels: int) -> int:
    """Return how many values describe a component of the mixture of a pixel of `channels` channels: 10 for three."""
    return 1 + 2 * channels + channels * (channels - 1) // 2


def first_parameters(channels: int, components: int) -> Tensor:
    """Return parameters for a decoder to begin with: equal components, whose means divide [-1, 1], with steep slopes.

    With the scales of 1 that a fresh layer gives, a network learns for long only how wide the distributions are, and
    meanwhile to do without its latents.

    Args:
        channels: C.
        components: K.

    Returns:
        (K x `parameters_per_component`,), see `mixture_of`.
    """
    pairs = channels * (channels - 1) // 2
    means = (2.0 * torch.arange(components) + 1.0) / components - 1.0
    scales = torch.full((channels * components,), FIRST_LOG_SCALE)
    return torch.cat([torch.zeros(components), means.repeat(channels), scales, torch.zeros(pairs * components)])


def mixture_of(parameters: Tensor, channels: int) -> LogisticMixture:
    """Return the mixtures that a decoder's output describes.

    Args:
        parameters: (N, K x `parameters_per_component`, H, W): logits, then means, then logarithms of scales, then the
            slopes before a tanh, each of them by channel or pair and then by component.
        channels: C.
    """
    count = parameters.shape[1] // parameters_per_component(channels)
    pairs = channels * (channels - 1) // 2
    logits, *rest = parameters.split([count, channels * count, channels * count, pairs * count], 1)
    means, log_scales, slopes = (part.unflatten(1, (part.shape[1] // count, count)) for part in rest)
    return LogisticMixture(logits, means, log_scales.clamp(min=LEAST_LOG_SCALE), torch.tanh(slopes))


def mixture_log_likelihood(parameters: Tensor, target: Tensor) -> Tensor:
    """Return log p(target) of each pixel, of all its channels together, in nats (Salimans et al. 2017, eq. 2 and 3).

    Args:
        parameters: See `mixture_of`.
        target: (N, C, H, W) in [-1, 1].

    Returns:
        (N, H, W).
    """
    # the logarithms below are twice as fast on contiguous numbers
    mixture, known = mixture_of(parameters.contiguous(), target.shape[1]), target.contiguous()[:, :, None]
    by_channel = log_likelihood("logistic", mixture.shifted_means(known), known, 2.0 * mixture.log_scales)
    return torch.logsumexp(by_channel.sum(1) + mixture.logits.log_softmax(1), 1)


def mean_image(parameters: Tensor, channels: int) -> Tensor:
    """Return the mean of the logistic mixtures before they are cut into levels and at the ends of the range.

    Args:
        parameters: See `mixture_of`.
        channels: C.

    Returns:
        (N, C, H, W), nominally in [-1, 1].
    """
    mixture = mixture_of(parameters, channels)
    means = list[Tensor]()
    pairs = iter(mixture.slopes.unbind(1))
    for mean in mixture.means.unbind(1):  # a component's mean is linear in its means of the channels before
        means.append(mean + sum(next(pairs) * before for before in tuple(means)))
    return (torch.stack(means, 1) * mixture.logits.softmax(1)[:, None]).sum(2)
