"""The total correlation of the latents, estimated by FactorVAE's discriminator or in the batch, as in beta-TCVAE."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.config import FIXED, SWITCH, Positive, Problem, Settings, Weight
from latent_ae.data.rng import permutations
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts

LAYERS = 6
SLOPE = 0.2
MOST_PAIRED = 2**28
"""Largest number of densities (batch x batch x dimensions) of the estimate from the batch: 1 GB."""
LARGEST = 1024
"""Largest number of latent dimensions: FactorVAE was published with 10, and a batch says little about 1000."""


class TotalCorrelationSettings(Settings):
    """The total correlation of the latents."""

    total_correlation: Annotated[Weight, SWITCH] = 0.0
    """Weight of the total correlation: the dependence of latent dimensions on each other, in nats per image, normalised
    like `kl`. It is gamma of FactorVAE and, with `kl` at 1, beta - 1 of beta-TCVAE."""
    total_correlation_estimate: Annotated[Literal["discriminator", "minibatch"], FIXED] = "discriminator"
    """How it is estimated: by a discriminator of latents (FactorVAE), or from the batch's posteriors (beta-TCVAE)."""
    total_correlation_width: Annotated[Positive, FIXED] = 1000
    """Units in each of the five hidden layers of that discriminator."""


class TotalCorrelation(Objective[TotalCorrelationSettings]):
    """Penalises the estimated total correlation KL(q(z) || prod_j q(z_j)), and trains its discriminator.

    Args:
        own: The settings.
        run: Facts of the run.
        adversary: The discriminator; None for the estimate from the batch.
    """

    name, section, docs = "total_correlation", "loss", "docs/vaes.md"
    charts = {"Total correlation of the latents (nats)": ("total_correlation",)}
    adversary_name = "total_correlation"

    adversary: "LatentDiscriminator | None"

    def __init__(
        self, own: TotalCorrelationSettings, run: RunFacts, adversary: "LatentDiscriminator | None" = None
    ) -> None:
        super().__init__(own, run)
        self.hold(adversary=adversary)

    @classmethod
    def enabled(cls, own: TotalCorrelationSettings) -> bool:
        return own.total_correlation > 0

    @classmethod
    def problems(cls, own: TotalCorrelationSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        plain, judged = TotalCorrelationSettings(), own.total_correlation_estimate == "discriminator"
        if own.total_correlation_width != plain.total_correlation_width and not (own.total_correlation and judged):
            yield Problem(
                "loss.total_correlation_width",
                "there is no discriminator without a total_correlation that it estimates: give it or leave this out",
            )
        if not own.total_correlation:
            if not judged:
                yield Problem("loss.total_correlation_estimate", "needs a weight: give loss.total_correlation")
            return
        if run.micro_batch != run.batch_size:
            what = "permutes each latent dimension over" if judged else "compares each latent with the posteriors of"
            yield Problem(
                "loss.total_correlation",
                f"{what} the whole batch of {run.batch_size}, and a pass holds {run.micro_batch}: training would "
                "depend on the split. Use one process and micro_batch_size null",
            )
        if judged and (run.batch_size % 2 or run.batch_size < 4):
            yield Problem(
                "batch_size", f"{run.batch_size} has no two halves for loss.total_correlation: even, 4 or more"
            )
        if run.batch_size < 2:
            yield Problem("batch_size", "1 has no other posterior for loss.total_correlation: 2 or more")
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
                f"the latent has {dimensions:,} dimensions, and a batch tells nothing of the dependence of more than "
                f"{LARGEST:,}: use fewer latent channels, a larger factor or smaller crops",
            )
        elif not judged and (numbers := run.batch_size**2 * dimensions) > MOST_PAIRED:
            yield Problem(
                "batch_size",
                f"{run.batch_size:,} latents of {dimensions:,} dimensions in each of as many posteriors are "
                f"{4e-9 * numbers:.1f} GB, several times over: lower it, or set "
                "loss.total_correlation_estimate=discriminator",
            )

    @classmethod
    def build(
        cls, own: TotalCorrelationSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "TotalCorrelation":
        from latent_ae.models.build import factor_of, latent_channels_of

        if own.total_correlation_estimate == "minibatch":
            return cls(own, run)
        dimensions = latent_channels_of(autoencoder) * (run.resolution // factor_of(autoencoder)) ** 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed + 3)
            adversary = LatentDiscriminator(dimensions, own.total_correlation_width)
        return cls(own, run, adversary.to(device))

    @classmethod
    def describe(cls, own: TotalCorrelationSettings, run: RunFacts) -> str:
        source = (
            "their discriminator" if own.total_correlation_estimate == "discriminator" else "the batch's posteriors"
        )
        return f"independent of each other by {source}, with weight {own.total_correlation:g}"

    def backward(self, p: Pass) -> None:
        """Send the estimate's gradient to the posterior, and the discriminator's own to its parameters."""
        if self.adversary is None:
            assert p.out.logvar is not None, "`problems` refuses models without a Gaussian posterior"
            estimate = minibatch_total_correlation(p.out.latent, p.out.mean, p.out.logvar)
            p.logs["total_correlation"] = estimate.detach()
            p.send_loss(estimate, self.own.total_correlation / p.batch.images[0].numel())
        else:
            self._ask(p.adversaries[self.name], self.adversary, p)

    def _ask(self, discriminator: nn.Module, bare: "LatentDiscriminator", p: Pass) -> None:
        """Take the estimate of the discriminator, and train it.

        The estimate is the mean logit over the whole batch. The discriminator learns to distinguish the first half from
        the second half with each dimension permuted over the samples (Algorithm 2); the two halves are independent.
        """
        latents = p.out.latent.detach().flatten(1).requires_grad_()
        half = len(latents) // 2
        logits = discriminator(latents)
        order = torch.from_numpy(permutations(self.run.seed, p.step, half, latents.shape[1]))
        permuted = discriminator(latents.detach()[half:].gather(0, order.to(latents.device)))
        estimate = logits.mean()
        (slope,) = torch.autograd.grad(estimate, latents, retain_graph=True)
        joint = logits[:half]
        loss = 0.5 * (F.softplus(-joint).mean() + F.softplus(permuted).mean())
        loss.backward(inputs=list(bare.parameters()))
        p.logs["total_correlation"] = estimate.detach()
        p.logs["total_correlation_discriminator"] = loss.detach()
        p.logs["total_correlation_accuracy"] = 0.5 * ((joint > 0).float().mean() + (permuted < 0).float().mean())
        weight = self.own.total_correlation / p.batch.images[0].numel()
        p.send(p.out.latent, slope.view_as(p.out.latent) * weight)


def minibatch_total_correlation(latent: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the total correlation of q(z) in nats, with the batch's posteriors in place of all images' (scalar).

    Minibatch-weighted sampling of Chen et al. 2018 (section 4.1): q(z) of each sample is the mean of its density under
    the posteriors of the batch, its own among them, and q(z_j) likewise. The paper divides by the number of images of
    the data besides, which adds a constant to the estimate and nothing to its gradient. The estimate is biased: from M
    images it is at most (D - 1) ln M for D dimensions.

    Args:
        latent: A sample of each posterior, (M, c, h, w).
        mean: Means of the posteriors, shaped like `latent`.
        logvar: Their log-variances, shaped like `latent`.
    """
    z, mean, logvar = latent.flatten(1)[:, None], mean.flatten(1)[None], logvar.flatten(1)[None]
    # (sample, posterior, dimension); ln 2 pi is left out, for it cancels
    log_densities = -0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar)
    joint = log_densities.sum(2).logsumexp(1)
    marginals = log_densities.logsumexp(1).sum(1)
    return (joint - marginals).mean() + (log_densities.shape[2] - 1) * math.log(len(latent))


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
