"""Encode and decode still images with the classes of diffusers, which differ in how they are called.

`registry.FAMILIES` names the pair of functions of each class.

An encoding function takes the autoencoder and images, (N, C, H, W) in [-1, 1]. It returns the posterior's mean and
log-variance, both (N, c, h, w) float32; an autoencoder without a posterior gives the latent and None.

A decoding function takes the autoencoder and raw latents, (N, c, h, w). It returns images, (N, C, H, W), nominally in
[-1, 1], in the autoencoder's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latent_ae.config import UserError

Moments = tuple[Tensor, Tensor | None]


def encode(autoencoder: Any, images: Tensor) -> Moments:
    """Return the moments or the latent from `autoencoder.encode`, which takes the images unchanged."""
    encoded = autoencoder.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()
    return (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float(), None


def decode(autoencoder: Any, latents: Tensor, **how: Any) -> Tensor:
    """Return the images from `autoencoder.decode`, which takes the latents unchanged.

    Args:
        autoencoder: An instance of a class of diffusers.
        latents: (N, c, h, w) raw latents.
        **how: Further arguments of `autoencoder.decode`.
    """
    sample: Tensor = autoencoder.decode(latents, **how).sample
    return sample


def encode_frame(autoencoder: Any, images: Tensor) -> Moments:
    """Encode each image as a video of one frame, (N, C, 1, H, W)."""
    posterior = autoencoder.encode(images[:, :, None]).latent_dist
    if not hasattr(posterior, "logvar"):  # the IdentityDistribution of Cosmos
        return posterior.mode()[:, :, 0].float(), None
    return posterior.mean[:, :, 0].float(), posterior.logvar[:, :, 0].float()


def decode_frame(autoencoder: Any, latents: Tensor) -> Tensor:
    """Decode each latent as a video of one frame, (N, c, 1, h, w)."""
    sample: Tensor = autoencoder.decode(latents[:, :, None]).sample[:, :, 0]
    return sample


def encode_opaque_frame(autoencoder: Any, images: Tensor) -> Moments:
    """Encode like `encode_frame`; if the autoencoder takes RGBA, add the alpha channel of an opaque image (1)."""
    missing = autoencoder.config.in_channels - images.shape[1]
    return encode_frame(autoencoder, torch.nn.functional.pad(images, (0, 0, 0, 0, 0, missing), value=1.0))


def decode_opaque_frame(autoencoder: Any, latents: Tensor) -> Tensor:
    """Decode like `decode_frame`, and drop the alpha channel."""
    return decode_frame(autoencoder, latents)[:, :3]


def encode_first_frames(autoencoder: Any, images: Tensor) -> Moments:
    """Encode each image as a video that repeats it: VidTok compresses several frames into the first latent frame."""
    frames = images[:, :, None].expand(-1, -1, autoencoder.temporal_compression_ratio, -1, -1)
    encoded = autoencoder.encode(frames)
    if isinstance(encoded, tuple):  # finite scalar quantisation: the quantised latent and its indices
        return encoded[0][:, :, 0].float(), None
    posterior = encoded.latent_dist
    return posterior.mean[:, :, 0].float(), posterior.logvar[:, :, 0].float()


def decode_first_frame(autoencoder: Any, latents: Tensor) -> Tensor:
    """Decode each latent as a video and return its first frame."""
    sample: Tensor = autoencoder.decode(latents[:, :, None])[:, :, 0]  # `decode` drops the repeated frames
    return sample


def encode_unit_range(autoencoder: Any, images: Tensor) -> Moments:
    """Encode with a representation autoencoder, which takes square images of one size in [0, 1] and scales its latents.

    Raises:
        UserError: If the images have another size.
    """
    side, (height, width) = autoencoder.decoder_image_size, images.shape[-2:]
    if (height, width) != (side, side):
        raise UserError(
            f"this {type(autoencoder).__name__} takes images of {side} x {side} px, not {height} x {width}: cut them "
            f"to that (crop_px={side}, or resolution={side} where a command has that)"
        )
    # the attribute, which overrides the config: noise from the global random state would depend on how data are split
    autoencoder.noise_tau = 0.0
    return autoencoder.encode((images + 1) / 2).latent.float(), None


def decode_unit_range(autoencoder: Any, latents: Tensor) -> Tensor:
    """Decode with a representation autoencoder, whose images are in [0, 1]."""
    sample: Tensor = autoencoder.decode(latents.contiguous()).sample
    return 2 * sample - 1


def decode_by_consistency(
    autoencoder: Any, latents: Tensor, generator: Sequence[torch.Generator] | None = None
) -> Tensor:
    """Decode with a consistency decoder, whose images begin with noise and must not depend on their batch.

    Args:
        autoencoder: A ConsistencyDecoderVAE.
        latents: (N, c, h, w) raw latents.
        generator: Draws the noise of each image; None takes that of seed 0 for all.
    """
    generators = [torch.Generator().manual_seed(0) for _ in latents] if generator is None else list(generator)
    sample: Tensor = autoencoder.decode(latents, generator=generators).sample
    return sample
