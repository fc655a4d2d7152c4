"""Decodes images and converts their type, range and mode; nothing else does, except crops and pictures in reports.

Arrays are HWC: uint8, uint16 (the full range of either) or float32 in [0, 1].
Tensors are float32 CHW or NCHW in [-1, 1].
"""

import io
import math
import os
import stat
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from torch.nn import functional as F

from latent_ae.data import fast_jpeg

MAX_PIXELS = 200_000_000
PICTURE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
Rounding = Literal["up", "even", "cut", "cut32"]
NUMPY_MAGIC = b"\x93NUMPY"
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA"),
    *("TIFF", "WEBP"),
)
"""Pillow's other formats are not read: for EPS it runs a program on the file."""
# by the EXIF tag's value
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# compressed data do not end in this many zero bytes, but a file whose end was allocated and never written does
UNWRITTEN_BYTES = 256
HALVES = {"uint8": 127.5, "uint16": 32767.5, "float32": 0.5}
"""Half of the range of levels, by type."""
JPEG_END = b"\xff\xd9"
SAME_COLOUR_LEVELS = 2
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """A file cannot be decoded to an image; the message is the reason, without the file's name."""


class Rgba(np.ndarray):
    """Pixels of a picture with straight alpha; crops keep the type.

    A resize weights their colours by alpha. The four channels of a .npy array need not be RGBA, so it has another type.
    """


