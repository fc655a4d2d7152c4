"""The gradient that passes from codes to latents: straight through, or rotated (Fifty et al. 2024)."""

from collections.abc import Iterator
from typing import Literal

from latent_ae.config import Problem, Settings
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, RunFacts
from latent_ae.objectives.codebook import codebook_problems


class CodeGradientSettings(Settings):
    """The gradient that passes from codes to latents."""

    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """Gradient that latents get from their codes: straight_through is the codes' own; rotation turns and scales it as
    the latent is turned and scaled into its code (Fifty et al. 2024)."""


class CodeGradient(Objective[CodeGradientSettings]):
    """The rotation trick, see `quantize.rotated`; the codes and images of a step do not change."""

    name, section, docs, plan_line = "code_gradient", "codebook", "docs/codes.md", "codebook"

    @classmethod
    def enabled(cls, own: CodeGradientSettings) -> bool:
        return own.gradient == "rotation"

    @classmethod
    def problems(cls, own: CodeGradientSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.gradient == "rotation":
            yield from codebook_problems("codebook.gradient", "straight_through", run, model, moves_codes=False)

    @classmethod
    def describe(cls, own: CodeGradientSettings, run: RunFacts) -> str:
        return "gradient rotated"

    def prepare(self, batch: Batch, step: int) -> Batch:
        return batch._replace(quantiser=batch.quantiser._replace(rotation=True))
