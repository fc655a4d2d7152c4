"""The one way through an autoencoder while it trains: images to latents to reconstructions."""

from operator import attrgetter
from typing import NamedTuple

from diffusers import ModelMixin, VQModel
from torch import Tensor, nn

from latent_ae.arithmetic import WeightPrecisionConv2d
from latent_ae.models.latent_changes import LatentChange, changed
from latent_ae.models.posterior import draw
from latent_ae.models.quantize import Codes, quantised
from latent_ae.models.registry import family_of


class Reconstruction(NamedTuple):
    """What one pass gives; all float32."""

    image: Tensor
    """NCHW like the input, nominally in [-1, 1], not clamped."""
    mean: Tensor
    """Posterior mean, N x latent_channels x H/f x W/f (raw: no scaling factor); without a posterior the latent."""
    logvar: Tensor | None
    """Posterior log-variance, like `mean`; None without a posterior."""
    latent: Tensor
    """mean + exp(logvar / 2) * noise, the mean, or its nearest codes; decoded, after a change if there is one."""
    to_decode: Tensor
    """The latent, or one given, on its way to the decoder, before a change; its gradient is that of the image alone."""
    projected: Tensor | None = None
    """The latent as features of a vision model, N x features x H/f x W/f, where there is a projection."""
    codes: Codes | None = None
    """What the latent was quantised to, where there is a codebook."""
    rates: tuple[Tensor, ...] = ()
    """KL of each latent dimension in nats, level by level (`posterior.Drawn`); empty without a posterior."""


class Reconstructor(nn.Module):
    """The one way through an autoencoder. What wraps it (DDP, autocast, compile) sees every use.

    Calling `autoencoder.encode` or `.decode` of a wrapped model bypasses the wrapper's hooks, so that
    gradients are not synchronised; hence this single `forward`.
    """

    def __init__(self, autoencoder: ModelMixin, projection: nn.Conv2d | None = None):
        """`projection` maps latents to the features that they are aligned to; it is no part of the autoencoder."""
        super().__init__()
        self.autoencoder, self.projection = autoencoder, projection
        keep_posterior_precise_(autoencoder)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        change: LatentChange | None = None,
        given: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstructs NCHW images in [-1, 1] whose sides are multiples of the factor.

        `noise` (standard normal, shaped like the latent) samples the posterior; None takes its mode. `change` is
        made to the latent before it is decoded; a scaled or turned latent gives an image of that size and turn. `given`
        is a latent that is decoded in place of the images' own.
        """
        latent, mean, logvar, rates, _ = draw(self.autoencoder, images, noise)
        codes, how = None, {}
        if isinstance(self.autoencoder, VQModel):
            latent, codes = quantised(mean, self.codebook)
            how = {"force_not_quantize": True}  # it is
        projected, to_decode = None, latent if given is None else given
        if self.projection is not None:
            projected = self.projection(latent).float()
            to_decode = latent.view_as(latent)  # a node of its own, so that the two gradients can be told apart
        decoded = to_decode if change is None else changed(to_decode, change)
        image = self.autoencoder.decode(decoded, **how).sample.float()
        return Reconstruction(image, mean, logvar, latent, to_decode, projected, codes, rates)

    @property
    def codebook(self) -> Tensor:
        """The vectors of a VQModel, codes x channels."""
        return self.autoencoder.quantize.embedding.weight

    @property
    def num_codes(self) -> int:
        """0 without a codebook."""
        return len(self.codebook) if isinstance(self.autoencoder, VQModel) else 0

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's output convolution, where the adaptive GAN weight is measured."""
        weight: Tensor = end_layers(self.autoencoder.decoder)[-1].weight
        return weight

    @property
    def encoder_last_layer(self) -> Tensor:
        """The weight of the encoder's output convolution, where the adaptive alignment weight is measured."""
        weight: Tensor = end_layers(self.autoencoder.encoder)[-1].weight
        return weight


def keep_posterior_precise_(module: nn.Module) -> None:
    """From now on an autocast leaves in float32 what a Gaussian posterior and a sample of it pass through.

    That is the encoder's last convolution, `quant_conv`, `post_quant_conv` and the decoder's first convolution. In
    bfloat16 each would round a latent to 8 bits, often more than the posterior's standard deviation, so that the KL
    term charged for a precision that does not reach the decoder. Names and values of the weights stay. Where there
    is no such posterior, nothing changes.
    """
    if family_of(module).latent not in ("posterior", "flow"):
        return
    for name in ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"):
        if (layer := attrgetter(name)(module)) is not None:  # not every model has both quant convolutions
            layer.__class__ = WeightPrecisionConv2d


def end_layers(part: nn.Module) -> list[nn.Module]:
    """The first and the last convolution of an encoder or decoder, as far as it has them."""
    if hasattr(part, "layers"):  # AutoencoderTiny's
        return [part.layers[0], part.layers[-1]]
    layers = [getattr(part, name) for name in ("conv_in", "conv_out") if hasattr(part, name)]
    # AutoencoderDC's may change the size, too, and hold theirs
    return [getattr(layer, "conv", layer) for layer in layers]
