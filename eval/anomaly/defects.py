"""Seeded synthetic defects on images, with masks of the changed pixels."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

KINDS = ("scratch", "blob", "patch")
SUPERSAMPLED = 4
LEVEL = 1 / 127.5
"""Width of an 8-bit grey level for values in [-1, 1]."""
FEWEST_PX = 4
TRIES = 100


class Defect(NamedTuple):
    """An image with a pasted defect."""

    image: Tensor
    """(C, H, W) in [-1, 1]."""
    mask: Tensor
    """(H, W) bool, True where a channel changed by more than a grey level."""
    kind: str


def paste_defect(image: Tensor, seed: int, number: int) -> Defect:
    """Return a copy of an image with one defect, which is a function of the seed and the image's number.

    scratch: a thin, bent, lighter or darker line. blob: a soft stain of another colour. patch: a rectangle from
    elsewhere in the image, 2 to 15 % of its area with sides at most 1 : 3.3 (CutPaste: Li et al. 2021,
    arXiv:2104.04015, without its colour jitter).

    Args:
        image: (C, H, W) float in [-1, 1].
        seed: Seed of the defects.
        number: Number of the image.

    Raises:
        ValueError: If a side is under 8 px, or no defect shows on the image.
    """
    rng = np.random.default_rng([seed, number])
    kind = KINDS[rng.integers(len(KINDS))]
    if min(image.shape[-2:]) < 8:
        raise ValueError(f"a defect needs sides of 8 px, not {tuple(image.shape[-2:])}")
    for attempt in range(TRIES):  # a dark scratch on black, or a patch of the same sky, changes nothing
        if attempt == TRIES // 2 and kind == "patch":
            kind = "scratch"  # the image is flat
        changed = _patch(image, rng) if kind == "patch" else _stain(image, kind, rng)
        mask = (changed - image).abs().amax(0) > LEVEL
        if int(mask.sum()) >= FEWEST_PX:
            return Defect(changed, mask, kind)
    raise ValueError("no defect shows on this image")


def _patch(image: Tensor, rng: np.random.Generator) -> Tensor:
    _, height, width = image.shape
    area = rng.uniform(0.02, 0.15) * height * width
    aspect = float(np.exp(rng.uniform(-np.log(3.3), np.log(3.3))))
    rows = int(np.clip(round((area * aspect) ** 0.5), 2, height - 1))
    columns = int(np.clip(round((area / aspect) ** 0.5), 2, width - 1))
    (top, left), (to_top, to_left) = (
        (int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))) for _ in range(2)
    )
    changed = image.clone()
    changed[:, to_top : to_top + rows, to_left : to_left + columns] = image[:, top : top + rows, left : left + columns]
    return changed


def _stain(image: Tensor, kind: str, rng: np.random.Generator) -> Tensor:
    channels, height, width = image.shape
    side = min(height, width)
    cover = Image.new("L", (width * SUPERSAMPLED, height * SUPERSAMPLED))
    draw = ImageDraw.Draw(cover)
    x, y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.85) * height
    if kind == "scratch":
        direction, points = rng.uniform(0, 2 * np.pi), [(x, y)]
        step = rng.uniform(0.2, 0.6) * side / 8
        for _ in range(8):
            direction += rng.normal(0, 0.25)
            x, y = x + step * np.cos(direction), y + step * np.sin(direction)
            points.append((x, y))
        thickness = max(SUPERSAMPLED, round(rng.uniform(0.004, 0.012) * side * SUPERSAMPLED))
        draw.line([(a * SUPERSAMPLED, b * SUPERSAMPLED) for a, b in points], 255, thickness, joint="curve")
        strength = np.full(channels, rng.choice((-1, 1)) * rng.uniform(0.4, 1.0))
    else:
        radius = rng.uniform(0.03, 0.09) * side
        for _ in range(4):
            cx, cy = (place + rng.normal(0, 0.5) * radius for place in (x, y))
            box = [cx - radius, cy - radius, cx + radius, cy + radius]
            draw.ellipse([edge * SUPERSAMPLED for edge in box], 255)
        cover = cover.filter(ImageFilter.GaussianBlur(0.3 * radius * SUPERSAMPLED))
        strength = rng.choice((-1, 1)) * rng.uniform(0.2, 0.8, channels)
    alpha = torch.from_numpy(np.asarray(cover.reduce(SUPERSAMPLED), dtype=np.float32) / 255)
    shift = torch.from_numpy(strength.astype(np.float32)).view(-1, 1, 1)
    return (image + alpha * shift).clamp(-1, 1)
