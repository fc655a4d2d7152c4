"""A variational autoencoder whose latents are codes drawn from a distribution: the discrete VAE of DALL-E."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from latent_ae.arithmetic import WeightPrecisionConv2d
from latent_ae.models.likelihood import from_open_interval
from latent_ae.models.posterior import Drawn
from latent_ae.models.quantize import Codes, Relaxation


@dataclass
class CodesOutput(BaseOutput):
    """The most likely codes of images."""

    latent: Tensor
    """Their vectors, (N, c, h, w)."""
    indices: Tensor
    """Their numbers, (N, h, w) int64."""


class DiscreteVAE(ModelMixin, ConfigMixin):
    """Codes with a categorical posterior q(z | x) and a uniform prior at each position (Ramesh et al. 2021, 2.1).

    The encoder gives the logits of q. Training decodes a sample of its relaxation. `encode` gives the most likely
    codes, and `draw` a sample of q, which is what the decoder learns from: they differ where q is not certain. The
    decoder gives for each value of the image a mean and a log-scale, as the logit-Laplace likelihood needs them
    (`likelihood.log_likelihood`).

    Encoder and decoder have the blocks of a VQModel, but the convolution to the logits is 1 x 1, as published. It and
    the mixture of the codes' vectors stay in float32 under autocast.

    Args:
        in_channels: Channels of the images.
        down_block_types: Blocks of the encoder's levels.
        up_block_types: Blocks of the decoder's levels, from the lowest resolution up.
        block_out_channels: Width of each level; n levels downsample by 2 ** (n - 1).
        layers_per_block: Residual blocks of each level.
        act_fn: Activation.
        latent_channels: Channels of the codes' vectors.
        num_vq_embeddings: Number of codes.
        norm_num_groups: Groups of each group normalisation.
        mid_block_add_attention: Self-attention at the lowest resolution.
        scaling_factor: A diffusion model multiplies shifted latents by it.
        shift_factor: A diffusion model subtracts it from latents.

    Raises:
        ValueError: If there are fewer than two codes.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        down_block_types: Iterable[str] = ("DownEncoderBlock2D",),
        up_block_types: Iterable[str] = ("UpDecoderBlock2D",),
        block_out_channels: Iterable[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 128,
        num_vq_embeddings: int = 8192,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        if num_vq_embeddings < 2:
            raise ValueError(f"num_vq_embeddings {num_vq_embeddings} must be at least 2")
        widths = tuple(block_out_channels)
        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=num_vq_embeddings,
            down_block_types=tuple(down_block_types),
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.encoder.conv_out = WeightPrecisionConv2d(widths[-1], num_vq_embeddings, 1)
        self.embedding = nn.Embedding(num_vq_embeddings, latent_channels)
        with torch.no_grad():
            # logits begin as products of the codes' vectors with a random projection of the features: codes of similar
            # vectors have similar logits, so the noise on many logits does not hide the image from the decoder. Vectors
            # of equal length, and features without their common mean, let an untrained encoder use many codes
            projection = torch.randn(latent_channels, widths[-1]) / math.sqrt(widths[-1])
            projection -= projection.mean(1, keepdim=True)
            self.embedding.weight.copy_(math.sqrt(latent_channels) * F.normalize(self.embedding.weight))
            self.encoder.conv_out.weight.copy_((self.embedding.weight @ projection)[:, :, None, None])
            self.encoder.conv_out.bias.zero_()
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=2 * in_channels,
            up_block_types=tuple(up_block_types),
            block_out_channels=widths,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of q(z | x), (N, K, h, w) float32, for images, (N, C, H, W) in [-1, 1]."""
        logits: Tensor = self.encoder(images).float()
        return logits

    def draw_codes(self, images: Tensor, relaxation: Relaxation | None) -> tuple[Tensor, Codes, Tensor]:
        """Draw from the relaxed posterior of the codes (Jang et al. 2017, eq. 2; Maddison et al. 2017).

        Args:
            images: (N, C, H, W) in [-1, 1].
            relaxation: Gumbel noise and temperature; None takes the most likely codes.

        Returns:
            The latent, (N, c, h, w) float32: the mean of the codes' vectors under softmax((logits + noise) /
            temperature), or the vectors of the most likely codes.
            The codes: `indices` are the most likely ones, `vectors` and `latent` the latent.
            KL(q(z | x) || uniform) of each position in nats, (N, 1, h, w) float32.
        """
        logits = self.logits(images)
        rate, indices = kl_to_uniform(logits.log_softmax(1)), logits.argmax(1)
        if relaxation is None:
            latent = self.vectors(indices).float()
        else:
            weights = ((logits + relaxation.gumbel) / relaxation.temperature).softmax(1)
            with torch.autocast(images.device.type, enabled=False):  # bfloat16 would round the latent
                latent = torch.einsum("nkhw,kc->nchw", weights, self.embedding.weight.float()).contiguous()
        return latent, Codes(indices, latent, latent, self.embedding.weight), rate

    def draw(self, images: Tensor, noise: Tensor | None) -> Drawn:
        """Sample the posterior, as `posterior.draw` does: one code at each position, without a relaxation.

        Args:
            images: (N, C, H, W) in [-1, 1].
            noise: (N, c, h, w) standard normal, of which the first channel chooses the codes: its distribution function
                is a uniform number, and the code is that in whose stretch of the cumulated q it lies. None takes the
                most likely codes.

        Returns:
            The vectors of the codes, and as the only rate KL(q(z | x) || uniform) of each position, (N, 1, h, w).
        """
        logits = self.logits(images)
        logarithms = logits.log_softmax(1)
        if noise is None:
            indices = logits.argmax(1)
        else:
            ends = logarithms.double().exp().cumsum(1)
            uniform = torch.special.ndtr(noise[:, :1].double()) * ends[:, -1:]
            indices = (ends <= uniform).sum(1).clamp(max=logits.shape[1] - 1)
        surprise = logarithms.gather(1, indices[:, None]) + math.log(logits.shape[1])
        log_ratio = -surprise.flatten(1).sum(1, dtype=torch.float64).float()
        latent = self.vectors(indices).float()
        return Drawn(latent, latent, None, (kl_to_uniform(logarithms),), log_ratio)

    def vectors(self, indices: Tensor) -> Tensor:
        """Return the vectors of codes, (N, c, h, w), which `decode` takes, for their numbers, (N, h, w)."""
        vectors: Tensor = self.embedding(indices).movedim(-1, 1).contiguous()
        return vectors

    def sample_prior(self, noise: Tensor) -> Tensor:
        """Sample the uniform prior: the vectors of codes that are equally likely and independent.

        Args:
            noise: (N, c, h, w) standard normal, of which the first channel chooses the codes.

        Returns:
            (N, c, h, w) latents.
        """
        count = self.embedding.num_embeddings
        chosen = (torch.special.ndtr(noise[:, 0].double()) * count).long()
        return self.vectors(chosen.clamp(max=count - 1))

    @apply_forward_hook
    def encode(self, images: Tensor) -> CodesOutput:
        """Return the most likely codes of images, (N, C, H, W) in [-1, 1]."""
        indices = self.logits(images).argmax(1)
        return CodesOutput(latent=self.vectors(indices), indices=indices)

    def decode_distribution(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image and the log-scales of the logit-Laplace distribution around it.

        Args:
            latent: (N, c, h, w), vectors of codes or mixtures of them.

        Returns:
            Both (N, C, H, W) float32: the image as the distribution's location, in [-1.25, 1.25] where pixels are in
            [-1, 1], and the natural logarithm of the scale, in units of the logit.
        """
        location, log_scale = self.decoder(latent).float().chunk(2, 1)
        return from_open_interval(location.sigmoid()), log_scale

    @apply_forward_hook
    def decode(self, latent: Tensor) -> DecoderOutput:
        """Return the images of latents, (N, c, h, w): (N, C, H, W), nominally in [-1, 1]."""
        return DecoderOutput(sample=self.decode_distribution(latent)[0].to(latent.dtype))

    def forward(self, images: Tensor) -> DecoderOutput:
        """Return the images decoded from the most likely codes, (N, C, H, W)."""
        return self.decode(self.encode(images).latent)


def kl_to_uniform(logarithms: Tensor) -> Tensor:
    """Return KL(q || uniform) at each position in nats, (N, 1, h, w), for the logarithms of q, (N, K, h, w)."""
    return (logarithms.exp() * (logarithms + math.log(logarithms.shape[1]))).sum(1, keepdim=True)
