"""Muon (Jordan et al. 2024): momentum whose update of each weight matrix is made nearly orthogonal."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.models.reconstruct import end_layers

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients of the quintic iteration: five iterations bring singular values to about 0.7 to 1.2."""
ITERATIONS = 5
MOMENTUM = 0.95


def inner_weights(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights that Muon trains: matrices and convolutions, except the first and last layers of encoder and
    decoder."""
    ends = {id(layer.weight) for part in (network.encoder, network.decoder) for layer in end_layers(part)}
    return [
        parameter
        for name, parameter in network.named_parameters()
        # the codes of a codebook and the learned start of a HierarchicalVAE are not linear maps
        if name.endswith(".weight") and not name.endswith("embedding.weight")
        if parameter.ndim > 1 and parameter.requires_grad and id(parameter) not in ends
    ]


class Muon(torch.optim.Optimizer):
    """The optimizer for weights of two and more dimensions; a convolution is the matrix out x (in height width).

    The update is 0.2 sqrt(max(rows, columns)) times a nearly orthogonal matrix: its root mean square is about that of
    AdamW's update, so the same learning rates fit (Liu et al. 2025). If `found_inf` is not 0, as a GradScaler sets it,
    nothing changes, and nothing waits for the device.

    Args:
        params: The weights.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, as in AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                # a non-finite gradient is replaced by the momentum, which then stays, and the new weight by the old
                bad = self.found_inf is not None and self.found_inf.bool()
                grad = weight.grad if bad is False else torch.where(bad, state["momentum"], weight.grad)
                state["momentum"].lerp_(grad, 1 - MOMENTUM)
                nesterov = grad.lerp(state["momentum"], MOMENTUM)
                update = orthogonalised(nesterov.flatten(1)).view_as(weight)
                scale = 0.2 * max(len(weight), weight[0].numel()) ** 0.5
                moved = torch.add(
                    weight * (1 - group["lr"] * group["weight_decay"]), update, alpha=-group["lr"] * scale
                )
                weight.copy_(moved if bad is False else torch.where(bad, weight, moved))


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return nearly U V^T for the matrix U S V^T, by Newton-Schulz iterations.

    They run in float32. In bfloat16, as published, rounding would make training depend on how a batch is split.

    Args:
        matrix: (rows, columns) float32.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.mT
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.mT
