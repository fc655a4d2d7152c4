"""Reads the text in images with tesseract, and compares what was read."""

import os
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

import numpy as np
from PIL import Image

from latent_ae.config import UserError
from latent_ae.files import writing

ENLARGED = 3
"""Factor by which images are enlarged first: tesseract expects letters of 20 px or more."""
LAYOUT = "--psm 6"
"""Takes an image for one block of text; the detection of columns would find none in a small crop."""


class Reader(Protocol):
    """An OCR engine."""

    languages: frozenset[str]
    """Names of the languages that it can read."""

    def read(self, pixels: np.ndarray, language: str) -> str:
        """Return the text in an image, (H, W, C) uint8 with C of 1 or 3. Several languages are joined by a plus."""

    def describe(self) -> dict[str, Any]:
        """Return what readings depend on, JSON-ready."""


class Tesseract:
    """Tesseract, called through pytesseract, once for each image.

    Raises:
        UserError: If the program or the package is missing.
    """

    def __init__(self) -> None:
        try:
            import pytesseract
        except ImportError:
            raise UserError(
                "eval text needs pytesseract: pip install '.[text]' in the checkout, and the program tesseract, "
                "for example: apt-get install tesseract-ocr tesseract-ocr-rus"
            ) from None
        self._package = pytesseract
        try:
            self.version = str(pytesseract.get_tesseract_version())
            self.languages = frozenset(pytesseract.get_languages())
        except (pytesseract.TesseractNotFoundError, SystemExit):  # the package exits if there is no version to read
            raise UserError(
                "eval text reads with the program tesseract, which is not on the PATH; install it with the languages "
                "to read, for example: apt-get install tesseract-ocr tesseract-ocr-rus"
            ) from None

    def read(self, pixels: np.ndarray, language: str) -> str:
        """Return the text in an image, (H, W, C) uint8. Raises UserError if tesseract fails."""
        picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        size = ENLARGED * picture.width, ENLARGED * picture.height
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        try:
            with writing(Path(gettempdir())):  # the package hands the image over in a file
                return str(self._package.image_to_string(picture, lang=language, config=LAYOUT))
        except self._package.TesseractError as error:
            raise UserError(f"tesseract cannot read {language}: {' '.join(str(error).split())[:300]}") from error

    def describe(self) -> dict[str, Any]:
        """Return what readings depend on, JSON-ready."""
        return {"name": "tesseract", "version": self.version, "enlarged": ENLARGED, "options": LAYOUT}


def missing_language(language: str) -> str:
    """Return in words that a language is missing and how to get it."""
    package = f"tesseract-ocr-{language.replace('_', '-')}"
    return f"tesseract lacks the language {language} (on Debian: apt-get install {package})"


@contextmanager
def reading_pool(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of `count` threads that call tesseract, each of whose processes takes one core."""
    name = "OMP_THREAD_LIMIT"  # several threads make tesseract slower on small images, and many processes fill the CPU
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def comparable(text: str) -> str:
    """Return text in the normal form NFKC, without white space and characters that nobody sees.

    Where a line ends, and how wide a gap must be to be a space, is the engine's choice and not in the pixels.
    """
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] not in "ZC")


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: how many insertions, deletions and substitutions turn a into b."""
    others = np.array([ord(letter) for letter in b])
    places = np.arange(len(b) + 1)
    row = places
    for count, letter in enumerate(a, start=1):
        kept = np.minimum(row[1:] + 1, row[:-1] + (others != ord(letter)))
        # each insertion adds one, so the least over all places to the left is a running minimum
        row = np.minimum.accumulate(np.concatenate([[count], kept]) - places) + places
    return int(row[-1])


def ned(a: str, b: str) -> float:
    """Return the normalised edit distance as OmniDoc-TokenBench defines it (arXiv:2605.13565): 1 is equal, 0 all wrong.

    1 - d(a, b) / max(|a|, |b|) with the Levenshtein distance d, of texts as `comparable` returns them.
    """
    a, b = comparable(a), comparable(b)
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)
