"""The patch discriminator of the adversarial loss (gan.network: patch)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.models.discriminator import Blur, Discriminator, groups_of

Norm = Literal["group", "spectral", "batch", "none"]


class PatchDiscriminator(Discriminator):
    """PatchGAN (Isola et al. 2017): each logit classifies a patch of the image, 70 px wide with three layers.

    `group` is the default norm because it does not look at other samples: a batch statistic (`batch`, the published
    choice) lets the result depend on the split over processes and breaks on one sample. `blur` filters before each
    subsampling but the first, which must see the unfiltered pixels (Zhang 2019; StyleGAN2's discriminator).

    Args:
        in_channels: Channels of the images.
        channels: Channels of the first layer; later layers have up to 8 times as many.
        layers: Number of layers between the first and the last.
        norm: Normalisation of these layers.
        blur: Whether to filter before subsampling.
        latent_channels: Channels of the latents that it sees besides the images; 0 shows it none.
    """

    title = "patch discriminator"
    arguments = ("in_channels", "channels", "layers", "norm", "blur", "latent_channels")
    settings = ("channels", "layers", "norm", "blur", "conditional")
    norms = ("group", "spectral", "batch", "none")

    def __init__(
        self,
        in_channels: int,
        channels: int = 64,
        layers: int = 3,
        norm: Norm = "group",
        blur: bool = False,
        latent_channels: int = 0,
    ):
        super().__init__()
        self.shape = {"in_channels": in_channels, "channels": channels, "layers": layers, "norm": norm, "blur": blur}
        if latent_channels:
            self.shape["latent_channels"] = latent_channels
        modules: list[nn.Module] = [
            _convolution(in_channels + latent_channels, channels, stride=2, norm="none"),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for layer in range(1, layers + 1):
            narrow, width = width, channels * min(2**layer, 8)
            stride = 1 if layer == layers else 2
            if blur and stride == 2:
                modules.append(Blur())
            modules.append(_convolution(narrow, width, stride=stride, norm=norm))
            if norm == "group":
                modules.append(nn.GroupNorm(groups_of(width), width))
            elif norm == "batch":
                # no running statistics: the discriminator is never used in evaluation mode
                modules.append(nn.BatchNorm2d(width, track_running_stats=False))
            modules.append(nn.LeakyReLU(0.2))
        modules.append(_convolution(width, 1, stride=1, norm="none"))
        self.layers = nn.Sequential(*modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    @classmethod
    def needs_px(cls, **settings: Any) -> int:
        return int(3 * 2 ** settings["layers"])

    def forward(self, images: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return the logits of images.

        Args:
            images: (N, C, H, W) in [-1, 1].
            latents: (N, c, H/f, W/f), if it sees latents; each pixel of them is repeated to the images' size.

        Returns:
            (N, 1, h, w) float32.
        """
        if latents is not None:
            images = torch.cat([images, F.interpolate(latents, images.shape[-2:])], 1)
        return self.layers(images).float()


def _convolution(in_channels: int, out_channels: int, *, stride: int, norm: Norm) -> nn.Module:
    bias = norm not in ("group", "batch")  # those norms have their own
    convolution = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)
    return nn.utils.parametrizations.spectral_norm(convolution) if norm == "spectral" else convolution
