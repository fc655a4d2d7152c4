"""StyleGAN's discriminator (gan.network: stylegan)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.models.discriminator import Blur, Discriminator

LAST_PX = 4
MOST_CHANNELS = 512


class StyleGANDiscriminator(Discriminator):
    """The residual discriminator of StyleGAN2 (Karras et al. 2020) with one logit per image, in LlamaGen's form.

    Blocks halve the image to 4 px, each with two convolutions and a filtered subsampling beside a strided 1 x 1
    convolution. As in FoundationVision/LlamaGen (tokenizer_image/discriminator_stylegan.py), where this is an option,
    there is no minibatch standard deviation: it would let a logit depend on the other samples of its pass, and so the
    loss on the split over processes and passes.

    Args:
        in_channels: Channels of the images.
        side_px: Side of the images, 4 times a power of two.
        channels: Channels of the first layer; they double with each block up to 512. LlamaGen's are 64 at 256 px.
    """

    title = "StyleGAN discriminator"
    arguments = ("in_channels", "side_px", "channels")
    settings = ("channels",)
    any_size = False

    def __init__(self, in_channels: int, side_px: int, channels: int = 64):
        super().__init__()
        self.shape = {"network": "stylegan", "in_channels": in_channels, "side_px": side_px, "channels": channels}
        width, modules = channels, _convolution(in_channels, channels)
        for _ in range(round(math.log2(side_px / LAST_PX))):
            narrow, width = width, max(channels, min(2 * width, MOST_CHANNELS))
            modules.append(Block(narrow, width))
        modules += _convolution(width, width)
        self.layers = nn.Sequential(*modules)
        self.classifier = nn.Sequential(
            nn.Linear(width * LAST_PX**2, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
        )

    @classmethod
    def misfits(cls, side_px: int, **settings: Any) -> Iterator[tuple[str, str]]:
        halvings = math.log2(side_px / LAST_PX)
        if halvings < 1 or not halvings.is_integer():
            yield "network", f"stylegan halves images to {LAST_PX} px: data.resolution={side_px} is not 8, 16, 32, ..."

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, (N, C, side_px, side_px) in [-1, 1]: (N, 1) float32."""
        return self.classifier(self.layers(images).flatten(1)).float()


class Block(nn.Module):
    """Two convolutions and a filtered subsampling by two, beside a strided 1 x 1 convolution.

    Args:
        narrow: Channels of its input.
        width: Channels of its output.
    """

    def __init__(self, narrow: int, width: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(narrow, width, 1)
        self.layers = nn.Sequential(
            *_convolution(narrow, width),
            *_convolution(width, width),
            Blur((1.0, 2.0, 1.0)),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, width, H / 2, W / 2) for (N, narrow, H, W)."""
        # A stride in the 1 x 1 convolution would do the same, but on CPUs the second derivative of gan.r1 then writes
        # past its memory where layouts are channels-last (torch 2.15).
        return torch.add(self.layers(x), self.shortcut(x[:, :, ::2, ::2])) / math.sqrt(2)


def _convolution(narrow: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(narrow, width, 3, padding=1), nn.LeakyReLU(0.2)]
