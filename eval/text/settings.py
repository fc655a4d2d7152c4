"""Settings of `latent-ae eval text`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae_eval.settings import JobSettings, Net
from latent_ae_eval.text.scripts import Name

Background = Literal["light", "dark", "photo"]
Content = Literal["words", "random"]
SIDE_PX = 256
MARGIN_PX = 8
"""Distance of the text from the sides: an OCR engine reads letters at a border badly."""
LINE_HEIGHT = 1.25
"""Distance of two lines as a multiple of the size."""
RENDERING = ("scripts", "sizes_px", "backgrounds", "contents", "repeats", "lines", "fonts")
READING = ("languages", "resize_px", "split")


class TextSettings(JobSettings):
    """What is rendered, and how it is read; docs/evaluation.md says more."""

    scripts: tuple[Name, ...] = ("latin", "cyrillic", "greek", "arabic", "chinese", "japanese")
    """Scripts of rendered text; one without a font or without a language of tesseract is left out with a note."""
    sizes_px: tuple[Annotated[int, Field(ge=4, le=999)], ...] = (8, 10, 12, 16, 24, 32)
    """Sizes of the font (an em, twice the height of a lower-case x), px."""
    backgrounds: tuple[Background, ...] = ("light", "dark", "photo")
    """Dark text on a light colour, light text on a dark one, or text on a photograph of low contrast."""
    contents: tuple[Content, ...] = ("words", "random")
    """Words, or random letters and digits, which neither a decoder nor an OCR engine can guess."""
    repeats: Positive = 2
    """Number of crops of each script, size, background and content."""
    lines: Positive = 4
    """Largest number of lines in a crop."""
    fonts: tuple[str, ...] = ()
    """Font files, of which each script takes those that have its letters; without any they are found."""
    languages: tuple[str, ...] = ("eng",)
    """Languages, as tesseract names them, in which the crops of DATA are read."""
    crop_px: Positive | None = None
    """Side of the square crop, px; null renders 256 px, and keeps the largest sides of an image of DATA that are
    multiples of the model's factor."""
    lpips: Net | None = "alex"
    """Network of LPIPS, if its weights are available; null leaves it out."""
    num_readers: Positive | None = None
    """Number of crops that each process reads at the same time; null takes its share of the CPU's cores."""
    num_pictures: NonNegative = 6
    """Number of crops in the report that lost most."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for key in ("scripts", "sizes_px", "backgrounds", "contents", "languages"):
            values = getattr(self, key)
            if not values:
                yield Problem(key, "is empty, so there is nothing to read; give at least one value or leave it out")
            if len(set(values)) < len(values):
                yield Problem(key, "has the same value twice; give each once")
        for name in self.fonts:
            if not Path(name).expanduser().is_file():
                yield Problem("fonts", f"no such file: {name} (from {Path.cwd()})")

    def too_large(self, side_px: int) -> Iterator[Problem]:
        """Yield the problem that letters do not fit into images of this side, if they do not."""
        most = int((side_px - 2 * MARGIN_PX) / LINE_HEIGHT)
        if max(self.sizes_px, default=0) > most:
            largest = max(self.sizes_px)
            yield Problem("sizes_px", f"{largest} px is too large for crops of {side_px} px; take {most} or less")

    def misplaced(self, has_data: bool) -> Iterator[Problem]:
        """Yield the settings of rendered text that were changed beside DATA, or those of DATA without it."""
        for key in RENDERING if has_data else READING:
            if getattr(self, key) != type(self).model_fields[key].default:
                wrong = "is about rendered text, and there is DATA" if has_data else "is about DATA, and there is none"
                yield Problem(key, f"{wrong}; leave out one of them")
