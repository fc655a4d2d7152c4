"""The section `model` of the training settings; imports nothing heavy, so that typos are reported at once."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem, Settings

DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
Kind = Literal[
    "AutoencoderKL",
    "VQModel",
    "AutoencoderTiny",
    "AutoencoderDC",
    "AsymmetricAutoencoderKL",
    "AutoencoderKLFlux2",
    "HierarchicalVAE",
    "DiscreteVAE",
    "VQVAE2",
    "FlowAutoencoderKL",
    "AutoencoderRAE",
]
"""Classes of first stages: docs/family.md."""


class DecoderSettings(Settings):
    """What decodes init_from's latents: a new decoder, or latents on which it trains; docs/new-decoder.md.

    Only the decoder trains; encoder, latents and scaling stay bit for bit. A new one starts from fresh weights.
    """

    kind: Literal["AutoencoderTiny", "FlowMatchingVAE"] | None = None
    """Class of the new decoder of an AutoencoderKL's latents: AutoencoderTiny takes scaled ones, as TAESD does, and
    FlowMatchingVAE carries noise to an image; null keeps the class of init_from, or takes the one that has its
    encoder."""
    config: dict[str, Any] = {}
    """Further keys and values of the config of a FlowMatchingVAE: sampling_steps, residual, noise_scale, patch_size,
    unet_norm_num_groups."""
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """Widths of the decoder's levels, from the image down, as many as init_from has; null keeps its widths. Those of
    an AutoencoderTiny are equal, and null means 64 with decoder.kind. A FlowMatchingVAE's are any number."""
    layers_per_block: Positive | tuple[NonNegative, ...] | None = None
    """Blocks of each level, as the class of init_from counts them: one number, or, for AutoencoderDC and
    AutoencoderTiny, one for each level, from the latents up; null keeps its numbers, and means 3, and 1 in the
    last, with decoder.kind."""
    latents: str | None = None
    """Folder of `latent-ae encode` with init_from's latents of the training images: the decoder, new or init_from's
    own, trains on them, and the encoder stays out of memory; null encodes the images in each step."""

    @property
    def wanted(self) -> bool:
        """Whether the run replaces the decoder."""
        return any(value is not None for value in (self.kind, self.block_out_channels, self.layers_per_block))

    def problems(self) -> Iterator[Problem]:
        keys = ("sampling_steps", "residual", "noise_scale", "patch_size", "unet_norm_num_groups")
        if self.config and self.kind != "FlowMatchingVAE":
            yield Problem("config", "is for decoder.kind FlowMatchingVAE: leave it out")
        elif unknown := sorted(self.config.keys() - set(keys)):
            yield Problem(f"config.{unknown[0]}", f"is no key of this decoder; it has {', '.join(keys)}")
        for key in ("sampling_steps", "patch_size", "unet_norm_num_groups"):
            if key in self.config and (type(self.config[key]) is not int or self.config[key] < 1):
                yield Problem(f"config.{key}", f"{self.config[key]} is no whole number from 1 on")
        if type(self.config.get("residual", True)) is not bool:
            yield Problem("config.residual", f"{self.config['residual']} is neither true nor false")
        scale = self.config.get("noise_scale", 1.0)
        if type(scale) not in (int, float) or not 0 < scale < math.inf:
            yield Problem("config.noise_scale", f"{scale} is no positive number")


class ModelFacts(NamedTuple):
    """The facts about a first stage that rules use, known from its settings or from the autoencoder itself."""

    name: str
    """Its name in messages."""
    latent: Literal["posterior", "deterministic", "codebook", "code_levels", "categorical", "hierarchy", "flow"]
    """Kind of latent, as in `family.Family`."""
    factor: int
    """Image px per latent px along one side."""
    channels: int
    """Channels of the images."""
    latent_channels: int
    side: int | None = None
    """The only side of images, px, that it takes; None if it takes all multiples of the factor."""
    trains: tuple[str, ...] = ("all", "decoder", "encoder")
    """Values of the setting `train` that it allows: sides that can be trained."""
    parameters: tuple[str, ...] = ()
    """Names of the parameters that images use; empty if they are known only once the autoencoder is built."""
    last_layers: Mapping[str, str] = {}
    """Names of the weights of the last layers of `encoder` and `decoder`, where adaptive weights are measured, and of
    the `codes` of a codebook; empty if they are known only once the autoencoder is built."""
    codes: int | None = None
    """Number of codes of a codebook."""
    flow_matching: bool = False
    """Whether the decoder is trained by flow matching."""
    states: str | None = None
    """Likelihood whose parameters the decoder gives besides the image, as in `family.Family`."""
    channel_keys: tuple[str, ...] = ()
    """Settings that give the number of `channels`; empty for an existing first stage, which keeps its own."""
    rescaled: bool = False
    """Whether its export encodes into other latents than those of the training, each value of which is scaled."""

    @property
    def random(self) -> bool:
        """Whether training samples latents from a posterior, so that there is a KL term."""
        return self.latent in ("posterior", "categorical", "hierarchy", "flow")

    @property
    def one_grid(self) -> bool:
        """Whether latents lie on one grid over the image; otherwise levels on several grids are packed into one."""
        return self.latent not in ("hierarchy", "code_levels")

    @property
    def no_codebook(self) -> str:
        """The message about settings of nearest codes if there are none; empty if there are."""
        if self.latent == "categorical":
            return f"is for the nearest codes of a codebook, and {self.name} draws its codes: leave it out"
        if self.latent in ("codebook", "code_levels"):
            return ""
        return f"is for a codebook, which {self.name} does not have: leave it out"

    @property
    def fixed_latent(self) -> str:
        """The message about settings that change a latent before it is decoded, for latents on several grids."""
        return (
            f"changes a latent before it is decoded, and the finer levels of {self.name} rest on the coarser ones as "
            "they were: leave it out"
        )


