"""A variational autoencoder whose latents are drawn level after level, coarse before fine."""

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
"""Logarithms of standard deviations are drawn into +- this by a tanh, as in NVAE."""


class HierarchicalVAE(ModelMixin, ConfigMixin):
    """Top-down levels with residual posteriors, as in NVAE (Vahdat and Kautz 2020) and very deep VAEs (Child 2021).

    The prior of a level is a Gaussian given the levels above, p(z) = N(m, s^2); its posterior N(m + s a, (s b)^2) says
    how it differs, a and b being functions of the image and the levels above. So KL(q || p) = (a^2 + b^2 - log b^2 - 1)
    / 2 (section 3.2 there, with the shift in units of s), and 0 before training.

    A latent is the levels' packed into one tensor, the top one first: N x D x 1 x 1 for images of `sample_size`.
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
        """`level_sides`: px of each level's grid, from the top; a side may come several times. `level_channels`: latent
        channels of each; 0 is a level of layers alone. `blocks`: residual blocks per level. `sample_size`: side of
        the images, px.

        Raises ValueError for levels that do not fit together.
        """
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
        """As `posterior.draw`: each level is sampled given the sample above it, or takes its mode given the modes.

        `rates` are each level's KL given the sample above, from the top level down. There is no one Gaussian: `mean` is
        the latent and `logvar` None. Raises UserError for images of another size than `sample_size`.
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
            # in units of the prior's spread, from its mean
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
        """Latents of the prior for standard normal `noise`, both N x D x 1 x 1; each level given the one above."""
        noises, latents = iter(self.unpacked(noise)), list[Tensor]()

        def choose(level: Level, state: Tensor) -> Tensor:
            mean, log_std = level.prior(state)
            latents.append(mean + log_std.exp() * next(noises))
            return latents[-1]

        self.decoder.descend(choose)
        return packed(latents)

    def encode(self, images: Tensor) -> EncoderOutput:
        """The mode of each level given the modes above, N x D x 1 x 1."""
        return EncoderOutput(latent=self.draw(images, None).latent)

    def decode(self, latent: Tensor) -> DecoderOutput:
        """Images of latents N x D x 1 x 1; NCHW, nominally in [-1, 1]."""
        latents = iter(self.unpacked(latent))
        return DecoderOutput(sample=self.decoder(self.decoder.descend(lambda level, state: next(latents))))

    def forward(self, images: Tensor) -> DecoderOutput:
        """Reconstructions of the mode."""
        return self.decode(self.encode(images).latent)

    def unpacked(self, latent: Tensor) -> list[Tensor]:
        """A latent N x D x 1 x 1 as its levels', each N x c x h x w, from the top. Raises ValueError for others."""
        sizes = [count * side * side for count, side, _ in self.shapes]
        if latent.shape[1:] != (sum(sizes), 1, 1):
            raise ValueError(f"a latent is N x {sum(sizes)} x 1 x 1, not {' x '.join(map(str, latent.shape))}")
        parts = latent.flatten(1).split(sizes, 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def packed(levels: Sequence[Tensor]) -> Tensor:
    """N x c x h x w of each level, from the top -> N x D x 1 x 1."""
    return torch.cat([level.flatten(1) for level in levels], 1)[:, :, None, None]


class Encoder(nn.Module):
    """Images -> features at each side, bottom-up."""

    def __init__(self, in_channels: int, sample_size: int, width: int, sides: list[int], blocks: int, groups: int):
        super().__init__()
        stride = sample_size // sides[0]
        self.sides = sides
        self.conv_in = nn.Conv2d(in_channels, width, stride + 2, stride, padding=1)
        self.stacks = nn.ModuleList(Stack(width, blocks, groups) for _ in sides)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        features, found = self.conv_in(images), dict[int, Tensor]()
        for side, stack in zip(self.sides, self.stacks, strict=True):
            features = found[side] = stack(F.avg_pool2d(features, features.shape[-1] // side))
        return found


class Level(nn.Module):
    """One step down: layers on what the levels above say, then, where it has `channels`, a latent."""

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
        # what only sees the start needs no layers: it is learned itself
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
        """What all levels say; `choose` gives a level's latent for what those above it say."""
        state: Tensor = self.start
        for level in self.levels:
            state = level.stack(F.interpolate(state, size=level.side))
            if level.channels:
                state = state + level.conv_latent(choose(level, state).to(state.dtype))
        return state

    def forward(self, state: Tensor) -> Tensor:
        hidden = self.conv_up(F.silu(self.norm_out(self.stack(state))))
        image: Tensor = self.conv_out(F.silu(F.pixel_shuffle(hidden, self.scale)))
        return image


class Moments(nn.Module):
    """The mean and the logarithm of the standard deviation of a Gaussian, float32; 0 and 0 before training."""

    def __init__(self, in_channels: int, width: int, channels: int, groups: int):
        super().__init__()
        self.block = Residual(in_channels, width, groups)
        self.conv = WeightPrecisionConv2d(width, 2 * channels, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.conv(self.block(features)).float().chunk(2, 1)
        return mean, LARGEST_LOG_STD * torch.tanh(log_std / LARGEST_LOG_STD)


class Stack(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, width: int, count: int, groups: int):
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(Residual(width, width, groups) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                features = self._gradient_checkpointing_func(block, features)
            else:
                features = block(features)
        return features


class Residual(ResnetBlock2D):
    """diffusers' block without a time embedding; its branch is 0 before training, so that depth costs no care."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__(in_channels=in_channels, out_channels=out_channels, temb_channels=None, groups=groups)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, features: Tensor) -> Tensor:
        hidden: Tensor = super().forward(features, None)
        return hidden
