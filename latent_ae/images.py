"""The only place where pixels change type, range, mode or size.

Arrays are HWC: uint8, uint16 (the full range of either) or float32 in [0, 1].
Tensors are float32 CHW or NCHW in [-1, 1].
"""

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F

MAX_PIXELS = 200_000_000
PICTURE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
Rounding = Literal["up", "even", "cut"]
NUMPY_MAGIC = b"\x93NUMPY"
_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """A file that cannot become an image; the message is the reason, without the file's name."""


def decode(
    source: bytes | str | Path,
    *,
    channels: int,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """An encoded picture or .npy array -> HWC array: uint8, uint16 or float32 in [0, 1].

    Pictures give 1 (luma), 3 (sRGB) or 4 (RGBA) channels, upright after their EXIF tag, the first frame of an
    animation; transparent pixels are laid on `background` unless 4 channels are asked for. Grayscale may have
    16 bits; Pillow reads 16-bit colour as 8 bits. Arrays are HW or HWC with exactly `channels` channels
    (one channel is repeated for 3). Raises ImageError with the reason.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            if stream.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
                return _array_pixels(source, channels, max_pixels)
            stream.seek(0)
            return _picture_pixels(_load_picture(stream, max_pixels), channels, background)
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from None


def kind_of(source: bytes | str | Path) -> str:
    """Format and mode of an encoded picture or array, like "JPEG RGB", from its header. Raises ImageError."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            if stream.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
                return "NumPy array"
            stream.seek(0)
            picture = _open_picture(stream)
            return f"{picture.format} {picture.mode}" + (" animated" if getattr(picture, "is_animated", False) else "")
    except Image.UnidentifiedImageError:
        raise ImageError("not a known image format, or damaged at its start") from None
    except Exception as error:  # on damaged files Pillow raises whatever its readers stumble over
        raise ImageError(f"unreadable: {error or type(error).__name__}") from error


def _open_picture(stream: io.IOBase) -> Image.Image:
    # Pillow's own limit is a global that may lie below ours; only the header is read while it is off
    with _pillow_limit:
        pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(cast(io.BytesIO, stream))
        finally:
            Image.MAX_IMAGE_PIXELS = pillows_limit


def _load_picture(stream: io.IOBase, max_pixels: int) -> Image.Image:
    try:
        picture = _open_picture(stream)
        width, height = picture.size
        if width * height <= max_pixels:
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except Image.UnidentifiedImageError:
        raise ImageError("not a known image format, or damaged at its start") from None
    except Exception as error:  # on damaged files Pillow raises whatever its readers stumble over
        raise ImageError(f"unreadable: {error or type(error).__name__}") from error
    raise ImageError(f"{width} x {height} px is more than the limit of {max_pixels} px")


def _picture_pixels(picture: Image.Image, channels: int, background: tuple[int, int, int]) -> np.ndarray:
    if channels not in PICTURE_MODES:
        raise ImageError(f"a picture gives 1, 3 or 4 channels; {channels} need .npy arrays")
    if picture.mode.startswith("I") or picture.mode == "F":
        return _repeat_gray(_deep_gray(picture), channels)
    try:
        if picture.has_transparency_data:
            icc_profile = picture.info.get("icc_profile")
            picture = picture.convert("RGBA")
            picture.info["icc_profile"] = icc_profile
        elif picture.mode not in ("L", "RGB", "CMYK"):
            picture = picture.convert("RGB")
        picture = _to_srgb(picture)
        if picture.mode == "RGBA" and channels != 4:
            ground = Image.new("RGBA", picture.size, (*background, 255))
            picture = Image.alpha_composite(ground, picture).convert("RGB")
        pixels = np.asarray(picture.convert(PICTURE_MODES[channels]))
    except ValueError as error:
        raise ImageError(f"pixels of mode {picture.mode}: {error}") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _deep_gray(picture: Image.Image) -> np.ndarray:
    """Single-channel pictures of more than 8 bits -> HW uint16 or float32."""
    pixels = np.asarray(picture)
    if picture.mode == "F":
        return _unit_floats(pixels)
    # older Pillow reads 16-bit PNG as "I"; other 32-bit integers have no known range
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):
        raise ImageError("32-bit integers have no known range; store 16 bits, or floats in [0, 1] as .npy")
    return pixels.astype(np.uint16)


