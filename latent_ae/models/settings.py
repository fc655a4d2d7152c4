"""The section `model` of a training's settings; light, so that a typo costs no waiting."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from latent_ae.config import Positive, Problem, Settings

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
    "FlowAutoencoderKL",
]
"""Classes of first stages: docs/family.md."""


class ModelFacts(NamedTuple):
    """What rules may ask of a first stage, known from its settings or from the autoencoder itself."""

    name: str
    """What messages call it."""
    latent: Literal["posterior", "deterministic", "codebook", "hierarchy", "flow"]
    """As `registry.Family` has it."""
    factor: int
    """Image px per latent px along one side."""
    channels: int
    """Channels of its images."""
    latent_channels: int
    side: int | None = None
    """The one side of its images in px; None where sides are multiples of the factor."""
    trains: tuple[str, ...] = ("all", "decoder", "encoder")
    """Sides of it that can be trained: values of `RunFacts.train`."""
    parameters: tuple[str, ...] = ()
    """Names of the parameters that images reach; empty where they are known only when it is built."""
    last_layers: Mapping[str, str] = {}
    """Names of the weights of the last layers of `encoder` and `decoder`, where adaptive weights are measured; empty
    like `parameters`."""

    @property
    def random(self) -> bool:
        """Whether a latent is drawn from a posterior, so that there is a KL term."""
        return self.latent in ("posterior", "hierarchy", "flow")

    @property
    def one_grid(self) -> bool:
        """Whether latents lie on one grid over the image; otherwise they are packed into one place."""
        return self.latent != "hierarchy"

    @property
    def fixed_latent(self) -> str:
        """Why a latent on several grids cannot be changed before it is decoded."""
        return (
            f"changes a latent before it is decoded, and the finer levels of {self.name} rest on the coarser ones as "
            "they were: leave it out"
        )


class ModelSettings(Settings):
    """An AutoencoderKL by the key names of its diffusers config, and how its weights begin; or another class."""

    kind: Kind = "AutoencoderKL"
    """Class of diffusers or ours. Of the others, `config` gives the shape and the keys below it must be left alone."""
    config: dict[str, Any] = {}
    """Keys and values of the diffusers config of another kind."""
    in_channels: Positive = 3
    """Channels of the images."""
    out_channels: Positive = 3
    """Channels of the reconstructions: the same."""
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 256, 512, 512)
    """Width of each level; n levels downsample by 2 ** (n - 1)."""
    layers_per_block: Positive = 2
    """ResNet blocks of each level of the encoder; the decoder has one more."""
    latent_channels: Positive = 4
    """Channels of the latents; at each position a mean and a log-variance for each."""
    norm_num_groups: Positive = 32
    """Groups of each group normalisation; it divides every width."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution, in encoder and decoder."""
    down_block_types: tuple[DownBlock, ...] | None = None
    """One per level; null means DownEncoderBlock2D everywhere (attention only in the middle)."""
    up_block_types: tuple[UpBlock, ...] | None = None
    """The same of the decoder, from the lowest resolution up; null means UpDecoderBlock2D everywhere."""
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
        """Whether the keys below `config` say the shape; of another kind it is known when the autoencoder is there."""
        return self.kind == "AutoencoderKL"

    def facts(self, resolution: int) -> ModelFacts | None:
        """What these settings tell of the autoencoder for images of `resolution`; None where it must be built first."""
        name = f"this {self.kind}"
        if self.gives_shape:
            return ModelFacts(name, "posterior", self.factor, self.in_channels, self.latent_channels)
        if self.kind == "HierarchicalVAE":  # it is for images of one size, and its latents are of 1 x 1
            side, channels = self.config.get("sample_size", resolution), self.config.get("in_channels", 3)
            if isinstance(side, int) and side > 0 and isinstance(channels, int):
                return ModelFacts(name, "hierarchy", side, channels, 0, side, ("all",))
        return None

    @property
    def factor(self) -> int:
        """Image px per latent px along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def problems(self) -> Iterator[Problem]:
        if not self.gives_shape:
            alone = ModelSettings(kind=self.kind, config=self.config)
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
        if self.in_channels not in (1, 3):
            yield Problem("init", f"linear needs 1 or 3 image channels, not {self.in_channels}: set model.init=default")
        elif self.latent_channels < self.in_channels:
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
