"""The section `data` of the training settings. This module imports little, so that a typo is refused at once."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from latent_ae.config import FREE, Byte, Fraction, NonNegative, Positive, Problem, Settings, looks_like_path

Relative = Annotated[float, Field(gt=0, le=1)]


class Bucket(Settings):
    """One size of training crops; in a recipe 256 (a square), [512, 384] (width, height), or its keys."""

    width: Positive
    """Width of the crops, px."""
    height: Positive
    """Height of the crops, px."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the steps, relative to the other buckets' weights."""

    @model_validator(mode="before")
    @classmethod
    def _a_side_or_both(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"width": value, "height": value}
        if isinstance(value, (list, tuple)) and len(value) == 2:
            return {"width": value[0], "height": value[1]}
        if not isinstance(value, (dict, Bucket)):
            raise ValueError("write 256 for a square, [512, 384] for width and height, or {width, height, weight}")
        return value

    @property
    def title(self) -> str:
        """The size in words."""
        return f"{self.width} x {self.height} px"


class DataSettings(Settings):
    """Where images come from and how a training sample is cut from them."""

    source: str = "photos"
    """`photos` (shipped with scikit-image), a folder, Parquet/Arrow files, or a hub id."""
    split: str = "train"
    """Split of the source, if it has splits."""
    eval_source: str | None = None
    """Held-out images; null holds out `eval_fraction` of the source."""
    eval_split: str | None = None
    """Split of eval_source, or else of the source, that is held out; null takes its validation or test split."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the source that is held out if there is no `eval_source`, validation split or test split."""
    image_column: str = "image"
    """Column of images in tables and hub datasets. If a table lacks the column `image` and has a single column of
    images, that one is taken."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    streaming: bool = False
    """Read tables or a hub dataset from start to end, without storing them first (docs/data.md)."""
    shuffle_buffer: Positive = 1000
    """Streaming only: images held in memory to shuffle from."""
    resolution: Positive = 256
    """Side of a training crop, px. With buckets, the side of held-out crops and of those whose latents are measured."""
    buckets: tuple[Bucket, ...] = ()
    """Several sizes of training crops: a list of 256 (a square), [512, 384] (width, height) or {width: 512, height:
    384, weight: 2}. All samples of a step have one size, and the sizes take turns by their weights (docs/data.md)."""
    scale: tuple[Relative, Relative] | None = None
    """Smallest and largest side of a crop in the image, relative to the largest crop that fits, as in [0.25, 1.0]; it
    is drawn for each sample, and the crop is resized to its size in px. null does not resize crops."""
    resize_px: Positive | None = None
    """Shorter side to which an image is resized before the crop, px; null crops from the image in its own size."""
    scaled_decoding: bool = False
    """Let the decoder of JPEG files do the halvings of resize_px, which is faster and changes pixels slightly. Only
    training crops are decoded so, held-out images never are (docs/data.md)."""
    flip: bool = True
    """Mirror half of the crops, at random."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour put behind transparent pixels."""
    num_workers: Annotated[NonNegative, FREE] = 2
    """Processes that decode images, for each training process; 0 decodes in the training process itself."""
    max_pixels: Positive = 200_000_000
    """Larger images are skipped before they are decoded."""
    max_bad_fraction: Annotated[Fraction, FREE] = 0.01
    """The run stops when more than this fraction of the images read was unreadable."""

    @property
    def crop_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of the training crops, px: those of the buckets, or the one size that there is."""
        return tuple((one.height, one.width) for one in self.buckets) or ((self.resolution, self.resolution),)

    @property
    def crops_title(self) -> str:
        """The sizes of the training crops in words."""
        return " and ".join(one.title for one in self.buckets) or f"{self.resolution} px"

    def problems(self) -> Iterator[Problem]:
        yield from self._crop_problems([self])
        yield from self._source_problems()

    def _crop_problems(self, sources: Sequence["DataSettings"]) -> Iterator[Problem]:
        """Yield problems of what all `sources` of a mixture share."""
        titles = [bucket.title for bucket in self.buckets]
        if twice := next((title for title in titles if titles.count(title) > 1), None):
            yield Problem("buckets", f"{twice} is given twice: give it once, with a weight")
        if self.scale is not None and self.scale[0] > self.scale[1]:
            yield Problem("scale", f"begins above its end: use [{self.scale[1]:g}, {self.scale[0]:g}]")
        if self.scaled_decoding and all(one.resize_px is None for one in sources):
            yield Problem("scaled_decoding", "speeds up data.resize_px, which is null: give that, or set this to false")

    def _source_problems(self) -> Iterator[Problem]:
        """Yield problems of what each source of a mixture may have of its own."""
        longest = max(map(max, self.crop_sizes))
        if self.resize_px is not None and self.resize_px < self.resolution:
            yield Problem(
                "resize_px",
                f"{self.resize_px} is smaller than data.resolution {self.resolution}; raise it or set null",
            )
        elif self.resize_px is not None and self.resize_px < longest:
            yield Problem(
                "resize_px",
                f"{self.resize_px} is smaller than {longest}, the longest side of data.buckets; raise it, or set null "
                "and give data.scale",
            )
        for key in ("source", "eval_source"):
            location = getattr(self, key)
            if location is not None and looks_like_path(location) and not Path(location).expanduser().exists():
                yield Problem(key, f"no such file or folder: {location} (from {Path.cwd()})")


class MixedSource(Settings):
    """One source of `data.mixture`. What is not given is that of the section `data`."""

    source: str
    """`photos`, a folder, Parquet/Arrow files, or a hub id."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the samples, relative to the other sources' weights; all sources have one, or none has."""
    repeats: Annotated[float, Field(gt=0)] = 1.0
    """How often each image is taken in an epoch of the mixture; without weights."""
    split: str = "train"
    """Split of the source, if it has splits."""
    eval_source: str | None = None
    """Held-out images; null holds out `eval_fraction` of the source."""
    eval_split: str | None = None
    """Split that is held out; null takes the validation or test split."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction that is held out if there is no `eval_source`, validation split or test split."""
    image_column: str = "image"
    """Column of images in tables and hub datasets."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    resize_px: Positive | None = None
    """Shorter side to which an image is resized before the crop, px; null crops from the image in its own size."""
    flip: bool = True
    """Mirror half of the crops, at random."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour put behind transparent pixels."""


