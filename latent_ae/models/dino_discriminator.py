"""The discriminator on features of a frozen vision transformer (gan.network: dino)."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latent_ae.models.discriminator import Discriminator, groups_of

NORM_EPS = 1e-6


class DinoDiscriminator(Discriminator):
    """Small heads on the patch tokens of a frozen vision transformer, as StyleGAN-T (Sauer et al. 2023) and RAE.

    The form is that of RAE (Zheng et al. 2025, bytetriper/RAE src/disc/dinodisc.py): one head on the tokens after each
    quarter of the transformer's blocks, and a further one after the last. A head has a block with kernel 1, a residual
    block with a wide kernel along the sequence of tokens, and a convolution to one logit per token. Each convolution is
    divided by its largest singular value. No norm looks at other samples.

    The frozen transformer is given by `attach`. It is not registered: its weights are in no state dict, have no
    optimizer, and are not sent between processes.

    Args:
        in_channels: Channels of the images; the transformer must accept them.
        features: Width of the tokens.
        depth: Number of the transformer's blocks.
        dino_kernel: Width of the wide kernel, odd; RAE's and StyleGAN-T's is 9. The sequence is padded circularly.
        norm: `group` (of up to 32 groups), `instance` (each channel over the tokens of a sample, RAE's `bn`), or
            `none`.
        sha256: Checksum of the transformer's weights, if they are known.
    """

    title = "discriminator on a frozen vision model, which is not in the file,"
    arguments = ("in_channels", "features", "depth", "dino_kernel", "norm")
    settings = ("dino_model", "dino_px", "dino_kernel", "norm")
    norms = ("group", "instance", "none")
    channels = (1, 3)

    def __init__(
        self,
        in_channels: int,
        features: int,
        depth: int,
        dino_kernel: int = 9,
        norm: Literal["group", "instance", "none"] = "group",
        sha256: str = "",
    ):
        super().__init__()
        self.shape = {
            **{"network": "dino", "in_channels": in_channels, "features": features, "depth": depth},
            **{"dino_kernel": dino_kernel, "norm": norm, "sha256": sha256},
        }
        quarters = sorted({math.ceil(depth * part / 4) for part in range(1, 5)})
        self.depths = [depth, *quarters]
        """For each head the number of blocks after which it sees the tokens."""
        self.heads = nn.ModuleList(
            nn.Sequential(
                _block(features, 1, norm),
                Residual(_block(features, dino_kernel, norm)),
                _convolution(features, 1, 1),
            )
            for _ in self.depths
        )

    @classmethod
    def misfits(cls, side_px: int, **settings: Any) -> Iterator[tuple[str, str]]:
        if settings["dino_kernel"] % 2 == 0:
            yield "dino_kernel", f"{settings['dino_kernel']} is even, and has no middle: give an odd number"

    def attach(self, trunk: Any, sha256: str) -> None:
        """Give it the frozen transformer.

        Args:
            trunk: A module with `layers(images, depths)`, which returns the tokens after several numbers of blocks,
                (N, features, tokens) each, and lets gradients through to the images.
            sha256: Checksum of its weights.
        """
        self.__dict__["trunk"] = trunk  # not registered
        self.shape["sha256"] = sha256

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DinoDiscriminator":
        if "trunk" in self.__dict__:  # it goes wherever the heads go
            self.__dict__["trunk"]._apply(fn)
        return super()._apply(fn, recurse)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the heads. The transformer stays as it is: transformers collects its tokens by hooks."""
        for head in self.heads:
            head.compile(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, (N, C, H, W) in [-1, 1]: (N, heads x tokens) float32."""
        tokens = self.__dict__["trunk"].layers(images, self.depths)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, tokens, strict=True)], dim=1).float()


class Residual(nn.Module):
    """Adds a network's input to its output, and divides by the square root of 2.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return (network(x) + x) / sqrt(2)."""
        return (self.network(x) + x) / math.sqrt(2)


def _block(width: int, kernel: int, norm: str) -> nn.Module:
    groups = width if norm == "instance" else groups_of(width)
    norms = [nn.GroupNorm(groups, width, eps=NORM_EPS)] if norm != "none" else []
    return nn.Sequential(_convolution(width, width, kernel), *norms, nn.LeakyReLU(0.2))


def _convolution(narrow: int, wide: int, kernel: int) -> nn.Module:
    convolution = nn.Conv1d(narrow, wide, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.utils.parametrizations.spectral_norm(convolution)
