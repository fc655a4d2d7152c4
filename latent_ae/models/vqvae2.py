"""VQ-VAE-2: codes on several grids, the finer ones chosen in the light of the coarser (Razavi et al. 2019)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latent_ae.models.quantize import PLAIN, Codes, Quantiser, exactly_nearest, quantised


@dataclass
class CodeLevelsOutput(BaseOutput):
    """The codes of images."""

    latent: Tensor
    """The vectors of all levels in one latent, (N, D, h, w); see `VQVAE2`."""
    indices: tuple[Tensor, ...]
    """The numbers of the codes of each level, from the coarsest, whose grid is h x w: (N, h 2^l, w 2^l) int64."""


class VQVAE2(ModelMixin, ConfigMixin):
    """Levels of nearest codes, each on a grid of twice the side of the one above (Razavi et al. 2019, section 3.1).

    The encoder of a coarser level works on the features of the finer one. From the coarsest level down, the vectors of
    the codes so far are decoded to features, which join those of the next level before its codes are chosen. The
    decoder takes the vectors of all levels, the coarser ones repeated. Each level has a codebook of its own.

    Encoders and decoders have the blocks of a VQModel. The published decoder of the coarse codes, and its upsampling
    of them for the image's decoder, are transposed convolutions.

    A latent holds the vectors of all levels on the grid of the coarsest: squares of 2^l x 2^l positions of level l
    become channels (`pixel_unshuffle`), so D is `latent_channels` times the sum of 4^l.

    Args:
        in_channels: Channels of the images.
        block_out_channels: Width of each stage of the finest level's encoder and of the decoder, from the image down; n
            stages downsample by 2 ** (n - 1), and each further level by 2.
        levels: Number of levels of codes, at least 2.
        layers_per_block: Residual blocks of each stage.
        latent_channels: Channels of the codes' vectors.
        num_vq_embeddings: Number of codes of each level.
        norm_num_groups: Groups of each group normalisation.
        scaling_factor: A diffusion model multiplies shifted latents by it.
        shift_factor: A diffusion model subtracts it from latents.

    Raises:
        ValueError: If there are fewer than two levels or codes.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 128, 128),
        levels: int = 2,
        layers_per_block: int = 2,
        latent_channels: int = 64,
        num_vq_embeddings: int = 512,
        norm_num_groups: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        if levels < 2 or num_vq_embeddings < 2:
            raise ValueError(f"levels {levels} and num_vq_embeddings {num_vq_embeddings} must be at least 2")
        widths, shape = tuple(block_out_channels), (layers_per_block, norm_num_groups)
        self.encoder = LevelsEncoder(in_channels, widths, levels, latent_channels, *shape)
        self.quantize = nn.ModuleList(CodeTable(num_vq_embeddings, latent_channels) for _ in range(levels))
        self.decoder = upwards(levels * latent_channels, in_channels, widths, *shape)

    def quantised_levels(self, images: Tensor, how: Quantiser = PLAIN) -> tuple[Tensor, tuple[Codes, ...]]:
        """Return the quantised latent, from which gradients flow to the encoder, and the codes of each level.

        Args:
            images: (N, C, H, W) in [-1, 1], whose sides are multiples of the factor.
            how: What gradients pass, and what is compared, on every level.

        Returns:
            The latent, (N, D, h, w) float32, and the codes from the coarsest level down.
        """
        found: list[Codes] = []

        def quantise(latent: Tensor) -> Tensor:
            # a no-op but where the whole model is in half precision
            codebook = self.quantize[len(found)].embedding.weight.float()
            through, codes = quantised(latent.float(), codebook, how)
            found.append(codes)
            return through

        return packed(self.encoder(images, quantise)), tuple(found)

    @apply_forward_hook
    def encode(self, images: Tensor) -> CodeLevelsOutput:
        """Return the codes of images, (N, C, H, W) in [-1, 1], and their vectors."""
        _, levels = self.quantised_levels(images)
        latent = packed([codes.vectors for codes in levels]).to(images.dtype)
        return CodeLevelsOutput(latent=latent, indices=tuple(codes.indices for codes in levels))

    def vectors(self, indices: Sequence[Tensor]) -> Tensor:
        """Return the latent of codes, (N, D, h, w), which `decode` takes, for the numbers of each level's codes."""
        parts = zip(self.quantize, indices, strict=True)
        return packed([level.embedding(one).movedim(-1, 1).contiguous() for level, one in parts])

    def nearest(self, latent: Tensor) -> tuple[Tensor, ...]:
        """Return the numbers of the nearest codes of each level, (N, h 2^l, w 2^l), for latents, (N, D, h, w)."""
        parts = zip(self.quantize, self.unpacked(latent), strict=True)
        return tuple(exactly_nearest(part.float(), level.embedding.weight.float()) for level, part in parts)

    @apply_forward_hook
    def decode(self, latent: Tensor, force_not_quantize: bool = False) -> DecoderOutput:
        """Return the images of latents, (N, D, h, w): (N, C, H, W), nominally in [-1, 1].

        Args:
            latent: Vectors of all levels.
            force_not_quantize: Decode them as they are; otherwise each is replaced by its nearest code, as in a
                VQModel.

        Raises:
            ValueError: If the latents have another number of channels.
        """
        if not force_not_quantize:
            latent = self.vectors(self.nearest(latent)).to(latent.dtype)
        return DecoderOutput(sample=self.decoder(joined(self.unpacked(latent))))

    def forward(self, images: Tensor) -> DecoderOutput:
        """Return the images decoded from their codes, (N, C, H, W)."""
        return self.decode(self.encode(images).latent, force_not_quantize=True)

    def unpacked(self, latent: Tensor) -> list[Tensor]:
        """Split a latent, (N, D, h, w), into the vectors of each level, (N, c, h 2^l, w 2^l), from the coarsest.

        Raises:
            ValueError: If the latent has another number of channels.
        """
        sizes = [self.config.latent_channels * 4**level for level in range(len(self.quantize))]
        if latent.shape[1] != sum(sizes):
            raise ValueError(f"a latent has {sum(sizes)} channels, not {latent.shape[1]}")
        return [F.pixel_shuffle(part, 2**level) for level, part in enumerate(latent.split(sizes, 1))]


