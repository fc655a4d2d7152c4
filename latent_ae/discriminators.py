"""The patch discriminator of the adversarial loss."""

from typing import Literal

from torch import Tensor, nn

Norm = Literal["group", "spectral", "none"]


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): each logit judges a patch of the image, 70 px wide with three layers.

    `group` is the default norm because it does not look at other samples: a batch statistic would let the result
    depend on the split over processes, break on one sample and tie the real to the fake images.

    NCHW in [-1, 1] -> N x 1 x h x w logits.
    """

    def __init__(self, in_channels: int, channels: int = 64, layers: int = 3, norm: Norm = "group"):
        super().__init__()
        modules: list[nn.Module] = [
            _convolution(in_channels, channels, stride=2, norm="none"),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for layer in range(1, layers + 1):
            narrow, width = width, channels * min(2**layer, 8)
            modules.append(_convolution(narrow, width, stride=1 if layer == layers else 2, norm=norm))
            if norm == "group":
                modules.append(nn.GroupNorm(_groups(width), width))
            modules.append(nn.LeakyReLU(0.2))
        modules.append(_convolution(width, 1, stride=1, norm="none"))
        self.layers = nn.Sequential(*modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).float()


def _groups(width: int) -> int:
    """The largest divisor of the width that is at most 32."""
    return next(count for count in range(min(32, width), 0, -1) if width % count == 0)


def _convolution(in_channels: int, out_channels: int, *, stride: int, norm: Norm) -> nn.Module:
    convolution = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=norm != "group")
    return nn.utils.parametrizations.spectral_norm(convolution) if norm == "spectral" else convolution
