"""Settings of the evaluations."""

from collections.abc import Iterator
from typing import Literal

from latent_ae.config import Byte, DataSettings, Fraction, NonNegative, Positive, Problem, Settings


class ReconSettings(Settings):
    """How reconstructions are measured; docs/evaluation.md says what each choice means for the figures."""

    split: str | None = None
    """Of the data; null takes its validation or test split, and all of it where it has neither."""
    image_column: str = "image"
    """Of tables and hub datasets."""
    data_revision: str | None = None
    """Commit or tag of a hub dataset."""
    streaming: bool = False
    """Read a hub dataset or tables from their start, without storing them first."""
    limit: Positive | None = None
    """Only so many images, from the first on."""
    resize_px: Positive | None = None
    """Shorter side that an image is resized to before the crop, px; null keeps its size."""
    crop_px: Positive | None = 256
    """Side of the square cut from the middle, px; null takes whole images, cut to a multiple of the factor."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Colour put behind transparent pixels."""
    max_pixels: Positive = 200_000_000
    """Larger images are skipped."""
    max_bad_fraction: Fraction = 0.01
    """More unreadable images than this are an error."""
    num_workers: NonNegative = 2

    subfolder: str | None = None
    """Of the model; a pipeline's `vae` is found without it."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    posterior: Literal["mode", "sample"] = "mode"
    """What is decoded: the posterior's mean, or a sample of it that depends on `seed` and the image's number only."""
    seed: NonNegative = 0
    batch_size: Positive = 8
    """Images at a time on each device; the results do not depend on it, up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    lpips: tuple[Literal["vgg", "alex"], ...] = ("vgg", "alex")
    """Networks of LPIPS; [] leaves it out and needs no weights."""
    num_pictures: NonNegative = 8
    """Images in the picture of pairs."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            yield Problem("resize_px", f"{self.resize_px} is smaller than crop_px {self.crop_px}; raise it or set null")

    def data(self, source: str) -> DataSettings:
        """What opens `source` as held-out images."""
        return DataSettings(
            eval_source=source,
            eval_split=self.split,
            image_column=self.image_column,
            revision=self.data_revision,
            streaming=self.streaming,
            resize_px=self.resize_px,
            background=self.background,
            max_pixels=self.max_pixels,
            num_workers=self.num_workers,
        )
