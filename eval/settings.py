"""Settings that evaluations share."""

from collections.abc import Iterator
from typing import Literal

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae.data.settings import DataSettings
from latent_ae.inference import StageSettings

Net = Literal["vgg", "alex"]
"""Networks of LPIPS."""


class QuestionSettings(StageSettings):
    """What every question to a first stage about held-out images needs to know."""

    split: str | None = None
    """Split of the data; null takes its validation or test split, and all of it where it has neither."""
    limit: Positive | None = None
    """Only so many images, spread over all of them by `seed`; of a stream the first ones."""
    seed: NonNegative = 0
    """Seed of whatever is drawn: the posterior's samples, choices of images."""

    def data(self, source: str) -> DataSettings:
        """What opens `source` as held-out images."""
        return self._data(eval_source=source, eval_split=self.split)


class EvalSettings(QuestionSettings):
    """Settings of the measurements whose images may come as a stream."""

    streaming: bool = False
    """Read a hub dataset or tables from their start, without storing them first."""

    def data(self, source: str) -> DataSettings:
        return super().data(source).model_copy(update={"streaming": self.streaming})


class JobSettings(QuestionSettings):
    """What all of them read: images, the model, and where they meet."""

    resize_px: Positive | None = None
    """Shorter side that images are resized to; null keeps their size."""
    crop_px: Positive | None = None
    """Side of the square cut from the middle; null keeps the largest sides that the model's factor divides."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            yield Problem("resize_px", f"{self.resize_px} is smaller than crop_px {self.crop_px}; change one")
