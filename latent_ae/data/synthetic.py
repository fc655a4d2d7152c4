"""Two small sets of images with known factors of variation: a white shape on black, one channel.

python -m latent_ae.data.synthetic shapes.parquet
python -m latent_ae.data.synthetic shapes64.parquet --side 64
python -m latent_ae.data.synthetic blobs.parquet --kind blobs

shapes (32 px): a square, ellipse or heart with sharp edges, after dSprites (Matthey, Higgins, Hassabis and Lerchner
2017). Rotations stay below a quarter turn, which maps a square onto itself.
blobs (16 px): a Gaussian blob. With soft edges the image changes nearly linearly as the blob moves, so that one latent
dimension is enough for a factor.
--side draws them larger or smaller.
Every combination of the factors occurs once. From 24 px on no two images are the same.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from PIL import Image

from latent_ae.files import replacing

FACTORS = {"shape": 3, "scale": 4, "orientation": 8, "x": 8, "y": 8}
"""Factors of the shapes: columns of the table, and the number of values of each."""
BLOB_FACTORS = {"scale": 6, "x": 12, "y": 12}
"""Factors of the blobs."""
SHAPES = ("square", "ellipse", "heart")
SIDE_PX, BLOB_SIDE_PX = 32, 16
SUBPIXELS = 4
"""Number of samples along each side of a pixel, which are averaged."""


def draw_shape(
    values: Sequence[int], counts: Sequence[int] = tuple(FACTORS.values()), side_px: int = SIDE_PX
) -> np.ndarray:
    """Draw the image of one combination of factors.

    The half width of the shape (0.7 of it for the square, so that its corners stay inside) goes from 1/8 to 1/4 of the
    side, its centre from 1/4 to 3/4, its rotation from 0 to just below a quarter turn; values are evenly spaced.

    Args:
        values: Value of each factor, from 0, in the order of FACTORS.
        counts: Number of values of each factor.
        side_px: Side of the image.

    Returns:
        (side_px, side_px) uint8.
    """
    shape, scale, orientation, x, y = values
    spread = [value / max(1, count - 1) for value, count in zip(values, counts, strict=True)]
    radius = side_px * (1 + spread[1]) / 8
    angle = 0.5 * np.pi * orientation / counts[2]
    centre = [side_px * (0.25 + 0.5 * part) for part in spread[3:]]
    grid = (np.arange(side_px * SUBPIXELS) + 0.5) / SUBPIXELS
    across, down = (grid[None, :] - centre[0]) / radius, (grid[:, None] - centre[1]) / radius
    u = np.cos(angle) * across + np.sin(angle) * down
    v = np.cos(angle) * down - np.sin(angle) * across
    inside = (
        np.maximum(abs(u), abs(v)) < 0.7,
        u**2 + (2 * v) ** 2 < 1,
        # the heart curve, point downwards; v is measured downwards
        ((1.2 * u) ** 2 + (0.1 - 1.2 * v) ** 2 - 1) ** 3 < (1.2 * u) ** 2 * (0.1 - 1.2 * v) ** 3,
    )[shape]
    covered = inside.reshape(side_px, SUBPIXELS, side_px, SUBPIXELS).mean((1, 3))
    return np.round(255 * covered).astype(np.uint8)


def draw_blob(
    values: Sequence[int], counts: Sequence[int] = tuple(BLOB_FACTORS.values()), side_px: int = BLOB_SIDE_PX
) -> np.ndarray:
    """Draw the image of one combination of factors: 255 exp(-d^2 / (2 r^2)) at distance d from the centre.

    r goes from 0.1 to 0.2 of the side, the centre from 0.3 to 0.7 of it; values are evenly spaced.

    Args:
        values: Value of each factor, from 0, in the order of BLOB_FACTORS.
        counts: Number of values of each factor.
        side_px: Side of the image.

    Returns:
        (side_px, side_px) uint8.
    """
    scale, x, y = (value / max(1, count - 1) for value, count in zip(values, counts, strict=True))
    grid = (np.arange(side_px) + 0.5) / side_px
    radius = 0.1 + 0.1 * scale
    squared = (grid[None, :] - (0.3 + 0.4 * x)) ** 2 + (grid[:, None] - (0.3 + 0.4 * y)) ** 2
    return np.round(255 * np.exp(-squared / (2 * radius**2))).astype(np.uint8)


class Kind(NamedTuple):
    """A set of images."""

    factors: dict[str, int]
    """Columns of the table, and the number of values of each."""
    draw: Callable[[Sequence[int], Sequence[int], int], np.ndarray]
    """Draws an image from values and counts, in the order of `factors`, and its side in px."""
    side_px: int
    """Side of the images if nothing else is asked for."""


KINDS = {"shapes": Kind(FACTORS, draw_shape, SIDE_PX), "blobs": Kind(BLOB_FACTORS, draw_blob, BLOB_SIDE_PX)}


def write_shapes(
    path: str | Path, counts: Sequence[int] | None = None, kind: str = "shapes", side_px: int | None = None
) -> Path:
    """Write every combination of factors to a Parquet table: `image` (PNG, one channel) and a column for each factor.

    Rows are in the order of itertools.product.

    Args:
        path: The file to write.
        counts: Number of values of each factor, in the order of the kind's factors; None takes the kind's own.
        kind: A key of KINDS.
        side_px: Side of the images; None takes the kind's own.

    Returns:
        The path.
    """
    factors, draw, own_px = KINDS[kind]
    side_px = side_px or own_px
    counts = tuple(factors.values()) if counts is None else counts

    def rows() -> Iterator[dict[str, object]]:
        for values in itertools.product(*map(range, counts)):
            yield {"image": Image.fromarray(draw(values, counts, side_px))} | dict(zip(factors, values, strict=True))

    features = datasets.Features({"image": datasets.Image()} | {name: datasets.Value("int64") for name in factors})
    table = datasets.Dataset.from_list(list(rows()), features=features)
    with replacing(Path(path)) as part:
        table.to_parquet(part)
    return Path(path)


def main() -> None:
    """Run `python -m latent_ae.data.synthetic`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="OUT.parquet")
    parser.add_argument("--kind", choices=KINDS, default="shapes", help="(default: shapes)")
    parser.add_argument(
        "--side", type=int, metavar="PX", help="side of the images (default: 32 for shapes, 16 for blobs)"
    )
    words = parser.parse_args()
    if words.side is not None and words.side < 8:
        parser.error(f"--side: {words.side} px are too few to show a shape: 8 or more")
    write_shapes(words.path, kind=words.kind, side_px=words.side)
    print(words.path)


if __name__ == "__main__":
    main()
