"""Codes that are running means of their latents (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019)."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_ae.config import Decay, Problem, Settings
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts, codebook_problems

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
    where it multiplies or divides. Each code begins with N = 1. A code that something else changes, because it restarts
    or is normalised, goes on from there with its N.

    Args:
        own: The decay.
        run: Facts of the run.
        num_codes: Size of the codebook.
    """

    name, section, docs, plan_line = "code_averages", "codebook", "docs/family.md", "codebook"

    uses: Tensor

    def __init__(self, own: CodeAveragesSettings, run: RunFacts, num_codes: int) -> None:
        super().__init__(own, run)
        self.register_buffer("uses", torch.ones(num_codes))
        self.newest: Tensor
        """Sum of each code's latents in the newest step and, in the last column, their number, (codes, c + 1)."""

    @classmethod
    def enabled(cls, own: CodeAveragesSettings) -> bool:
        return own.ema_decay > 0

    @classmethod
    def problems(cls, own: CodeAveragesSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.ema_decay:
            yield from codebook_problems("codebook.ema_decay", "0", run, model)

    @classmethod
    def build(cls, own: CodeAveragesSettings, run: RunFacts, autoencoder: Any, device: torch.device) -> "CodeAverages":
        codes = autoencoder.quantize.embedding.weight.requires_grad_(False)
        return cls(own, run, len(codes)).to(device)

    @classmethod
    def describe(cls, own: CodeAveragesSettings, run: RunFacts) -> str:
        return f"codes are means of latents, decay {own.ema_decay:g}"

    def backward(self, p: Pass) -> None:
        codes = p.out.codes
        assert codes is not None
        latents = codes.latent.detach().movedim(1, -1).flatten(0, 2)
        counted = torch.cat([latents, torch.ones_like(latents[:, :1])], 1)
        sums = counted.new_zeros(p.model.num_codes, counted.shape[1]).index_add_(0, codes.indices.flatten(), counted)
        # the mean of this over passes and processes is the sum over the global batch
        p.global_means["code_averages/sums"] = sums * (self.run.batch_size / len(p.batch.images))

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        self.newest = means["code_averages/sums"]

    @torch.no_grad()
    def after_update(
        self, step: int, skipped: Tensor, model: "Reconstructor", optimizer: torch.optim.Optimizer
    ) -> None:
        codes, share = model.codebook, 1.0 - self.own.ema_decay
        sums = torch.lerp(codes * smoothed(self.uses), self.newest[:, :-1], share)
        self.uses.lerp_(self.newest[:, -1], share)
        codes.copy_(torch.where(skipped, codes, sums / smoothed(self.uses)))


def smoothed(uses: Tensor) -> Tensor:
    """Return numbers of uses with Laplace smoothing, whose sum is the same, so that none is 0.

    Args:
        uses: (codes,).

    Returns:
        (codes, 1).
    """
    total = uses.sum()
    return ((uses + SMALLEST) / (total + SMALLEST * len(uses)) * total)[:, None]
