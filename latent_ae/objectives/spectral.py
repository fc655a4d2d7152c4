"""Spectral regularisation: the sum of the largest singular values of the autoencoder's layers, as in NVAE."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.config import SWITCH, Settings, UserError, Weight
from latent_ae.objectives.base import Objective, Pass, RunFacts

ITERATIONS, FIRST_ITERATIONS = 4, 40
"""Power iterations in a step, and in the first one."""


class SpectralSettings(Settings):
    """Spectral regularisation."""

    spectral: Annotated[Weight, SWITCH] = 0.0
    """Weight of the sum of the largest singular values of all convolutions and linear layers that train, which keeps
    deep networks smooth (NVAE). Losses are means here: 0.01 of a loss that is summed over an image of C x H x W is
    0.01 / (C x H x W)."""


class Spectral(Objective[SpectralSettings]):
    """Spectral regularisation (Vahdat and Kautz 2020, section 3.2; Yoshida and Miyato 2017), by power iteration.

    A convolution is the matrix out x (in height width). The left singular vectors of earlier steps are kept, so a few
    iterations are enough. They are made once in a step, in its first pass, however the batch is split.

    Args:
        own: The settings.
        run: Facts of the run.
        autoencoder: The autoencoder, whose layers do not change any more.
    """

    name, section, docs = "spectral", "loss", "docs/losses.md"
    plan_line = "losses"
    charts = {"Largest singular value, mean over layers": ("spectral",)}

    def __init__(self, own: SpectralSettings, run: RunFacts, autoencoder: nn.Module) -> None:
        super().__init__(own, run)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed + 3)
            for (rows, columns), group in trained_weights(autoencoder).items():
                start = F.normalize(torch.randn(len(group), rows), dim=1)
                self.register_buffer(f"left_{rows}_{columns}", start)

    @classmethod
    def enabled(cls, own: SpectralSettings) -> bool:
        return own.spectral > 0

    @classmethod
    def build(cls, own: SpectralSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "Spectral":
        if not trained_weights(autoencoder):
            raise UserError("loss.spectral: nothing that trains is a convolution or a linear layer: set it to 0")
        return cls(own, run, autoencoder).to(device)

    @classmethod
    def describe(cls, own: SpectralSettings, run: RunFacts) -> str:
        return f"largest singular values with weight {own.spectral:g}"

    def backward(self, p: Pass) -> None:
        if not p.first:  # of this process: the weights, and so the term, are those of the other passes
            return
        values = list[Tensor]()
        for (rows, columns), group in trained_weights(p.model.autoencoder).items():
            matrices = torch.stack([weight.flatten(1) for weight in group])
            left: Tensor = getattr(self, f"left_{rows}_{columns}")
            with torch.no_grad():
                for _ in range(FIRST_ITERATIONS if p.step == 0 else ITERATIONS):
                    right = F.normalize(torch.einsum("nrc,nr->nc", matrices, left), dim=1)
                    left.copy_(F.normalize(torch.einsum("nrc,nc->nr", matrices, right), dim=1))
            values.append(torch.einsum("nr,nrc,nc->n", left.clone(), matrices, right))
        largest = torch.cat(values)
        # the step's gradients and logs are means over its passes, and this one is in the first alone
        p.send_loss(largest.sum(), self.own.spectral * p.accumulation)
        p.logs["spectral"] = largest.detach().mean() * p.accumulation


def trained_weights(autoencoder: nn.Module) -> dict[tuple[int, int], list[Tensor]]:
    """Return the weights of convolutions and linear layers that train, by the rows and columns of their matrices."""
    found: dict[tuple[int, int], list[Tensor]] = {}
    for layer in autoencoder.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.Linear)) and layer.weight.requires_grad:
            found.setdefault((len(layer.weight), layer.weight[0].numel()), []).append(layer.weight)
    return found
