"""A loss of one's own: trains the quickstart recipe with a term on edges. python examples/edges.py OUT [STEPS]"""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from latent_ae.objectives.base import Objective, Pass
from latent_ae_train import TrainSettings, train


class Edges(Objective):
    """Mean absolute error of the differences between neighbouring pixels (Mathieu et al. 2016, eq. 6)."""

    name = "edges"
    charts = {"Edges": ("edges", "edges_average")}

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("average", torch.zeros(()))  # in each checkpoint; a skipped step does not change it

    def backward(self, p: Pass) -> None:
        errors = [(p.image.diff(dim=side) - p.batch.target.diff(dim=side)).abs().mean() for side in (2, 3)]
        loss = p.batch.area * (errors[0] + errors[1])
        (gradient,) = torch.autograd.grad(loss, p.image)
        p.send_image(gradient, self.weight)
        p.logs["edges"] = loss.detach()
        p.global_means["edges/loss"] = loss.detach()

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        self.average.lerp_(means["edges/loss"], 0.1)
        logs["edges_average"] = self.average.clone()


if __name__ == "__main__":
    out, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40
    settings = TrainSettings.load("quickstart", f"output_dir={out}", f"steps={steps}", "gan.weight=0", "log.every=1")
    results = train(settings, objectives=[Edges(weight=0.5)])
    print(results["held_out"]["after"]["psnr"], "dB")
