"""The perceptual loss by the logits of a frozen ConvNeXt classifier (TA-TiTok, Kim et al. 2025)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from latent_ae.config import Problem, Settings, Weight
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.bands import unseen
from latent_ae.objectives.base import Objective, Pass, RunFacts, loss_of_outputs
from latent_ae.pretrained.frozen import folder_problems

if TYPE_CHECKING:
    from latent_ae.pretrained.convnext import ConvNeXtLogits


class ConvNeXtSettings(Settings):
    """The perceptual loss by a ConvNeXt's logits."""

    convnext: Weight = 0.0
    """Weight of the mean squared difference of a ConvNeXt-S's logits, beside LPIPS; 0 neither loads nor computes it."""
    convnext_weights: str | None = None
    """A folder of transformers' ConvNextForImageClassification, or a file with torchvision's state dict of a ConvNeXt;
    null takes torchvision's convnext_small (docs/weights.md)."""


class ConvNeXtLoss(Objective[ConvNeXtSettings]):
    """The mean over samples and classes of the squared difference between the logits of reconstruction and image.

    Args:
        own: The settings.
        run: Facts of the run.
        network: The classifier.
    """

    name, section, docs = "convnext", "loss", "docs/losses.md"
    plan_line = "losses"
    charts = {"ConvNeXt loss": ("convnext",)}

    def __init__(self, own: ConvNeXtSettings, run: RunFacts, network: "ConvNeXtLogits") -> None:
        super().__init__(own, run)
        self.hold(network=network)

    @classmethod
    def enabled(cls, own: ConvNeXtSettings) -> bool:
        return own.convnext > 0

    @classmethod
    def problems(cls, own: ConvNeXtSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        key, place = "loss.convnext_weights", own.convnext_weights
        if not own.convnext:
            if place is not None:
                yield Problem(key, "are used by loss.convnext, whose weight is 0: give it a weight")
            return
        if place is not None and Path(place).expanduser().is_dir():
            yield from folder_problems(key, place)
        elif place is not None and not Path(place).expanduser().is_file():
            yield Problem(key, f"no such file or folder: {place} (from {Path.cwd()})")
        yield from unseen("loss.convnext", "ConvNeXt", run, model)

    @classmethod
    def build(
        cls, own: ConvNeXtSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "ConvNeXtLoss":
        from latent_ae.pretrained.convnext import ConvNeXtLogits

        network = ConvNeXtLogits(own.convnext_weights, run.weights_dir)
        return cls(own, run, network.to(device, memory_format=torch.channels_last))

    @classmethod
    def describe(cls, own: ConvNeXtSettings, run: RunFacts) -> str:
        return f"ConvNeXt's logits with weight {own.convnext:g}"

    def backward(self, p: Pass) -> None:
        loss = loss_of_outputs(p, self.network, lambda outputs, expected: (outputs - expected).square().mean())
        (gradient,) = torch.autograd.grad(loss, p.image)
        p.logs["convnext"] = loss.detach()
        p.send_reconstruction(gradient, self.own.convnext * p.batch.area)
