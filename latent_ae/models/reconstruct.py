"""The forward pass of an autoencoder in training: images to latents to reconstructions."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from latent_ae.arithmetic import WeightPrecisionConv2d
from latent_ae.models.flow_matching import Path
from latent_ae.models.posterior import draw
from latent_ae.models.quantize import PLAIN, Codes, Quantiser, quantised
from latent_ae.models.registry import family_of, states
from latent_ae.models.stored_encoder import StoredEncoder


class Reconstruction(NamedTuple):
    """The results of a forward pass. All tensors are float32 except the codes' indices."""

    image: Tensor
    """(N, C, H, W) like the input, nominally in [-1, 1], not clamped."""
    mean: Tensor
    """Posterior mean, (N, c, H/f, W/f), raw (without scaling factor); the latent if there is no Gaussian posterior."""
    logvar: Tensor | None
    """Posterior log-variance, shaped like `mean`; None if there is no Gaussian posterior."""
    latent: Tensor
    """mean + exp(logvar / 2) * noise, the mean, or its nearest codes, before transforms."""
    to_decode: Tensor
    """The latent, or the one given, that is transformed and decoded; only images contribute to its gradient."""
    heads: Mapping[str, Tensor] = {}
    """Outputs of the heads by their names."""
    codes: tuple[Codes, ...] = ()
    """The codes of the latent, of each level if there are several, from the coarsest; empty if there is no codebook."""
    rates: tuple[Tensor, ...] = ()
    """KL of each latent dimension in nats, level by level (see `posterior.Drawn`), or of the code at each position;
    empty without a posterior."""
    second: Tensor | None = None
    """The image of the latent as `second` changes it, if that was given."""
    stated: Tensor | None = None
    """What the decoder gives of the likelihood besides `image`, (N, P, H, W), see `family.Family.states`: logarithms of
    scales, or the parameters of mixtures."""


