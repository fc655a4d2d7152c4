"""A variational autoencoder that samples its latents level by level, coarse before fine."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latent_ae.arithmetic import WeightPrecisionConv2d
from latent_ae.config import UserError
from latent_ae.models.cells import CELLS, CellKind, Narrow, Residual, make_cell, narrowed
from latent_ae.models.logistic_mixture import first_parameters, mean_image, parameters_per_component
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
        width: Channels of the features, one number or one for each side, from the coarsest.
        level_sides: Side of each level's grid, px, from the top; a side may occur several times.
        level_channels: Latent channels of each level; a level of 0 channels has layers only.
        blocks: Cells per level, and of the encoder per side.
        norm_num_groups: Groups of each group normalisation; a bottleneck has none.
        cell: Kind of the cells: `residual`, `bottleneck` (Child 2021) or `depthwise` (Vahdat and Kautz 2020).
        encoder_cell: Kind of the encoder's; None means `cell`.
        encoder_blocks: Cells of the encoder, one number or one for each side, from the coarsest; None means `blocks`.
        side_bias: Whether a learned bias for each position is added where the state enters a finer grid (Child 2021).
        open_posteriors: Whether posteriors begin with random means and a standard deviation of e^open_log_std, in units
            of the prior's; otherwise they begin as the priors.
        open_log_std: Logarithm of that standard deviation, before the tanh that limits it. Narrow posteriors (-2) let
            the decoder find the latents useful from the first step on, and cost 1.4 nats for each latent value, so they
            need a warm-up of the KL; 0 is how very deep VAEs and NVAE begin.
        mixtures: Components of a mixture of logistics for each pixel, which the decoder gives (`logistic_mixture`); 0
            gives an image alone.
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
        width: int | Sequence[int] = 64,
        level_sides: Sequence[int] = (4, 8, 16),
        level_channels: Sequence[int] = (16, 8, 4),
        blocks: int = 1,
        norm_num_groups: int = 8,
        cell: CellKind = "residual",
        encoder_cell: CellKind | None = None,
        encoder_blocks: int | Sequence[int] | None = None,
        side_bias: bool = False,
        open_posteriors: bool = False,
        open_log_std: float = -2.0,
        mixtures: int = 0,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        sides, channels = list(level_sides), list(level_channels)
        all_sides = sorted(set(sides))
        widths = by_side(width, all_sides, "width")
        least = min([*sides, *widths.values(), *(count + 1 for count in channels)])
        if len(sides) != len(channels) or least < 1 or not any(channels):
            raise ValueError(f"level_sides {sides} and level_channels {channels} must be of the same levels, some > 0")
        if any(finer % coarser for coarser, finer in itertools.pairwise([*sides, sample_size])):
            raise ValueError(
                f"each of level_sides {sides} must divide the next one, and the last one sample_size {sample_size}"
            )
        encoder_cell = encoder_cell or cell
        if unknown := {cell, encoder_cell} - set(CELLS):
            raise ValueError(f"{', '.join(unknown)} is no kind of cell: {', '.join(CELLS)}")
        if "bottleneck" in (cell, encoder_cell) and min([blocks, *numbers_of(encoder_blocks)]) < 1:
            raise ValueError(f"blocks {blocks} and encoder_blocks {encoder_blocks} must be positive with bottlenecks")
        if mixtures < 0 or not math.isfinite(float(open_log_std)):
            raise ValueError(
                f"mixtures {mixtures} must not be negative, and open_log_std {open_log_std} must be a number"
            )
        top = min(side for side, count in zip(sides, channels, strict=True) if count)
        within = [side for side in all_sides if side >= top]
        cells = by_side(blocks if encoder_blocks is None else encoder_blocks, within, "encoder_blocks")
        shape = Shape(in_channels, sample_size, widths, norm_num_groups, open_log_std if open_posteriors else None)
        self.encoder = Encoder(shape, encoder_cell, cells)
        self.decoder = Decoder(shape, cell, sides, channels, blocks, side_bias, mixtures)
        self.shapes = [(count, side, side) for side, count in zip(sides, channels, strict=True) if count]

    def draw(self, images: Tensor, noise: Tensor | None) -> Drawn:
        """Sample each level of the posterior given the samples above it, as `posterior.draw` does; see `descend`."""
        return self.descend(images, noise)[0]

    def descend(self, images: Tensor, noise: Tensor | None) -> tuple[Drawn, Tensor]:
        """Sample each level of the posterior given the samples above it.

        Args:
            images: (N, C, H, W) in [-1, 1].
            noise: (N, D, 1, 1) standard normal; None takes the mode of each level given the modes above it.

        Returns:
            The sample. `rates` holds the KL of each level given the samples above it, from the top level down. The
            posterior is not one Gaussian, so `mean` is the latent and `logvar` is None.
            The state after all levels, (N, width, side, side), which `output` turns into the image.

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

        state = self.decoder.descend(choose)
        latent = packed(latents)
        # the ratio of two densities does not change with the units
        ratio = log_ratio(packed(shifts), packed(logvars), noise)
        return Drawn(latent, latent, None, tuple(rates), ratio), state

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

    @apply_forward_hook
    def encode(self, images: Tensor) -> EncoderOutput:
        """Return the mode of each level given the modes above it, (N, D, 1, 1), for images in [-1, 1].

        Raises:
            UserError: If the images have another size than `sample_size`.
        """
        return EncoderOutput(latent=self.draw(images, None).latent)

    def output(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the image for a state after all levels, and the mixtures that it is the mean of.

        Args:
            state: (N, width, side, side).

        Returns:
            The image, (N, C, H, W), and the parameters of mixtures, (N, P, H, W) float32, or None.
        """
        output = self.decoder(state)
        if not self.config.mixtures:
            return output, None
        return mean_image(output.float(), self.config.in_channels), output.float()

    def decode_distribution(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the image and the mixtures of logistics around it, for latents, (N, D, 1, 1); see `output`.

        Raises:
            ValueError: If the latents have another shape.
        """
        latents = iter(self.unpacked(latent))
        return self.output(self.decoder.descend(lambda level, state: next(latents)))

    @apply_forward_hook
    def decode(self, latent: Tensor) -> DecoderOutput:
        """Return the images of latents, (N, D, 1, 1): (N, C, H, W), nominally in [-1, 1]; means of mixtures.

        Raises:
            ValueError: If the latents have another shape.
        """
        return DecoderOutput(sample=self.decode_distribution(latent)[0].to(latent.dtype))

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

    def __init__(self, shape: "Shape", kind: CellKind, cells: dict[int, int]):
        super().__init__()
        self.sides = sides = sorted(cells, reverse=True)
        stride, first = shape.sample_size // sides[0], shape.widths[sides[0]]
        self.conv_in = nn.Conv2d(shape.in_channels, first, stride + 2, stride, padding=1)
        self.stacks = nn.ModuleList(Stack(shape, kind, side, cells[side], sum(cells.values())) for side in sides)
        self.passages = nn.ModuleList(shape.passage(finer, coarser) for finer, coarser in itertools.pairwise(sides))

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Return features, (N, width, side, side), by their side, for images, (N, C, H, W)."""
        features, found = self.conv_in(images), dict[int, Tensor]()
        passages: list[nn.Module] = [nn.Identity(), *self.passages]
        for side, stack, passage in zip(self.sides, self.stacks, passages, strict=True):
            features = found[side] = stack(passage(F.avg_pool2d(features, features.shape[-1] // side)))
        return found


class Level(nn.Module):
    """One step down: layers on the state from the levels above and, if it has `channels`, a latent."""

    prior: "Moments"
    posterior: "Moments"

    def __init__(self, shape: "Shape", kind: CellKind, above: int, side: int, channels: int, cells: int, depth: int):
        super().__init__()
        self.side, self.channels, width = side, channels, shape.widths[side]
        self.passage = shape.passage(above, side)
        self.stack = Stack(shape, kind, side, cells, depth)
        if channels:
            self.prior = Moments(shape, kind, side, channels, posterior=False)
            self.posterior = Moments(shape, kind, side, channels, posterior=True)
            self.conv_latent = WeightPrecisionConv2d(channels, width, 1)
            if kind != "residual":  # without normalisation the state grows with each latent, and with it the next one
                self.conv_latent.weight.data.mul_(1.0 / math.sqrt(depth))


class Decoder(nn.Module):
    """The levels from the top down, and the layers from the last level to the image."""

    def __init__(
        self,
        shape: "Shape",
        kind: CellKind,
        sides: list[int],
        channels: list[int],
        blocks: int,
        side_bias: bool,
        mixtures: int,
    ):
        super().__init__()
        last, width = sides[-1], shape.widths[sides[-1]]
        self.scale = shape.sample_size // last
        self.start = nn.Parameter(torch.randn(1, shape.widths[sides[0]], sides[0], sides[0]))
        # levels that see only the start need no layers, because the start itself is learned
        cells = [blocks if any(channels[:number]) else 0 for number in range(len(sides))]
        depth = sum(cells) + blocks
        self.levels = nn.ModuleList(
            Level(shape, kind, above, side, count, number, depth)
            for above, side, count, number in zip([sides[0], *sides], sides, channels, cells, strict=False)
        )
        self.stack = Stack(shape, kind, last, blocks, depth)
        self.biases = nn.ParameterDict(
            {str(side): torch.zeros(1, shape.widths[side], side, side) for side in sorted(set(sides[1:]) - {sides[0]})}
            if side_bias
            else {}
        )
        outputs = mixtures * parameters_per_component(shape.in_channels) if mixtures else shape.in_channels
        # a mixture's parameters decide on single levels of 8 bits, which bfloat16 would round away
        last_layer = WeightPrecisionConv2d if mixtures else nn.Conv2d
        if kind == "residual":
            self.norm_out: nn.Module = nn.GroupNorm(shape.groups, width, eps=1e-6)
            fine = max(1, width // self.scale)
            self.conv_up: nn.Module = nn.Conv2d(width, fine * self.scale**2, 3, padding=1)
            self.conv_out = last_layer(fine, outputs, 3, padding=1)
            self.activation: nn.Module = nn.SiLU()
        else:
            fine = max(1, width // self.scale) if self.scale > 1 else width
            self.norm_out = nn.Identity()
            self.conv_up = nn.Conv2d(width, fine * self.scale**2, 3, padding=1) if self.scale > 1 else nn.Identity()
            self.conv_out = last_layer(fine, outputs, 1)
            self.activation = nn.GELU() if kind == "bottleneck" else nn.SiLU()
        # very deep VAEs have no activation before the output; their gain and bias there are part of the convolution
        self.activation_out = nn.Identity() if kind == "bottleneck" and self.scale == 1 else self.activation
        if mixtures:
            self.conv_out.bias.data.copy_(first_parameters(shape.in_channels, mixtures))

    def descend(self, choose: Callable[[Level, Tensor], Tensor]) -> Tensor:
        """Return the state after all levels.

        Args:
            choose: Returns the latent of a level, (N, c, h, w), for the level and the state from the levels above it.
        """
        state: Tensor = self.start
        for level in self.levels:
            entered = level.side != state.shape[-1]
            state = F.interpolate(level.passage(state), size=level.side)
            if entered and str(level.side) in self.biases:
                state = state + self.biases[str(level.side)]
            state = level.stack(state)
            if level.channels:
                state = state + level.conv_latent(choose(level, state).to(state.dtype))
        return state

    def forward(self, state: Tensor) -> Tensor:
        """Return the image, or the parameters of its mixtures, for the state after all levels."""
        hidden = self.stack(state)
        if not isinstance(self.conv_up, nn.Identity):
            hidden = self.conv_up(self.activation(self.norm_out(hidden)))
            hidden = F.pixel_shuffle(hidden, self.scale)
        output: Tensor = self.conv_out(self.activation_out(hidden))
        return output


class Moments(nn.Module):
    """Computes mean and log standard deviation of a Gaussian, both float32; before training both are 0, if not open.

    A prior sees the state, a posterior the state and the image's features. Residual cells have a block of their own for
    either; of the others only a bottleneck's posterior has one, because the cells before already serve the prior (NVAE;
    in very deep VAEs the prior's block adds to the state, too).
    """

    def __init__(self, shape: "Shape", kind: CellKind, side: int, channels: int, *, posterior: bool):
        super().__init__()
        width = shape.widths[side]
        inputs, middle, kernel = width * (2 if posterior else 1), width, 1
        if kind == "residual":
            self.block: nn.Module = Residual(inputs, width, shape.groups)
        elif kind == "bottleneck" and posterior:
            middle = narrowed(width)
            self.block = Narrow(inputs, middle, side)
        else:
            self.block = nn.GELU() if kind == "bottleneck" else nn.SiLU()
            middle, kernel = inputs, 3 if posterior else 1
        self.conv = WeightPrecisionConv2d(middle, 2 * channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv.bias)
        if posterior and shape.open_log_std is not None:
            self.conv.bias.data[channels:] = shape.open_log_std
        else:
            nn.init.zeros_(self.conv.weight)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, (N, channels, side, side), for features, (N, in_channels, side, side)."""
        mean, log_std = self.conv(self.block(features)).float().chunk(2, 1)
        return mean, LARGEST_LOG_STD * torch.tanh(log_std / LARGEST_LOG_STD)


class Stack(nn.Module):
    """Cells of one width on one grid."""

    def __init__(self, shape: "Shape", kind: CellKind, side: int, count: int, depth: int):
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(
            make_cell(kind, shape.widths[side], side, shape.groups, depth) for _ in range(count)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return features, (N, width, side, side) like the input."""
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                features = self._gradient_checkpointing_func(block, features)
            else:
                features = block(features)
        return features


class Shape(NamedTuple):
    """What all parts of a network share."""

    in_channels: int
    sample_size: int
    """Side of the images, px."""
    widths: dict[int, int]
    """Channels of the features by the side of their grid."""
    groups: int
    """Groups of each group normalisation."""
    open_log_std: float | None
    """Logarithm of the standard deviation with which open posteriors begin; None if they begin as the priors."""

    def passage(self, before: int, side: int) -> nn.Module:
        """Return the layer between features of two sides: none if they have the same width."""
        widths = self.widths[before], self.widths[side]
        return nn.Identity() if widths[0] == widths[1] else nn.Conv2d(*widths, 1)


def numbers_of(given: int | Sequence[int] | None) -> list[int]:
    """Return one number or several as a list; an empty one for None."""
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def by_side(given: int | Sequence[int], sides: Sequence[int], name: str) -> dict[int, int]:
    """Return a number for each side.

    Args:
        given: One number for all sides, or one for each, from the coarsest.
        sides: The sides, from the coarsest.
        name: What messages call the numbers.

    Raises:
        ValueError: If there is another count of numbers than of sides.
    """
    numbers = [given] * len(sides) if isinstance(given, int) else list(given)
    if len(numbers) != len(sides):
        raise ValueError(f"{name} {numbers} must be one number, or one for each of the sides {list(sides)}")
    return dict(zip(sides, numbers, strict=True))
