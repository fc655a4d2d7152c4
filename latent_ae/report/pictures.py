"""Pictures of image tensors, for people to look at."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from latent_ae.data.images import to_uint8

FONT_PX, LINE_PX = 13, 16
"""Size of the letters, and height of a line of text."""
SQUARE_PX, GRAY = 8, 204
"""Side of the squares behind transparent pixels, and the level of the dark ones, as image editors show them."""


def to_picture(image: torch.Tensor) -> Image.Image:
    """Return an image as an RGB picture.

    Args:
        image: (C, H, W) in [-1, 1]. 4 channels are RGBA, laid on a checkerboard of white and gray; of other numbers the
            first three or the first are shown.
    """
    pixels = to_uint8(image.cpu()).permute(1, 2, 0).contiguous().numpy()
    if pixels.shape[2] == 4:
        rows, columns = (np.arange(side) // SQUARE_PX % 2 for side in pixels.shape[:2])
        board = np.where(rows[:, None] ^ columns, GRAY, 255).astype(np.uint8)
        ground = Image.fromarray(board).convert("RGBA")
        return Image.alpha_composite(ground, Image.fromarray(pixels)).convert("RGB")
    bands = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(bands)).convert("RGB")


def _fit(picture: Image.Image, width: float, height: float) -> Image.Image:
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    whole = scale >= 1 and scale == int(scale)
    return picture.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.BICUBIC)


def picture_grid(
    rows: Sequence[Sequence[torch.Tensor]],
    labels: Sequence[str] | None = None,
    *,
    row_labels: Sequence[str] = (),
    largest_px: int = 512,
) -> Image.Image:
    """Return rows of images as one RGB picture.

    All images are scaled to one cell, as large as the largest (at least 128 px, at most `largest_px`), and centred.

    Args:
        rows: Rows of (C, H, W) images in [-1, 1].
        labels: Text above each column; None shows none.
        row_labels: Text left of each row.
        largest_px: Largest side of a cell, px.
    """
    gap, smallest, largest = 6, 128, largest_px
    font = ImageFont.load_default(FONT_PX)
    side = round(max(map(font.getlength, row_labels), default=0)) + (gap if row_labels else 0)
    pictures = [[to_picture(image) for image in row] for row in rows]
    sizes = np.array([picture.size for row in pictures for picture in row])
    longest = int(sizes.max())
    # whole steps when small images grow, so that their pixels stay visible as squares
    scale = largest / longest if longest > largest else max(1, -(-smallest // longest))
    cell_w, cell_h = (float(side) * scale for side in sizes.max(axis=0))
    fitted = [[_fit(picture, cell_w, cell_h) for picture in row] for row in pictures]
    heights = [max(picture.height for picture in row) for row in fitted]
    titles = [_lines(label, font, cell_w) for label in labels or ()]
    head, step = gap + max((20 + LINE_PX * title.count("\n") for title in titles), default=0), round(cell_w) + gap
    size = (side + max(map(len, rows)) * step + gap, head + sum(heights) + gap * len(heights))
    sheet = Image.new("RGB", size, "white")
    top, draw = head, ImageDraw.Draw(sheet)
    for y, (row, height) in enumerate(zip(fitted, heights, strict=True)):
        if row_labels:
            draw.text((side, top + height / 2), row_labels[y], fill=(60, 60, 60), font=font, anchor="rm")
        for x, picture in enumerate(row):
            left = side + gap + x * step + (round(cell_w) - picture.width) // 2
            sheet.paste(picture, (left, top + (height - picture.height) // 2))
        top += height + gap
    for x, title in enumerate(titles):
        middle = (side + gap + x * step + cell_w / 2, head / 2)
        gray, between = (60, 60, 60), LINE_PX - FONT_PX
        draw.multiline_text(middle, title, gray, font=font, anchor="mm", align="center", spacing=between)
    return sheet


def _lines(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Return a label broken into lines behind commas where it is wider than `width` px; a line that stays is cut."""
    lines = [""]
    for part in label.split(", "):
        longer = f"{lines[-1]}, {part}" if lines[-1] else part
        lines[-1:] = [longer] if font.getlength(longer) <= width or not lines[-1] else [lines[-1], part]
    for number, line in enumerate(lines):
        while font.getlength(line) > width and len(line) > 1:
            line = line.removesuffix("…")[:-1] + "…"
        lines[number] = line
    return "\n".join(lines)
