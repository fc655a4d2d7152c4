"""Decodes ordinary JPEG files with simplejpeg, which takes four fifths of Pillow's time and gives the same pixels.

Both call libjpeg-turbo with the same options. Each brings its own copy of that library, so the equality is one of
versions; tests/data/test_fast_jpeg.py compares them. Files for which it is not certain are left to Pillow.
"""

import numpy as np

try:
    import simplejpeg
except ImportError:  # Pillow then decodes all files
    simplejpeg = None

MAX_BYTES = 2**26
"""Larger files are left to Pillow, which reads them in pieces."""
COLOURS = {("RGB", 3): ("RGB", ("YCbCr", "RGB")), ("L", 3): ("RGB", ("Gray",)), ("L", 1): ("GRAY", ("Gray",))}
"""By Pillow's mode and the number of channels: the colours to decode to, and those that the file may hold."""


def decode_jpeg(content: bytes, mode: str, size: tuple[int, int], channels: int, divisor: int = 1) -> np.ndarray | None:
    """Decode a JPEG file, neither turned upright nor converted to sRGB.

    Args:
        content: The file's bytes.
        mode: The picture's mode as Pillow found it.
        size: Its width and height as Pillow found them, px.
        channels: 1 or 3.
        divisor: 1, or the 2, 4 or 8 by which the decoder divides the sides (rounded up).

    Returns:
        (H, W, channels) uint8; None if Pillow has to decode it: other colours, damage of any kind, or no simplejpeg.
    """
    if simplejpeg is None or (mode, channels) not in COLOURS:
        return None
    target, stored = COLOURS[mode, channels]
    width, height = (-(-side // divisor) for side in size)
    try:
        header = simplejpeg.decode_jpeg_header(content)
        if header[:2] != size[::-1] or header[2] not in stored:
            return None
        pixels = simplejpeg.decode_jpeg(content, target, min_height=height, min_width=width, min_factor=divisor)
    except ValueError:  # also for what the library could mend
        return None
    return pixels if pixels.shape == (height, width, channels) else None
