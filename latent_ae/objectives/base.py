"""What several objectives use."""

import torch
from torch import Tensor

ADAPTIVE_EPS = 1e-4
"""As latent diffusion has it: it stands beside the adversarial gradient, whose units are the same there and here."""


def adaptive_ratio(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, cap: float) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at the last layer, clamped to [0, cap].

    Esser et al. 2021, eq. 7, in per-element means as all losses here are. Latent diffusion's
    `calculate_adaptive_weight` sums the reconstruction over a sample's C x H x W elements and takes the mean of the
    logits, so its ratio is C H W times this one, and its clamp at 1e4 is `cap = 1e4 / (C H W)`.

    Args:
        reconstruction_gradient: of the reconstruction losses (per-element means) with respect to the layer's weight.
        adversarial_gradient: of the mean of -D(r) with respect to the same weight, without any weight of its own.
        cap: the largest ratio.

    Returns:
        A scalar; NaN where a gradient or the ratio is not finite.
    """
    norm = adversarial_gradient.norm()
    ratio = reconstruction_gradient.norm() / (norm + ADAPTIVE_EPS)
    # infinity must not pass for the cap, nor below the line for 0: the step passes over what is not finite
    return torch.where(ratio.isfinite() & norm.isfinite(), ratio.clamp(0.0, cap), torch.nan)
