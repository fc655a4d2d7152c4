"""An AutoencoderKL whose images come from a decoder that is trained by flow matching, on an unchanged encoder."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class Path(NamedTuple):
    """Where each image is on the way from noise to image, on which a flow-matching decoder is trained."""

    target: Tensor
    """The images at its end, (N, C, H, W) in [-1, 1]."""
    noise: Tensor
    """Standard normal noise at its beginning, (N, C, H, W)."""
    times: Tensor
    """(N,) in [0, 1): 0 is noise, 1 the image."""


class PlainDecoder(nn.Module):
    """The decoder of the AutoencoderKL from which a FlowMatchingVAE was made; it is never trained."""

    def __init__(self, post_quant_conv: nn.Module | None, decoder: nn.Module):
        super().__init__()
        self.post_quant_conv, self.decoder = post_quant_conv, decoder

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """Return images, (N, C, H, W), of raw latents, (N, c, h, w)."""
        image: Tensor = self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))
        return image


class FlowMatchingVAE(AutoencoderKL):
    """Encodes as an AutoencoderKL does, and decodes by carrying noise to an image along a learned flow.

    The path from noise e to an image x is x_t = (1 - t) e + t y, where y = (x - b) / s; b is the plain decoder's image
    (`residual`) or 0, and s is `noise_scale`. The velocity along it is y - e (rectified flow, Liu et al. 2023, and flow
    matching, Lipman et al. 2023). The network sees x_t, b, the latent and t, and predicts y; the velocity follows as
    (y - x_t) / (1 - t) (Li and He 2025, arXiv:2511.13720). `decode` takes `sampling_steps` Euler steps of equal length.
    Before training y is 0, so a decoder of residuals begins as the plain decoder.

    The network is a UNet2DModel of diffusers on patches of pixels.

    Args:
        sampling_steps: Euler steps of `decode`.
        residual: Whether the flow makes what the plain decoder's image lacks, or the image itself.
        noise_scale: Standard deviation of the noise, in [-1, 1] units, best about that of what the flow makes.
        patch_size: Side of the patches of pixels on which the network works.
        unet_block_out_channels: Widths of its levels, from the finest; each level halves the sides.
        unet_layers_per_block: Residual blocks of each level.
        unet_norm_num_groups: Groups of each group normalisation.
        **config: The config of the AutoencoderKL.

    Raises:
        ValueError: If the network's levels halve the grid of patches below that of the latents.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        sampling_steps: int = 8,
        residual: bool = True,
        noise_scale: float = 0.15,
        patch_size: int = 2,
        unet_block_out_channels: Sequence[int] = (64, 128),
        unet_layers_per_block: int = 1,
        unet_norm_num_groups: int = 8,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        widths, factor = tuple(unet_block_out_channels), 2 ** (len(block_out_channels) - 1)
        if not widths or patch_size < 1 or factor % (coarsest := patch_size * 2 ** (len(widths) - 1)):
            raise ValueError(
                f"patch_size {patch_size} and {len(widths)} levels end at {coarsest} px, which does not divide the "
                f"factor {factor} of the latents"
                if widths and patch_size >= 1
                else "patch_size and unet_block_out_channels must not be empty"
            )
        if sampling_steps < 1 or noise_scale <= 0:
            raise ValueError("sampling_steps and noise_scale must be positive")
        plain: Any = self  # whose parts the class below has made
        self.base = PlainDecoder(plain.post_quant_conv, plain.decoder) if residual else None
        self.post_quant_conv = None
        pixels = out_channels * patch_size**2
        self.decoder = UNet2DModel(
            in_channels=pixels * (2 if residual else 1) + latent_channels,
            out_channels=pixels,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=unet_layers_per_block,
            norm_num_groups=unet_norm_num_groups,
            add_attention=False,
        )
        nn.init.zeros_(self.decoder.conv_out.weight)
        nn.init.zeros_(self.decoder.conv_out.bias)

    def estimate(self, latents: Tensor, path: Path) -> Tensor:
        """Return the images that the network expects at the end of the path, (N, C, H, W) float32 in [-1, 1] units.

        Args:
            latents: (N, c, h, w), raw.
            path: Where on it the network looks; it does not see the target but for its part in x_t.
        """
        base, scale = self._base(latents), float(self.config.noise_scale)
        times = path.times[:, None, None, None]
        there = (1.0 - times) * path.noise + times * (path.target - base) / scale
        return base + scale * self._clean(there, path.times, base, latents)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        steps: int | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Return the images of raw latents, (N, c, h, w): (N, C, H, W), nominally in [-1, 1].

        `enable_slicing` decodes them one by one, and `enable_tiling` in tiles, as an AutoencoderKL does.

        Args:
            z: The latents.
            return_dict: Whether to return a DecoderOutput or a tuple.
            generator: Draws noise for each image; a list has one for each of them. None takes the same noise for all,
                that of seed 0, so that an image depends on its latent alone. A distance between sets of images, such
                as a Fréchet distance, needs a noise of its own for each.
            steps: Euler steps; None takes `sampling_steps` of the config.
        """
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        shape = (self.config.out_channels, z.shape[-2] * factor, z.shape[-1] * factor)
        if generator is None:  # on the CPU, so that devices agree
            noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).expand(len(z), -1, -1, -1)
        else:
            noise = randn_tensor((len(z), *shape), generator=generator, device=z.device)
        count = int(self.config.sampling_steps if steps is None else steps)
        pairs = zip(z.split(1), noise.split(1), strict=True) if self.use_slicing else [(z, noise)]
        images = [self._in_tiles(latents, part.to(z.device), count) for latents, part in pairs]
        image = torch.cat(images).to(z.dtype)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def carried(self, latents: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Return the images to which Euler steps carry noise, (N, C, H, W) float32.

        Args:
            latents: (N, c, h, w), raw.
            noise: (N, C, H, W), standard normal.
            steps: Number of steps, of equal length.
        """
        base, state = self._base(latents), noise
        for number in range(steps):
            times = torch.full((len(latents),), number / steps, device=latents.device)
            # a step of 1 / steps along (y - x_t) / (1 - t): the last one ends at y
            state = state.lerp(self._clean(state, times, base, latents), 1.0 / (steps - number))
        return base + float(self.config.noise_scale) * state

    def _in_tiles(self, latents: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Return what `carried` does; with tiling, in tiles, cut and blended as `AutoencoderKL.tiled_decode` has them.

        Each tile begins with the part of the noise over it.
        """
        side, shape = self.tile_latent_min_size, latents.shape[-2:]
        if not self.use_tiling or max(shape) <= side:
            return self.carried(latents, noise, steps)
        factor, stride = noise.shape[-1] // shape[-1], int(side * (1 - self.tile_overlap_factor))
        blended = int(self.tile_sample_min_size * self.tile_overlap_factor)
        kept = self.tile_sample_min_size - blended

        def tile(y: int, x: int) -> Tensor:
            over = noise[..., y * factor : (y + side) * factor, x * factor : (x + side) * factor]
            return self.carried(latents[..., y : y + side, x : x + side], over, steps)

        rows = [[tile(y, x) for x in range(0, shape[1], stride)] for y in range(0, shape[0], stride)]
        for i, row in enumerate(rows):
            for j, image in enumerate(row):  # which these change in place
                if i > 0:
                    self.blend_v(rows[i - 1][j], image, blended)
                if j > 0:
                    self.blend_h(row[j - 1], image, blended)
        return torch.cat([torch.cat([image[..., :kept, :kept] for image in row], -1) for row in rows], -2)

    def _base(self, latents: Tensor) -> Tensor:
        """Return the image from which the flow sets out, float32: the plain decoder's, or a single 0."""
        return latents.new_zeros(1, 1, 1, 1).float() if self.base is None else self.base(latents).float()

    def _clean(self, state: Tensor, times: Tensor, base: Tensor, latents: Tensor) -> Tensor:
        """Return the network's estimate of y, (N, C, H, W) float32, for x_t and t, the base and the latent."""
        side, weight = int(self.config.patch_size), self.decoder.conv_in.weight
        seen = [F.pixel_unshuffle(state, side)]
        if self.base is not None:
            seen.append(F.pixel_unshuffle(base, side))
        seen.append(F.interpolate(latents.float(), size=seen[0].shape[-2:]))
        patches: Any = self.decoder(torch.cat(seen, 1).to(weight.dtype), 1000.0 * times).sample
        return F.pixel_shuffle(patches, side).float()
