"""A small random instance of each class of first stage."""

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderTiny,
    VQModel,
)

from latent_ae.models.flow import FlowAutoencoderKL
from latent_ae.models.hierarchical import HierarchicalVAE

TWO = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def tiny(name: str, seed: int = 0) -> torch.nn.Module:
    """A small random instance of each class."""
    torch.manual_seed(seed)
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
