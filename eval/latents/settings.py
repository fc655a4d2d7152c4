"""Settings of `latent-ae eval latents`."""

from collections.abc import Iterator

from latent_ae.config import NonNegative, Positive, Problem, Weight
from latent_ae_eval.settings import EvalSettings, Net


class LatentsSettings(EvalSettings):
    """How latents are measured; docs/latents.md explains the numbers."""

    resize_px: Positive | None = 256
    """Shorter side to which images are resized, px; null keeps their size."""
    crop_px: Positive | None = 256
    """Side of the centre crop, px; null takes the largest sides that are multiples of twice the model's factor."""
    num_decoded: NonNegative = 64
    """Number of images, spread over all, that are also decoded: scaled, rotated and noised in latent space."""
    noise: tuple[Weight, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    """Standard deviations of the noise added to latents, relative to that of the latents."""
    lpips: Net | None = "vgg"
    """Network of LPIPS for images of noised latents, if its weights are available; null leaves it out."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            message = f"{self.resize_px} is smaller than crop_px {self.crop_px}; change one or set it to null"
            yield Problem("resize_px", message)
        if len(set(self.noise)) < len(self.noise):
            yield Problem("noise", "has the same value twice; give each once")