def packed(levels: Sequence[Tensor]) -> Tensor:
    """Join the vectors of levels, (N, c, h 2^l, w 2^l) from the coarsest, into one latent on its grid, (N, D, h, w)."""
    return torch.cat([F.pixel_unshuffle(part, 2**level) for level, part in enumerate(levels)], 1)


def joined(levels: Sequence[Tensor]) -> Tensor:
    """Return the vectors of levels, each (N, c, h, w) of its own size, as channels on the grid of the last one."""
    return torch.cat([F.interpolate(part, size=levels[-1].shape[-2:]) for part in levels], 1)


class LevelsEncoder(nn.Module):
    """From images to the vectors that each level replaces by codes, in the light of the codes of the levels above.

    Args:
        in_channels: Channels of the images.
        widths: Width of each stage of the finest level.
        levels: Number of levels.
        latent_channels: Channels of the vectors.
        layers: Residual blocks of each stage.
        groups: Groups of each group normalisation.
    """

    def __init__(
        self, in_channels: int, widths: tuple[int, ...], levels: int, latent_channels: int, layers: int, groups: int
    ):
        super().__init__()
        width, above = widths[-1], range(1, levels)
        half = (width, width)
        # from the image up
        self.up = nn.ModuleList([downwards(in_channels, width, widths, layers, groups)])
        self.up.extend(downwards(width, width, half, layers, groups) for _ in above)
        # from the coarsest level down
        self.down = nn.ModuleList(upwards(level * latent_channels, width, half, layers, groups) for level in above)
        self.to_vectors = nn.ModuleList(
            nn.Conv2d(2 * width if level else width, latent_channels, 1) for level in range(levels)
        )

    @property
    def conv_in(self) -> nn.Module:
        """The first layer, which sees the image."""
        first: nn.Module = self.up[0].conv_in
        return first

    @property
    def conv_out(self) -> nn.Module:
        """The last layer, which gives the vectors of the finest level."""
        return self.to_vectors[-1]

    def forward(self, images: Tensor, quantise: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return what `quantise` makes of the vectors of each level, (N, c, h 2^l, w 2^l), from the coarsest down.

        Args:
            images: (N, C, H, W).
            quantise: Is called with the vectors of one level after another and returns those of its codes.
        """
        features = [self.up[0](images)]
        for encoder in self.up[1:]:
            features.append(encoder(features[-1]))
        found: list[Tensor] = []
        for level, to_vectors in enumerate(self.to_vectors):
            own = features.pop()
            if level:
                own = torch.cat([own, self.down[level - 1](joined(found).to(own.dtype))], 1)
            found.append(quantise(to_vectors(own)))
        return found


class CodeTable(nn.Module):
    """The codebook of one level, initialised like that of a VQModel."""

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)


def downwards(in_channels: int, out_channels: int, widths: tuple[int, ...], layers: int, groups: int) -> Encoder:
    """Return an encoder that halves the sides between its stages."""
    return Encoder(
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        double_z=False,
        mid_block_add_attention=False,
    )


def upwards(in_channels: int, out_channels: int, widths: tuple[int, ...], layers: int, groups: int) -> Decoder:
    """Return a decoder that doubles the sides between its stages; `widths` are in an encoder's order."""
    return Decoder(
        in_channels=in_channels,
        out_channels=out_channels,
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        mid_block_add_attention=False,
    )
