"""Alignment of latents to the features of a vision model (VA-VAE, Yao et al. 2025)."""

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from latent_ae.config import SWITCH, Fraction, Problem, Settings
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.balance import GradientBalance
from latent_ae.objectives.base import Objective, Pass, RunFacts
from latent_ae.pretrained.frozen import folder_problems
from latent_ae.pretrained.vision import VisionModel

CAP, SMOOTHING = 100.0, 0.9
"""Cap and smoothing of the adaptive weight. The ratio lags by a step, so both keep it stable after a batch that is
aligned already and whose gradient is small."""


class AlignmentSettings(Settings):
    """Aligns the latents to the features of a frozen vision model, as VA-VAE does; the defaults are its weight and
    margins."""

    model: Annotated[str | None, SWITCH] = None
    """Folder of a vision transformer that transformers loads (config.json, model.safetensors,
    preprocessor_config.json); null turns alignment off."""
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Weight of both terms."""
    adaptive: Annotated[bool, SWITCH] = True
    """Scale the term by the ratio of gradient norms at the encoder's last layer; false uses the weight as it is."""
    cosine_margin: Fraction = 0.5
    """Cosine distance of a latent to its feature below which there is no loss."""
    distance_margin: Fraction = 0.25
    """Difference between the similarity of two latents and that of their features below which there is no loss."""


class Alignment(Objective[AlignmentSettings]):
    """Marginal cosine and distance terms between projected latents and a frozen vision model's features.

    Args:
        own: The settings.
        run: Facts of the run.
        vision: The vision model.
        projection: From latents to its features; trained with the autoencoder.
    """

    name, section, docs = "alignment", "alignment", "docs/latents.md"
    charts = {"Alignment to the vision model": ("alignment_similarity", "alignment_cosine", "alignment_distance")}

    vision: VisionModel
    projection: nn.Conv2d

    def __init__(self, own: AlignmentSettings, run: RunFacts, vision: VisionModel, projection: nn.Conv2d) -> None:
        super().__init__(own, run)
        self.hold(vision=vision, projection=projection)
        self.area = 1.0
        if own.adaptive:
            self.balance = GradientBalance(self.name, CAP, SMOOTHING)

    @classmethod
    def enabled(cls, own: AlignmentSettings) -> bool:
        return own.model is not None

    @classmethod
    def problems(cls, own: AlignmentSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        key = "alignment.model"
        if own.model is None:
            return
        yield from folder_problems(key, own.model)
        if run.train == "decoder":
            yield Problem(key, "moves the encoder, which train leaves fixed: set it to null")
        elif "encoder" in run.fixed_ends and own.adaptive:
            yield Problem(
                "alignment.adaptive",
                "measures gradients at the encoder's last layer, which train leaves fixed: set it to false",
            )
        if "distillation" in run.enabled:
            yield Problem(key, "shapes latents that distillation.teacher gives: keep one, null the other")
        if model is None:
            return
        if model.channels not in (1, 3):
            yield Problem(key, f"{model.name} has {model.channels} channels, vision models see 1 or 3: set it to null")
        if not model.one_grid:
            yield Problem(key, f"needs latents on one grid, and {model.name} has several grids: leave it out")

    @classmethod
    def build(cls, own: AlignmentSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "Alignment":
        from latent_ae.models.build import factor_of, latent_channels_of

        factor = factor_of(autoencoder)
        grids = [(height // factor, width // factor) for height, width in run.crop_sizes]
        vision = VisionModel(str(own.model), grids).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed + 2)
            # 1 x 1 and without bias, as VA-VAE's
            projection = nn.Conv2d(latent_channels_of(autoencoder), vision.num_features, kernel_size=1, bias=False)
        return cls(own, run, vision, projection).to(device)

    @classmethod
    def describe(cls, own: AlignmentSettings, run: RunFacts) -> str:
        return f"aligned to {own.model}"

    def head(self) -> nn.Module:
        return self.projection

    def backward(self, p: Pass) -> None:
        own, self.area = self.own, p.batch.area
        projected = p.out.heads[self.name]
        with torch.no_grad(), p.autocast():
            features = self.vision(p.batch.images, p.out.latent.shape[2:])
        leaf = projected.detach().requires_grad_()
        cosine, distance, similarity = alignment_loss(leaf, features, own.cosine_margin, own.distance_margin)
        (gradient,) = torch.autograd.grad(cosine + distance, leaf)
        p.logs["alignment_cosine"], p.logs["alignment_distance"] = cosine.detach(), distance.detach()
        p.logs["alignment_similarity"] = similarity
        weight: float | Tensor = own.weight
        if own.adaptive:
            self.balance.measure_at_encoder(p, projected, gradient)
            weight = own.weight * self.area * self.balance.weight  # it follows the image losses, which count the area
        p.send(projected, weight * gradient)

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        if self.own.adaptive:
            # within both margins there is no gradient, and no ratio
            self.balance.update(means, self.area, skip_zero=True)
            logs["alignment_weight"] = self.own.weight * self.balance.weight


def alignment_loss(
    projected: Tensor, features: Tensor, cosine_margin: float, distance_margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return VA-VAE's marginal cosine and marginal distance matrix losses (Yao et al. 2025, eq. 2 and 3).

    Cosine: the mean over samples and positions of relu(1 - margin - cos(z, f)). Distance: the mean over samples and
    pairs of positions i, j of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    Args:
        projected: (N, C, h, w) latents z, projected to the features' channels.
        features: (N, C, h, w) features f of a vision model.
        cosine_margin: Margin of the cosine loss.
        distance_margin: Margin of the distance loss.

    Returns:
        Both losses, and the mean cosine without a gradient; scalars.
    """
    z, f = (F.normalize(x.flatten(2), dim=1) for x in (projected, features))
    cosines = (z * f).sum(1)
    distances = (z.mT @ z - f.mT @ f).abs()
    cosine = F.relu(1.0 - cosine_margin - cosines).mean()
    return cosine, F.relu(distances - distance_margin).mean(), cosines.detach().mean()
