"""The adaptive weight, which balances a term of training against the reconstruction losses."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from latent_ae.objectives.base import Pass

ADAPTIVE_EPS = 1e-4
"""Latent diffusion's value; it is added to the norm of the adversarial gradient, whose units are the same here."""


class GradientBalance(nn.Module):
    """The adaptive weight of a term: |gradient of the reconstruction| / |gradient of the term| at one layer.

    Esser et al. 2021, eq. 7, for the global batch, capped, smoothed and one step late, so that it is the same for any
    split and needs no second pass.

    Args:
        name: Name of the objective, for the keys in `Pass.global_means`.
        cap: Largest ratio.
        smoothing: Fraction of the previous value that the ratio keeps in each step, 0 to 1.
    """

    weight: Tensor

    def __init__(self, name: str, cap: float, smoothing: float):
        super().__init__()
        self.term, self.reconstruction = f"{name}/term", f"{name}/reconstruction"
        self.cap, self.smoothing = cap, smoothing
        # 0 until the first measurement, so the first step with the term only measures
        self.register_buffer("weight", torch.zeros(()))

    def at(self, area: float) -> Tensor:
        """Return the weight for images of a relative `area` (0 to 1), to which reconstruction losses are scaled."""
        return (area * self.weight).clamp(max=self.cap)

    def measure_at_decoder(self, p: Pass, gradient: Tensor) -> None:
        """Measure both gradients at the decoder's output convolution; each costs one small matrix product.

        Args:
            p: The pass, after its `reconstruction_gradient` was set.
            gradient: (N, C, H, W), gradient of the unweighted term at `p.image`.
        """
        layer = p.model.last_layer
        if not layer.requires_grad:  # the setting train leaves it fixed
            return
        assert p.reconstruction_gradient is not None
        for key, at_image in ((self.reconstruction, p.reconstruction_gradient), (self.term, gradient)):
            (p.global_means[key],) = torch.autograd.grad(p.out.image, layer, at_image, retain_graph=True)

    def measure_at_encoder(self, p: Pass, tensor: Tensor, gradient: Tensor) -> None:
        """Measure both gradients at the encoder's output convolution; the image's during `Pass.backward`.

        That of the image is of all its losses, the adversarial one included, since one backward pass brings their sum.

        Args:
            p: The pass.
            tensor: A tensor of the autoencoder's graph.
            gradient: Gradient of the unweighted term at `tensor`.
        """
        layer, latent = p.model.encoder_last_layer, p.out.latent
        (p.global_means[self.term],) = torch.autograd.grad(tensor, layer, gradient, retain_graph=True)

        def image_gradient_arrives(at_latent: Tensor) -> None:
            (at_layer,) = torch.autograd.grad(latent, layer, at_latent, retain_graph=True)
            p.global_means[self.reconstruction] = at_layer * p.accumulation  # the pass sends only its share

        p.out.to_decode.register_hook(image_gradient_arrives)

    def update(self, means: Mapping[str, Tensor], area: float, skip_zero: bool = False) -> None:
        """Update the weight with the ratio of a step.

        Args:
            means: Means over the global batch; nothing happens if they lack the gradients.
            area: Relative area of the step's images, see `Batch.area`.
            skip_zero: Keep the weight if the term has no gradient.
        """
        if self.term not in means:
            return
        reconstruction, term = means[self.reconstruction], means[self.term]
        ratio = adaptive_ratio(reconstruction, term, self.cap)
        if skip_zero:
            ratio = torch.where(term.norm() > 0, ratio, torch.nan)
        smooth_(self.weight, ratio / area, self.smoothing)


def adaptive_ratio(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, cap: float) -> Tensor:
    """Return |grad of reconstruction| / (|grad of adversarial| + 1e-4) at the last layer, clamped to [0, cap].

    Esser et al. 2021, eq. 7, in per-element means as all losses here are. Latent diffusion's
    `calculate_adaptive_weight` sums the reconstruction over a sample's C x H x W elements and takes the mean of the
    logits, so its ratio is C H W times this one, and its clamp at 1e4 is `cap = 1e4 / (C H W)`.

    Args:
        reconstruction_gradient: Gradient of the reconstruction losses (per-element means) at the layer's weight.
        adversarial_gradient: Gradient of the unweighted adversarial term at the same weight.
        cap: Largest ratio.

    Returns:
        A scalar; NaN if a gradient or the ratio is not finite.
    """
    norm = adversarial_gradient.norm()
    ratio = reconstruction_gradient.norm() / (norm + ADAPTIVE_EPS)
    # an infinite ratio must not become the cap, nor an infinite norm 0: `smooth_` ignores NaN
    return torch.where(ratio.isfinite() & norm.isfinite(), ratio.clamp(0.0, cap), torch.nan)


def smooth_(average: Tensor, value: Tensor, smoothing: float) -> None:
    """Move an average towards a value in place; it becomes the value if it is still 0, and ignores a non-finite one.

    Args:
        average: Tensor of averages, 0 at the start.
        value: Tensor of the same shape.
        smoothing: Fraction of the average that is kept, 0 to 1.
    """
    smoothed = torch.where(average > 0, torch.lerp(value, average, smoothing), value)
    average.copy_(torch.where(value.isfinite(), smoothed, average))
