"""A small random instance of each class of first stage."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    VQModel,
)

from latent_ae.models.discrete import DiscreteVAE
from latent_ae.models.flow import FlowAutoencoderKL
from latent_ae.models.hierarchical import HierarchicalVAE
from latent_ae.models.registry import FAMILIES, OWN, class_of
from latent_ae.models.vqvae2 import VQVAE2

TWO = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
SCALED = {"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 1.5]}
VIDEO = SCALED | {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, "temperal_downsample": [True]}
VIDTOK = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 2, "tempo_ds": [0], "tempo_us": [1]}
CONFIGS: dict[str, dict[str, Any]] = {
    "AutoencoderRAE": {
        "encoder_type": "mae",
        "encoder_hidden_size": 64,
        "encoder_patch_size": 8,
        "encoder_num_hidden_layers": 1,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "patch_size": 4,
        "encoder_input_size": 64,
        "latents_mean": [[[0.1]]] * 64,
        "latents_std": [[[2.0]]] * 64,
    },
    "AutoencoderKLQwenImage": VIDEO | {"dim_mult": [1, 2]},
    "AutoencoderKLQwenImage21": VIDEO | {"decoder_base_dim": 16, "dim_mult": [1, 1], "scale_factor_spatial": 2},
    "AutoencoderKLWan": VIDEO | {"dim_mult": [1, 2], "scale_factor_spatial": 2},
    "AutoencoderKLWan 2.2": VIDEO
    | {
        **{"dim_mult": [1, 1], "is_residual": True, "patch_size": 2},
        **{"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 4},
    },
    "AutoencoderKLHunyuanImage": {
        **{"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64)},
        **{"layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 32, "scaling_factor": 0.7},
    },
    "AutoencoderKLHunyuanImageRefiner": {
        **{"latent_channels": 4, "block_out_channels": (12, 24), "layers_per_block": 1},
        **{"spatial_compression_ratio": 2, "temporal_compression_ratio": 2},
    },
    "AutoencoderKLKVAE": {
        **{"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4},
        **{"ch_mult": (1, 2), "sample_size": 32},
    },
    "AutoencoderKLCosmos": {
        **{
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8, 16),
            "decode_block_out_channels": (8, 8, 8, 16),
        },
        **{"attention_resolutions": (8,), "resolution": 32, "num_layers": 1, "patch_size": 2},
        **{"spatial_compression_ratio": 4, "temporal_compression_ratio": 4},
        # of four latent frames
        **{"latents_mean": [number / 10 for number in range(16)], "latents_std": [1 + number for number in range(16)]},
    },
    "FlowMatchingVAE": TWO
    | {"latent_channels": 4, "unet_block_out_channels": (8,), "unet_norm_num_groups": 4, "sampling_steps": 2},
    "AutoencoderVidTok": VIDTOK,
    "AutoencoderVidTok FSQ": VIDTOK | {"double_z": False, "regularizer": "fsq", "codebook_size": 64},
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (8, 16),
        "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
        "encoder_norm_num_groups": 4,
        "encoder_layers_per_block": 1,
        "decoder_block_out_channels": (32, 32),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_layers_per_block": 1,
    },
}
"""Configs of classes that are measured but not trained from fresh weights, by class and variant."""
CLASSES = [name for name in FAMILIES if name in OWN or hasattr(diffusers, name)]
"""Those that the installed diffusers has."""
TRAINED = [name for name in CLASSES if name not in CONFIGS]
"""Those that train from fresh weights."""
MEASURED = [name for name in CONFIGS if name.split()[0] in CLASSES]
"""The keys of CONFIGS that the installed diffusers has."""


def tiny(name: str, seed: int = 0) -> torch.nn.Module:
    """A small random instance of a class, or of a variant of CONFIGS."""
    torch.manual_seed(seed)
    if name in CONFIGS:
        model = class_of(name.split()[0])(**CONFIGS[name])
        if name == "FlowMatchingVAE":  # whose last convolution begins at 0
            model.decoder.conv_out.reset_parameters()
        return model
    if name == "AutoencoderKL":
        return AutoencoderKL(**TWO, latent_channels=4)
    if name == "AutoencoderKLFlux2":
        return AutoencoderKLFlux2(**TWO, latent_channels=4, layers_per_block=1)
    if name == "AsymmetricAutoencoderKL":
        return AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=(8, 16),
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=(8, 32),
            latent_channels=4,
            norm_num_groups=4,
        )
    if name == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    if name == "AutoencoderDC":
        return AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
        )
    if name == "HierarchicalVAE":
        model = HierarchicalVAE(
            width=8, level_sides=(4, 8, 16), level_channels=(3, 0, 1), norm_num_groups=2, sample_size=32
        )
        for part in model.modules():  # whose branches and moments begin at 0
            if isinstance(part, torch.nn.Conv2d):
                part.reset_parameters()
        return model
    if name == "FlowAutoencoderKL":
        flow = FlowAutoencoderKL(**TWO, latent_channels=4, flow_width=8)
        for coupling in flow.flow:  # which begin as the identity
            torch.nn.init.normal_(coupling.network[-1].weight)
        return flow
    if name == "DiscreteVAE":
        return DiscreteVAE(**TWO, latent_channels=4, num_vq_embeddings=16)
    if name == "VQVAE2":
        return VQVAE2(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, num_vq_embeddings=16)
    return VQModel(**TWO, latent_channels=4, num_vq_embeddings=16)


def pictures(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def tiny_autoencoder(in_channels: int = 3, out_channels: int = 3) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )


SIZES = ((60, 45), (45, 60), (40, 33), (64, 64), (51, 39))
"""Of `photos`, px."""
