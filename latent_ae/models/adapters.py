"""How the classes of diffusers encode and decode a still image: N x C x H x W in [-1, 1] to N x c x h x w and back.

`registry.FAMILIES` names the pair of functions of each class. An encoding function takes the autoencoder and images
and returns the posterior's mean and log-variance, float32, or the latent and None where nothing is random; a decoding
function takes raw latents and returns images in the autoencoder's own dtype.
"""

from typing import Any

import torch
from torch import Tensor

from latent_ae.config import UserError

Moments = tuple[Tensor, Tensor | None]


def encode(autoencoder: Any, images: Tensor) -> Moments:
    """The moments or the latent that `autoencoder.encode` returns of images as they are."""
    encoded = autoencoder.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()
    return (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float(), None


def decode(autoencoder: Any, latents: Tensor, **how: Any) -> Tensor:
    """`autoencoder.decode` of latents as they are; `how` are further arguments."""
    sample: Tensor = autoencoder.decode(latents, **how).sample
    return sample


def encode_frame(autoencoder: Any, images: Tensor) -> Moments:
    """An image is a video of one frame, N x C x 1 x H x W."""
    posterior = autoencoder.encode(images[:, :, None]).latent_dist
    if not hasattr(posterior, "logvar"):  # the IdentityDistribution of Cosmos
        return posterior.mode()[:, :, 0].float(), None
    return posterior.mean[:, :, 0].float(), posterior.logvar[:, :, 0].float()


def decode_frame(autoencoder: Any, latents: Tensor) -> Tensor:
    sample: Tensor = autoencoder.decode(latents[:, :, None]).sample[:, :, 0]
    return sample


def encode_opaque_frame(autoencoder: Any, images: Tensor) -> Moments:
    """Like `encode_frame`, with the alpha channel of an opaque image (1) where the autoencoder takes RGBA."""
    missing = autoencoder.config.in_channels - images.shape[1]
    return encode_frame(autoencoder, torch.nn.functional.pad(images, (0, 0, 0, 0, 0, missing), value=1.0))


def decode_opaque_frame(autoencoder: Any, latents: Tensor) -> Tensor:
    return decode_frame(autoencoder, latents)[:, :3]


def encode_first_frames(autoencoder: Any, images: Tensor) -> Moments:
    """VidTok makes the first latent frame of as many frames as it compresses into one, the image before it repeated."""
    frames = images[:, :, None].expand(-1, -1, autoencoder.temporal_compression_ratio, -1, -1)
    encoded = autoencoder.encode(frames)
    if isinstance(encoded, tuple):  # finite scalar quantisation: the quantised latent and its indices
        return encoded[0][:, :, 0].float(), None
    posterior = encoded.latent_dist
    return posterior.mean[:, :, 0].float(), posterior.logvar[:, :, 0].float()


def decode_first_frame(autoencoder: Any, latents: Tensor) -> Tensor:
    sample: Tensor = autoencoder.decode(latents[:, :, None])[:, :, 0]  # the repeated frames are cut there
    return sample


def encode_unit_range(autoencoder: Any, images: Tensor) -> Moments:
    """A representation autoencoder takes square images of one size in [0, 1] and scales its latents itself."""
    side, (height, width) = autoencoder.decoder_image_size, images.shape[-2:]
    if (height, width) != (side, side):
        raise UserError(
            f"this {type(autoencoder).__name__} takes images of {side} x {side} px, not {height} x {width}: cut them "
            f"to that (crop_px={side}, or resolution={side} where a command has that)"
        )
    # an attribute apart from the config: noise from the global random state would differ from split to split
    autoencoder.noise_tau = 0.0
    return autoencoder.encode((images + 1) / 2).latent.float(), None


def decode_unit_range(autoencoder: Any, latents: Tensor) -> Tensor:
    sample: Tensor = autoencoder.decode(latents.contiguous()).sample
    return 2 * sample - 1


def decode_by_consistency(autoencoder: Any, latents: Tensor) -> Tensor:
    """The consistency decoder begins with noise: the same for each image, so that no image depends on its batch."""
    generators = [torch.Generator().manual_seed(0) for _ in latents]
    sample: Tensor = autoencoder.decode(latents, generator=generators).sample
    return sample
