"""Settings that several evaluations share."""

from collections.abc import Iterator
from typing import Literal

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae.data.settings import DataSettings
from latent_ae.inference import StageSettings

Net = Literal["vgg", "alex"]
"""Networks of LPIPS."""


class QuestionSettings(StageSettings):
    """Settings of all evaluations on held-out images."""

    split: str | None = None
    """Split of the data; null takes its validation or test split, or all images if it has neither."""
    limit: Positive | None = None
    """Largest number of images, spread over all of them by `seed`; of a stream the first ones."""
    seed: NonNegative = 0
    """Seed of everything random: samples of the posterior, choices of images."""

    def data(self, source: str) -> DataSettings:
        """Return the training section `data` that opens `source` as held-out images."""
        return self._data(eval_source=source, eval_split=self.split)


class EvalSettings(QuestionSettings):
    """Settings of evaluations whose images may come as a stream."""

    streaming: bool = False
    """Read a hub dataset or tables from start to end, without storing them first."""

    def data(self, source: str) -> DataSettings:
        return super().data(source).model_copy(update={"streaming": self.streaming})


class JobSettings(QuestionSettings):
    """Settings of evaluations with resized and cropped images."""

    resize_px: Positive | None = None
    """Shorter side to which images are resized, px; null keeps their size."""
    crop_px: Positive | None = None
    """Side of the centre crop, px; null keeps the largest sides that are multiples of the model's factor."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            yield Problem("resize_px", f"{self.resize_px} is smaller than crop_px {self.crop_px}; change one")
