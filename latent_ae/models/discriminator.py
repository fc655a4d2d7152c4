"""The patch discriminator of the adversarial loss."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Norm = Literal["group", "spectral", "batch", "none"]
FILE = "discriminator.safetensors"
"""Name of the file in a checkpoint and in an exported folder."""


class PatchDiscriminator(nn.Module):
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
    """

    def __init__(self, in_channels: int, channels: int = 64, layers: int = 3, norm: Norm = "group", blur: bool = False):
        super().__init__()
        self.shape = {"in_channels": in_channels, "channels": channels, "layers": layers, "norm": norm, "blur": blur}
        """The arguments, from which the network can be built again."""
        modules: list[nn.Module] = [
            _convolution(in_channels, channels, stride=2, norm="none"),
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
                modules.append(nn.GroupNorm(_groups(width), width))
            elif norm == "batch":
                # no running statistics: the discriminator is never used in evaluation mode
                modules.append(nn.BatchNorm2d(width, track_running_stats=False))
            modules.append(nn.LeakyReLU(0.2))
        modules.append(_convolution(width, 1, stride=1, norm="none"))
        self.layers = nn.Sequential(*modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, (N, C, H, W) in [-1, 1]: (N, 1, h, w) float32."""
        return self.layers(images).float()


def save_network(network: nn.Module, path: Path) -> None:
    """Write a network's tensors to a safetensors file; the `shape` of a PatchDiscriminator goes into the metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # under one key, because safetensors writes several in random order
    save_file(tensors, path, {"shape": json.dumps(network.shape)} if isinstance(network, PatchDiscriminator) else None)


def read_network(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_network` wrote.

    Returns:
        The tensors by name, and the shape, which is empty if the file has none.

    Raises:
        SafetensorError: If it is not a safetensors file.
        ValueError: If the shape cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    shape = json.loads(metadata.get("shape", "{}"))
    if not isinstance(shape, dict):
        raise ValueError(f"its shape is {shape}")
    return load_file(path), shape


class Blur(nn.Module):
    """Filters each channel with the low-pass [1 3 3 1] x [1 3 3 1] / 64; the size stays, and edges are reflected."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        # without the channels: DDP cannot broadcast a lone channels-last buffer of one channel per group (torch 2.15)
        self.register_buffer("kernel", taps[:, None] * taps, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return filtered images, (N, C, H, W) like the input."""
        padded, channels = F.pad(images, (1, 2, 1, 2), mode="reflect"), images.shape[1]
        return F.conv2d(padded, self.kernel.to(images.dtype).expand(channels, 1, 4, 4), groups=channels)


def _groups(width: int) -> int:
    """Return the largest divisor of the width that is at most 32."""
    return next(count for count in range(min(32, width), 0, -1) if width % count == 0)


def _convolution(in_channels: int, out_channels: int, *, stride: int, norm: Norm) -> nn.Module:
    bias = norm not in ("group", "batch")  # those norms have their own
    convolution = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)
    return nn.utils.parametrizations.spectral_norm(convolution) if norm == "spectral" else convolution
