"""Draws the codes of a DiscreteVAE from a Gumbel-softmax whose temperature falls (Ramesh et al. 2021, appendix A.2)."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from latent_ae.config import Positive, Problem, Settings
from latent_ae.data.rng import gumbel_noise
from latent_ae.models.quantize import Relaxation
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts

Temperature = Annotated[float, Field(gt=0)]


class CodeRelaxationSettings(Settings):
    """How the codes of a DiscreteVAE are drawn."""

    temperature: Temperature = 1.0
    """First temperature of the softmax from which training draws codes; validation takes the most likely ones."""
    temperature_end: Temperature = 0.0625
    """Last temperature, which a cosine approaches."""
    temperature_steps: Positive | None = None
    """Steps over which the temperature falls, and then stays; null takes all steps."""


class CodeRelaxation(Objective[CodeRelaxationSettings]):
    """Gives the forward pass Gumbel noise and the step's temperature; does nothing for other classes.

    The noise is a function of the run's seed and each sample's number, the temperature one of the step. With a fixed
    encoder the decoder learns from the most likely codes.

    The log has the mean entropy of a position's distribution over codes, in nats: where it is not small, the most
    likely codes, which validation decodes, are unlike those from which the decoder learns.

    Args:
        own: The schedule.
        run: Facts of the run.
        num_codes: Number of codes that are drawn from; 0 if there are none.
    """

    name, section, docs, plan_line = "code_relaxation", "codebook", "docs/codes.md", "temperature"
    charts = {
        "Temperature of the codes": ("temperature",),
        "Entropy of the distribution over codes (nats per position)": ("code_entropy",),
    }

    def __init__(self, own: CodeRelaxationSettings, run: RunFacts, num_codes: int = 0) -> None:
        super().__init__(own, run)
        self.num_codes = num_codes

    @classmethod
    def problems(cls, own: CodeRelaxationSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.temperature_end > own.temperature:
            yield Problem(
                "codebook.temperature_end",
                f"{own.temperature_end:g} is above the first temperature, {own.temperature:g}: lower it, or raise "
                "codebook.temperature",
            )
        plain = CodeRelaxationSettings()
        changed = [key for key in CodeRelaxationSettings.model_fields if getattr(own, key) != getattr(plain, key)]
        if not changed:
            return
        key = f"codebook.{changed[0]}"
        if model is not None and model.latent != "categorical":
            yield Problem(
                key, f"is for codes that are drawn, as a DiscreteVAE's, and not for {model.name}: leave it out"
            )
        elif run.train == "decoder":
            yield Problem(key, "is for the encoder, which train leaves fixed: leave it out")

    @classmethod
    def build(
        cls, own: CodeRelaxationSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "CodeRelaxation":
        from latent_ae.models.registry import family_of

        family = family_of(autoencoder)
        drawn = family.latent == "categorical" and run.train != "decoder"
        return cls(own, run, family.codes(autoencoder.config) or 0 if drawn else 0)

    @classmethod
    def describe(cls, own: CodeRelaxationSettings, run: RunFacts) -> str:
        if run.train == "decoder":
            return "none: the most likely codes are decoded"
        return f"from {own.temperature:g} to {own.temperature_end:g} by step {own.temperature_steps or run.steps:,}"

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        if not self.num_codes:
            return ()
        return (gumbel_noise(self.run.seed, numbers, (self.num_codes, *latent_shape[1:])),)

    def prepare(self, batch: Batch, step: int) -> Batch:
        if not self.num_codes:
            return batch
        (gumbel,) = batch.draws[self.name]
        height, width = batch.noise.shape[-2:]  # smaller than drawn where latents.equivariance scales the images
        relaxation = Relaxation(gumbel[..., :height, :width], temperature_at(step, self.own, self.run.steps))
        return batch._replace(quantiser=batch.quantiser._replace(relaxation=relaxation))

    def backward(self, p: Pass) -> None:
        if (relaxation := p.batch.quantiser.relaxation) is not None:
            p.logs["temperature"] = torch.full((), relaxation.temperature, device=p.image.device)
            p.logs["code_entropy"] = math.log(self.num_codes) - p.out.rates[0].detach().mean()


def temperature_at(step: int, own: CodeRelaxationSettings, steps: int) -> float:
    """Return the temperature in a step: half a cosine from the first to the last one, which then stays.

    Args:
        step: Number of the step, from 0.
        own: The settings.
        steps: Number of steps of the run.
    """
    done = min(1.0, step / (own.temperature_steps or steps))
    return own.temperature_end + (own.temperature - own.temperature_end) * 0.5 * (1.0 + math.cos(math.pi * done))
