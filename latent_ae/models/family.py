"""What is asked of a class of first stages: the record `Family`, and functions that read its diffusers config."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from latent_ae.models import adapters
from latent_ae.models.adapters import Moments


def powers_of_two(key: str, steps: int = -1) -> Callable[[Any], int]:
    """Downsampling by 2 from each level of the config's `key` to the next; `steps` are those beyond its length."""
    return lambda config: int(2 ** (len(config[key]) + steps))


def of_config(key: str) -> Callable[[Any], int]:
    return lambda config: int(config[key])


def _same_as_input(config: Any) -> int | None:
    given = config.get("out_channels")
    return None if given is None else int(given)


class LatentScaling(NamedTuple):
    """What diffusion models of a class do with its latents: (z - mean) * factor / std."""

    factor: float = 1.0
    """`scaling_factor`."""
    shift: float = 0.0
    """`shift_factor`, subtracted where there is no mean of each channel."""
    mean: list[float] | None = None
    """`latents_mean` of each channel, in place of the shift."""
    std: list[float] | None = None
    """`latents_std` of each channel; None is 1."""
    inside: bool = False
    """Whether the class itself scales what it encodes, besides this."""

    def scaled(self, latents: Tensor) -> Tensor:
        """Raw latents, N x c x h x w, as a diffusion model is fed them."""
        mean, std = self._normalisation(latents)
        return (latents - mean) * (self.factor / std)

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`: what is decoded."""
        mean, std = self._normalisation(latents)
        return latents * (std / self.factor) + mean

    def _normalisation(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted, and what is divided by besides the factor: numbers, or one for each channel."""
        if self.mean is None or self.std is None:
            return latents.new_tensor(self.shift), latents.new_ones(())
        return latents.new_tensor(self.mean)[:, None, None], latents.new_tensor(self.std)[:, None, None]

    @property
    def measured(self) -> bool:
        """Whether the model says how its latents are scaled."""
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
    """Cosmos has a mean and a deviation for each channel and latent frame, channel after channel."""
    scaling = _scaling_of_config(config)
    if scaling.mean is None or scaling.std is None:
        return scaling
    frames = len(scaling.mean) // config.latent_channels
    return scaling._replace(mean=scaling.mean[::frames], std=scaling.std[::frames])


def patched(key: str) -> Callable[[Any], int]:
    """Channels of images, of which a patch of pixels gives `key`."""
    return lambda config: int(config[key] // (config.get("patch_size") or 1) ** 2)


def factor_of_patches(config: Any) -> int:
    return int(2 ** (len(config.dim_mult) - 1) * (config.get("patch_size") or 1))


class Family(NamedTuple):
    """A class of first stages. A function of the config takes the class's diffusers config."""

    latent: Literal["posterior", "deterministic", "codebook", "hierarchy", "flow"]
    """posterior: one Gaussian. hierarchy, flow: random, but without moments to encode; the class draws it itself."""
    factor: Callable[[Any], int]
    """Its config -> image px per latent px along one side."""
    latent_channels: Callable[[Any], int] = of_config("latent_channels")
    """Its config -> channels of a latent."""
    channels: Callable[[Any], int] = of_config("in_channels")
    """Its config -> channels of its images."""
    out_channels: Callable[[Any], int | None] = _same_as_input
    """Its config -> channels of its reconstructions; None: as many as its images."""
    side: Callable[[Any], int | None] = lambda config: None
    """Its config -> the one side of images in px that it takes; None where sides are multiples of the factor."""
    encode: Callable[[Any, Tensor], Moments] = adapters.encode
    """The autoencoder and images -> what a latent is drawn from, as `adapters` describes it."""
    decode: Callable[..., Tensor] = adapters.decode
    """The autoencoder and latents -> images, as `adapters` describes it."""
    encoded: str = "vae.encode(images).latent_dist.sample()"
    """What a user of diffusers writes for it, as Python."""
    decoded: str = "vae.decode(z).sample"
    scaling: Callable[[Any], LatentScaling] = _scaling_of_config
    """Its config -> what its diffusion models do with its latents."""
    codes: Callable[[Any], int | None] = lambda config: None
    """Its config -> number of codes that each place of a latent is one of; None where a latent is continuous."""
    variant: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Its config -> fields that differ from these."""
    refusal: Callable[[Any], str | None] = lambda config: None
    """Its config -> why such an instance has no still images or latents on a grid, and what to do."""
    trains: tuple[Literal["all", "decoder", "encoder"], ...] = ("all", "decoder", "encoder")
    """Values of `train` in a training's settings that suit it."""
    unreached: str = ""
    """Part of the names of weights that no still image reaches."""
    scaled_by_patches: bool = False
    """Diffusion models scale its latents by the statistics in its batch norm, not by its config."""
    tried_in_half_precision: bool = False
    """Export tries it in half precision and in tiles."""
    pipeline_decodes: bool = False
    """DiTPipeline decodes with it."""
    gradient_checkpointing: bool | None = None
    """Whether its blocks can be recomputed in the backward pass; None: as diffusers' flag of the class says."""

    @property
    def plain(self) -> bool:
        """Whether its `decode` takes N x c x h x w and gives images in [-1, 1], as stock image pipelines expect."""
        return self.decode is adapters.decode

    @property
    def random(self) -> bool:
        """Whether a latent is drawn from a posterior, so that there is a KL term."""
        return self.latent in ("posterior", "hierarchy", "flow")

    @property
    def draws_itself(self) -> bool:
        """Whether the class has a method `draw`, as its posterior is more than one Gaussian."""
        return self.latent in ("hierarchy", "flow")

    @property
    def one_grid(self) -> bool:
        """Whether latents lie on one grid over the image; otherwise they are packed into one place."""
        return self.latent != "hierarchy"
