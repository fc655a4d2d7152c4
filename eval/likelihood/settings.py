"""Settings of `latent-ae eval likelihood`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae_eval.settings import JobSettings


class LikelihoodSettings(JobSettings):
    """Bounds on the likelihood that a variational autoencoder gives to images."""

    likelihood: Literal["auto", "bernoulli", "gaussian", "logistic"] = "auto"
    """Likelihood of the pixels given the latent; auto takes that of the training, or if none is known, that whose
    parameters the decoder gives, or else gaussian."""
    scale: Literal["auto", "fit"] | Annotated[float, Field(gt=0)] = "auto"
    """Standard deviation (gaussian) or scale (logistic), in [-1, 1] units; fit takes the most likely one for a fifth of
    the images, which then do not count; auto takes that of the training, or fit if the model has none."""
    discretised: bool = True
    """For gaussian, use the probability of a pixel's 8-bit level; false uses the density, which is training's loss."""
    samples: Positive = 64
    """Number of samples of each posterior, for the importance-weighted bound."""
    num_pictures: NonNegative = 4
    """Number of the best and of the worst images that the report shows."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.likelihood == "bernoulli" and self.scale != "auto":
            yield Problem("scale", "bernoulli has no scale; leave it out, or use gaussian or logistic")
        if not self.discretised and self.likelihood in ("bernoulli", "logistic"):
            yield Problem("discretised", f"{self.likelihood} gives probabilities, never densities; leave it out")
