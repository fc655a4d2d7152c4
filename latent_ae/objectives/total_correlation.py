"""FactorVAE (Kim and Mnih 2018): a discriminator estimates how much the latent dimensions depend on each other."""

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.config import FIXED, SWITCH, Positive, Problem, Settings, Weight
from latent_ae.data.rng import permutations
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts

LAYERS = 6
SLOPE = 0.2
LARGEST = 1024
"""Largest number of latent dimensions: FactorVAE was published with 10, and a batch says little about 1000."""


class TotalCorrelationSettings(Settings):
    """The total correlation of the latents."""

    total_correlation: Annotated[Weight, SWITCH] = 0.0
    """Weight (gamma) of FactorVAE's total correlation: the dependence of latent dimensions on each other, in nats per
    image, normalised like `kl`."""
    total_correlation_width: Annotated[Positive, FIXED] = 1000
    """Units in each of the five hidden layers of the discriminator that estimates it."""


class TotalCorrelation(Objective[TotalCorrelationSettings]):
    """Penalises the estimated total correlation KL(q(z) || prod_j q(z_j)), and trains its discriminator.

    Args:
        own: The settings.
        run: Facts of the run.
        adversary: The discriminator.
    """

    name, section, docs = "total_correlation", "loss", "docs/family.md"
    charts = {"Total correlation of the latents (nats)": ("total_correlation",)}
    adversary_name = "total_correlation"

    adversary: "LatentDiscriminator"

    def __init__(self, own: TotalCorrelationSettings, run: RunFacts, adversary: "LatentDiscriminator") -> None:
        super().__init__(own, run)
        self.hold(adversary=adversary)

    @classmethod
    def enabled(cls, own: TotalCorrelationSettings) -> bool:
        return own.total_correlation > 0

    @classmethod
    def problems(cls, own: TotalCorrelationSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        width = TotalCorrelationSettings().total_correlation_width
        if own.total_correlation_width != width and not own.total_correlation:
            yield Problem(
                "loss.total_correlation_width", "there is no discriminator without a total_correlation: give it"
            )
        if not own.total_correlation:
            return
        if run.micro_batch != run.batch_size:
            yield Problem(
                "loss.total_correlation",
                f"permutes each latent dimension over the whole batch of {run.batch_size}, and a pass holds "
                f"{run.micro_batch}: training would depend on the split. Use one process and micro_batch_size null",
            )
        if run.batch_size % 2 or run.batch_size < 4:
            yield Problem(
                "batch_size", f"{run.batch_size} has no two halves for loss.total_correlation: even, 4 or more"
            )
        if not run.one_size:
            yield Problem(
                "latents.equivariance",
                "changes the latent's size from step to step, and loss.total_correlation needs one size: set one to 0",
            )
        if len(run.crop_sizes) > 1:
            yield Problem(
                "data.buckets",
                "give latents of several sizes, and loss.total_correlation needs one: leave one of the two out",
            )
        if run.train == "decoder":
            yield Problem("loss.total_correlation", "shapes the posterior, which train leaves fixed: set it to 0")
        if model is None:
            return
        if model.latent != "posterior":
            yield Problem(
                "loss.total_correlation", f"needs a Gaussian posterior, which {model.name} does not have: set it to 0"
            )
        elif (dimensions := model.latent_channels * (run.resolution // model.factor) ** 2) > LARGEST:
            yield Problem(
                "loss.total_correlation",
                f"the latent has {dimensions:,} dimensions, and its discriminator learns nothing from more than "
                f"{LARGEST:,}: use fewer latent channels, a larger factor or smaller crops",
            )

    @classmethod
    def build(
        cls, own: TotalCorrelationSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "TotalCorrelation":
        from latent_ae.models.build import factor_of, latent_channels_of

        dimensions = latent_channels_of(autoencoder) * (run.resolution // factor_of(autoencoder)) ** 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed + 3)
            adversary = LatentDiscriminator(dimensions, own.total_correlation_width)
        return cls(own, run, adversary.to(device))

    @classmethod
    def describe(cls, own: TotalCorrelationSettings, run: RunFacts) -> str:
        return f"independent of each other with weight {own.total_correlation:g}"

    def backward(self, p: Pass) -> None:
        """Send the estimate's gradient to the latent, and the discriminator's own to its parameters.

        The estimate is the mean logit over the whole batch. The discriminator learns to distinguish the first half from
        the second half with each dimension permuted over the samples (Algorithm 2); the two halves are independent.
        """
        discriminator = p.adversaries[self.name]
        latents = p.out.latent.detach().flatten(1).requires_grad_()
        half = len(latents) // 2
        logits = discriminator(latents)
        order = torch.from_numpy(permutations(self.run.seed, p.step, half, latents.shape[1]))
        permuted = discriminator(latents.detach()[half:].gather(0, order.to(latents.device)))
        estimate = logits.mean()
        (slope,) = torch.autograd.grad(estimate, latents, retain_graph=True)
        joint = logits[:half]
        loss = 0.5 * (F.softplus(-joint).mean() + F.softplus(permuted).mean())
        loss.backward(inputs=list(self.adversary.parameters()))
        p.logs["total_correlation"] = estimate.detach()
        p.logs["total_correlation_discriminator"] = loss.detach()
        p.logs["total_correlation_accuracy"] = 0.5 * ((joint > 0).float().mean() + (permuted < 0).float().mean())
        weight = self.own.total_correlation / p.batch.images[0].numel()
        p.send(p.out.latent, slope.view_as(p.out.latent) * weight)


class LatentDiscriminator(nn.Module):
    """FactorVAE's discriminator: six linear layers with leaky ReLU.

    Its logit is ln of the odds that a latent is a sample of q(z) and not of the product of the marginals q(z_j), so its
    mean over samples of q(z) estimates the total correlation KL(q(z) || prod_j q(z_j)) in nats (eq. 3 of the paper).

    Args:
        dimensions: Number of dimensions of a flattened latent.
        width: Units of each hidden layer.
    """

    def __init__(self, dimensions: int, width: int):
        super().__init__()
        widths = [dimensions, *[width] * (LAYERS - 1), 1]
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(before, after), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, latents: Tensor) -> Tensor:
        """Return the logits, (N,), of flattened latents, (N, dimensions)."""
        logits: Tensor = self.layers(latents).squeeze(1)
        return logits
