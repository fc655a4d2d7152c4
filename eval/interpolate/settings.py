"""Settings of `latent-ae eval interpolate`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae_eval.settings import JobSettings


class InterpolateSettings(JobSettings):
    """Paths between images in latent space."""

    images: Annotated[tuple[NonNegative | str, ...], Field(min_length=2)] | None = None
    """Numbers (over all of the data, from 0) or file names of the images that the path visits; null takes `num_images`,
    spread over all."""
    num_images: Annotated[int, Field(ge=2)] = 4
    """Number of images that the path visits if `images` names none."""
    steps: Annotated[int, Field(ge=3)] = 9
    """Number of points of each path in the picture and in the measures, including both ends; it must be odd."""
    centre: Literal["channels", "none"] = "channels"
    """Centre of spherical interpolation: each channel's mean over the images, or the origin."""
    lpips: Literal["vgg", "alex"] | None = "alex"
    """Network of LPIPS for the perceptual length of a path; null leaves it out."""
    animation: Literal["webp", "gif"] | None = "webp"
    """Format of the animated path; null writes none."""
    frames: Positive = 16
    """Number of frames from one image to the next."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.steps % 2 == 0:
            yield Problem("steps", f"{self.steps} is even, so no point lies in the middle; use {self.steps + 1}")
        if self.images is not None and len(set(self.images)) < len(self.images):
            yield Problem("images", "has the same image twice; give each once")
        if self.limit is not None:
            yield Problem("limit", "a path visits num_images images, or those that images names; set one of these")