class Reconstructor(nn.Module):
    """Encodes and decodes in a single `forward`, so that wrappers (DDP, autocast, compile) see every use.

    Calling `autoencoder.encode` or `.decode` of a wrapped model bypasses the wrapper's hooks, so that
    gradients are not synchronised.

    Args:
        autoencoder: An instance of one of FAMILIES.
        heads: Networks on the latent that train with the autoencoder and are not part of it, by name.
    """

    def __init__(self, autoencoder: ModelMixin, heads: Mapping[str, nn.Module] | None = None):
        super().__init__()
        self.autoencoder, self.heads = autoencoder, nn.ModuleDict(dict(heads or {}))
        keep_posterior_precise_(autoencoder)

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        transforms: Sequence[Callable[[Tensor], Tensor]] = (),
        decode: Tensor | None = None,
        quantiser: Quantiser = PLAIN,
        second: Callable[[Tensor], Tensor] | None = None,
        draws: Mapping[str, Sequence[Tensor]] = {},
        path: Path | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Reconstruction:
        """Reconstruct images.

        Args:
            images: (N, C, H, W) in [-1, 1], whose sides are multiples of the factor.
            noise: Standard normal, shaped like the latent, to sample the posterior; None takes the mode.
            transforms: Applied to the latent one after another before it is decoded; a scaled or rotated latent gives a
                scaled or rotated image.
            decode: A latent to decode instead of the images' latent. If the encoder is not in memory, it counts as the
                images' latent.
            quantiser: How latents are replaced by codes, if there is a codebook.
            second: Applied to the latent after the transforms; the result is decoded besides.
            draws: Random tensors that each head takes besides the latent, by its name.
            path: Where a FlowMatchingVAE looks at each image on its way from noise; None decodes as in evaluation.
            generators: One for each image, with which a decoder that begins with noise draws it; None takes the same
                noise for all images.
        """
        encoder, kind = getattr(self.autoencoder, "encoder", None), family_of(self.autoencoder).latent
        codes, how, stated = tuple[Codes, ...](), dict[str, Any](), None
        if kind == "hierarchy" and decode is None and second is None and not transforms:
            # its latents are decoded on the way down
            (latent, mean, logvar, rates, _), state = self.autoencoder.descend(images, noise)
            image, stated = self.autoencoder.output(state)
            heads = self._outputs_of_heads(latent, draws)
            return Reconstruction(image.float(), mean, logvar, latent, latent, heads, rates=rates, stated=stated)
        if decode is not None and isinstance(encoder, StoredEncoder):
            latent, mean, logvar, rates = decode, decode, None, tuple[Tensor, ...]()
        elif kind == "categorical":
            latent, drawn, rate = self.autoencoder.draw_codes(images, quantiser.relaxation)
            mean, logvar, rates, codes = latent, None, (rate,), (drawn,)
        elif kind == "code_levels":
            latent, codes = self.autoencoder.quantised_levels(images, quantiser)
            mean, logvar, rates = latent, None, ()
            how = {"force_not_quantize": True}  # because it is quantised already
        else:
            latent, mean, logvar, rates, _ = draw(self.autoencoder, images, noise)
        if kind == "codebook":
            latent, nearest = quantised(mean, self.codebooks[0], quantiser)
            codes, how = (nearest,), {"force_not_quantize": True}
        heads = self._outputs_of_heads(latent, draws)
        to_decode = latent if decode is None else decode
        to_decode = to_decode.view_as(to_decode)  # a separate node, whose gradient comes only from images
        decoded = to_decode
        for transform in transforms:
            decoded = transform(decoded)
        family = family_of(self.autoencoder)
        how |= {"generator": generators} if family.decodes_noise else {}
        decode_latent = partial(family.decode, self.autoencoder, **how)
        if states(self.autoencoder) is not None:
            image, stated = self.autoencoder.decode_distribution(decoded)
        elif path is not None:
            image = self.autoencoder.estimate(decoded, path)
        else:
            image = decode_latent(decoded).float()
        second_image = decode_latent(second(decoded)).float() if second is not None else None
        return Reconstruction(image, mean, logvar, latent, to_decode, heads, codes, rates, second_image, stated)

    def _outputs_of_heads(self, latent: Tensor, draws: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        return {name: head(latent, *draws.get(name, ())).float() for name, head in self.heads.items()}

    @property
    def codebooks(self) -> list[nn.Parameter]:
        """The codebook of each level of a VQModel or VQVAE2, (codes, c), from the coarsest."""
        return codebooks_of(self.autoencoder)

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


def codebooks_of(autoencoder: Any) -> list[nn.Parameter]:
    """Return the codebook of each level of a VQModel or VQVAE2, (codes, c), from the coarsest."""
    levels = autoencoder.quantize if family_of(autoencoder).latent == "code_levels" else [autoencoder.quantize]
    return [level.embedding.weight for level in levels]


def keep_posterior_precise_(module: nn.Module) -> None:
    """Keep the convolutions around a Gaussian posterior in float32 under autocast, in place.

    They are the encoder's last convolution, `quant_conv`, `post_quant_conv` and the decoder's first convolution, and
    those of the plain decoder of a FlowMatchingVAE. In bfloat16 each would round a latent to 8 bits. The error is often
    larger than the posterior's standard deviation, so the KL term would charge for a precision that does not reach the
    decoder. Names and values of the weights stay. Models without such a posterior and convolutions of videos do not
    change.
    """
    if family_of(module).latent not in ("posterior", "flow"):
        return
    names = ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in")
    for name in (*names, "base.post_quant_conv", "base.decoder.conv_in"):
        layer: Any = module
        for part in name.split("."):
            layer = getattr(layer, part, None)  # no class has all of them
        if type(layer) is nn.Conv2d:
            layer.__class__ = WeightPrecisionConv2d


def end_layers(part: nn.Module) -> list[nn.Module]:
    """Return the first and the last convolution of an encoder or decoder, as far as it has them."""
    if hasattr(part, "layers"):  # AutoencoderTiny
        return [part.layers[0], part.layers[-1]]
    # in AutoencoderRAE's decoder they are linear layers
    places = {"conv_in": 0, "decoder_embed": 0, "conv_out": -1, "decoder_pred": -1}
    # AutoencoderDC's may be wrapped in a block that resamples; AutoencoderKLCosmos has two in a row, of space and time
    return [
        [inner for inner in getattr(part, name).modules() if hasattr(inner, "weight")][place]
        for name, place in places.items()
        if hasattr(part, name)
    ]
