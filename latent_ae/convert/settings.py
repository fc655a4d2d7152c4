"""Settings of `latent-ae convert`; imports nothing heavy, so that typos are reported at once."""

from typing import Literal

from latent_ae.config import Byte, NonNegative, Positive, Settings
from latent_ae.data.settings import DataSettings

MEASURING = (
    *("resolution", "limit", "seed", "batch_size", "split"),
    *("image_column", "background", "num_workers", "device"),
)
"""Settings that only --measure uses."""


class ConvertSettings(Settings):
    """The facts about a first stage that no shape tells, and how latents are measured; docs/convert.md says more."""

    scaling_factor: float | None = None
    """Factor of latents in a diffusion model: (z - shift_factor) * scaling_factor."""
    shift_factor: float | None = None
    """Subtracted from latents before they are multiplied; 0 if the model has no shift."""
    latents_mean: tuple[float, ...] | None = None
    """Mean of each channel, instead of scaling_factor and shift_factor."""
    latents_std: tuple[float, ...] | None = None
    """Standard deviation of each channel, together with latents_mean."""
    sample_size: Positive | None = None
    """Side of the images, px, from which diffusers derives its tiles; null takes 256."""
    norm_num_groups: Positive | None = None
    """Groups of the group norms; null takes 32, as all published models have."""
    decoder_num_attention_heads: Positive | None = None
    """Attention heads of an RAE's decoder; null takes those of the published decoder of its width."""
    ema: bool | None = None
    """Averaged (true) or raw weights (false) if a file has both; null takes those that the original code loads."""
    prefix: str | None = None
    """Prefix of the tensors' names, which chooses one of several first stages in a file."""

    resolution: Positive = 256
    """Measuring: side of the square that images are resized and cut to, px."""
    limit: Positive = 1000
    """Measuring: largest number of images, spread over the data."""
    seed: NonNegative = 0
    """Measuring: seed of the choice and of the posterior's samples."""
    batch_size: Positive = 8
    """Measuring: images at a time."""
    split: str = "train"
    """Measuring: split of the data, if it has splits."""
    image_column: str = "image"
    """Measuring: column of images in tables and hub datasets."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Measuring: colour behind transparent pixels."""
    num_workers: NonNegative = 2
    """Measuring: worker processes that decode images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Measuring: where the model computes; auto takes a GPU if there is one."""

    def data(self, source: str) -> DataSettings:
        """Return the settings that open the images of `source`."""
        return DataSettings(
            source=source,
            split=self.split,
            image_column=self.image_column,
            background=self.background,
            num_workers=self.num_workers,
        )
