"""The codes of first stages that have them, one interface for all: latents to numbers of codes and back."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from latent_ae.models.quantize import exactly_nearest, quantised
from latent_ae.models.registry import FAMILIES, family_of

WITH_CODES = tuple(
    name for name, family in FAMILIES.items() if family.latent in ("codebook", "code_levels", "categorical")
)
"""Classes whose latents are codes with vectors."""


def has_codes(module: nn.Module) -> bool:
    """Return whether the latents of an instance of one of FAMILIES are codes with vectors."""
    return family_of(module).latent in ("codebook", "code_levels", "categorical")


def nearest_codes(module: Any, latent: Tensor) -> tuple[Tensor, ...]:
    """Return the numbers of the nearest codes of each level, from the coarsest, (N, h_l, w_l) int64 each.

    A vector that is a code gets this code; the latents of a VQModel are none, and it chooses as the model does.

    Args:
        module: A first stage that has codes.
        latent: (N, c, h, w) raw latents, as `latent-ae encode` stores them.
    """
    if family_of(module).latent == "code_levels":
        levels: tuple[Tensor, ...] = module.nearest(latent)
        return levels
    if family_of(module).latent == "categorical":
        return (exactly_nearest(latent.float(), module.embedding.weight.float()),)
    return (quantised(latent.float(), _table(module).weight.float())[1].indices,)


def latent_of_codes(module: Any, indices: Sequence[Tensor]) -> Tensor:
    """Return the latent, (N, c, h, w), that `decode` takes, for the numbers of each level's codes."""
    if family_of(module).latent == "code_levels":
        latent: Tensor = module.vectors(indices)
        return latent
    (numbers,) = indices
    return _table(module)(numbers).movedim(-1, 1).contiguous()


def _table(module: Any) -> nn.Embedding:
    """Return the codes' vectors of a first stage with one level."""
    table: nn.Embedding = module.embedding if family_of(module).latent == "categorical" else module.quantize.embedding
    return table
