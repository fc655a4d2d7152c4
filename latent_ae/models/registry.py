"""The classes of first stages that are known here: what their latents are, and how sides shrink."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import diffusers
from torch import nn

from latent_ae.models.flow import FlowAutoencoderKL
from latent_ae.models.hierarchical import HierarchicalVAE


class Family(NamedTuple):
    """A class of first stages."""

    latent: Literal["posterior", "deterministic", "codebook", "hierarchy", "flow"]
    """posterior: one Gaussian. hierarchy, flow: drawn, but without moments to encode."""
    factor: Callable[[Any], int]
    """Of its config: image px per latent px along one side."""
    latent_channels: Callable[[Any], int]


FAMILIES = {
    "AutoencoderKL": Family("posterior", lambda c: 2 ** (len(c.block_out_channels) - 1), lambda c: c.latent_channels),
    "AutoencoderKLFlux2": Family(
        "posterior", lambda c: 2 ** (len(c.block_out_channels) - 1), lambda c: c.latent_channels
    ),
    "AsymmetricAutoencoderKL": Family(
        "posterior", lambda c: 2 ** (len(c.down_block_out_channels) - 1), lambda c: c.latent_channels
    ),
    "AutoencoderTiny": Family(
        "deterministic", lambda c: 2 ** (len(c.encoder_block_out_channels) - 1), lambda c: c.latent_channels
    ),
    "AutoencoderDC": Family(
        "deterministic", lambda c: 2 ** (len(c.encoder_block_out_channels) - 1), lambda c: c.latent_channels
    ),
    "VQModel": Family(
        "codebook", lambda c: 2 ** (len(c.block_out_channels) - 1), lambda c: c.vq_embed_dim or c.latent_channels
    ),
    # its levels' latents packed into one of 1 x 1
    "HierarchicalVAE": Family(
        "hierarchy",
        lambda c: c.sample_size,
        lambda c: sum(side**2 * count for side, count in zip(c.level_sides, c.level_channels, strict=True)),
    ),
    "FlowAutoencoderKL": Family("flow", lambda c: 2 ** (len(c.block_out_channels) - 1), lambda c: c.latent_channels),
}

OWN: dict[str, type[nn.Module]] = {"FlowAutoencoderKL": FlowAutoencoderKL, "HierarchicalVAE": HierarchicalVAE}
"""Classes that diffusers has not, saved and loaded as its are. FAMILIES has them, too."""


def class_of(name: str) -> Any:
    """The class of one of FAMILIES."""
    return OWN[name] if name in OWN else getattr(diffusers, name)


def module_of(name: str) -> str:
    """From which the class can be imported."""
    return OWN[name].__module__ if name in OWN else "diffusers"


def family_name(module: object) -> str | None:
    """Which of FAMILIES this is an instance of."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in FAMILIES), None)


def family_of(module: nn.Module) -> Family:
    """Of an instance of one of FAMILIES."""
    return FAMILIES[str(family_name(module))]


def untrained(config: dict[str, Any]) -> nn.Module:
    """A fresh instance of the class of FAMILIES that a diffusers config names. Raises what diffusers does."""
    name = config.get("_class_name", "AutoencoderKL")
    if name not in FAMILIES:
        raise ValueError(f"{name} is not a first stage known here: {', '.join(FAMILIES)}")
    model: nn.Module = class_of(name).from_config(config)
    return model
