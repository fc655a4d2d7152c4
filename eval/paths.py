"""Straight and spherical paths between two tensors."""

import math

import torch
from torch import Tensor

PARALLEL = 1e-4
"""Angle in radians, from 0 or from pi, under which the great circle is not well defined."""


def linear(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return (1 - t) a + t b.

    Args:
        a: A tensor of any shape.
        b: A tensor of the same shape.
        t: (T,) in [0, 1].

    Returns:
        (T, *shape).
    """
    t = t.to(a).view(-1, *[1] * a.ndim)
    return (1 - t) * a + t * b


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return the spherical linear interpolation of the flattened a and b (Shoemake 1985; White 2016, arXiv:1609.04468).

    (sin((1 - t) w) a + sin(t w) b) / sin w with w the angle between them, computed in float64. Linear if one is zero or
    they are parallel or opposite to within `PARALLEL`.

    Args:
        a: A tensor of any shape.
        b: A tensor of the same shape.
        t: (T,) in [0, 1].

    Returns:
        (T, *shape) of a's type.
    """
    omega = angle(a, b)
    if not is_spherical(omega):
        return linear(a, b, t)
    t64 = t.double().view(-1, *[1] * a.ndim).to(a.device)
    path = (torch.sin((1 - t64) * omega) * a.double() + torch.sin(t64 * omega) * b.double()) / math.sin(omega)
    return path.to(a.dtype)


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between the flattened a and b in radians; 0 if one of them is zero."""
    u, v = (x.flatten().double() for x in (a, b))
    lengths = float(u.norm()), float(v.norm())
    if not all(lengths):
        return 0.0
    u, v = u / lengths[0], v / lengths[1]
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))  # exact for small angles too (Kahan)


def is_spherical(omega: float) -> bool:
    """Return whether there is one great circle through two ends at this angle (radians)."""
    return PARALLEL < omega < math.pi - PARALLEL
