"""The entropy penalty of a codebook: latents choose one code each, and all codes together (MAGVIT-v2, LlamaGen)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from latent_ae.config import Problem, Settings, Weight
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts
from latent_ae.objectives.codebook import codebook_problems

SMOOTHING = 0.9
"""Fraction of the previous value that the mean assignment keeps in each step."""
FLOOR = 1e-3
"""Smallest probability of a code in the logarithm of the mean assignment, relative to 1 / codes."""


class CodeEntropySettings(Settings):
    """A penalty that spreads latents over all codes."""

    entropy: Weight = 0.0
    """Weight of the entropy penalty: the mean entropy of the latents' assignments to codes minus the entropy of the
    mean assignment, in nats (IBQ: 0.05)."""
    entropy_temperature: Annotated[float, Field(gt=0)] = 0.01
    """Temperature of the assignment, softmax(-squared distance / temperature); 0.01 is LlamaGen's, whose codes are
    normalised."""


class CodeEntropy(Objective[CodeEntropySettings]):
    """Mean entropy of the assignment minus entropy of the mean assignment (Yu et al. 2024, eq. 4; LlamaGen's code).

    The second term is of the whole batch. Its gradient at the mean assignment m is log m + 1, which needs m before the
    backward pass. Here m is an average over the global batches of the steps before, so the gradient is the same for any
    split over processes and passes. In the first step, m is taken to be uniform, where the term has no gradient. With
    several levels of codes (VQVAE2) the penalties and the logged entropies are summed over levels.

    Args:
        own: Weight and temperature.
        run: Facts of the run.
        sizes: Size of each level's codebook.
    """

    name, section, docs, plan_line = "code_entropy", "codebook", "docs/codes.md", "codebook"
    charts = {"Entropy of the assignment to codes (nats)": ("assignment_entropy", "mean_assignment_entropy")}

    assignment: Tensor

    def __init__(self, own: CodeEntropySettings, run: RunFacts, sizes: Sequence[int]) -> None:
        super().__init__(own, run)
        self.sizes = list(sizes)
        self.register_buffer("assignment", torch.cat([torch.full((size,), 1.0 / size) for size in sizes]))

    @classmethod
    def enabled(cls, own: CodeEntropySettings) -> bool:
        return own.entropy > 0

    @classmethod
    def problems(cls, own: CodeEntropySettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.entropy:
            yield from codebook_problems("codebook.entropy", "0", run, model, moves_codes=False)
        elif own.entropy_temperature != CodeEntropySettings().entropy_temperature:
            yield Problem(
                "codebook.entropy_temperature", "is used by codebook.entropy, whose weight is 0: give it a weight"
            )

    @classmethod
    def build(
        cls, own: CodeEntropySettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "CodeEntropy":
        from latent_ae.models.reconstruct import codebooks_of

        return cls(own, run, [len(codes) for codes in codebooks_of(autoencoder)]).to(device)

    @classmethod
    def describe(cls, own: CodeEntropySettings, run: RunFacts) -> str:
        return f"entropy penalty {own.entropy:g} at temperature {own.entropy_temperature:g}"

    def backward(self, p: Pass) -> None:
        entropies, means = list[Tensor](), list[Tensor]()
        for codes, assignment in zip(p.out.codes, self.assignment.split(self.sizes), strict=True):
            # at leaves, so that the assignments of all positions to all codes are freed before the autoencoder's pass
            latent, codebook = (tensor.detach().requires_grad_() for tensor in (codes.latent, codes.codebook))
            places = latent.movedim(1, -1).flatten(0, 2)
            loss, entropy, mean = entropy_penalty(places, codebook, assignment, self.own.entropy_temperature)
            gradients = torch.autograd.grad(loss, (latent, codebook))
            for tensor, gradient in zip((codes.latent, codes.codebook), gradients, strict=True):
                if tensor.requires_grad:
                    p.send(tensor, self.own.entropy * gradient)
            entropies.append(entropy)
            means.append(mean)
        p.logs["assignment_entropy"] = torch.stack(entropies).sum()
        p.global_means["code_entropy/assignment"] = torch.cat(means)

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        mean = means["code_entropy/assignment"]
        logs["mean_assignment_entropy"] = torch.special.entr(mean).sum()
        self.assignment.lerp_(mean, 1.0 - SMOOTHING)


def entropy_penalty(
    latents: Tensor, codebook: Tensor, mean: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a loss with the gradient of the entropy penalty, mean_i H(p_i) - H(mean_i p_i).

    p_i is softmax over codes of -|latent - code|^2 / temperature. The gradient of -H(m) at m is log m + 1; its 1 has no
    effect, because probabilities sum to 1.

    Args:
        latents: (positions, c).
        codebook: (codes, c).
        mean: (codes,), the mean assignment m at which the gradient of the second term is taken.
        temperature: Temperature of the softmax.

    Returns:
        The loss, mean_i (H(p_i) + p_i log m); the mean entropy of p_i in nats, and the mean assignment of these
        latents, (codes,), both without a gradient. If `mean` is this mean assignment, the gradient of the loss is
        exactly that of the penalty; codes below a thousandth of a uniform probability count as having that.
    """
    # |latent|^2 is the same for all codes, and softmax ignores it
    affinity = (2.0 * latents @ codebook.T - codebook.square().sum(1)) / temperature
    logarithm = affinity.log_softmax(1)
    assignment = logarithm.exp()
    entropy = -(assignment * logarithm).sum(1).mean()
    batch_mean = assignment.mean(0)
    lowest = math.log(FLOOR / len(codebook))
    loss = entropy + batch_mean @ mean.log().clamp(min=lowest)
    return loss, entropy.detach(), batch_mean.detach()
