"""Settings of `latent-ae eval factors`."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from latent_ae.config import NonNegative, Problem
from latent_ae_eval.settings import JobSettings


class FactorsSettings(JobSettings):
    """Which latent dimensions represent which known factors."""

    factors: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Columns of integers or classes; null takes all of them."""
    dci: bool | None = None
    """Measure disentanglement, completeness and informativeness; null does so if scikit-learn is installed and it takes
    minutes at most."""
    traversed: NonNegative | None = None
    """Number of the image whose latent's dimensions are moved in the picture, counted from 0 over the images that
    `limit` chooses; null takes the middle one."""
    steps: Annotated[int, Field(ge=3)] = 9
    """Number of images in each row of that picture."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.factors is not None and len(set(self.factors)) < len(self.factors):
            yield Problem("factors", "has the same value twice; give each once")
