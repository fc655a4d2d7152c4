"""Codes of length 1, which are compared with latents by their direction (ViT-VQGAN, Yu et al. 2022; LlamaGen)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import Problem, Settings
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, RunFacts
from latent_ae.objectives.codebook import codebook_problems

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.reconstruct import Reconstructor


class UnitCodesSettings(Settings):
    """The length of codes."""

    normalised: bool = False
    """Codes of length 1, which latents are compared with by their direction, as in ViT-VQGAN and LlamaGen; those of
    init_from are normalised at the start."""


class UnitCodes(Objective[UnitCodesSettings]):
    """Keeps codes at length 1, those of the averaged weights included, and normalises latents before they are compared.

    It comes after all objectives that change codes. A stock VQModel takes the nearest code by Euclidean distance; for
    codes of length 1 this is the code with the largest cosine, so the export needs nothing but these codes.
    """

    name, section, docs, plan_line = "unit_codes", "codebook", "docs/codes.md", "codebook"

    @classmethod
    def enabled(cls, own: UnitCodesSettings) -> bool:
        return own.normalised

    @classmethod
    def problems(cls, own: UnitCodesSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.normalised:
            yield from codebook_problems("codebook.normalised", "false", run, model)

    @classmethod
    def build(cls, own: UnitCodesSettings, run: RunFacts, autoencoder: Any, device: torch.device) -> "UnitCodes":
        normalise_codebooks_(autoencoder)
        return cls(own, run)

    @classmethod
    def describe(cls, own: UnitCodesSettings, run: RunFacts) -> str:
        return "codes of length 1"

    def prepare(self, batch: Batch, step: int) -> Batch:
        return batch._replace(quantiser=batch.quantiser._replace(normalised=True))

    @torch.no_grad()
    def after_update(
        self, step: int, skipped: Tensor, model: "Reconstructor", optimizer: torch.optim.Optimizer
    ) -> None:
        normalise_codebooks_(model.autoencoder, skipped)

    def after_average(self, autoencoder: Any) -> None:
        normalise_codebooks_(autoencoder)  # an average of vectors of length 1 is shorter


@torch.no_grad()
def normalise_codebooks_(autoencoder: Any, skipped: Tensor | None = None) -> None:
    """Scale the codes of all levels to length 1 in place.

    Args:
        autoencoder: A VQModel or VQVAE2.
        skipped: Bool scalar, True if they stay as they are, bit for bit; None is False.
    """
    from latent_ae.models.reconstruct import codebooks_of

    for codes in codebooks_of(autoencoder):
        unit = F.normalize(codes, dim=1)
        codes.copy_(unit if skipped is None else torch.where(skipped, codes, unit))
