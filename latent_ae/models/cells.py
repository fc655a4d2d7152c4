"""Cells of a HierarchicalVAE: diffusers' residual block, the bottleneck of very deep VAEs, NVAE's depthwise cell."""

import math
from typing import Literal, get_args

import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

CellKind = Literal["residual", "bottleneck", "depthwise"]
CELLS: tuple[CellKind, ...] = get_args(CellKind)
SMALLEST_SIDE = 3
"""Side of the smallest grid, px, on which a bottleneck's convolutions are 3 x 3; on smaller ones they are 1 x 1."""
NARROWER = 4
"""By how much a bottleneck is narrower than its features."""
EXPANSION = 6
"""By how much a depthwise cell is wider than its features."""
SQUEEZE, LEAST_SQUEEZED = 16, 4
"""By how much squeeze-and-excitation is narrower than the features, and its least width."""
BRANCH_SCALE = 0.1
"""Factor of a depthwise cell's branch."""


def make_cell(kind: CellKind, width: int, side: int, groups: int, depth: int) -> nn.Module:
    """Return a cell, which takes and returns features, (N, width, side, side).

    Args:
        kind: Its kind.
        width: Channels of the features.
        side: Side of the features' grid, px.
        groups: Groups of each group normalisation.
        depth: Number of such cells one after another in the network.
    """
    if kind == "residual":
        return Residual(width, width, groups)
    return Bottleneck(width, side, depth) if kind == "bottleneck" else Depthwise(width, groups)


class Residual(ResnetBlock2D):
    """diffusers' block without a time embedding; its branch is 0 before training, so that deep stacks train stably."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__(in_channels=in_channels, out_channels=out_channels, temb_channels=None, groups=groups)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return features, (N, out_channels, side, side), for features, (N, in_channels, side, side)."""
        hidden: Tensor = super().forward(features, None)
        return hidden


class Narrow(nn.Sequential):
    """The first three convolutions of a bottleneck, each after a GELU, without normalisation (Child 2021, figure 3).

    Args:
        in_channels: Channels of the features.
        width: Channels of the result.
        side: Side of the grid, px.
    """

    def __init__(self, in_channels: int, width: int, side: int):
        kernel = 3 if side >= SMALLEST_SIDE else 1
        layers = list[nn.Module]()
        for channels, size in ((in_channels, 1), (width, kernel), (width, kernel)):
            convolution = nn.Conv2d(channels, width, size, padding=size // 2)
            nn.init.zeros_(convolution.bias)
            layers += [nn.GELU(), convolution]
        super().__init__(*layers, nn.GELU())


class Bottleneck(nn.Module):
    """A residual block of very deep VAEs: 1 x 1, 3 x 3, 3 x 3, 1 x 1 (Child 2021, section 3.1 and figure 3).

    The last convolution begins smaller by the root of the network's depth, so that the sum of all branches begins as
    large as one of them.
    """

    def __init__(self, width: int, side: int, depth: int):
        super().__init__()
        middle = narrowed(width)
        self.narrow = Narrow(width, middle, side)
        self.widen = nn.Conv2d(middle, width, 1)
        nn.init.zeros_(self.widen.bias)
        self.widen.weight.data.mul_(1.0 / math.sqrt(depth))

    def forward(self, features: Tensor) -> Tensor:
        """Return features, (N, width, side, side) like the input."""
        hidden: Tensor = features + self.widen(self.narrow(features))
        return hidden


class Depthwise(nn.Module):
    """NVAE's decoder cell: 1 x 1 to six times the width, 5 x 5 by channel, 1 x 1 back, squeeze-and-excitation.

    Vahdat and Kautz 2020, figure 3a. NVAE normalises by batch; here groups of channels of one sample are normalised,
    because a gradient must not depend on how a batch is split over passes and processes.
    """

    def __init__(self, width: int, groups: int):
        super().__init__()
        wide, squeezed = EXPANSION * width, max(width // SQUEEZE, LEAST_SQUEEZED)
        self.layers = nn.Sequential(
            nn.GroupNorm(groups, width),
            nn.Conv2d(width, wide, 1, bias=False),
            nn.GroupNorm(groups, wide),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 5, padding=2, groups=wide, bias=False),
            nn.GroupNorm(groups, wide),
            nn.SiLU(),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.GroupNorm(groups, width),
        )
        self.excitation = nn.Sequential(
            nn.Conv2d(width, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, width, 1), nn.Sigmoid()
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return features, (N, width, side, side) like the input."""
        branch = self.layers(features)
        return features + BRANCH_SCALE * branch * self.excitation(F.adaptive_avg_pool2d(branch, 1))


def narrowed(width: int) -> int:
    """Return the width of a bottleneck between features of `width` channels."""
    return max(1, width // NARROWER)
