"""The one way through an autoencoder while it trains: images to latents to reconstructions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffusers import ModelMixin
from torch import Tensor, nn

from latent_ae.arithmetic import WeightPrecisionConv2d
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
    """mean + exp(logvar / 2) * noise, the mean, or its nearest codes; decoded, after transforms."""
    to_decode: Tensor
    """The latent, or one given, on its way to the decoder, before transforms; its gradient is the image's alone."""
    heads: Mapping[str, Tensor] = {}
    """What the heads make of the latent, float32, by their names."""
    codes: Codes | None = None
    """What the latent was quantised to, where there is a codebook."""
    rates: tuple[Tensor, ...] = ()
    """KL of each latent dimension in nats, level by level (`posterior.Drawn`); empty without a posterior."""


class Reconstructor(nn.Module):
    """The one way through an autoencoder. What wraps it (DDP, autocast, compile) sees every use.

    Calling `autoencoder.encode` or `.decode` of a wrapped model bypasses the wrapper's hooks, so that
    gradients are not synchronised; hence this single `forward`.
    """

    def __init__(self, autoencoder: ModelMixin, heads: Mapping[str, nn.Module] | None = None):
        """`heads` are networks on the latent that train with the autoencoder and are no part of it."""
        super().__init__()
        self.autoencoder, self.heads = autoencoder, nn.ModuleDict(dict(heads or {}))
        keep_posterior_precise_(autoencoder)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        transforms: Sequence[Callable[[Tensor], Tensor]] = (),
        decode: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstructs images.

        Args:
            images: N x C x H x W in [-1, 1]; the sides are multiples of the factor.
            noise: Standard normal, shaped like the latent; it samples the posterior. None takes its mode.
            transforms: Applied to the latent one after another before it is decoded; a scaled or turned latent gives an
                image of that size and turn.
            decode: A latent that is decoded in place of the images' own.
        """
        latent, mean, logvar, rates, _ = draw(self.autoencoder, images, noise)
        codes, how = None, {}
        if self.num_codes:
            latent, codes = quantised(mean, self.codebook)
            how = {"force_not_quantize": True}  # it is quantised already
        heads = {name: head(latent).float() for name, head in self.heads.items()}
        to_decode = latent if decode is None else decode
        to_decode = to_decode.view_as(to_decode)  # a node of its own: its gradient is that of the image alone
        decoded = to_decode
        for transform in transforms:
            decoded = transform(decoded)
        image = family_of(self.autoencoder).decode(self.autoencoder, decoded, **how).float()
        return Reconstruction(image, mean, logvar, latent, to_decode, heads, codes, rates)

    @property
    def codebook(self) -> Tensor:
        """The vectors of a VQModel, codes x channels."""
        return self.autoencoder.quantize.embedding.weight

    @property
    def num_codes(self) -> int:
        """0 without a codebook."""
        return num_codes_of(self.autoencoder)

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


def num_codes_of(autoencoder: nn.Module) -> int:
    """Size of the codebook; 0 without one."""
    return len(autoencoder.quantize.embedding.weight) if family_of(autoencoder).latent == "codebook" else 0


def keep_posterior_precise_(module: nn.Module) -> None:
    """From now on an autocast leaves in float32 what a Gaussian posterior and a sample of it pass through.

    That is the encoder's last convolution, `quant_conv`, `post_quant_conv` and the decoder's first convolution. In
    bfloat16 each would round a latent to 8 bits, often more than the posterior's standard deviation, so that the KL
    term charged for a precision that does not reach the decoder. Names and values of the weights stay. Where there
    is no such posterior, and in convolutions of videos, nothing changes.
    """
    if family_of(module).latent not in ("posterior", "flow"):
        return
    for name in ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"):
        layer: Any = module
        for part in name.split("."):
            layer = getattr(layer, part, None)  # no class has all of them
        if type(layer) is nn.Conv2d:
            layer.__class__ = WeightPrecisionConv2d


def end_layers(part: nn.Module) -> list[nn.Module]:
    """The first and the last convolution of an encoder or decoder, as far as it has them."""
    if hasattr(part, "layers"):  # AutoencoderTiny's
        return [part.layers[0], part.layers[-1]]
    # those of AutoencoderRAE's decoder are linear
    places = {"conv_in": 0, "decoder_embed": 0, "conv_out": -1, "decoder_pred": -1}
    # AutoencoderDC's may change the size, too, and hold theirs; AutoencoderKLCosmos has two for one, of space and time
    return [
        [inner for inner in getattr(part, name).modules() if hasattr(inner, "weight")][place]
        for name, place in places.items()
        if hasattr(part, name)
    ]
