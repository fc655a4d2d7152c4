"""Distances between a reconstruction and its image."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PixelLoss = Literal["l1", "l2", "charbonnier"]
CHARBONNIER_EPS = 1e-3


def pixel_loss(kind: PixelLoss, reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of |d|, d^2 or sqrt(d^2 + eps^2) - eps (Charbonnier et al. 1994), d in [-1, 1] units."""
    if kind == "l1":
        return F.l1_loss(reconstruction, target)
    if kind == "l2":
        return F.mse_loss(reconstruction, target)
    difference = reconstruction - target
    return (torch.sqrt(difference.square() + CHARBONNIER_EPS**2) - CHARBONNIER_EPS).mean()
