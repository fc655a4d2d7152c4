"""The networks that a run starts from."""

import torch
from diffusers import AutoencoderKL

from latent_ae.config import UserError
from latent_ae.discriminators import PatchDiscriminator
from latent_ae.models import build_autoencoder, factor_of, load_autoencoder

from .config import TrainSettings


def starting_autoencoder(settings: TrainSettings) -> AutoencoderKL:
    """A fresh autoencoder of model.*, or the one that init_from names.

    Raises UserError when the latter does not go with the other settings.
    """
    name, data, loss = settings.init_from, settings.data, settings.loss
    if name is None:
        return build_autoencoder(settings.model, sample_size=data.resolution, seed=settings.seed)
    autoencoder = load_autoencoder(name)
    factor, channels, out_channels = factor_of(autoencoder), *_image_channels(autoencoder)
    for key, side in (("data.resolution", data.resolution), ("validate.crop_px", settings.validation.crop_px)):
        if side is not None and side % factor:
            raise UserError(f"{key}: {side} is not a multiple of {name}'s factor {factor}")
    if channels != out_channels:
        raise UserError(
            f"init_from: {name} takes {channels} channels and gives {out_channels}; the loss compares output with "
            "input, so they must be equal"
        )
    if loss.perceptual and channels not in (1, 3):
        raise UserError(f"loss.perceptual: {name} has {channels} channels, LPIPS sees 1 or 3: set it to 0")
    return autoencoder


def starting_discriminator(settings: TrainSettings, channels: int) -> PatchDiscriminator:
    """A fresh discriminator for images of `channels` channels."""
    gan = settings.gan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 1)
        network = PatchDiscriminator(channels, gan.channels, gan.layers, gan.norm)
    return network.to(memory_format=torch.channels_last)


def _image_channels(autoencoder: AutoencoderKL) -> tuple[int, int]:
    return int(autoencoder.config.in_channels), int(autoencoder.config.out_channels)
