"""The use of codes, and for nearest codes their loss (van den Oord et al. 2017) and the restart of dead ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.config import NonNegative, Problem, Settings, Weight
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.reconstruct import Reconstructor


MOST_CHARTED = 4
"""Number of levels of codes whose use has a curve in the report."""


class CodebookSettings(Settings):
    """The loss of a codebook."""

    commitment: Weight = 0.25
    """Weight of the term that moves latents to the codes of a codebook; codes move to latents with weight 1."""
    revive_after: NonNegative = 100
    """Steps without use after which a code of a codebook restarts as a latent of its own; 0 is never."""


class Codebook(Objective[CodebookSettings]):
    """Moves codes and latents towards each other, and logs their use; does nothing if the model has no codes.

    Dead codes restart as different latents of the step's first sample (Dhariwal et al. 2020, random restarts). Codes
    that are running means of latents (codebook.ema_decay) get no gradient; those of finite scalar quantisation
    (codebook.levels) stay fixed, and neither they nor the latents have a loss. Neither have codes that are drawn from a
    distribution (DiscreteVAE): the most likely ones are counted, and other losses move them.

    With several levels of codes (VQVAE2) the losses are summed over levels, and each level's use is logged.

    Args:
        own: The weights.
        run: Facts of the run.
        sizes: Number of codes that learn by this loss, of each level; empty if there are none.
    """

    name, section, docs, plan_line = "codebook", "loss", "docs/codes.md", "codebook"
    charts = {
        "Codebook": ("codebook_perplexity", *(f"codebook_perplexity_level_{n}" for n in range(1, MOST_CHARTED + 1))),
        "Codebook loss": ("codebook",),
    }

    code_age: Tensor

    def __init__(self, own: CodebookSettings, run: RunFacts, sizes: Sequence[int] = ()) -> None:
        super().__init__(own, run)
        self.sizes = list(sizes)
        self.counts: Tensor | None = None
        """Number of uses of each code in the newest step, mean over the global batch, level after level, (codes,)."""
        self.candidates: list[Tensor] = []
        """Latents as which dead codes of each level may restart, (positions, channels)."""
        self.restarted: list[tuple[Tensor, Tensor] | None] = []
        """The codes of each level and which of them restarted in the newest step, (codes,) bool; None if none may."""
        if sizes:
            # steps since each code was last used; a fresh one counts as dead, so it begins as a latent
            age = 0.0 if run.existing else float(own.revive_after)
            self.register_buffer("code_age", torch.full((sum(sizes),), age))

    @classmethod
    def problems(cls, own: CodebookSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        plain = CodebookSettings()
        changed = [key for key in ("commitment", "revive_after") if getattr(own, key) != getattr(plain, key)]
        if changed and model is not None and model.no_codebook:
            yield Problem(f"loss.{changed[0]}", model.no_codebook)
        elif changed and "fsq" in run.enabled:
            key = changed[0]
            yield Problem(
                f"loss.{key}",
                f"is for codes that learn, and those of codebook.levels do not: set it to {getattr(plain, key):g}",
            )

    @classmethod
    def build(cls, own: CodebookSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "Codebook":
        from latent_ae.models.reconstruct import codebooks_of
        from latent_ae.models.registry import family_of

        learned = "fsq" not in run.enabled and family_of(autoencoder).latent in ("codebook", "code_levels")
        return cls(own, run, [len(codes) for codes in codebooks_of(autoencoder)] if learned else ()).to(device)

    @classmethod
    def describe(cls, own: CodebookSettings, run: RunFacts) -> str:
        if "fsq" in run.enabled:
            return ""
        if run.train == "decoder":
            return "codes stay as they are"
        restart = f"codes unused for {own.revive_after} steps restart" if own.revive_after else "unused codes stay"
        return f"commitment {own.commitment:g}, {restart}"

    def backward(self, p: Pass) -> None:
        levels = p.out.codes
        if not levels:
            return
        p.global_means["codebook/counts"] = torch.cat([code_counts(one.indices, len(one.codebook)) for one in levels])
        if not self.sizes:
            return
        if p.out.mean.requires_grad or any(one.vectors.requires_grad for one in levels):
            losses = [codebook_loss(one.latent, one.vectors, self.own.commitment) for one in levels]
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            p.logs["codebook"] = loss.detach()
            p.send_loss(loss)
        if p.first:  # from the step's first sample, which is the same however the batch is split
            self.candidates = [one.latent.detach()[0].flatten(1).T.contiguous() for one in levels]

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        self.counts = means.get("codebook/counts")
        if self.counts is None:
            return
        levels = self.counts.split(self.sizes or len(self.counts))
        for level, counts in enumerate(levels, start=1):
            name = f"_level_{level}" if len(levels) > 1 else ""
            logs[f"codebook_perplexity{name}"] = perplexity(counts)
            logs[f"codebook_used{name}"] = (counts > 0).float().mean()

    @torch.no_grad()
    def after_update(
        self, step: int, skipped: Tensor, model: "Reconstructor", optimizer: torch.optim.Optimizer
    ) -> None:
        """Age the codes, and restart those that were not used for `loss.revive_after` steps.

        A dead code becomes a latent of the step's first sample, and its moments in the optimizer become 0. The order
        of the latents is drawn by (seed, step), and none is taken twice, because of two equal codes one is never the
        nearest; dead codes beyond them wait for the next step. The result is the same on all processes, and nothing
        waits for the device.
        """
        self.restarted = []
        if self.counts is None or not self.candidates or not self.own.revive_after:
            return
        generator = torch.Generator().manual_seed((self.run.seed * 1_000_003 + step) % 2**63)
        counts, ages = self.counts.split(self.sizes), self.code_age.split(self.sizes)
        for codebook, fresh, used, kept in zip(model.codebooks, self.candidates, counts, ages, strict=True):
            if not codebook.requires_grad and "code_averages" not in self.run.enabled:
                self.restarted.append(None)
                continue
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(fresh, src=0)  # the first process has the first sample
            age = torch.where(used > 0, 0.0, kept + 1.0)
            dead = (age > self.own.revive_after) & ~skipped
            order = torch.randperm(len(fresh), generator=generator)
            if codebook.is_cuda:
                order = order.pin_memory().to(codebook.device, non_blocking=True)
            place = dead.cumsum(0) - 1  # of each dead code among them
            dead &= place < len(fresh)
            chosen = order[place.clamp(0, len(fresh) - 1)]
            codebook.copy_(torch.where(dead[:, None], fresh[chosen].to(codebook.dtype), codebook))
            if codebook.requires_grad:
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = optimizer.state[codebook][name]
                    moment.copy_(torch.where(dead[:, None], 0.0, moment))
            kept.copy_(torch.where(dead, 0.0, age))
            self.restarted.append((codebook, dead))

    @torch.no_grad()
    def after_average(self, autoencoder: Any) -> None:
        """Let codes that restarted begin anew in the averaged weights, too, which would move there for long."""
        from latent_ae.models.reconstruct import codebooks_of

        if not self.restarted:  # of a class without codes, too
            return
        for codes, restarted in zip(codebooks_of(autoencoder), self.restarted, strict=True):
            if restarted is not None:
                codebook, dead = restarted
                codes.copy_(torch.where(dead[:, None], codebook, codes))


def codebook_loss(latent: Tensor, vectors: Tensor, commitment: float) -> Tensor:
    """Return the codebook loss of van den Oord et al. 2017, eq. 3, as means over latent elements.

    Codes move to latents with weight 1, latents to codes with weight `commitment`. (The loss in diffusers has the
    weight on the other term, for compatibility with old models.)

    Args:
        latent: (N, c, h, w) latents before quantisation.
        vectors: (N, c, h, w) their codes.
        commitment: Weight of the second term.
    """
    return F.mse_loss(vectors, latent.detach()) + commitment * F.mse_loss(latent, vectors.detach())


def code_counts(indices: Tensor, num_codes: int) -> Tensor:
    """Return how often each code was used, (num_codes,) float32, without waiting for the device.

    Args:
        indices: Integer indices of codes, of any shape.
        num_codes: Size of the codebook.
    """
    flat = indices.flatten()
    return torch.zeros(num_codes, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))


def perplexity(counts: Tensor) -> Tensor:
    """Return exp of the entropy of the codes' frequencies: that many equally frequent codes carry as much information.

    Args:
        counts: (num_codes,) number of uses of each code.
    """
    frequencies = counts / counts.sum().clamp(min=1.0)
    return torch.exp(torch.special.entr(frequencies).sum())


def codebook_problems(
    key: str, off: str, run: RunFacts, model: ModelFacts | None, moves_codes: bool = True
) -> Iterator[Problem]:
    """Yield why a setting of a codebook does not go with the autoencoder or with what is trained.

    Args:
        key: The full key of the setting, which is on.
        off: Its value that turns it off.
        run: Facts of the run.
        model: Facts of the autoencoder; None before they are known.
        moves_codes: Whether it changes codes; otherwise it only changes what reaches the encoder.
    """
    if model is not None and model.no_codebook:
        yield Problem(key, model.no_codebook)
    elif moves_codes and "codes" in run.fixed_ends:
        yield Problem(key, f"changes codes, which train leaves fixed: set it to {off}")
    elif run.train == "decoder":
        yield Problem(key, f"is for encoder and codes, which train leaves fixed: set it to {off}")
