"""Settings of `latent-ae eval factors`."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from latent_ae.config import NonNegative, Problem
from latent_ae_eval.settings import JobSettings


class FactorsSettings(JobSettings):
    """Which latent dimension stands for which known factor."""

    factors: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Columns of integers or classes; null takes all that the table has."""
    traversed: NonNegative | None = None
    """Number of the image whose latent's dimensions are moved in the picture, counted from 0 over those that `limit`
    chooses; null: the middle one."""
    steps: Annotated[int, Field(ge=3)] = 9
    """Points of each row of that picture."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.factors is not None and len(set(self.factors)) < len(self.factors):
            yield Problem("factors", "names one twice")
