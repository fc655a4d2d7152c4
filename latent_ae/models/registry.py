"""The known classes of first stages: a record for each, which tells the rest of the project how to use it."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock, ResBlock
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from latent_ae.config import UserError
from latent_ae.models import adapters
from latent_ae.models.cells import Bottleneck, Depthwise
from latent_ae.models.family import (
    Family,
    LatentScaling,
    factor_of_patches,
    of_config,
    patched,
    powers_of_two,
    scaling_of_first_frame,
)
from latent_ae.models.likelihood import LikelihoodKind

BLOCKS = (ResnetBlock2D, AutoencoderTinyBlock, ResBlock, EfficientViTBlock, Bottleneck, Depthwise)
"""Building blocks of the classes, which `compile` compiles."""


LATENT_CHANNELS = of_config("latent_channels")


def _one_frame(
    factor: Callable[[Any], int], latent_channels: Callable[[Any], int] = LATENT_CHANNELS, **fields: Any
) -> Family:
    """Return the record of a class for videos, (N, C, T, H, W), which takes an image as a video of one frame."""
    own: dict[str, Any] = {
        "latent": "posterior",
        "encode": adapters.encode_frame,
        "decode": adapters.decode_frame,
        "encoded": "vae.encode(images[:, :, None]).latent_dist.sample()[:, :, 0]",
        "decoded": "vae.decode(z[:, :, None]).sample[:, :, 0]",
        "trains": ("decoder",),
    }
    return Family(factor=factor, latent_channels=latent_channels, **own | fields)


def _codes_per_position(config: Any) -> int:
    return sum(4**level for level in range(config.levels))


def _vidtok_factor(config: Any) -> int:
    return int(2 ** (len(config.ch_mult) - 1 if config.spatial_ds is None else len(config.spatial_ds)))


_VIDTOK_FRAMES = "images[:, :, None].expand(-1, -1, vae.temporal_compression_ratio, -1, -1)"
_QUANTISED = {
    "latent": "deterministic",
    "encoded": f"vae.encode({_VIDTOK_FRAMES})[0][:, :, 0]",
    "codes": of_config("codebook_size"),
}
_RGBA = {
    "encoded": "vae.encode(torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 1), value=1.0)[:, :, None])"
    ".latent_dist.sample()[:, :, 0]",
    "decoded": "vae.decode(z[:, :, None]).sample[:, :3, 0]",
    "trains": (),  # no loss would keep the alpha channel at 1
}

FAMILIES = {
    "AutoencoderKL": Family(
        "posterior", powers_of_two("block_out_channels"), tried_in_half_precision=True, pipeline_decodes=True
    ),
    "AutoencoderKLFlux2": Family("posterior", powers_of_two("block_out_channels"), scaled_by_patches=True),
    # its decoder has weights for masks, which a first stage does not get
    "AsymmetricAutoencoderKL": Family(
        "posterior",
        powers_of_two("down_block_out_channels"),
        unreached="condition_encoder",
        pipeline_decodes=True,
        gradient_checkpointing=True,  # its encoder and decoder support it, though diffusers 0.42 does not flag it
    ),
    # with checkpointing, its encoder does not scale the images (diffusers 0.42)
    "AutoencoderTiny": Family(
        "deterministic",
        powers_of_two("encoder_block_out_channels"),
        encoded="vae.encode(images).latents",
        pipeline_decodes=True,
        gradient_checkpointing=False,
    ),
    "AutoencoderDC": Family(
        "deterministic",
        powers_of_two("encoder_block_out_channels"),
        encoded="vae.encode(images).latent",
        pipeline_decodes=True,
    ),
    "VQModel": Family(
        "codebook",
        powers_of_two("block_out_channels"),
        lambda config: int(config.vq_embed_dim or config.latent_channels),
        encoded="vae.encode(images).latents",
        codes=of_config("num_vq_embeddings"),
        pipeline_decodes=True,
        gradient_checkpointing=True,  # as for AsymmetricAutoencoderKL
    ),
    # its latent packs those of all levels into one of 1 x 1
    "HierarchicalVAE": Family(
        "hierarchy",
        lambda config: int(config.sample_size),
        lambda config: sum(
            side**2 * count for side, count in zip(config.level_sides, config.level_channels, strict=True)
        ),
        side=of_config("sample_size"),
        states=lambda config: "logistic_mixture" if config.mixtures else None,
        encoded="vae.encode(images).latent",
        trains=("all",),
    ),
    "DiscreteVAE": Family(
        "categorical",
        powers_of_two("block_out_channels"),
        states=lambda config: "logit_laplace",
        encoded="vae.encode(images).latent",
        codes=of_config("num_vq_embeddings"),
    ),
    # its latent packs the vectors of all levels on the grid of the coarsest
    "VQVAE2": Family(
        "code_levels",
        lambda config: int(2 ** (len(config.block_out_channels) + config.levels - 2)),
        lambda config: int(config.latent_channels * _codes_per_position(config)),
        encoded="vae.encode(images).latent",
        codes=of_config("num_vq_embeddings"),
        codes_per_position=_codes_per_position,
    ),
    # its plain decoder is never trained
    "FlowMatchingVAE": Family(
        "posterior",
        powers_of_two("block_out_channels"),
        unreached="base.",
        trains=("decoder",),
        decodes_noise=True,
        flow_matching=True,
    ),
    "FlowAutoencoderKL": Family("flow", powers_of_two("block_out_channels"), encoded="vae.encode(images).latent"),
    "AutoencoderRAE": Family(
        "deterministic",
        of_config("patch_size"),
        of_config("encoder_hidden_size"),
        channels=of_config("num_channels"),
        side=lambda config: int(config.patch_size * (config.encoder_input_size // config.encoder_patch_size)),
        encode=adapters.encode_unit_range,
        decode=adapters.decode_unit_range,
        encoded="vae.encode((images + 1) / 2).latent",
        decoded="2 * vae.decode(z).sample - 1",
        # its `encode` scales them
        scaling=lambda config: LatentScaling(inside=config.latents_std is not None or config.scaling_factor != 1.0),
        refusal=lambda config: (
            None if config.reshape_to_2d else "its latents are tokens without a grid: set reshape_to_2d in config.json"
        ),
        scaled_by_positions=True,
        trains=("decoder",),
    ),
    "AutoencoderKLQwenImage": _one_frame(
        powers_of_two("temperal_downsample", 0),
        of_config("z_dim"),
        channels=of_config("input_channels"),
        unreached="time_conv",
    ),
    # for RGBA images; a still image becomes an opaque one
    "AutoencoderKLQwenImage21": _one_frame(
        factor_of_patches,
        of_config("z_dim"),
        channels=lambda config: min(3, config.in_channels),
        out_channels=lambda config: min(3, config.out_channels),
        encode=adapters.encode_opaque_frame,
        decode=adapters.decode_opaque_frame,
        variant=lambda config: _RGBA if config.in_channels == 4 else {},
        unreached="time_conv",
    ),
    "AutoencoderKLWan": _one_frame(
        factor_of_patches,
        of_config("z_dim"),
        channels=patched("in_channels"),
        out_channels=patched("out_channels"),
        unreached="time_conv",
    ),
    "AutoencoderKLHunyuanImage": Family("posterior", of_config("spatial_compression_ratio"), trains=("decoder",)),
    "AutoencoderKLHunyuanImageRefiner": _one_frame(of_config("spatial_compression_ratio")),
    "AutoencoderKLKVAE": Family("posterior", powers_of_two("ch_mult"), of_config("z_channels"), trains=("decoder",)),
    "AutoencoderKLCosmos": _one_frame(
        of_config("spatial_compression_ratio"),
        latent="deterministic",
        encoded="vae.encode(images[:, :, None]).latent_dist.sample()[:, :, 0]",
        scaling=scaling_of_first_frame,
    ),
    "AutoencoderVidTok": _one_frame(
        _vidtok_factor,
        of_config("z_channels"),
        encode=adapters.encode_first_frames,
        decode=adapters.decode_first_frame,
        encoded=f"vae.encode({_VIDTOK_FRAMES}).latent_dist.sample()[:, :, 0]",
        decoded="vae.decode(z[:, :, None])[:, :, 0]",
        variant=lambda config: _QUANTISED if config.regularizer == "fsq" else {},
        refusal=lambda config: (
            None if config.is_causal else "with is_causal=false it takes videos of 16 frames and no still images"
        ),
    ),
    "ConsistencyDecoderVAE": Family(
        "posterior",
        powers_of_two("encoder_block_out_channels"),
        channels=of_config("encoder_in_channels"),
        decode=adapters.decode_by_consistency,
        decoded="vae.decode(z, generator=[torch.Generator().manual_seed(0) for _ in z]).sample",
        decodes_noise=True,
        trains=(),
    ),
}

OWN = {
    "DiscreteVAE": "latent_ae.models.discrete",
    "FlowAutoencoderKL": "latent_ae.models.flow",
    "FlowMatchingVAE": "latent_ae.models.flow_matching",
    "HierarchicalVAE": "latent_ae.models.hierarchical",
    "VQVAE2": "latent_ae.models.vqvae2",
}
"""Modules of this project's own classes, which save and load like those of diffusers; they are in FAMILIES, too."""


