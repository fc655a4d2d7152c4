"""Settings of `latent-ae eval likelihood`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae_eval.settings import JobSettings


class LikelihoodSettings(JobSettings):
    """Bounds on the likelihood that a variational autoencoder gives to images."""

    likelihood: Literal["auto", "bernoulli", "gaussian", "logistic"] = "auto"
    """Likelihood of the pixels given the latent; auto: that of the training, and gaussian where the model does not
    say."""
    scale: Literal["auto", "fit"] | Annotated[float, Field(gt=0)] = "auto"
    """Standard deviation (gaussian) or scale (logistic), in [-1, 1] units; fit: the most likely one of a fifth of the
    images, which then do not count; auto: that of the training, and fit where the model does not say."""
    discretised: bool = True
    """gaussian: the probability of a pixel's level of 8 bits; false: the density, which training has as its loss."""
    samples: Positive = 64
    """Samples of each posterior; so many has the importance-weighted bound."""
    num_pictures: NonNegative = 4
    """How many of the best and of the worst images the report shows."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.likelihood == "bernoulli" and self.scale != "auto":
            yield Problem("scale", "bernoulli has none; leave it out, or take gaussian or logistic")
        if not self.discretised and self.likelihood in ("bernoulli", "logistic"):
            yield Problem("discretised", f"{self.likelihood} gives probabilities, never densities; leave it out")
