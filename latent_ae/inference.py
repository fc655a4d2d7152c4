"""Settings of all commands that run a finished first stage on images. It imports little, so that typos show at once."""

from typing import Any, Literal

from latent_ae.config import Byte, Fraction, NonNegative, Positive, Settings
from latent_ae.data.settings import DataSettings


class StageSettings(Settings):
    """How images are read, and where the model is loaded from and how it is run."""

    image_column: str = "image"
    """Column of images in tables and hub datasets."""
    data_revision: str | None = None
    """Commit or tag of a hub dataset."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour put behind transparent pixels."""
    max_pixels: Positive = 200_000_000
    """Larger images are skipped."""
    max_bad_fraction: Fraction = 0.01
    """Largest accepted fraction of unreadable images."""
    num_workers: NonNegative = 2
    """Worker processes that decode images, for each process."""
    subfolder: str | None = None
    """Subfolder of the model; a pipeline's first stage is found without it."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    variant: str | None = None
    """Variant of the model's weight files: fp16, non_ema, ..."""
    ema: bool | None = None
    """Averaged (true) or raw weights (false) if the model has both; null takes those that are loaded by default."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which the model runs; results are computed from its outputs in float32 or more."""
    batch_size: Positive = 8
    """Largest number of images at a time on each device (smaller for large images on a CPU, which is faster); results
    do not depend on it, up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""

    @property
    def place(self) -> dict[str, Any]:
        """The settings that choose a model's weights, as arguments of `models.loading.load`."""
        return {key: getattr(self, key) for key in ("subfolder", "revision", "variant", "ema")}

    def _data(self, **where: Any) -> DataSettings:
        """Return the training section `data` that opens images as these settings say."""
        return DataSettings(
            image_column=self.image_column,
            revision=self.data_revision,
            background=self.background,
            max_pixels=self.max_pixels,
            num_workers=self.num_workers,
            **where,
        )
