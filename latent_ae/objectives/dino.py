"""The perceptual loss by the patch features of a frozen vision transformer (P-DINO, Ma et al. 2026)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.config import Positive, Problem, Settings, Weight
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.bands import unseen
from latent_ae.objectives.base import Objective, Pass, RunFacts, loss_of_outputs
from latent_ae.pretrained.frozen import folder_problems
from latent_ae.pretrained.vision import VisionModel


class DinoSettings(Settings):
    """The perceptual loss by a vision model's patch features."""

    dino: Weight = 0.0
    """Weight of the cosine distance between patch features of a vision model; 0 neither loads nor computes it."""
    dino_model: str | None = None
    """Folder of a vision transformer that transformers loads, such as DINOv2-B (config.json, model.safetensors,
    preprocessor_config.json)."""
    dino_px: Positive = 224
    """Side to which images are resized for it, px; it is rounded down to whole patches."""


class DinoLoss(Objective[DinoSettings]):
    """The mean over samples and patches of 1 - cos between the features of reconstruction and image.

    Args:
        own: The settings.
        run: Facts of the run.
        vision: The vision model.
    """

    name, section, docs = "dino", "loss", "docs/losses.md"
    plan_line = "losses"
    charts = {"Loss of a vision model's features": ("dino",)}

    def __init__(self, own: DinoSettings, run: RunFacts, vision: VisionModel) -> None:
        super().__init__(own, run)
        self.hold(vision=vision)

    @classmethod
    def enabled(cls, own: DinoSettings) -> bool:
        return own.dino > 0

    @classmethod
    def problems(cls, own: DinoSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        key = "loss.dino_model"
        if not own.dino:
            if own.dino_model is not None:
                yield Problem(key, "is used by loss.dino, whose weight is 0: give it a weight")
            if own.dino_px != DinoSettings().dino_px:
                yield Problem("loss.dino_px", "is used by loss.dino, whose weight is 0: give it a weight")
            return
        if own.dino_model is None:
            yield Problem(key, "loss.dino needs a folder with a vision transformer (docs/weights.md): give it")
        else:
            yield from folder_problems(key, own.dino_model)
        yield from unseen("loss.dino", "a vision model", run, model)

    @classmethod
    def build(cls, own: DinoSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "DinoLoss":
        vision = VisionModel(str(own.dino_model), image_px=own.dino_px, setting="loss.dino_model")
        return cls(own, run, vision.to(device))

    @classmethod
    def describe(cls, own: DinoSettings, run: RunFacts) -> str:
        return f"features of {own.dino_model} with weight {own.dino:g}"

    def backward(self, p: Pass) -> None:
        loss = loss_of_outputs(p, lambda images: self.vision(images, self.vision.grid), dino_loss)
        (gradient,) = torch.autograd.grad(loss, p.image)
        p.logs["dino"] = loss.detach()
        p.send_reconstruction(gradient, self.own.dino * p.batch.area)


def dino_loss(features: Tensor, target: Tensor) -> Tensor:
    """Return the mean over samples and positions of 1 - cos (P-DINO of PixelGen, Ma et al. 2026, arXiv:2602.02493).

    Args:
        features: (N, C, h, w) features of reconstructions, those of the vision model's last layer after its norm.
        target: The same of the images.
    """
    return 1.0 - F.cosine_similarity(features, target, dim=1).mean()
