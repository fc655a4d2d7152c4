"""Trains a first stage together with a density of its latents and reconstructions, as DAGMM (Zong et al. 2018)."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from latent_ae.config import FIXED, Positive, Problem, Settings, Weight
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts

if TYPE_CHECKING:  # brings diffusers
    from latent_ae.models.density import Density


class DensitySettings(Settings):
    """A mixture of Gaussians on latents and reconstruction errors, which trains together with the first stage."""

    components: Annotated[Positive | None, FIXED] = None
    """Number of Gaussians; null turns it off."""
    weight: Weight = 0.1
    """Weight of minus the log-density of a sample's features, in nats, normalised like `loss.kl` (0.1 as published); 0
    lets the mixture follow the features without changing them."""
    penalty: Weight = 0.005
    """Weight of the sum over Gaussians and latent channels of 1 / variance, normalised likewise (0.005 as published),
    without which all latents shrink to a point. It has no effect with weight 0."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Part of the mixture's running averages that a step keeps."""


class DensityObjective(Objective[DensitySettings]):
    """Draws the features of a batch to the mixture, whose Gaussians follow the features of former steps.

    Args:
        own: The settings.
        run: Facts of the run.
        density: The mixture; its parameters are buffers that EM moves.
    """

    name, section, docs, plan_line = "density", "density", "docs/vaes.md", "density"
    charts = {"Minus the log-density of latents and errors (nats)": ("density_energy",)}

    density: "Density"

    def __init__(self, own: DensitySettings, run: RunFacts, density: "Density") -> None:
        super().__init__(own, run)
        self.density = density

    @classmethod
    def enabled(cls, own: DensitySettings) -> bool:
        return own.components is not None

    @classmethod
    def problems(cls, own: DensitySettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        plain = DensitySettings()
        if own.components is None:
            if changed := [key for key in type(own).model_fields if getattr(own, key) != getattr(plain, key)]:
                yield Problem(f"density.{changed[0]}", "needs the number of Gaussians: give density.components")
            return
        if model is not None and not model.one_grid:
            yield Problem(
                "density.components",
                f"takes the mean of each latent channel over one grid, and {model.name} has several: leave it out",
            )
        if model is not None and model.rescaled:
            yield Problem(
                "density.components",
                f"learns the latents of the training, and the export of {model.name} scales each of their values: "
                "leave it out",
            )

    @classmethod
    def build(
        cls, own: DensitySettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "DensityObjective":
        from latent_ae.models.build import latent_channels_of
        from latent_ae.models.density import Density

        return cls(own, run, Density(own.components or 1, latent_channels_of(autoencoder))).to(device)

    @classmethod
    def describe(cls, own: DensitySettings, run: RunFacts) -> str:
        weight = f"with weight {own.weight:g}" if own.weight else "which changes nothing else"
        if own.weight and not own.penalty:
            weight += " and nothing that keeps the latents from shrinking (density.penalty)"
        return f"a mixture of {own.components} Gaussians on latents and errors, {weight}"

    def exported(self) -> tuple[str, nn.Module]:
        from latent_ae.models.density import FOLDER

        return FOLDER, self.density

    def backward(self, p: Pass) -> None:
        from latent_ae.models.density import FIRST

        latent = p.out.latent.detach().requires_grad_()
        features = self.density.features(latent, p.batch.target, p.image)
        energy = self.density(features).mean()
        p.global_means |= {f"{self.name}/{key}": value for key, value in self.density.moments(features).items()}
        p.logs["density_energy"] = energy.detach()
        if not self.own.weight:
            return
        loss = self.own.weight * energy
        if self.own.penalty:
            loss = loss + self.own.penalty * self.density.penalty(features).mean()
        of_latent, of_image = torch.autograd.grad(loss, [latent, p.image])
        # before the mixture knows anything it draws to nothing
        weight = (self.density.updates >= FIRST) / p.batch.images[0].numel()
        p.send_image(of_image, weight)
        if p.out.latent.requires_grad:
            p.send(p.out.latent, of_latent * weight)

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        self.density.update({key: means[f"{self.name}/{key}"] for key in ("mass", "shift", "square")}, self.own.decay)
