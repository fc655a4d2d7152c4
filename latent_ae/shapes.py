"""A small set of images whose factors of variation are known: one white shape on black, after dSprites.

python -m latent_ae.shapes shapes.parquet

dSprites: Matthey, Higgins, Hassabis and Lerchner 2017. Every combination of the factors is there once, and no two
images are the same: turns stay below a quarter, which is where a square comes back to itself.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from latent_ae.disk import replacing

FACTORS = {"shape": 3, "scale": 4, "orientation": 8, "x": 8, "y": 8}
"""Columns of the table and how many values each has."""
SHAPES = ("square", "ellipse", "heart")
SIDE_PX = 32
SUBPIXELS = 4
"""Along each side of a pixel, averaged."""


def draw_shape(values: Sequence[int], counts: Sequence[int] = tuple(FACTORS.values())) -> np.ndarray:
    """The image of one combination: (32, 32) uint8. `values` and `counts` are in the order of FACTORS.

    The shape's half width (of the square 0.7 of it, so that its corners stay inside) goes from an eighth to a quarter
    of the side, its centre from a quarter to three quarters, its turn from 0 to just below a quarter turn; values are
    evenly spaced.
    """
    shape, scale, orientation, x, y = values
    spread = [value / max(1, count - 1) for value, count in zip(values, counts, strict=True)]
    radius = SIDE_PX * (1 + spread[1]) / 8
    angle = 0.5 * np.pi * orientation / counts[2]
    centre = [SIDE_PX * (0.25 + 0.5 * part) for part in spread[3:]]
    grid = (np.arange(SIDE_PX * SUBPIXELS) + 0.5) / SUBPIXELS
    across, down = (grid[None, :] - centre[0]) / radius, (grid[:, None] - centre[1]) / radius
    u = np.cos(angle) * across + np.sin(angle) * down
    v = np.cos(angle) * down - np.sin(angle) * across
    inside = (
        np.maximum(abs(u), abs(v)) < 0.7,
        u**2 + (2 * v) ** 2 < 1,
        # the heart curve, point downwards; v is measured downwards
        ((1.2 * u) ** 2 + (0.1 - 1.2 * v) ** 2 - 1) ** 3 < (1.2 * u) ** 2 * (0.1 - 1.2 * v) ** 3,
    )[shape]
    covered = inside.reshape(SIDE_PX, SUBPIXELS, SIDE_PX, SUBPIXELS).mean((1, 3))
    return np.round(255 * covered).astype(np.uint8)


def write_shapes(path: str | Path, counts: Sequence[int] = tuple(FACTORS.values())) -> Path:
    """Writes every combination as a Parquet table: `image` (PNG, one channel) and an integer column for each factor.

    `counts` are the numbers of values, in the order of FACTORS. Rows are in the order of itertools.product.
    """

    def rows() -> Iterator[dict[str, object]]:
        for values in itertools.product(*map(range, counts)):
            yield {"image": Image.fromarray(draw_shape(values, counts))} | dict(zip(FACTORS, values, strict=True))

    features = datasets.Features({"image": datasets.Image()} | {name: datasets.Value("int64") for name in FACTORS})
    table = datasets.Dataset.from_list(list(rows()), features=features)
    with replacing(Path(path)) as part:
        table.to_parquet(part)
    return Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="OUT.parquet")
    words = parser.parse_args()
    write_shapes(words.path)
    print(words.path)


if __name__ == "__main__":
    main()
