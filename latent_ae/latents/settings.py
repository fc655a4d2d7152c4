"""Settings of `latent-ae encode`; light, so that a typo costs no waiting."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from latent_ae.config import Positive, Problem
from latent_ae.data.settings import DataSettings
from latent_ae.inference import StageSettings

WAYS = {"batch_size", "num_workers", "device", "max_bad_fraction", "subfolder", "revision", "variant", "ema"}
"""Settings that change how it goes, or where the model is found, but not what is stored of a model."""


class EncodeSettings(StageSettings):
    """What of which images is stored; docs/encode.md says more."""

    resolution: Positive = 256
    """Side of the square cut from the middle, px."""
    resize_px: Positive | Literal["resolution"] | None = "resolution"
    """Shorter side that an image is resized to before; `resolution` takes that, null keeps the image's size."""
    resample: Literal["adm", "bicubic", "tensor", "linear"] = "adm"
    """How it is resized, see docs/evaluation.md."""
    flips: bool = True
    """Also encode each image mirrored left to right."""
    stored: Literal["fp16", "fp32"] = "fp16"
    """Type of the stored numbers."""

    split: str = "train"
    """Split of the data, where it has splits."""
    part: Literal["all", "train", "held_out"] = "all"
    """Part of the data: the whole split, or what training with the same `split` and `eval_fraction` sees or holds
    out."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Part of the data that training holds out where it has no validation or test split."""
    label_column: str | None = "auto"
    """Column of classes: `auto` takes `label`, or the names of the folders that image files lie in; null takes none."""
    shard_size: Positive = 512
    """Images per file, which are also what a process takes at a time and what a kill loses at most."""
    batch_size: Positive = 16
    """At most so many images at a time on each device (on a CPU fewer large ones)."""

    def problems(self) -> Iterator[Problem]:
        if isinstance(self.resize_px, int) and self.resize_px < self.resolution:
            yield Problem("resize_px", f"{self.resize_px} is smaller than resolution {self.resolution}")

    def framing(self) -> dict[str, Any]:
        """How an image becomes a square, JSON-ready."""
        resize_px = self.resolution if self.resize_px == "resolution" else self.resize_px
        return {"resize_px": resize_px, "crop_px": self.resolution, "resample": self.resample}

    def contents(self) -> dict[str, Any]:
        """All that changes what is stored, JSON-ready."""
        return self.model_dump(mode="json", exclude=WAYS)

    def data(self, source: str) -> DataSettings:
        """What opens `source`."""
        return self._data(source=source, split=self.split, eval_fraction=self.eval_fraction)
