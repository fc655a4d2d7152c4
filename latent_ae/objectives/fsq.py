"""Finite scalar quantisation: a fixed codebook of a few levels for each channel (Mentzer et al. 2023)."""

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field

from latent_ae.config import Problem, Settings
from latent_ae.models import fsq
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, RunFacts
from latent_ae.objectives.codebook import codebook_problems

MOST_CODES = 2**20
"""Size of the largest codebook; its distances to every position are computed."""
OTHERS = {
    "unit_codes": "codebook.normalised",
    "code_gradient": "codebook.gradient",
    "code_entropy": "codebook.entropy",
    "code_averages": "codebook.ema_decay",
}
"""Settings of other objectives that are for codes which learn, by the objective's name."""


class FSQSettings(Settings):
    """Finite scalar quantisation."""

    levels: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] | None = None
    """Levels of each channel of the latent, as [8, 5, 5, 5]: the codebook is their fixed product (finite scalar
    quantisation); null learns the codes."""


class FSQ(Objective[FSQSettings]):
    """Fixes the codebook to the product of the levels (`models.fsq.grid`), and passes the gradient of a tanh.

    There is no loss of codes, and none restarts.
    """

    name, section, docs, plan_line = "fsq", "codebook", "docs/codes.md", "codebook"

    @classmethod
    def enabled(cls, own: FSQSettings) -> bool:
        return own.levels is not None

    @classmethod
    def problems(cls, own: FSQSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.levels is None:
            return
        key, (codes, channels) = "codebook.levels", shape_of_codebook(own.levels)
        if codes > MOST_CODES:
            yield Problem(key, f"make {codes:,} codes, more than {MOST_CODES:,}: give fewer or smaller levels")
            return
        if others := [OTHERS[name] for name in OTHERS if name in run.enabled]:
            yield Problem(key, f"fix the codes, and {', '.join(others)} would be for codes that learn: keep one")
        yield from codebook_problems(key, "null", run, model)
        if model is not None and model.latent == "code_levels":
            yield Problem(key, f"fix one codebook, and {model.name} has one for each level: leave them out")
        elif model is not None and not model.no_codebook and (model.codes, model.latent_channels) != (codes, channels):
            yield Problem(
                "model.config",
                f"{model.name} has {model.codes:,} codes of {model.latent_channels} channels, and codebook.levels make "
                f"{codes:,} of {channels}: set num_vq_embeddings to {codes} and vq_embed_dim to {channels}, or leave "
                "both out",
            )

    @classmethod
    def build(cls, own: FSQSettings, run: RunFacts, autoencoder: Any, device: torch.device) -> "FSQ":
        assert own.levels is not None
        codes = autoencoder.quantize.embedding.weight.requires_grad_(False)
        codes.copy_(fsq.grid(own.levels))
        return cls(own, run)

    @classmethod
    def describe(cls, own: FSQSettings, run: RunFacts) -> str:
        assert own.levels is not None
        return f"fixed, {' x '.join(map(str, own.levels))} levels"

    def prepare(self, batch: Batch, step: int) -> Batch:
        assert self.own.levels is not None
        return batch._replace(quantiser=batch.quantiser._replace(levels=self.own.levels))


def shape_of_codebook(levels: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of codes and of their channels."""
    return math.prod(levels), len(levels)
