"""A variational autoencoder that samples its latents level by level, coarse before fine."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from latent_ae.arithmetic import WeightPrecisionConv2d
from latent_ae.config import UserError
from latent_ae.models.posterior import Drawn, kl_per_dimension, log_ratio

LARGEST_LOG_STD = 5.0
"""A tanh limits the logarithms of standard deviations to +- this value, as in NVAE."""


class HierarchicalVAE(ModelMixin, ConfigMixin):
    """Top-down levels with residual posteriors, as in NVAE (Vahdat and Kautz 2020) and very deep VAEs (Child 2021).

    The prior of a level is a Gaussian given the levels above, p(z) = N(m, s^2). Its posterior is relative to the prior,
    q(z) = N(m + s a, (s b)^2), where a and b are functions of the image and the levels above. So KL(q || p) =
    (a^2 + b^2 - log b^2 - 1) / 2 (NVAE, section 3.2, with the shift in units of s), which is 0 before training.

    A latent holds all levels in one tensor, the top level first: (N, D, 1, 1) for images of `sample_size`.

    Args:
        in_channels: Channels of the images.
        sample_size: Side of the images, px.
        width: Channels of the features.
        level_sides: Side of each level's grid, px, from the top; a side may occur several times.
        level_channels: Latent channels of each level; a level of 0 channels has layers only.
        blocks: Residual blocks per level.
        norm_num_groups: Groups of each group normalisation.
        scaling_factor: A diffusion model multiplies shifted latents by it.
        shift_factor: A diffusion model subtracts it from latents.

    Raises:
        ValueError: If the levels do not fit together.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int = 32,
        width: int = 64,
        level_sides: Sequence[int] = (4, 8, 16),
        level_channels: Sequence[int] = (16, 8, 4),
        blocks: int = 1,
        norm_num_groups: int = 8,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        sides, channels = list(level_sides), list(level_channels)
        if len(sides) != len(channels) or min([*sides, width, *(c + 1 for c in channels)]) < 1 or not any(channels):
            raise ValueError(f"level_sides {sides} and level_channels {channels} must be of the same levels, some > 0")
        if any(finer % coarser for coarser, finer in itertools.pairwise([*sides, sample_size])):
            raise ValueError(
                f"each of level_sides {sides} must divide the next one, and the last one sample_size {sample_size}"
            )
        with_latents = sorted({side for side, count in zip(sides, channels, strict=True) if count}, reverse=True)
        within = [side for side in sorted(set(sides), reverse=True) if side >= with_latents[-1]]
        self.encoder = Encoder(in_channels, sample_size, width, within, blocks, norm_num_groups)
        self.decoder = Decoder(in_channels, sample_size, width, sides, channels, blocks, norm_num_groups)
        self.shapes = [(count, side, side) for side, count in zip(sides, channels, strict=True) if count]

    def draw(self, images: Tensor, noise: Tensor | None) -> Drawn:
        """Sample each level of the posterior given the samples above it, as `posterior.draw` does.

        Args:
            images: (N, C, H, W) in [-1, 1].
            noise: (N, D, 1, 1) standard normal; None takes the mode of each level given the modes above it.

        Returns:
            The sample. `rates` holds the KL of each level given the samples above it, from the top level down. The
            posterior is not one Gaussian, so `mean` is the latent and `logvar` is None.

        Raises:
            UserError: If the images have another size than `sample_size`.
        """
        size = self.config.sample_size
        height, width = images.shape[-2:]
        if (height, width) != (size, size):
            raise UserError(
                f"this HierarchicalVAE takes images of {size} x {size} px, not {height} x {width}: cut them to that "
                f"(crop_px={size})"
            )
        features, noises = self.encoder(images), None if noise is None else iter(self.unpacked(noise))
        latents, shifts, logvars, rates = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()

        def choose(level: Level, state: Tensor) -> Tensor:
            mean, log_std = level.prior(state)
            state = state.expand(len(images), -1, -1, -1)
            # relative to the prior: from its mean, in units of its standard deviation
            shift, log_scale = level.posterior(torch.cat([state, features[level.side]], 1))
            rates.append(kl_per_dimension(shift, 2.0 * log_scale))
            shifts.append(shift if noises is None else shift + log_scale.exp() * next(noises))
            logvars.append(2.0 * log_scale)
            latents.append(mean + log_std.exp() * shifts[-1])
            return latents[-1]

        self.decoder.descend(choose)
        latent = packed(latents)
        # the ratio of two densities does not change with the units
        return Drawn(latent, latent, None, tuple(rates), log_ratio(packed(shifts), packed(logvars), noise))

    def sample_prior(self, noise: Tensor) -> Tensor:
        """Sample the prior, each level given the levels above it.

        Args:
            noise: (N, D, 1, 1) standard normal.

        Returns:
            (N, D, 1, 1) latents.
        """
        noises, latents = iter(self.unpacked(noise)), list[Tensor]()

        def choose(level: Level, state: Tensor) -> Tensor:
            mean, log_std = level.prior(state)
            latents.append(mean + log_std.exp() * next(noises))
            return latents[-1]

        self.decoder.descend(choose)
        return packed(latents)

    def encode(self, images: Tensor) -> EncoderOutput:
        """Return the mode of each level given the modes above it, (N, D, 1, 1), for images in [-1, 1].

        Raises:
            UserError: If the images have another size than `sample_size`.
        """
        return EncoderOutput(latent=self.draw(images, None).latent)

    def decode(self, latent: Tensor) -> DecoderOutput:
        """Return the images of latents, (N, D, 1, 1): (N, C, H, W), nominally in [-1, 1].

        Raises:
            ValueError: If the latents have another shape.
        """
        latents = iter(self.unpacked(latent))
        return DecoderOutput(sample=self.decoder(self.decoder.descend(lambda level, state: next(latents))))

    def forward(self, images: Tensor) -> DecoderOutput:
        """Return the images decoded from the mode, (N, C, H, W)."""
        return self.decode(self.encode(images).latent)

    def unpacked(self, latent: Tensor) -> list[Tensor]:
        """Split a latent, (N, D, 1, 1), into its levels, each (N, c, h, w), from the top.

        Raises:
            ValueError: If the latent has another shape.
        """
        sizes = [count * side * side for count, side, _ in self.shapes]
        if latent.shape[1:] != (sum(sizes), 1, 1):
            raise ValueError(f"a latent is N x {sum(sizes)} x 1 x 1, not {' x '.join(map(str, latent.shape))}")
        parts = latent.flatten(1).split(sizes, 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def packed(levels: Sequence[Tensor]) -> Tensor:
    """Join levels, each (N, c, h, w), from the top, into one latent, (N, D, 1, 1)."""
    return torch.cat([level.flatten(1) for level in levels], 1)[:, :, None, None]


class Encoder(nn.Module):
    """Computes features of images at each side, bottom-up."""

    def __init__(self, in_channels: int, sample_size: int, width: int, sides: list[int], blocks: int, groups: int):
        super().__init__()
        stride = sample_size // sides[0]
        self.sides = sides
        self.conv_in = nn.Conv2d(in_channels, width, stride + 2, stride, padding=1)
        self.stacks = nn.ModuleList(Stack(width, blocks, groups) for _ in sides)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Return features, (N, width, side, side), by their side, for images, (N, C, H, W)."""
        features, found = self.conv_in(images), dict[int, Tensor]()
        for side, stack in zip(self.sides, self.stacks, strict=True):
            features = found[side] = stack(F.avg_pool2d(features, features.shape[-1] // side))
        return found


class Level(nn.Module):
    """One step down: layers on the state from the levels above and, if it has `channels`, a latent."""

    prior: "Moments"
    posterior: "Moments"

    def __init__(self, width: int, side: int, channels: int, blocks: int, groups: int):
        super().__init__()
        self.side, self.channels = side, channels
        self.stack = Stack(width, blocks, groups)
        if channels:
            self.prior = Moments(width, width, channels, groups)
            self.posterior = Moments(2 * width, width, channels, groups)
            self.conv_latent = WeightPrecisionConv2d(channels, width, 1)


class Decoder(nn.Module):
    """The levels from the top down, and the layers from the last level to the image."""

    def __init__(
        self,
        out_channels: int,
        sample_size: int,
        width: int,
        sides: list[int],
        channels: list[int],
        blocks: int,
        groups: int,
    ):
        super().__init__()
        self.scale = sample_size // sides[-1]
        self.start = nn.Parameter(torch.randn(1, width, sides[0], sides[0]))
        # levels that see only the start need no layers, because the start itself is learned
        above = [any(channels[:number]) for number in range(len(sides))]
        self.levels = nn.ModuleList(
            Level(width, side, count, blocks if fed else 0, groups)
            for side, count, fed in zip(sides, channels, above, strict=True)
        )
        self.stack = Stack(width, blocks, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        fine = max(1, width // self.scale)
        self.conv_up = nn.Conv2d(width, fine * self.scale**2, 3, padding=1)
        self.conv_out = nn.Conv2d(fine, out_channels, 3, padding=1)

    def descend(self, choose: Callable[[Level, Tensor], Tensor]) -> Tensor:
        """Return the state after all levels.

        Args:
            choose: Returns the latent of a level, (N, c, h, w), for the level and the state from the levels above it.
        """
        state: Tensor = self.start
        for level in self.levels:
            state = level.stack(F.interpolate(state, size=level.side))
            if level.channels:
                state = state + level.conv_latent(choose(level, state).to(state.dtype))
        return state

    def forward(self, state: Tensor) -> Tensor:
        """Return the image for the state after all levels."""
        hidden = self.conv_up(F.silu(self.norm_out(self.stack(state))))
        image: Tensor = self.conv_out(F.silu(F.pixel_shuffle(hidden, self.scale)))
        return image


class Moments(nn.Module):
    """Computes mean and log standard deviation of a Gaussian, both float32 and both 0 before training."""

    def __init__(self, in_channels: int, width: int, channels: int, groups: int):
        super().__init__()
        self.block = Residual(in_channels, width, groups)
        self.conv = WeightPrecisionConv2d(width, 2 * channels, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, (N, channels, side, side), for features, (N, in_channels, side, side)."""
        mean, log_std = self.conv(self.block(features)).float().chunk(2, 1)
        return mean, LARGEST_LOG_STD * torch.tanh(log_std / LARGEST_LOG_STD)


class Stack(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, width: int, count: int, groups: int):
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(Residual(width, width, groups) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        """Return features, (N, width, side, side) like the input."""
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                features = self._gradient_checkpointing_func(block, features)
            else:
                features = block(features)
        return features


class Residual(ResnetBlock2D):
    """diffusers' block without a time embedding; its branch is 0 before training, so that deep stacks train stably."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__(in_channels=in_channels, out_channels=out_channels, temb_channels=None, groups=groups)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return features, (N, out_channels, side, side), for features, (N, in_channels, side, side)."""
        hidden: Tensor = super().forward(features, None)
        return hidden
