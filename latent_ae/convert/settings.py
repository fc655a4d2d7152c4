"""Settings of `latent-ae convert`; light, so that a typo costs no waiting."""

from typing import Literal

from latent_ae.config import Byte, NonNegative, Positive, Settings
from latent_ae.data.settings import DataSettings

MEASURING = (
    *("resolution", "limit", "seed", "batch_size", "split"),
    *("image_column", "background", "num_workers", "device"),
)
"""Settings that go with --measure."""


class ConvertSettings(Settings):
    """What no shape tells of a first stage, and how latents are measured; docs/convert.md says more."""

    scaling_factor: float | None = None
    """By which a diffusion model multiplies latents: (z - shift_factor) * scaling_factor."""
    shift_factor: float | None = None
    """What is subtracted before; 0 where there is none."""
    latents_mean: tuple[float, ...] | None = None
    """Mean of each channel, in place of the two above."""
    latents_std: tuple[float, ...] | None = None
    """Standard deviation of each channel, beside latents_mean."""
    sample_size: Positive | None = None
    """Side of the images, px, from which diffusers derives its tiles; null takes 256."""
    norm_num_groups: Positive | None = None
    """Groups of the group norms; null takes 32, as all published models have."""
    decoder_num_attention_heads: Positive | None = None
    """Heads of an RAE's decoder; null takes those of its published widths."""
    ema: bool | None = None
    """Averaged weights (true) or raw ones (false) where a file has both; null takes what the original's code loads."""
    prefix: str | None = None
    """What stands before the names of the first stage, where a file holds several."""

    resolution: Positive = 256
    """Measuring: side of the square that images are resized and cut to, px."""
    limit: Positive = 1000
    """Measuring: at most so many images, spread over the data."""
    seed: NonNegative = 0
    """Measuring: seed of the choice and of the posterior's samples."""
    batch_size: Positive = 8
    """Measuring: images at a time."""
    split: str = "train"
    """Measuring: split of the data, where it has splits."""
    image_column: str = "image"
    """Measuring: column of images in tables and hub datasets."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Measuring: colour put behind transparent pixels."""
    num_workers: NonNegative = 2
    """Measuring: processes that decode images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Measuring: where the model computes; auto takes a GPU where there is one."""

    def data(self, source: str) -> DataSettings:
        """What opens images of `source`."""
        return DataSettings(
            source=source,
            split=self.split,
            image_column=self.image_column,
            background=self.background,
            num_workers=self.num_workers,
        )