def decode(
    source: bytes | str | Path,
    *,
    channels: int,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode a picture or .npy array.

    A picture is turned upright after its EXIF tag and converted to sRGB; of an animation the first frame is taken.
    Grayscale may have 16 bits; Pillow reads 16-bit colour as 8 bits. An array is HW or HWC with exactly `channels`
    channels (one channel is repeated for 3).

    Args:
        source: The encoded bytes, or a file.
        channels: 1 (luma), 3 (sRGB) or 4 (RGBA) for pictures; any number for arrays.
        background: Colour behind transparent pixels, 0 to 255, unless 4 channels are requested.
        max_pixels: Larger images are refused before they are decoded.

    Returns:
        (H, W, channels) uint8, uint16 or float32 in [0, 1]; an `Rgba` if it is a picture and has 4 channels of 8 bits.

    Raises:
        ImageError: If it is unreadable, too large, or has other channels.
    """
    return decode_scaled(source, channels=channels, background=background, max_pixels=max_pixels).pixels


class Decoded(NamedTuple):
    """A decoded image."""

    pixels: np.ndarray
    """As `decode` returns them; smaller than the image if the decoder scaled it."""
    size: tuple[int, int]
    """Height and width of the image itself, upright, px."""


def decode_scaled(
    source: bytes | str | Path,
    *,
    channels: int,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    shorter_px: int | None = None,
) -> Decoded:
    """Decode a picture or .npy array as `decode` does, but a large JPEG smaller than it is.

    A JPEG decoder can compute 1/2, 1/4 or 1/8 of the sides (rounded up) from the cosine transform's lower frequencies.
    Pictures that their EXIF tag turns are decoded in full size.

    Args:
        source: The encoded bytes, or a file.
        channels: As for `decode`.
        background: As for `decode`.
        max_pixels: As for `decode`; the image's own size counts.
        shorter_px: Length that the shorter side keeps at least, px; None decodes in full size.

    Raises:
        ImageError: As for `decode`.
    """
    with open_encoded(source) as stream:
        try:
            if stream.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
                array = _array_pixels(source, stream, channels, max_pixels)
                return Decoded(array, array.shape[:2])
            stream.seek(0)
            picture = _open_picture(stream)
            width, height = picture.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} px is more than the limit of {max_pixels} px")
            divisor = 1
            # in a picture that is turned, the pixels that the image covers in part would not be the last ones
            if shorter_px is not None and picture.format == "JPEG" and _orientation(picture) not in UPRIGHT:
                divisor = max(one for one in (1, 2, 4, 8) if one == 1 or min(width, height) >= one * shorter_px)
            pixels = _ordinary_jpeg_pixels(picture, stream, channels, divisor)
            if pixels is not None:
                return Decoded(pixels, (height, width))
            if divisor > 1:
                picture.draft(None, (width // divisor, height // divisor))
            pixels = _picture_pixels(_upright(_loaded(picture, stream)), channels, background)
            return Decoded(pixels, (height, width) if divisor > 1 else pixels.shape[:2])
        except OSError as error:
            raise ImageError(reason_of(error)) from None


def open_encoded(source: bytes | str | Path) -> BinaryIO:
    """Open stored bytes or a regular file for reading.

    Raises:
        ImageError: If the file cannot be opened, or is a directory, pipe or device (reading a pipe could wait forever,
            and some devices never end).
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise ImageError("a directory, pipe or device, not a file")
        return open(source, "rb")
    except (OSError, ValueError) as error:
        raise ImageError(reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """Return the message of an error in a few words, without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def kind_of(source: bytes | str | Path) -> str:
    """Return format and mode of an encoded picture or array, such as "JPEG RGB", from its header.

    Raises:
        ImageError: If it is unreadable.
    """
    with open_encoded(source) as stream:
        if stream.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC:
            return "NumPy array"
        stream.seek(0)
        picture = _open_picture(stream)
        return f"{picture.format} {picture.mode}" + (" animated" if getattr(picture, "is_animated", False) else "")


def _open_picture(stream: BinaryIO) -> Image.Image:
    try:
        # Pillow's own limit is a global that may lie below ours; only the header is read while it is off
        with _pillow_limit, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings name no file
            pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                Image.init()
                return Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
            finally:
                Image.MAX_IMAGE_PIXELS = pillows_limit
    except Image.UnidentifiedImageError:
        raise ImageError("not a known image format, or damaged at its start") from None
    except Exception as error:  # on damaged files Pillow raises errors of any kind
        raise ImageError(f"unreadable: {reason_of(error)}") from error


def _ordinary_jpeg_pixels(picture: Image.Image, stream: BinaryIO, channels: int, divisor: int) -> np.ndarray | None:
    """Return the pixels of an opened JPEG that is upright and in sRGB; None if Pillow has to decode the file."""
    if picture.format != "JPEG" or _orientation(picture) in UPRIGHT:
        return None
    icc_profile = picture.info.get("icc_profile")
    if icc_profile and _srgb_transform(icc_profile, picture.mode) is not None:
        return None
    if stream.seek(0, os.SEEK_END) > fast_jpeg.MAX_BYTES or _ends_unwritten(stream):
        return None
    stream.seek(0)
    return fast_jpeg.decode_jpeg(stream.read(), picture.mode, picture.size, channels, divisor)


def _loaded(picture: Image.Image, stream: BinaryIO) -> Image.Image:
    """Decode an opened picture. A file whose missing pixels Pillow would fill silently is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if picture.format == "PNG":
                picture.verify()  # the checksums
                stream.seek(0)
                picture = _open_picture(stream)
            picture.load()
    except Exception as error:  # on damaged files Pillow raises errors of any kind
        raise ImageError(f"unreadable: {reason_of(error)}") from error
    if picture.format in ("JPEG", "MPO", "WEBP", "AVIF") and _ends_unwritten(stream):
        raise ImageError("unreadable: its end was never written, it is all zeros")
    return picture


def _orientation(picture: Image.Image) -> int | None:
    """Return the value of the EXIF tag; None if there is none, or the tags are damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # on damaged tags Pillow raises errors of any kind
        return None


def _upright(picture: Image.Image) -> Image.Image:
    orientation = _orientation(picture)
    if orientation not in UPRIGHT:
        return picture
    turned = picture.transpose(UPRIGHT[orientation])
    turned.format = picture.format
    return turned


def _ends_unwritten(stream: BinaryIO) -> bool:
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - UNWRITTEN_BYTES))
    if any(stream.read()):
        return False
    stream.seek(0)
    return not stream.read().rstrip(b"\0").endswith(JPEG_END)  # zeros behind a JPEG's end are padding


def _picture_pixels(picture: Image.Image, channels: int, background: tuple[int, int, int]) -> np.ndarray:
    if channels not in PICTURE_MODES:
        raise ImageError(f"a picture gives 1, 3 or 4 channels; {channels} need .npy arrays")
    if picture.mode.startswith("I") or picture.mode == "F":
        pixels = _repeat_gray(_deep_gray(picture), channels)
        clear = picture.info.get("transparency")
        if isinstance(clear, int) and pixels.dtype == np.uint16:
            ground = Image.new("RGB", (1, 1), background).convert(PICTURE_MODES[min(channels, 3)])
            level = np.asarray(ground).reshape(-1).astype(np.uint16) * 257
            pixels[pixels[..., 0] == clear] = level if channels != 4 else (clear, clear, clear, 0)
        return pixels
    try:
        icc_profile, alpha = picture.info.get("icc_profile"), None
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            alpha = rgba.getchannel("A")
            picture = picture.convert("L") if picture.mode in ("L", "LA") else rgba.convert("RGB")
        elif picture.mode not in ("L", "RGB", "CMYK"):
            picture = picture.convert("RGB")
        transform = _srgb_transform(icc_profile, picture.mode) if icc_profile else None
        if transform is not None:
            picture = transform.apply(picture)
        if alpha is not None:
            picture = picture.convert("RGB")
            picture.putalpha(alpha)
            if channels != 4:
                ground = Image.new("RGBA", picture.size, (*background, 255))
                picture = Image.alpha_composite(ground, picture).convert("RGB")
        values = np.asarray(picture.convert(PICTURE_MODES[channels]))
    except ValueError as error:
        raise ImageError(f"pixels of mode {picture.mode}: {error}") from None
    pixels = values.reshape(*values.shape[:2], channels)
    return pixels.view(Rgba) if channels == 4 else pixels


def _deep_gray(picture: Image.Image) -> np.ndarray:
    """Return the pixels of a single-channel picture of more than 8 bits, (H, W) uint16 or float32."""
    pixels = np.asarray(picture)
    if picture.mode == "F":
        return _unit_floats(pixels)
    # older Pillow reads 16-bit PNG as "I"; other 32-bit integers have no known range
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):
        raise ImageError("integers with a sign or of 32 bits have no known range; store 16 bits, or floats in [0, 1]")
    pixels = pixels.astype(np.uint16)
    tags = getattr(picture, "tag_v2", {})  # Pillow follows neither of these TIFF tags
    if tags.get(BITS_PER_SAMPLE) == (12,):
        pixels = (pixels.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    return 65535 - pixels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else pixels


def _array_pixels(source: bytes | str | Path, stream: BinaryIO, channels: int, max_pixels: int) -> np.ndarray:
    try:
        shape = _array_shape(stream)
    except Exception as error:  # a header is a Python expression, and can be wrong in many ways
        raise ImageError(f"unreadable array: {' '.join(str(error).split())[:200]}") from None
    if len(shape) not in (2, 3) or min(shape) <= 0:
        raise ImageError(f"an array of shape {shape}; HW or HWC is expected")
    if shape[0] * shape[1] > max_pixels:
        raise ImageError(f"{shape[1]} x {shape[0]} px is more than the limit of {max_pixels} px")
    try:
        if isinstance(source, bytes):
            array = np.load(io.BytesIO(source), allow_pickle=False)
        else:
            array = np.load(source, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, OverflowError, MemoryError) as error:
        raise ImageError(f"unreadable array: {' '.join(str(error).split())[:200]}") from None
    if array.ndim == 2:
        array = array[..., None]
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


def _array_shape(stream: BinaryIO) -> tuple[int, ...]:
    """Return the shape in the header, without allocating it. Raises ValueError if the file is shorter than that."""
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    here = stream.tell()
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > stream.seek(0, os.SEEK_END) - here:
        raise ValueError("the file is shorter than its header says")
    return shape


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


@lru_cache(maxsize=8)
def _srgb_transform(icc_profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return a transform from `mode` to sRGB; None for a profile that is damaged, for other pixels, or sRGB itself."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    # a profile's name may mislead (linear sRGB is not sRGB), so its effect on a grid of colours decides
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    colours = Image.fromarray(grid).convert(mode)
    moved = np.abs(np.asarray(transform.apply(colours), int) - np.asarray(colours.convert("RGB"), int)).max()
    return transform if mode == "CMYK" or moved > SAME_COLOUR_LEVELS else None


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Convert decoded pixels to a tensor.

    Args:
        array: (H, W, C) uint8, uint16, or float32 in [0, 1].

    Returns:
        (C, H, W) float32 in [-1, 1], contiguous.

    Raises:
        ValueError: If the array has another type.
    """
    return to_batch([array])[0]


def to_batch(arrays: Sequence[np.ndarray], pin_memory: bool = False) -> torch.Tensor:
    """Convert decoded pixels of one size to a batch, each as `to_tensor` does.

    Args:
        arrays: N arrays (H, W, C), each of uint8, uint16, or float32 in [0, 1].
        pin_memory: Whether the batch lies in pinned memory, from which a GPU copies faster.

    Returns:
        (N, C, H, W) float32 in [-1, 1].

    Raises:
        ValueError: If an array has another type.
    """
    height, width, channels = arrays[0].shape
    batch = torch.empty(len(arrays), channels, height, width, pin_memory=pin_memory)
    for planes, array in zip(batch.numpy(), arrays, strict=True):
        half = HALVES.get(array.dtype.name)
        if half is None:
            raise ValueError(f"uint8, uint16 or float32 expected, not {array.dtype}")
        planes[:] = np.ascontiguousarray(array.transpose(2, 0, 1))  # faster than from a view with other strides
        planes /= half
        planes -= 1
    return batch


def to_uint8(images: torch.Tensor, rounding: Rounding = "up") -> torch.Tensor:
    """Convert images to 8-bit pixels. They are clamped and rounded in float32, because bf16 is too coarse for it.

    Args:
        images: Floats in [-1, 1], of any shape.
        rounding: "up" rounds halves up, floor(127.5 x + 128), as nearly all image files are written; "even" rounds
            halves to the even level; "cut" drops fractions, which darkens by half a level; "cut32" drops those of
            float32 numbers in [0, 1] times 255, where 63 of an image's 256 levels come back slightly below themselves
            and so lose a whole level. Published protocols use all of them.

    Returns:
        uint8 of the same shape.
    """
    levels = images.detach().float().clamp(-1, 1)
    if rounding == "up":
        return (levels * 127.5 + 128).floor().to(torch.uint8)
    if rounding == "cut32":
        return ((levels + 1) / 2 * 255).to(torch.uint8)
    # in float64: k / 127.5 - 1 in float32 may come back slightly below k, and dropping fractions would make it k - 1
    levels = ((levels.double() + 1) * 127.5).mul_(2**16).round_().div_(2**16)
    return (levels.round() if rounding == "even" else levels.floor()).to(torch.uint8)


def over_background(images: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Lay RGBA images on a colour: a x + (1 - a) b (Porter and Duff 1984, "over" an opaque background).

    Args:
        images: (N, 4, H, W) float, straight alpha, all channels in [-1, 1]; values outside are not clamped.
        colours: (N, 3) or (3,) in [-1, 1], the background b.

    Returns:
        (N, 3, H, W).
    """
    below = colours.to(images).view(-1, 3, 1, 1)
    alpha = 0.5 * (images[:, 3:] + 1)
    return below + alpha * (images[:, :3] - below)


def visible(images: torch.Tensor, background: Sequence[int]) -> torch.Tensor:
    """Return what of RGBA images can be seen: colours over a background, and alpha.

    Args:
        images: (N, 4, H, W) float, straight alpha, all channels in [-1, 1]; values outside are clamped.
        background: Red, green and blue, 0 to 255.

    Returns:
        (N, 4, H, W) in [-1, 1]: composites and alpha; NaN where a value is not finite.
    """
    images = torch.where(images.isfinite(), images.clamp(-1, 1), torch.nan)
    colour = torch.tensor(background, dtype=torch.float32) / 127.5 - 1
    return torch.cat([over_background(images, colour), images[:, 3:]], dim=1)


def bicubic_down_up(images: torch.Tensor, factor: int, alpha: bool = False) -> torch.Tensor:
    """Downsample images by `factor` with antialiased bicubic interpolation and upsample them again: a simple baseline.

    Args:
        images: (N, C, H, W) float in [-1, 1].
        factor: The downsampling factor.
        alpha: Whether they are RGBA with straight alpha; colours are then weighted by alpha, so that those of invisible
            pixels do not mix with others.

    Returns:
        Float32 of the same shape, in [-1, 1].
    """
    if alpha:
        premultiplied = bicubic_down_up(visible(images, (0, 0, 0)), factor)
        opacity = 0.5 * (premultiplied[:, 3:] + 1)
        colours = (premultiplied[:, :3] + 1) / opacity.clamp(min=1 / 255) - 1
        return torch.cat([colours.clamp(-1, 1), premultiplied[:, 3:]], dim=1)
    size = images.shape[-2:]
    small = F.interpolate(images.float(), [max(1, side // factor) for side in size], mode="bicubic", antialias=True)
    return F.interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)
