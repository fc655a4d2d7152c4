"""Settings of every command that gives images to a finished first stage; light, so that a typo costs no waiting."""

from typing import Any, Literal

from latent_ae.config import Byte, Fraction, NonNegative, Positive, Settings
from latent_ae.data.settings import DataSettings


class StageSettings(Settings):
    """How images are read, and where the model is found and how it computes."""

    image_column: str = "image"
    """Column of images in tables and hub datasets."""
    data_revision: str | None = None
    """Commit or tag of a hub dataset."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour put behind transparent pixels."""
    max_pixels: Positive = 200_000_000
    """Larger images are skipped."""
    max_bad_fraction: Fraction = 0.01
    """More unreadable images than this are an error."""
    num_workers: NonNegative = 2
    """That decode images, for each process."""
    subfolder: str | None = None
    """Subfolder of the model; a pipeline's first stage is found without it."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    variant: str | None = None
    """Variant of the model's weight files: fp16, non_ema, ..."""
    ema: bool | None = None
    """Averaged weights (true) or raw ones (false) where the model has both; null takes what it loads by default."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """That the model computes in; what is measured or stored of it is computed in float32 or more."""
    batch_size: Positive = 8
    """At most so many images at a time on each device (on a CPU fewer large ones, which is faster); the results do not
    depend on it, up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes; auto takes a GPU where there is one."""

    @property
    def place(self) -> dict[str, Any]:
        """Which weights of a model are meant, as `models.loading.load` takes it."""
        return {key: getattr(self, key) for key in ("subfolder", "revision", "variant", "ema")}

    def _data(self, **where: Any) -> DataSettings:
        """What opens images, with these settings' names in training."""
        return DataSettings(
            image_column=self.image_column,
            revision=self.data_revision,
            background=self.background,
            max_pixels=self.max_pixels,
            num_workers=self.num_workers,
            **where,
        )