class ModelSettings(Settings):
    """An AutoencoderKL, given by the keys of its diffusers config and its initialisation, or another class."""

    kind: Kind = "AutoencoderKL"
    """Class of the autoencoder. For all but AutoencoderKL, `config` gives the shape; leave out the keys below it."""
    config: dict[str, Any] = {}
    """Keys and values of the diffusers config of another kind."""
    encoder: str | None = None
    """Folder of the frozen encoder of an AutoencoderRAE, a vision transformer of transformers (DINOv2 with registers,
    MAE or SigLIP); its decoder has fresh weights and trains. See docs/family.md."""
    in_channels: Positive = 3
    """Channels of the images."""
    out_channels: Positive = 3
    """Channels of the reconstructions, which must equal in_channels."""
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 256, 512, 512)
    """Width of each level; n levels downsample by 2 ** (n - 1)."""
    layers_per_block: Positive = 2
    """ResNet blocks of each level of the encoder; the decoder has one more."""
    latent_channels: Positive = 4
    """Channels of the latents; the encoder gives a mean and a log-variance for each."""
    norm_num_groups: Positive = 32
    """Groups of each group normalisation, a divisor of every width."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution, in encoder and decoder."""
    down_block_types: tuple[DownBlock, ...] | None = None
    """One per level; null means DownEncoderBlock2D everywhere (attention only in the middle)."""
    up_block_types: tuple[UpBlock, ...] | None = None
    """The same for the decoder, from the lowest resolution up; null means UpDecoderBlock2D everywhere."""
    act_fn: Literal["silu"] = "silu"
    """Activation."""
    use_quant_conv: bool = True
    """A 1 x 1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """A 1 x 1 convolution before the decoder."""
    init: Literal["default", "linear"] = "default"
    """`linear`: the fresh network is a linear down- and upsampler (see docs/linear-start.md)."""

    @property
    def gives_shape(self) -> bool:
        """Whether the keys below `config` give the shape; for another kind only the built autoencoder gives it."""
        return self.kind == "AutoencoderKL"

    def facts(self, resolution: int) -> ModelFacts | None:
        """Return the facts that the settings determine; None if the autoencoder must be built first.

        Args:
            resolution: Side of the training images, px.
        """
        name = f"this {self.kind}"
        if self.gives_shape:
            keys = ("model.in_channels", "model.out_channels")
            shape = (self.factor, self.in_channels, self.latent_channels)
            return ModelFacts(name, "posterior", *shape, channel_keys=keys)
        if self.kind == "HierarchicalVAE":  # takes images of one size only, and its latents are 1 x 1
            side, channels = self.config.get("sample_size", resolution), self.config.get("in_channels", 3)
            if isinstance(side, int) and side > 0 and isinstance(channels, int):
                own = ("model.config.in_channels",)
                stated = "logistic_mixture" if self.config.get("mixtures") else None
                facts = ModelFacts(name, "hierarchy", side, channels, 0, side, ("all",), channel_keys=own)
                return facts._replace(states=stated)
        return None

    @property
    def factor(self) -> int:
        """Image px per latent px along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def problems(self) -> Iterator[Problem]:
        if self.encoder is not None and self.kind != "AutoencoderRAE":
            yield Problem("encoder", f"is for an AutoencoderRAE, and model.kind is {self.kind}: leave it out")
        if not self.gives_shape:
            alone = ModelSettings(kind=self.kind, config=self.config, encoder=self.encoder)
            for key in type(self).model_fields:
                if getattr(self, key) != getattr(alone, key):
                    yield Problem(key, f"is AutoencoderKL's; a {self.kind} takes its shape from model.config")
            return
        if self.config:
            yield Problem("config", "is for other kinds; an AutoencoderKL has its keys under model itself")
        levels = len(self.block_out_channels)
        if self.in_channels != self.out_channels:
            yield Problem(
                "out_channels",
                f"{self.out_channels}, but model.in_channels is {self.in_channels}: the loss compares output with "
                f"input, so they must be equal: set model.out_channels={self.in_channels}",
            )
        wrong = [width for width in self.block_out_channels if width % self.norm_num_groups]
        if wrong:
            yield Problem("norm_num_groups", f"{self.norm_num_groups} does not divide model.block_out_channels {wrong}")
        for key in ("down_block_types", "up_block_types"):
            blocks = getattr(self, key)
            if blocks is not None and len(blocks) != levels:
                yield Problem(key, f"has {len(blocks)} entries; model.block_out_channels has {levels}")
        if self.init == "linear":
            yield from self._linear_problems(wrong)

    def _linear_problems(self, wrong: list[int]) -> Iterator[Problem]:
        if self.latent_channels < self.in_channels:
            yield Problem(
                "init", f"linear needs model.latent_channels >= {self.in_channels}, or set model.init=default"
            )
        if not wrong and any((width // self.norm_num_groups) % 4 for width in self.block_out_channels):
            yield Problem(
                "init",
                "linear needs a multiple of 4 channels per group: lower model.norm_num_groups, or set "
                "model.init=default",
            )
        if min(self.block_out_channels) < 4 * self.in_channels:
            least = 4 * self.in_channels
            yield Problem("init", f"linear needs at least {least} channels at every level, or set model.init=default")
