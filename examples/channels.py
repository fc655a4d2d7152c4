"""Makes two small sets of images that are not RGB (docs/channels.md): python examples/channels.py OUT [NUMBER [SEED]]

OUT/rgba holds pictures with an alpha channel (PNG): soft-edged shapes, some of them translucent, over transparent.
OUT/bands holds arrays of five spectral bands (.npy, 16 bits): fields, bare soil and water as a satellite sees them in
blue, green, red, red edge and near infrared.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE_PX = 64
SPECTRA = np.array(
    [
        (0.03, 0.07, 0.04, 0.28, 0.45),  # vegetation reflects near infrared
        (0.10, 0.15, 0.20, 0.25, 0.30),  # soil
        (0.06, 0.05, 0.03, 0.02, 0.01),  # water absorbs it
    ]
)
"""Reflectance, 0 to 1, of each material in each band."""


def rgba_image(rng: np.random.Generator) -> np.ndarray:
    """Return shapes over transparent, (SIDE_PX, SIDE_PX, 4) uint8 with straight alpha; invisible pixels are black."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX] / SIDE_PX
    colour, alpha = np.zeros((SIDE_PX, SIDE_PX, 3)), np.zeros((SIDE_PX, SIDE_PX, 1))
    for _ in range(rng.integers(2, 5)):
        across, down = x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8)
        angle, width, height = rng.uniform(0, np.pi), *rng.uniform(0.1, 0.35, 2)
        u, v = across * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - across * np.sin(angle)
        distance = np.hypot(u / width, v / height)
        shape = rng.uniform(0.4, 1.0) * np.clip((1 - distance) / rng.uniform(0.05, 0.5) + 0.5, 0, 1)[..., None]
        stripes = 0.5 + 0.5 * np.sin(rng.uniform(10, 40) * u)[..., None]
        paint = stripes * rng.uniform(0, 1, 3) + (1 - stripes) * rng.uniform(0, 1, 3)
        whole = shape + alpha * (1 - shape)
        colour = (paint * shape + colour * alpha * (1 - shape)) / np.maximum(whole, 1e-6)  # over (Porter and Duff 1984)
        alpha = whole
    pixels = np.round(255 * np.concatenate([colour, alpha], axis=2)).astype(np.uint8)
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def bands_image(rng: np.random.Generator) -> np.ndarray:
    """Return five bands of a landscape, (SIDE_PX, SIDE_PX, 5) uint16; 65535 is a reflectance of 0.5."""
    smooth = [Image.fromarray(rng.normal(size=(6, 6)).astype(np.float32)) for _ in range(3)]
    fields = np.stack([np.asarray(one.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)) for one in smooth], axis=2)
    shares = np.exp(6 * fields)  # mostly one material at each place
    light = 1 + 0.03 * rng.normal(size=(SIDE_PX, SIDE_PX, 1))
    reflectance = light * (shares / shares.sum(axis=2, keepdims=True)) @ SPECTRA
    return np.round(65535 * np.clip(2 * reflectance, 0, 1)).astype(np.uint16)


if __name__ == "__main__":
    out, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200
    rng = np.random.default_rng(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    for name in ("rgba", "bands"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for index in range(number):
        Image.fromarray(rgba_image(rng)).save(out / "rgba" / f"{index:03}.png")
        np.save(out / "bands" / f"{index:03}.npy", bands_image(rng))
