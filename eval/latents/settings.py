"""Settings of `latent-ae eval latents`."""

from collections.abc import Iterator

from latent_ae.config import NonNegative, Positive, Problem, Weight
from latent_ae_eval.settings import EvalSettings, Net


class LatentsSettings(EvalSettings):
    """How latents are measured; docs/latents.md says what the figures mean."""

    resize_px: Positive | None = 256
    """Shorter side that images are resized to; null keeps their size."""
    crop_px: Positive | None = 256
    """Side of the square cut from the middle; null takes the largest sides that twice the model's factor divides."""
    num_decoded: NonNegative = 64
    """So many of the images, spread over them, are also decoded: scaled, rotated and noised in latent space."""
    noise: tuple[Weight, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    """Standard deviations of the noise added to latents, in the latents' own standard deviation."""
    lpips: Net | None = "vgg"
    """Network of LPIPS of noised latents' images, where its weights can be had; null leaves it out."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            message = f"{self.resize_px} is smaller than crop_px {self.crop_px}; change one or set it to null"
            yield Problem("resize_px", message)
        if len(set(self.noise)) < len(self.noise):
            yield Problem("noise", "names one twice")
