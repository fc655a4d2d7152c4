"""Settings of `latent-ae eval ifid`."""

from collections.abc import Iterator
from typing import Literal

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae_eval.settings import FeatureSettings, JobSettings


class IfidSettings(FeatureSettings, JobSettings):
    """How neighbours are found and midpoints are measured; docs/diffusion.md says more."""

    neighbours_from: str | None = None
    """Images among whose latents neighbours are found, such as the training set; null takes DATA itself, where an image
    is not its own neighbour."""
    neighbours_split: str | None = None
    """Split of `neighbours_from`; null takes its validation or test split, or all images if it has neither."""
    neighbours: Positive = 10
    """Number of nearest latents, by cosine, of which one is drawn."""
    latents: Literal["sample", "mode"] = "sample"
    """A sample of the posterior, or its mean; a model without a posterior has one latent."""
    frechet: tuple[Literal["inception", "vgg16", "dinov2", "clip"], ...] = ("inception", "vgg16")
    """Features whose Fréchet distance is measured; only Inception's is called iFID; dinov2 and clip need a folder."""
    num_pictures: NonNegative = 3
    """Number of nearest and of farthest pairs in the report."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.frechet:
            yield Problem("frechet", "nothing to compare images by: give [vgg16], [inception] or both")
        yield from self.problems_of_features(self.frechet)
        if len(set(self.frechet)) < len(self.frechet):
            yield Problem("frechet", "has the same value twice; give each once")
        if self.neighbours_split is not None and self.neighbours_from is None:
            yield Problem("neighbours_split", "there are no other images to take a split of; set neighbours_from")