OWN = tuple(name for name in MixedSource.model_fields if name in DataSettings.model_fields)
"""The settings that each source of a mixture may have of its own."""


class TrainingData(DataSettings):
    """The section `data` of the training settings."""

    mixture: tuple[MixedSource, ...] = ()
    """Several sources in place of `source`: a list of {source, weight or repeats, split, image_column, ...}, each with
    its own split, column and framing (docs/data.md)."""

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_given_is_that_of_the_section(cls, values: Any) -> Any:
        parts = values.get("mixture") if isinstance(values, dict) else None
        if not isinstance(parts, (list, tuple)):
            return values
        shared = {name: values[name] for name in OWN if name in values and name != "source"}
        return values | {"mixture": [shared | part if isinstance(part, dict) else part for part in parts]}

    @property
    def title(self) -> str:
        """What texts call the images."""
        return " + ".join(part.source for part in self.mixture) or self.source

    def sources(self) -> tuple[DataSettings, ...]:
        """Return the section as it holds for each source of the mixture."""
        shared = {name: getattr(self, name) for name in DataSettings.model_fields if name not in OWN}
        return tuple(DataSettings(**shared, **{name: getattr(part, name) for name in OWN}) for part in self.mixture)

    def problems(self) -> Iterator[Problem]:
        if not self.mixture:
            yield from super().problems()
            return
        if self.source != DataSettings().source:
            yield Problem("source", f"{self.source}: data.mixture names the sources; leave data.source out")
        yield from self._crop_problems(self.sources())
        if self.streaming:
            yield Problem("streaming", "a stream has no number for each image, which a mixture needs: set it to false")
        weighted = [part.weight is not None for part in self.mixture]
        for number, (part, one) in enumerate(zip(self.mixture, self.sources(), strict=True)):
            place = f"mixture[{number}]"
            if any(weighted) and part.weight is None:
                yield Problem(f"{place}.weight", f"{part.source} has none, and others have: give every source a weight")
            if part.weight is not None and part.repeats != MixedSource.model_fields["repeats"].default:
                yield Problem(f"{place}.repeats", f"{part.source} has a weight, too: give one of the two")
            for problem in one._source_problems():
                yield Problem(f"{place}.{problem.key}", problem.message)


class CheckSettings(DataSettings):
    """The settings of the section `data`, and the channels of the model's images."""

    channels: Positive = 3
    """Channels of the images that the model takes: model.in_channels in training."""


WORDS = {"source": "DATA", "eval_source": "DATA", "eval_split": "split"}


def without_section(text: str) -> str:
    """Return a message with training's keys `data.*` replaced by the words of commands that have no sections."""
    keys = "|".join(DataSettings.model_fields)
    return re.sub(rf"\bdata\.({keys})\b", lambda match: WORDS.get(match[1], match[1]), text)
