"""Settings of `latent-ae encode`. This module imports little, so that a typo is refused at once."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from latent_ae.config import Positive, Problem
from latent_ae.data.settings import DataSettings
from latent_ae.inference import StageSettings

WAYS = {"batch_size", "num_workers", "device", "max_bad_fraction", "subfolder", "revision", "variant", "ema"}
"""Settings that change how the job runs or where the model is found, but not the stored latents."""


class EncodeSettings(StageSettings):
    """Which images are encoded, how they are framed and what is stored; docs/encode.md says more."""

    resolution: Positive = 256
    """Side of the centre crop, px."""
    resize_px: Positive | Literal["resolution"] | None = "resolution"
    """Shorter side to which an image is resized before the crop, px; `resolution` takes that value, null keeps the
    image's size."""
    resample: Literal["adm", "bicubic", "tensor", "linear"] = "adm"
    """Resampling method; docs/evaluation.md describes them."""
    flips: bool = True
    """Also encode each image mirrored left to right."""
    stored: Literal["fp16", "fp32"] = "fp16"
    """Type of the stored latents."""

    split: str = "train"
    """Split of the data, if it has splits."""
    part: Literal["all", "train", "held_out"] = "all"
    """Part of the data: the whole split, or the images that training with the same `split` and `eval_fraction` trains
    on or holds out."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the data that training holds out if there is no validation or test split."""
    label_column: str | None = "auto"
    """Column of the classes: auto takes `label` or `cls`, or the names of files' folders; null stores no classes."""
    shard_size: Positive = 512
    """Images per file; a process encodes one file at a time, and a kill loses at most one per process."""
    batch_size: Positive = 16
    """Largest number of images at a time on each device (smaller for large images on a CPU)."""

    def problems(self) -> Iterator[Problem]:
        if isinstance(self.resize_px, int) and self.resize_px < self.resolution:
            yield Problem("resize_px", f"{self.resize_px} is smaller than resolution {self.resolution}")

    def framing(self) -> dict[str, Any]:
        """Return how an image becomes a square, JSON-ready: `resize_px`, `crop_px` and `resample`."""
        resize_px = self.resolution if self.resize_px == "resolution" else self.resize_px
        return {"resize_px": resize_px, "crop_px": self.resolution, "resample": self.resample}

    def contents(self) -> dict[str, Any]:
        """Return all settings that change the stored latents, JSON-ready."""
        return self.model_dump(mode="json", exclude=WAYS)

    def data(self, source: str) -> DataSettings:
        """Return the data settings that open `source`."""
        return self._data(source=source, split=self.split, eval_fraction=self.eval_fraction)
