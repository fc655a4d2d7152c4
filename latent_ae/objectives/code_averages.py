"""Codes that are running means of their latents (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_ae.config import Decay, Problem, Settings
from latent_ae.models.quantize import Codes
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts
from latent_ae.objectives.codebook import codebook_problems

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.reconstruct import Reconstructor

SMALLEST = 1e-5
"""Uses of a code that Laplace smoothing adds to those counted."""


class CodeAveragesSettings(Settings):
    """How codes are learned."""

    ema_decay: Decay = 0.0
    """Codes are running means of the latents that chose them, with this decay (0.99 is published), and get no gradient;
    0 moves them by the gradient of the codebook loss."""


class CodeAverages(Objective[CodeAveragesSettings]):
    """Moves each code to the running mean of its latents.

    Of each code the running number of uses N is kept, and the running sum of its latents is N times the code:

        N <- decay N + (1 - decay) n,    sum <- decay sum + (1 - decay) s,    code <- sum / N

    where n latents, with the sum s, chose the code in the global batch; N is replaced by its Laplace-smoothed value
    where it multiplies or divides. A code that no latent chose stays where it is, and only its N falls: smoothing would
    draw it to 0. Each code begins with N = 1. A code that something else changes, because it restarts or is normalised,
    goes on from there with its N. With several levels of codes (VQVAE2) each has its own.

    Args:
        own: The decay.
        run: Facts of the run.
        sizes: Size of each level's codebook.
    """

    name, section, docs, plan_line = "code_averages", "codebook", "docs/codes.md", "codebook"

    uses: Tensor

    def __init__(self, own: CodeAveragesSettings, run: RunFacts, sizes: Sequence[int]) -> None:
        super().__init__(own, run)
        self.sizes = list(sizes)
        self.register_buffer("uses", torch.ones(sum(sizes)))
        self.newest: Tensor
        """Sum of each code's latents in the newest step and, in the last column, their number, level after level,
        (codes, c + 1)."""

    @classmethod
    def enabled(cls, own: CodeAveragesSettings) -> bool:
        return own.ema_decay > 0

    @classmethod
    def problems(cls, own: CodeAveragesSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.ema_decay:
            yield from codebook_problems("codebook.ema_decay", "0", run, model)

    @classmethod
    def build(cls, own: CodeAveragesSettings, run: RunFacts, autoencoder: Any, device: torch.device) -> "CodeAverages":
        from latent_ae.models.reconstruct import codebooks_of

        return cls(own, run, [len(codes.requires_grad_(False)) for codes in codebooks_of(autoencoder)]).to(device)

    @classmethod
    def describe(cls, own: CodeAveragesSettings, run: RunFacts) -> str:
        return f"codes are means of latents, decay {own.ema_decay:g}"

    def backward(self, p: Pass) -> None:
        sums = torch.cat([summed(codes) for codes in p.out.codes])
        # the mean of this over passes and processes is the sum over the global batch
        p.global_means["code_averages/sums"] = sums * (self.run.batch_size / len(p.batch.images))

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        self.newest = means["code_averages/sums"]

    @torch.no_grad()
    def after_update(
        self, step: int, skipped: Tensor, model: "Reconstructor", optimizer: torch.optim.Optimizer
    ) -> None:
        share = 1.0 - self.own.ema_decay
        levels = zip(model.codebooks, self.uses.split(self.sizes), self.newest.split(self.sizes), strict=True)
        for codes, uses, newest in levels:
            sums = torch.lerp(codes * smoothed(uses), newest[:, :-1], share)
            uses.lerp_(newest[:, -1], share)
            stays = skipped | (newest[:, -1:] == 0)
            codes.copy_(torch.where(stays, codes, sums / smoothed(uses)))


def summed(codes: Codes) -> Tensor:
    """Return the sum of each code's latents and, in the last column, their number, (codes, c + 1)."""
    latents = codes.latent.detach().movedim(1, -1).flatten(0, 2)
    counted = torch.cat([latents, torch.ones_like(latents[:, :1])], 1)
    return counted.new_zeros(len(codes.codebook), counted.shape[1]).index_add_(0, codes.indices.flatten(), counted)


def smoothed(uses: Tensor) -> Tensor:
    """Return numbers of uses with Laplace smoothing, whose sum is the same, so that none is 0.

    Args:
        uses: (codes,).

    Returns:
        (codes, 1).
    """
    total = uses.sum()
    return ((uses + SMALLEST) / (total + SMALLEST * len(uses)) * total)[:, None]
