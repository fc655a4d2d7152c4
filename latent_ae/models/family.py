"""The record `Family`, which describes a class of first stages, and functions that read its diffusers config."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from latent_ae.models import adapters
from latent_ae.models.adapters import Moments
from latent_ae.models.likelihood import LikelihoodKind

SIDES: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder", "quant_conv"),
    "decoder": ("decoder", "decoder_unet", "post_quant_conv", "base"),
    "codebook": ("quantize", "embedding"),
    "flow": ("flow",),
}
"""The modules of first stages by the side to which they belong."""


def powers_of_two(key: str, steps: int = -1) -> Callable[[Any], int]:
    """Return a function from a config to the downsampling factor of a model that halves the sides level by level.

    Args:
        key: Key of the config that lists the levels.
        steps: Number of halvings minus the number of levels.
    """
    return lambda config: int(2 ** (len(config[key]) + steps))


def of_config(key: str) -> Callable[[Any], int]:
    """Return a function from a config to the number under `key`."""
    return lambda config: int(config[key])


def _same_as_input(config: Any) -> int | None:
    given = config.get("out_channels")
    return None if given is None else int(given)


class LatentScaling(NamedTuple):
    """How diffusion models scale the latents z of a class: (z - mean) * factor / std."""

    factor: float = 1.0
    """`scaling_factor`."""
    shift: float = 0.0
    """`shift_factor`, which is subtracted if there is no mean of each channel."""
    mean: list[float] | None = None
    """`latents_mean` of each channel, which replaces the shift."""
    std: list[float] | None = None
    """`latents_std` of each channel; None means 1."""
    inside: bool = False
    """Whether the class itself scales latents in `encode`."""

    def scaled(self, latents: Tensor) -> Tensor:
        """Return the inputs of a diffusion model for raw latents, (N, c, h, w)."""
        mean, std = self._normalisation(latents)
        return (latents - mean) * (self.factor / std)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Return raw latents, (N, c, h, w), which the autoencoder decodes: the inverse of `scaled`."""
        mean, std = self._normalisation(latents)
        return latents * (std / self.factor) + mean

    def _normalisation(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean to subtract and the std to divide by: each a scalar, or (c, 1, 1) of one per channel."""
        if self.mean is None or self.std is None:
            return latents.new_tensor(self.shift), latents.new_ones(())
        return latents.new_tensor(self.mean)[:, None, None], latents.new_tensor(self.std)[:, None, None]

    @property
    def measured(self) -> bool:
        """Whether the scaling is known: the class applies it itself, or it differs from the default."""
        return self.inside or self.factor != 1.0 or self.std is not None


def _scaling_of_config(config: Any) -> LatentScaling:
    per_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
    return LatentScaling(
        config.get("scaling_factor") or 1.0,
        config.get("shift_factor") or 0.0,
        list(config["latents_mean"]) if per_channel else None,
        list(config["latents_std"]) if per_channel else None,
    )


def scaling_of_first_frame(config: Any) -> LatentScaling:
    """Return the scaling of Cosmos for still images: its config lists mean and std by channel, then by latent frame."""
    scaling = _scaling_of_config(config)
    if scaling.mean is None or scaling.std is None:
        return scaling
    frames = len(scaling.mean) // config.latent_channels
    return scaling._replace(mean=scaling.mean[::frames], std=scaling.std[::frames])


def patched(key: str) -> Callable[[Any], int]:
    """Return a function from a config to the channels of images, whose patches of pixels have `key` channels."""
    return lambda config: int(config[key] // (config.get("patch_size") or 1) ** 2)


def factor_of_patches(config: Any) -> int:
    """Return the downsampling factor of a model that cuts images into patches and halves their sides level by level."""
    return int(2 ** (len(config.dim_mult) - 1) * (config.get("patch_size") or 1))


class Family(NamedTuple):
    """A class of first stages. Fields that are functions take its diffusers config, unless they say otherwise."""

    latent: Literal["posterior", "deterministic", "codebook", "code_levels", "categorical", "hierarchy", "flow"]
    """Kind of latent. `posterior` is one Gaussian; `hierarchy` and `flow` are random without being one Gaussian, so the
    class samples them itself, and so does `categorical`, a distribution over codes. `codebook` is the nearest code,
    `code_levels` are nearest codes on several grids."""
    factor: Callable[[Any], int]
    """Image px per latent px along one side."""
    latent_channels: Callable[[Any], int] = of_config("latent_channels")
    """Channels of a latent."""
    channels: Callable[[Any], int] = of_config("in_channels")
    """Channels of the images."""
    out_channels: Callable[[Any], int | None] = _same_as_input
    """Channels of the reconstructions; None means the same number as the images."""
    side: Callable[[Any], int | None] = lambda config: None
    """The only side of images, px, that the model takes; None if it takes all multiples of the factor."""
    encode: Callable[[Any, Tensor], Moments] = adapters.encode
    """Takes the autoencoder and images; see the encoding functions in `adapters`."""
    decode: Callable[..., Tensor] = adapters.decode
    """Takes the autoencoder and latents; see the decoding functions in `adapters`."""
    states: Callable[[Any], LikelihoodKind | None] = lambda config: None
    """Likelihood whose parameters the decoder gives: then the class has `decode_distribution`, which returns them
    besides the image. None if it gives an image alone."""
    encoded: str = "vae.encode(images).latent_dist.sample()"
    """The Python code with which a user of diffusers encodes."""
    decoded: str = "vae.decode(z).sample"
    """The Python code with which a user of diffusers decodes."""
    scaling: Callable[[Any], LatentScaling] = _scaling_of_config
    """How diffusion models scale the latents."""
    codes: Callable[[Any], int | None] = lambda config: None
    """Number of codes from which each position of a latent is taken; None if the latents are continuous."""
    codes_per_position: Callable[[Any], int] = lambda config: 1
    """Number of codes at each position of a latent: more than one if finer levels are folded into it."""
    variant: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Fields whose values differ from those of the record, by name."""
    refusal: Callable[[Any], str | None] = lambda config: None
    """Why an instance has no still images or no latents on a grid, and what to do; None if it has both."""
    trains: tuple[Literal["all", "decoder", "encoder"], ...] = ("all", "decoder", "encoder")
    """Values of the setting `train` that are allowed for the class."""
    unreached: str = ""
    """Part of the names of weights that no still image uses; empty if all are used."""
    scaled_by_patches: bool = False
    """Whether diffusion models scale the latents by the statistics in the model's batch norm, not by its config."""
    scaled_by_positions: bool = False
    """Whether the class scales each value of a latent by a mean and deviation of its own, in its `encode`."""
    tried_in_half_precision: bool = False
    """Whether export tries the model in half precision and in tiles."""
    pipeline_decodes: bool = False
    """Whether DiTPipeline can decode with the model."""
    decodes_noise: bool = False
    """Whether each image begins with noise: then `decode` takes `generator`, a torch.Generator for each image."""
    flow_matching: bool = False
    """Whether the decoder carries noise to an image, and is trained by flow matching."""
    gradient_checkpointing: bool | None = None
    """Whether the blocks can be recomputed in the backward pass; None follows diffusers' flag of the class."""

    @property
    def plain(self) -> bool:
        """Whether the class's `decode` turns (N, c, h, w) into images in [-1, 1], as stock image pipelines expect."""
        return self.decode is adapters.decode

    @property
    def random(self) -> bool:
        """Whether latents are sampled from a posterior."""
        return self.latent in ("posterior", "categorical", "hierarchy", "flow")

    @property
    def draws_itself(self) -> bool:
        """Whether the class has a method `draw`, because its posterior is not one Gaussian."""
        return self.latent in ("categorical", "hierarchy", "flow")

    @property
    def one_grid(self) -> bool:
        """Whether latents lie on one grid over the image; otherwise levels on several grids are packed into one."""
        return self.latent not in ("hierarchy", "code_levels")
