"""The classes of first stages that are known here: a record for each, with all that is asked of a class elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffusers
from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock, ResBlock
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from latent_ae.models.flow import FlowAutoencoderKL
from latent_ae.models.hierarchical import HierarchicalVAE

BLOCKS = (ResnetBlock2D, AutoencoderTinyBlock, ResBlock, EfficientViTBlock)
"""Blocks that the classes are made of, which `compile` compiles."""


def _powers_of_two(key: str) -> Callable[[Any], int]:
    """Downsampling by 2 from each level of the config's `key` to the next."""
    return lambda config: int(2 ** (len(config[key]) - 1))


class Family(NamedTuple):
    """A class of first stages."""

    latent: Literal["posterior", "deterministic", "codebook", "hierarchy", "flow"]
    """posterior: one Gaussian. hierarchy, flow: random, but without moments to encode; the class draws it itself."""
    factor: Callable[[Any], int]
    """Its config -> image px per latent px along one side."""
    latent_channels: Callable[[Any], int] = lambda config: int(config.latent_channels)
    """Its config -> channels of a latent."""
    encoded: str = "latent_dist.sample()"
    """What of the result of `encode` a user takes as the latent, as Python."""
    scaled_by_patches: bool = False
    """Diffusion models scale its latents by the statistics in its batch norm, not by its config."""
    tried_in_half_precision: bool = False
    """Export tries it in half precision and in tiles."""
    pipeline_decodes: bool = False
    """DiTPipeline decodes with it."""
    gradient_checkpointing: bool = True
    """False where diffusers' is wrong."""

    @property
    def random(self) -> bool:
        """Whether a latent is drawn from a posterior, so that there is a KL term."""
        return self.latent in ("posterior", "hierarchy", "flow")

    @property
    def draws_itself(self) -> bool:
        """Whether the class has a method `draw`, as its posterior is more than one Gaussian."""
        return self.latent in ("hierarchy", "flow")

    @property
    def one_grid(self) -> bool:
        """Whether latents lie on one grid over the image; otherwise they are packed into one place."""
        return self.latent != "hierarchy"


FAMILIES = {
    "AutoencoderKL": Family(
        "posterior", _powers_of_two("block_out_channels"), tried_in_half_precision=True, pipeline_decodes=True
    ),
    "AutoencoderKLFlux2": Family("posterior", _powers_of_two("block_out_channels"), scaled_by_patches=True),
    "AsymmetricAutoencoderKL": Family("posterior", _powers_of_two("down_block_out_channels"), pipeline_decodes=True),
    # its encoder forgets to scale images when it checkpoints (diffusers 0.42)
    "AutoencoderTiny": Family(
        "deterministic",
        _powers_of_two("encoder_block_out_channels"),
        encoded="latents",
        pipeline_decodes=True,
        gradient_checkpointing=False,
    ),
    "AutoencoderDC": Family(
        "deterministic", _powers_of_two("encoder_block_out_channels"), encoded="latent", pipeline_decodes=True
    ),
    "VQModel": Family(
        "codebook",
        _powers_of_two("block_out_channels"),
        lambda config: int(config.vq_embed_dim or config.latent_channels),
        encoded="latents",
        pipeline_decodes=True,
    ),
    # its levels' latents packed into one of 1 x 1
    "HierarchicalVAE": Family(
        "hierarchy",
        lambda config: int(config.sample_size),
        lambda config: sum(
            side**2 * count for side, count in zip(config.level_sides, config.level_channels, strict=True)
        ),
        encoded="latent",
    ),
    "FlowAutoencoderKL": Family("flow", _powers_of_two("block_out_channels"), encoded="latent"),
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
    """The record of an instance of one of FAMILIES."""
    return FAMILIES[str(family_name(module))]


def untrained(config: dict[str, Any]) -> nn.Module:
    """A fresh instance of the class of FAMILIES that a diffusers config names. Raises what diffusers does."""
    name = config.get("_class_name", "AutoencoderKL")
    if name not in FAMILIES:
        raise ValueError(f"{name} is not a first stage known here: {', '.join(FAMILIES)}")
    model: nn.Module = class_of(name).from_config(config)
    return model


def config_of(folder: str | Path) -> dict[str, Any]:
    """The diffusers config in a folder. Raises what diffusers does."""
    config: dict[str, Any] = diffusers.AutoencoderKL.load_config(folder)
    return config
