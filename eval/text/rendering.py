"""Renders text: each image is a function of the seed and of its script, size, background, content and number alone."""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latent_ae.data.datasets import open_images
from latent_ae.data.images import decode
from latent_ae.data.rng import rendering_generator
from latent_ae.data.settings import DataSettings
from latent_ae.data.sources import StreamSource
from latent_ae_eval.text.fonts import Font
from latent_ae_eval.text.scripts import SCRIPTS, Name
from latent_ae_eval.text.settings import LINE_HEIGHT, MARGIN_PX, Background, Content

PHOTO_CONTRAST = 0.25
"""Contrast that a photograph keeps behind text: at 0.4, tesseract reads a fifth of the letters wrong or not at all."""


class Sample(NamedTuple):
    """What stands in an image."""

    script: Name
    size_px: int
    """Size of the font: an em, about twice the height of a lower-case x."""
    background: Background
    content: Content
    repeat: int

    @property
    def number(self) -> int:
        """A number that no other sample has, whatever else is rendered."""
        script, ground = list(SCRIPTS).index(self.script), get_args(Background).index(self.background)
        content = get_args(Content).index(self.content)
        return int(f"{self.repeat}{script:02}{ground}{content}{self.size_px:03}")


class Rendered(NamedTuple):
    """An image of text."""

    picture: Image.Image
    """RGB."""
    text: str
    """What stands in it, its lines separated by line breaks."""
    font: str
    """File name of the font."""


@dataclass(frozen=True)
class RenderedText:
    """Images of rendered text by number, as a source of images (`StoredImages`)."""

    samples: Sequence[Sample]
    fonts: Mapping[Name, Sequence[Font]]
    """The fonts of each script."""
    seed: int
    side_px: int
    """Side of the images, px."""
    lines: int
    """Largest number of lines."""

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        script, size_px, background, content, repeat = self.samples[i]
        return f"{script} {size_px} px, {background}, {content} {repeat}"

    def read(self, i: int) -> bytes:
        stream = io.BytesIO()
        self.render(i).picture.save(stream, "PNG", compress_level=1)
        return stream.getvalue()

    def keys(self) -> np.ndarray:
        return np.array([sample.number for sample in self.samples], dtype=np.uint64)

    def subset(self, rows: np.ndarray) -> "RenderedText":
        return replace(self, samples=[self.samples[row] for row in rows])

    def facts(self, i: int) -> dict[str, Any]:
        """Return what stands in image i and how, JSON-ready."""
        rendered = self.render(i)
        return self.samples[i]._asdict() | {"font": rendered.font, "text": rendered.text}

    def render(self, i: int) -> Rendered:
        """Draw image i."""
        sample = self.samples[i]
        random = rendering_generator(self.seed, sample.number)
        script, fonts = SCRIPTS[sample.script], self.fonts[sample.script]
        font = fonts[_drawn(random, len(fonts))]
        face = _face(str(font.path), font.face, sample.size_px, script.right_to_left)
        width, step = self.side_px - 2 * MARGIN_PX, round(LINE_HEIGHT * sample.size_px)
        count = max(1, min(self.lines, (self.side_px - 2 * MARGIN_PX) // step))
        lines = [_line(_tokens(random, sample), script.between, face, width) for _ in range(count)]
        picture, ink = _ground(random, sample.background, self.side_px)
        pen = ImageDraw.Draw(picture)
        top = MARGIN_PX + _drawn(random, self.side_px - 2 * MARGIN_PX - count * step + 1)
        x, anchor = (self.side_px - MARGIN_PX, "ra") if script.right_to_left else (MARGIN_PX, "la")
        for number, line in enumerate(lines):
            pen.text((x, top + number * step), line, ink, face, anchor)
        return Rendered(picture, "\n".join(lines), font.path.name)


def _tokens(random: np.random.Generator, sample: Sample) -> Iterator[str]:
    """Yield words of the script, or random strings of three to seven letters or digits."""
    script = SCRIPTS[sample.script]
    words = script.words.split()
    while True:
        if sample.content == "words":
            yield words[_drawn(random, len(words))]
        else:
            of = script.digits if script.digits and random.random() < 0.25 else script.letters
            yield "".join(of[_drawn(random, len(of))] for _ in range(3 + _drawn(random, 5)))


def _line(tokens: Iterator[str], between: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    """Return as many tokens as fit into a width, px; a first token that does not fit is cut off."""
    line = next(tokens)
    while len(line) > 1 and face.getlength(line) > width:
        line = line[:-1]
    for token in tokens:
        longer = line + between + token
        if face.getlength(longer) > width:
            return line
        line = longer
    raise AssertionError("there is always another token")


def _ground(
    random: np.random.Generator, background: Background, side_px: int
) -> tuple[Image.Image, tuple[int, int, int]]:
    """Return a background and a colour that is legible on it."""
    dark = _colour(random, 0, 64)
    light = _colour(random, 192, 64)
    if background == "light":
        return Image.new("RGB", (side_px, side_px), light), dark
    if background == "dark":
        return Image.new("RGB", (side_px, side_px), dark), light
    photos = _photographs(side_px)
    photo = photos[_drawn(random, len(photos))]
    left, top = _drawn(random, photo.width - side_px + 1), _drawn(random, photo.height - side_px + 1)
    piece = photo.crop((left, top, left + side_px, top + side_px))
    paper, ink = ((255, 255, 255), dark) if random.random() < 0.5 else ((0, 0, 0), light)
    return Image.blend(Image.new("RGB", piece.size, paper), piece, PHOTO_CONTRAST), ink


def _colour(random: np.random.Generator, least: int, count: int) -> tuple[int, int, int]:
    return least + _drawn(random, count), least + _drawn(random, count), least + _drawn(random, count)


@lru_cache(maxsize=1)
def _photographs(side_px: int) -> list[Image.Image]:
    """Return the photographs that come with the project, enlarged to at least `side_px`."""
    settings = DataSettings(source="photos")
    source = open_images(settings, "all")
    assert not isinstance(source, StreamSource), "photos are files"
    pictures = []
    for i in range(len(source)):
        array = decode(source.read(i), channels=3, background=settings.background, max_pixels=settings.max_pixels)
        picture = Image.fromarray(array)
        scale = max(1.0, side_px / min(picture.size))
        pictures.append(picture.resize((round(scale * picture.width), round(scale * picture.height))))
    return pictures


@lru_cache(maxsize=64)
def _face(path: str, face: int, size_px: int, right_to_left: bool) -> ImageFont.FreeTypeFont:
    # the basic layout is the same on every machine, and joins no Arabic letters
    engine = ImageFont.Layout.RAQM if right_to_left else ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size_px, face, layout_engine=engine)


def _drawn(random: np.random.Generator, count: int) -> int:
    """Return a whole number from 0 to below `count`."""
    return int(random.random() * count)


def samples_of(
    scripts: Sequence[Name],
    sizes_px: Sequence[int],
    backgrounds: Sequence[Background],
    contents: Sequence[Content],
    repeats: int,
) -> list[Sample]:
    """Return every combination, `repeats` times; those of one script and size are neighbours."""
    return [Sample(*one) for one in itertools.product(scripts, sizes_px, backgrounds, contents, range(repeats))]
