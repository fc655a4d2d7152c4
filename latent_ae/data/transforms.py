"""Resizes and crops decoded images: HWC arrays of uint8, uint16 or float32 in [0, 1], as images.decode returns."""

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from latent_ae.config import UserError
from latent_ae.data.images import ImageError, Rgba

Resample = Literal["adm", "bicubic", "bilinear", "tensor", "linear"]
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
LEVELS = {"uint8": 255.0, "uint16": 65535.0}
# enlarging the shorter side of an image more elongated than this could fill the memory
MAX_ELONGATION = 64


def _resize(
    array: np.ndarray,
    height: int,
    width: int,
    resample: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize an HWC array to the same type, antialiased, each channel separately; colours of `Rgba` count by alpha.

    `box` is the part that is resized: left, top, right and bottom, px; None takes all.
    """
    if isinstance(array, Rgba):  # Pillow multiplies them by alpha before, and divides after
        return np.asarray(Image.fromarray(np.ascontiguousarray(array)).resize((width, height), resample, box)).view(
            Rgba
        )
    if array.dtype == np.uint8 and array.shape[2] == 3:
        return np.asarray(Image.fromarray(array).resize((width, height), resample, box))
    bands = []
    for channel in range(array.shape[2]):
        band = np.ascontiguousarray(array[..., channel])
        deep = band.dtype != np.uint8
        picture = Image.fromarray(band.astype(np.float32) if deep else band)
        resized = np.asarray(picture.resize((width, height), resample, box))
        if deep:  # bicubic overshoots at edges
            resized = resized.clip(0, 1) if band.dtype == np.float32 else resized.round().clip(0, 65535)
        bands.append(resized.astype(array.dtype))
    return np.stack(bands, axis=2)


def resize_shorter(
    array: np.ndarray, size_px: int, resample: Resample = "adm", image_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize an image so that its shorter side is `size_px`; the aspect ratio is kept.

    Args:
        array: (H, W, C) uint8, uint16, or float32 in [0, 1].
        size_px: The new shorter side, px.
        resample: "adm" halves by boxes, then resizes bicubically, as `center_crop_arr` of openai/guided-diffusion
            (image_datasets.py) does; most published numbers rest on it. "bicubic" and "bilinear" are Pillow's, as
            torchvision's Resize of a picture. "tensor" is bilinear with antialiasing, as torchvision's Resize of a
            tensor; its result is float32 and not rounded to levels. "linear" is bilinear without antialiasing, as
            OpenCV's INTER_LINEAR (albumentations), to within a level.
        image_size: Only for "adm": height and width of the image whose JPEG was decoded to the smaller `array`
            (`images.decode_scaled`), px. The result has the size that the image itself would get.

    Returns:
        The resized array; of the same type, except for "tensor".

    Raises:
        ImageError: If the image is too elongated to be enlarged.
    """
    height, width = image_size or array.shape[:2]
    if min(height, width) == size_px:
        return array
    if min(height, width) < size_px and max(height, width) > MAX_ELONGATION * min(height, width):
        raise ImageError(f"{width} x {height} px is too elongated to enlarge to {size_px} px")
    if resample != "adm":
        return _resize_once(array, size_px, resample)
    box = None if image_size is None else _part_of_pixels(array, image_size)
    while min(height, width) >= 2 * size_px:
        height, width = height // 2, width // 2
        if array.shape[0] >= 2 * height:  # otherwise the decoder has halved it already
            array, box = _resize(array, height, width, Image.Resampling.BOX, box), None
    scale = size_px / min(height, width)
    return _resize(array, round(height * scale), round(width * scale), Image.Resampling.BICUBIC, box)


def _part_of_pixels(array: np.ndarray, image_size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Return the part that an image takes up in its scaled decoding: a pixel at the edge may be covered in part."""
    height, width = image_size
    for divisor in (8, 4, 2):
        if array.shape[:2] == (-(-height // divisor), -(-width // divisor)):
            return 0, 0, width / divisor, height / divisor
    return None


def _resize_once(array: np.ndarray, size_px: int, resample: Resample) -> np.ndarray:
    height, width = array.shape[:2]
    shorter = min(height, width)
    # torchvision drops the fraction of the longer side, albumentations rounds it
    exact = [side * size_px / shorter for side in (height, width)]
    sides = [round(side) if resample == "linear" else int(side) for side in exact]
    if resample in PILLOW:
        return _resize(array, sides[0], sides[1], PILLOW[resample])
    levels = LEVELS.get(array.dtype.name, 1.0)
    planes = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))[None].astype(np.float32))
    resized = F.interpolate(planes, sides, mode="bilinear", antialias=resample == "tensor", align_corners=False)
    pixels = resized[0].permute(1, 2, 0).numpy()
    if resample == "tensor":
        return np.clip(pixels / np.float32(levels), 0, 1)
    return pixels.round().astype(array.dtype) if array.dtype != np.float32 else pixels


def random_crop(
    array: np.ndarray,
    size: tuple[int, int],
    resize_px: int | None,
    flip: bool,
    rng: np.random.Generator,
    scale: tuple[float, float] | None = None,
    image_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Return a random crop, mirrored half of the time; smaller images are enlarged to cover it.

    Args:
        array: (H, W, C) decoded pixels.
        size: Height and width of the crop, px.
        resize_px: Shorter side to which the image is resized first, px; None keeps its size.
        flip: Whether crops are mirrored.
        rng: Takes three draws, and with `scale` one more before them.
        scale: Bounds, 0 to 1, between which the side of the crop in the image is drawn uniformly, relative to the
            largest crop of this aspect ratio; the crop is then resized to `size`. It is at least `size`, so that
            nothing is enlarged but images that are too small for any crop. None takes crops of `size`.
        image_size: Height and width of the image, px, if it was decoded to a smaller `array`; see `resize_shorter`.

    Returns:
        (height, width, C) of the array's type; it may be a view.

    Raises:
        ImageError: If the image is too elongated to be enlarged.
    """
    if resize_px is not None:
        array = resize_shorter(array, resize_px, image_size=image_size)
    shorter = min(array.shape[:2])
    needed = max(-(-side * shorter // whole) for side, whole in zip(size, array.shape[:2], strict=True))
    if needed > shorter:
        array = resize_shorter(array, needed)
    window = size
    if scale is not None:
        relative = scale[0] + (scale[1] - scale[0]) * rng.random()
        largest = min(whole / side for side, whole in zip(size, array.shape[:2], strict=True))
        factor = max(1.0, relative * largest)
        window = round(factor * size[0]), round(factor * size[1])
    top = int(rng.integers(array.shape[0] - window[0] + 1))
    left = int(rng.integers(array.shape[1] - window[1] + 1))
    mirrored = rng.random() < 0.5
    crop = array[top : top + window[0], left : left + window[1]]
    crop = crop if window == size else _shrunk(crop, size)
    return crop[:, ::-1] if flip and mirrored else crop


def _shrunk(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to a smaller height and width as `resize_shorter` does: halved by boxes, then bicubically."""
    while array.shape[0] >= 2 * size[0] and array.shape[1] >= 2 * size[1]:
        array = _resize(array, array.shape[0] // 2, array.shape[1] // 2, Image.Resampling.BOX)
    return _resize(array, *size, Image.Resampling.BICUBIC)


def center_crop(
    array: np.ndarray, resolution: int | None, multiple_of: int = 1, *, nearest: bool = False
) -> np.ndarray:
    """Return the middle of an image; smaller images are enlarged to fit.

    Args:
        array: (H, W, C) decoded pixels.
        resolution: Side of the square, px; None takes the largest sides that are multiples of `multiple_of`.
        multiple_of: Number of px of which the sides must be a multiple.
        nearest: Round half of an odd margin to the even number, as torchvision's CenterCrop does; otherwise the smaller
            half comes first.

    Raises:
        UserError: If `resolution` is not a multiple of `multiple_of`.
        ImageError: If the image is too elongated to be enlarged.
    """
    if resolution is not None and resolution % multiple_of:
        raise UserError(f"a crop of {resolution} px: the model needs a multiple of {multiple_of}")
    needed = resolution or multiple_of
    if min(array.shape[:2]) < needed:
        array = resize_shorter(array, needed)
    sides = [resolution or side // multiple_of * multiple_of for side in array.shape[:2]]
    top, left = (
        round((whole - side) / 2) if nearest else (whole - side) // 2
        for whole, side in zip(array.shape[:2], sides, strict=True)
    )
    return array[top : top + sides[0], left : left + sides[1]]