def _array_pixels(source: bytes | str | Path, channels: int, max_pixels: int) -> np.ndarray:
    try:
        if isinstance(source, bytes):
            array = np.load(io.BytesIO(source), allow_pickle=False)
        else:
            array = np.load(source, allow_pickle=False, mmap_mode="r")  # the size is known before it is read
    except (ValueError, EOFError) as error:
        raise ImageError(f"unreadable array: {error}") from None
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise ImageError(f"an array of shape {array.shape}; HW or HWC is expected")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise ImageError(f"{array.shape[1]} x {array.shape[0]} px is more than the limit of {max_pixels} px")
    if array.shape[2] != channels and not (array.shape[2] == 1 and channels == 3):
        hint = "; it looks like CHW, transpose it" if array.shape[0] == channels else ""
        raise ImageError(f"an array of shape {array.shape} (HWC), but {channels} channels are expected{hint}")
    if array.dtype.kind == "f":
        pixels = _unit_floats(array)
    elif array.dtype in (np.uint8, np.dtype("<u2"), np.dtype(">u2")):
        pixels = np.array(array, dtype=array.dtype.newbyteorder("="))
    else:
        raise ImageError(f"an array of {array.dtype}; uint8, uint16 or floats in [0, 1] are expected")
    return pixels if pixels.shape[2] == channels else _repeat_gray(pixels[..., 0], channels)


def _unit_floats(array: np.ndarray) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ImageError(f"floats from {low:g} to {high:g}; they must lie in [0, 1], without NaN")
    return np.array(array, dtype=np.float32)


def _repeat_gray(gray: np.ndarray, channels: int) -> np.ndarray:
    pixels = np.repeat(gray[..., None], channels, axis=2)
    if channels == 4:
        pixels[..., 3] = 1 if gray.dtype.kind == "f" else np.iinfo(gray.dtype).max
    return pixels


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Follows an embedded colour profile; one that is damaged or made for other pixels changes nothing."""
    icc_profile = picture.info.get("icc_profile")
    if not icc_profile:
        return picture
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, profile, srgb, outputMode=mode) or picture
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """HWC uint8, uint16 or float32 in [0, 1] -> CHW float32 in [-1, 1], contiguous."""
    half = {"uint8": 127.5, "uint16": 32767.5, "float32": 0.5}.get(array.dtype.name)
    if half is None:
        raise ValueError(f"uint8, uint16 or float32 expected, not {array.dtype}")
    planes = np.ascontiguousarray(array.transpose(2, 0, 1)).astype(np.float32)
    planes /= half
    planes -= 1
    return torch.from_numpy(planes)


def to_uint8(images: torch.Tensor, rounding: Rounding = "up") -> torch.Tensor:
    """Floats in [-1, 1], any shape -> uint8, clamped and rounded in fp32 (bf16 is too coarse for it).

    Halves go up (floor(127.5 x + 128)), as files are written nearly everywhere; or to the even level; or all fractions
    are cut off, which darkens by half a level: protocols that others published do both.
    """
    levels = images.detach().float().clamp(-1, 1)
    if rounding == "up":
        return (levels * 127.5 + 128).floor().to(torch.uint8)
    # in float64: k / 127.5 - 1 in float32 may come back a hair under k, and cutting would make it k - 1
    levels = ((levels.double() + 1) * 127.5).mul_(2**16).round_().div_(2**16)
    return (levels.round() if rounding == "even" else levels.floor()).to(torch.uint8)


def bicubic_down_up(images: torch.Tensor, factor: int) -> torch.Tensor:
    """NCHW in [-1, 1] -> same shape: antialiased bicubic down by `factor` and up, the baseline to beat."""
    size = images.shape[-2:]
    small = F.interpolate(images.float(), [max(1, side // factor) for side in size], mode="bicubic", antialias=True)
    return F.interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)


def to_picture(image: torch.Tensor) -> Image.Image:
    """CHW in [-1, 1] -> RGB; alpha on white, of other channel counts the first three or the first."""
    pixels = to_uint8(image.cpu()).permute(1, 2, 0).contiguous().numpy()
    if pixels.shape[2] == 4:
        picture = Image.fromarray(pixels)
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
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
    """Rows of CHW images in [-1, 1] -> one RGB picture, column `labels` on top and `row_labels` on the left.

    All images are scaled to one cell, as large as the largest (at least 128 px, at most `largest_px`), and centred.
    """
    gap, smallest, largest = 6, 128, largest_px
    font = ImageFont.load_default(13)
    side = round(max(map(font.getlength, row_labels), default=0)) + (gap if row_labels else 0)
    pictures = [[to_picture(image) for image in row] for row in rows]
    sizes = np.array([picture.size for row in pictures for picture in row])
    longest = int(sizes.max())
    # whole steps when small images grow, so that their pixels stay visible as squares
    scale = largest / longest if longest > largest else max(1, -(-smallest // longest))
    cell_w, cell_h = (float(side) * scale for side in sizes.max(axis=0))
    fitted = [[_fit(picture, cell_w, cell_h) for picture in row] for row in pictures]
    heights = [max(picture.height for picture in row) for row in fitted]
    head, step = 26 if labels else gap, round(cell_w) + gap
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
    for x, label in enumerate(labels or ()):
        while draw.textlength(label, font=font) > cell_w and len(label) > 1:
            label = label.removesuffix("…")[:-1] + "…"
        middle = (side + gap + x * step + cell_w / 2, head / 2)
        draw.text(middle, label, fill=(60, 60, 60), font=font, anchor="mm")
    return sheet