def class_of(name: str) -> Any:
    """Return a class of FAMILIES by its name.

    Raises:
        UserError: If the installed diffusers does not have it.
    """
    found = getattr(importlib.import_module(module_of(name)), name, None)
    if found is None:
        raise UserError(
            f"diffusers {diffusers.__version__} has no {name}: install a newer one (pip install -U diffusers)"
        )
    return found


def module_of(name: str) -> str:
    """Return the name of the module from which a class of FAMILIES can be imported."""
    return OWN.get(name, "diffusers")


def family_name(module: object) -> str | None:
    """Return the name in FAMILIES of the class of an instance; None if it is not in FAMILIES."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in FAMILIES), None)


def family_of(module: Any) -> Family:
    """Return the record of an instance of one of FAMILIES, with the fields of its variant."""
    family = FAMILIES[str(family_name(module))]
    return family._replace(**family.variant(module.config))


def states(module: Any) -> LikelihoodKind | None:
    """Return the likelihood whose parameters the decoder of an instance of one of FAMILIES gives; None if none."""
    return family_of(module).states(module.config)


def recompute_blocks_(module: Any) -> None:
    """Switch on gradient checkpointing in an instance of one of FAMILIES, in place.

    Raises:
        ValueError: If the class does not support it.
    """
    if not recomputes(module):
        raise ValueError(f"{type(module).__name__} has no gradient checkpointing")
    module._supports_gradient_checkpointing = True  # on this instance, because the class may lack diffusers' flag
    module.enable_gradient_checkpointing()


def recomputes(module: Any) -> bool:
    """Return whether an instance of one of FAMILIES supports gradient checkpointing."""
    known = family_of(module).gradient_checkpointing
    return bool(module._supports_gradient_checkpointing if known is None else known)


def scaling_of(module: Any) -> LatentScaling:
    """Return how diffusion models scale the latents of an instance of one of FAMILIES."""
    return family_of(module).scaling(module.config)


def untrained(config: dict[str, Any]) -> nn.Module:
    """Return a fresh instance of the class that a diffusers config names.

    Raises:
        ValueError: If the class is not in FAMILIES. The errors of diffusers pass through.
        UserError: If the installed diffusers does not have the class.
    """
    name = config.get("_class_name", "AutoencoderKL")
    if name not in FAMILIES:
        raise ValueError(f"{name} is not a first stage known here: {', '.join(FAMILIES)}")
    model: nn.Module = class_of(name).from_config(config)
    return model


def config_of(folder: str | Path) -> dict[str, Any]:
    """Return the diffusers config in a folder. The errors of diffusers pass through."""
    config: dict[str, Any] = diffusers.AutoencoderKL.load_config(folder)
    return config
