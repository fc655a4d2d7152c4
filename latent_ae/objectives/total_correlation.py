"""FactorVAE (Kim and Mnih 2018): a discriminator tells latents from latents whose dimensions were drawn apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.data.rng import permutations
from latent_ae.models.reconstruct import Reconstruction

LAYERS = 6
SLOPE = 0.2
LARGEST = 1024
"""Latent dimensions: published with 10, and a batch's samples say little about the dependence of a thousand."""


class TotalCorrelation(nn.Module):
    """The discriminator, six layers with leaky ReLU as published, and the two gradients that it gives.

    Its logit is ln of the odds that a latent is a sample of q(z) and not of the product of the marginals q(z_j), so its
    mean over samples of q(z) estimates the total correlation KL(q(z) || prod_j q(z_j)) in nats (their eq. 3).
    """

    def __init__(self, dimensions: int, width: int, seed: int):
        """`dimensions`: numbers of a flattened latent; `seed` decides the permutations, with the step."""
        super().__init__()
        self.seed = seed
        widths = [dimensions, *[width] * (LAYERS - 1), 1]
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(before, after), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, latents: Tensor) -> Tensor:
        """(N, dimensions) -> logits (N,)."""
        logits: Tensor = self.layers(latents).squeeze(1)
        return logits

    def gradient(self, result: Reconstruction, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the discriminator's own gradient; returns that of the estimate at the latent, and what to log.

        `result` is of the whole batch, of an even number of samples. The estimate is the mean over all of them. The
        discriminator learns from the first half as it is and from the second half with each dimension permuted over the
        samples (their Algorithm 2), so what it is to tell apart is independent.
        """
        latents = result.latent.detach().flatten(1).requires_grad_()
        half = len(latents) // 2
        logits = self(latents)
        order = torch.from_numpy(permutations(self.seed, step, half, latents.shape[1]))
        permuted = self(latents.detach()[half:].gather(0, order.to(latents.device)))
        estimate = logits.mean()
        (slope,) = torch.autograd.grad(estimate, latents, retain_graph=True)
        joint = logits[:half]
        loss = 0.5 * (F.softplus(-joint).mean() + F.softplus(permuted).mean())
        loss.backward(inputs=list(self.parameters()))
        accuracy = 0.5 * ((joint > 0).float().mean() + (permuted < 0).float().mean())
        means = {
            "total_correlation": estimate.detach(),
            "total_correlation_discriminator": loss.detach(),
            "total_correlation_accuracy": accuracy,
        }
        return slope.view_as(result.latent), means
