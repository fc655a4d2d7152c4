"""The classes of first stages that are known here: a record for each, with all that is asked of a class elsewhere."""

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
from latent_ae.models.family import (
    Family,
    LatentScaling,
    factor_of_patches,
    of_config,
    patched,
    powers_of_two,
    scaling_of_first_frame,
)

BLOCKS = (ResnetBlock2D, AutoencoderTinyBlock, ResBlock, EfficientViTBlock)
"""Blocks that the classes are made of, which `compile` compiles."""


LATENT_CHANNELS = of_config("latent_channels")


def _one_frame(
    factor: Callable[[Any], int], latent_channels: Callable[[Any], int] = LATENT_CHANNELS, **fields: Any
) -> Family:
    """A class of videos, N x C x T x H x W, to which an image is a video of one frame."""
    own: dict[str, Any] = {
        "latent": "posterior",
        "encode": adapters.encode_frame,
        "decode": adapters.decode_frame,
        "encoded": "vae.encode(images[:, :, None]).latent_dist.sample()[:, :, 0]",
        "decoded": "vae.decode(z[:, :, None]).sample[:, :, 0]",
        "trains": ("decoder",),
    }
    return Family(factor=factor, latent_channels=latent_channels, **own | fields)


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
    "trains": (),  # nothing would hold its alpha in place
}

FAMILIES = {
    "AutoencoderKL": Family(
        "posterior", powers_of_two("block_out_channels"), tried_in_half_precision=True, pipeline_decodes=True
    ),
    "AutoencoderKLFlux2": Family("posterior", powers_of_two("block_out_channels"), scaled_by_patches=True),
    # its decoder has weights for masks, which a first stage is not given
    "AsymmetricAutoencoderKL": Family(
        "posterior",
        powers_of_two("down_block_out_channels"),
        unreached="condition_encoder",
        pipeline_decodes=True,
        gradient_checkpointing=True,  # its encoder and decoder can (diffusers 0.42 does not flag it)
    ),
    # its encoder forgets to scale images when it checkpoints (diffusers 0.42)
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
        gradient_checkpointing=True,  # as of AsymmetricAutoencoderKL
    ),
    # its levels' latents packed into one of 1 x 1
    "HierarchicalVAE": Family(
        "hierarchy",
        lambda config: int(config.sample_size),
        lambda config: sum(
            side**2 * count for side, count in zip(config.level_sides, config.level_channels, strict=True)
        ),
        side=of_config("sample_size"),
        encoded="vae.encode(images).latent",
        trains=("all",),
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
        # its `encode` has scaled them
        scaling=lambda config: LatentScaling(inside=config.latents_std is not None or config.scaling_factor != 1.0),
        refusal=lambda config: (
            None if config.reshape_to_2d else "its latents are tokens without a grid: set reshape_to_2d in config.json"
        ),
        trains=("decoder",),
    ),
    "AutoencoderKLQwenImage": _one_frame(
        powers_of_two("temperal_downsample", 0),
        of_config("z_dim"),
        channels=of_config("input_channels"),
        unreached="time_conv",
    ),
    # of RGBA images; a still image is given to it as an opaque one
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
        trains=(),
    ),
}

OWN = {"FlowAutoencoderKL": "latent_ae.models.flow", "HierarchicalVAE": "latent_ae.models.hierarchical"}
"""Modules of the classes that diffusers has not, saved and loaded as its are. FAMILIES has them, too."""


def class_of(name: str) -> Any:
    """The class of one of FAMILIES. Raises UserError where the installed diffusers is older than it."""
    found = getattr(importlib.import_module(module_of(name)), name, None)
    if found is None:
        raise UserError(
            f"diffusers {diffusers.__version__} has no {name}: install a newer one (pip install -U diffusers)"
        )
    return found


def module_of(name: str) -> str:
    """From which the class can be imported."""
    return OWN.get(name, "diffusers")


def family_name(module: object) -> str | None:
    """Which of FAMILIES this is an instance of."""
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in FAMILIES), None)


def family_of(module: Any) -> Family:
    """The record of an instance of one of FAMILIES."""
    family = FAMILIES[str(family_name(module))]
    return family._replace(**family.variant(module.config))


def recompute_blocks_(module: Any) -> None:
    """From now on the blocks of an instance of one of FAMILIES are computed again in the backward pass.

    Raises ValueError where they cannot be.
    """
    if not recomputes(module):
        raise ValueError(f"{type(module).__name__} has no gradient checkpointing")
    module._supports_gradient_checkpointing = True  # of this instance; diffusers' flag of the class may be missing
    module.enable_gradient_checkpointing()


def recomputes(module: Any) -> bool:
    """Whether the blocks of an instance of one of FAMILIES can be computed again in the backward pass."""
    known = family_of(module).gradient_checkpointing
    return bool(module._supports_gradient_checkpointing if known is None else known)


def scaling_of(module: Any) -> LatentScaling:
    """What diffusion models do with the latents of an instance of one of FAMILIES."""
    return family_of(module).scaling(module.config)


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
