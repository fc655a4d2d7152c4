"""What discriminators of images have in common: what each is built of, and their files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "discriminator.safetensors"
"""Name of the file in a checkpoint and in an exported folder."""


class Discriminator(nn.Module):
    """A discriminator of images; its logits are (N, ...) float32.

    Class attributes:
        title: What it is, in words.
        arguments: Names of the constructor's arguments that it is built from.
        settings: Keys of the section `gan` that concern it.
        norms: Values of gan.norm that it takes.
        channels: Numbers of image channels that it takes; None takes any.
        any_size: Whether one network takes images of any size.
    """

    title: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]]
    norms: ClassVar[tuple[str, ...]] = ()
    channels: ClassVar[tuple[int, ...] | None] = None
    any_size: ClassVar[bool] = True

    shape: dict[str, Any]
    """The arguments, from which it can be built again, and the value of gan.network if that is not `patch`."""

    @classmethod
    def needs_px(cls, **settings: Any) -> int:
        """Return the side of the smallest image that it can process, px.

        Args:
            **settings: The values of the section `gan`.
        """
        return 1

    @classmethod
    def misfits(cls, side_px: int, **settings: Any) -> Iterator[tuple[str, str]]:
        """Yield keys of the section `gan` that do not go with it, and what is wrong.

        Args:
            side_px: Side of the training crops, px.
            **settings: The values of this section.
        """
        return iter(())


def save_network(network: nn.Module, path: Path) -> None:
    """Write a network's tensors to a safetensors file; the `shape` of a Discriminator goes into the metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    # under one key, because safetensors writes several in random order
    save_file(tensors, path, {"shape": json.dumps(network.shape)} if isinstance(network, Discriminator) else None)


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
    """Filters each channel with a low-pass; the size stays, and edges are reflected.

    Args:
        taps: The filter along each side; it is divided by its sum.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float] = (1.0, 3.0, 3.0, 1.0)) -> None:
        super().__init__()
        weights = torch.tensor(taps) / sum(taps)
        # without the channels: DDP cannot broadcast a lone channels-last buffer of one channel per group (torch 2.15)
        self.register_buffer("kernel", weights[:, None] * weights, persistent=False)
        self.size = len(taps)
        self.padding = 2 * ((self.size - 1) // 2, self.size // 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return filtered images, (N, C, H, W) like the input."""
        padded, channels = F.pad(images, self.padding, mode="reflect"), images.shape[1]
        kernel = self.kernel.to(images.dtype).expand(channels, 1, self.size, self.size)
        return F.conv2d(padded, kernel, groups=channels)


def groups_of(width: int) -> int:
    """Return the number of groups of a GroupNorm: the largest divisor of the width that is at most 32."""
    return next(count for count in range(min(32, width), 0, -1) if width % count == 0)
