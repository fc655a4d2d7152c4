"""The distance between a reconstruction and its image: a pixel loss or likelihood, and LPIPS."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from latent_ae.config import FIXED, Positive, Problem, Settings, Weight, fixed_with
from latent_ae.data.rng import downsampling_number
from latent_ae.models.likelihood import LIKELIHOODS, SCALED, STATED, Likelihood, LikelihoodKind, log_likelihood
from latent_ae.models.logistic_mixture import mixture_log_likelihood
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.bands import unseen
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts, mean_over_views
from latent_ae.pretrained.lpips import LPIPS, TRUNKS

PixelLoss = Literal["l1", "l2", "charbonnier"]
CHARBONNIER_EPS = 1e-3
NEEDED = {
    "logit_laplace": "the scale of each value, as a DiscreteVAE has",
    "logistic_mixture": "a mixture for each pixel, as a HierarchicalVAE with mixtures in model.config has",
}
"""What a decoder must give for a likelihood of STATED."""


class ReconstructionSettings(Settings):
    """Reconstruction losses."""

    pixel: Annotated[
        Literal[PixelLoss, LikelihoodKind],
        fixed_with("learned_logvar"),
    ] = "l1"
    """A distance, or the negative logarithm of a likelihood in nats: with kl=1 and perceptual=0 the loss is minus the
    evidence lower bound. logit_laplace is for decoders that give a scale for each value (DiscreteVAE), logistic_mixture
    for those that give a mixture for each pixel (HierarchicalVAE with mixtures)."""
    pixel_weight: Weight = 1.0
    """Weight of the pixel term."""
    scale: Annotated[float, Field(gt=0), fixed_with("learned_logvar")] = 0.1
    """Standard deviation (gaussian) or scale (logistic) of a likelihood, in [-1, 1] units."""
    perceptual: Weight = 1.0
    """Weight of LPIPS; 0 neither loads nor computes it."""
    perceptual_net: Annotated[Literal["vgg", "alex"], FIXED] = "vgg"
    """Network of LPIPS."""
    perceptual_every: Positive = 1
    """Compute LPIPS on every n-th sample only, weighted so that its mean stays the same: cheaper steps on small
    machines."""
    scale_consistency: Weight = 0.0
    """Weight of the same losses between a downsampled latent's image and the equally downsampled image, by 2 or 4; it
    costs a second pass of the decoder at that size."""
    learned_logvar: Annotated[bool, FIXED] = False
    """Learn the log-variance s of the reconstruction's likelihood: loss / exp(s) + s. With pixel=gaussian or logistic s
    is that of the pixels alone, and starts at the logarithm of `scale` squared."""


class Reconstruction(Objective[ReconstructionSettings]):
    """The weighted sum of the pixel loss and LPIPS, divided by exp(s) if a log-variance s is learned.

    Args:
        own: The settings.
        run: Facts of the run.
        perceptual: LPIPS; None if it has no weight.
    """

    name, section, docs = "reconstruction", "loss", "docs/losses.md"
    plan_line = "losses"
    charts = {"Reconstruction losses": ("l1", "l2", "charbonnier", "lpips")}
    lr_scale = 10.0  # the log-variance is a single number that moves far from its start

    perceptual: nn.Module | None

    def __init__(self, own: ReconstructionSettings, run: RunFacts, perceptual: nn.Module | None = None) -> None:
        super().__init__(own, run)
        self.hold(perceptual=perceptual)
        if own.learned_logvar:
            # for a likelihood with a scale: twice the logarithm of the scale
            self.logvar = nn.Parameter(torch.tensor(2.0 * math.log(own.scale if own.pixel in SCALED else 1.0)))

    @classmethod
    def problems(cls, own: ReconstructionSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.scale != ReconstructionSettings().scale and own.pixel not in SCALED:
            yield Problem("loss.scale", f"pixel: {own.pixel} has none; it is for gaussian and logistic")
        if own.pixel in LIKELIHOODS and not own.pixel_weight:
            yield Problem(
                "loss.pixel_weight", f"0 takes the likelihood away that loss.pixel {own.pixel} names: give it a weight"
            )
        if own.learned_logvar and own.pixel == "bernoulli":
            yield Problem("loss.learned_logvar", "bernoulli has no variance to learn: set it to false")
        if own.learned_logvar and own.pixel in STATED:
            yield Problem("loss.learned_logvar", f"the decoder gives the scale of {own.pixel}: set it to false")
        if own.pixel in STATED and model is not None and model.states != own.pixel:
            yield Problem(
                "loss.pixel",
                f"{own.pixel} needs a decoder that gives {NEEDED[own.pixel]}: {model.name} has none, so use logistic",
            )
        if own.pixel == "logistic_mixture" and "gan" in run.enabled:
            yield Problem(
                "gan.weight",
                "an adversary judges an image, and loss.pixel logistic_mixture has no gradient there: set it to 0",
            )
        by_flow = run.existing if model is None else model.flow_matching  # which has a loss of its own
        if not (own.pixel_weight or own.perceptual or by_flow or run.enabled & {"convnext", "dino"}):
            yield Problem("loss", "pixel_weight and perceptual are both 0: nothing would be reconstructed")
        if own.scale_consistency:
            yield from scale_problems(own, run, model)
        least = TRUNKS[own.perceptual_net].min_px
        if own.perceptual and min(run.resolution, run.validation_px) < least:
            yield Problem("loss.perceptual_net", f"{own.perceptual_net} needs images of at least {least} px for LPIPS")
        if own.perceptual:
            yield from unseen("loss.perceptual", "LPIPS", run, model)
        if own.pixel in LIKELIHOODS and "alpha" in run.enabled:
            yield Problem(
                "loss.backgrounds",
                f"compares composites, and loss.pixel {own.pixel} is a likelihood of the channels: use l1, l2 or "
                "charbonnier",
            )

    @classmethod
    def needs_px(cls, own: ReconstructionSettings) -> int:
        return TRUNKS[own.perceptual_net].min_px if own.perceptual else 1

    @classmethod
    def build(
        cls, own: ReconstructionSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device
    ) -> "Reconstruction":
        perceptual = None
        if own.perceptual:  # no weights are needed where only shapes are asked for
            perceptual = LPIPS(own.perceptual_net, run.weights_dir, weights=device.type != "meta").to(device)
        return cls(own, run, perceptual).to(device)

    @classmethod
    def describe(cls, own: ReconstructionSettings, run: RunFacts) -> str:
        terms = [f"{own.pixel} with weight {own.pixel_weight:g}"] if own.pixel_weight else []
        terms += [f"LPIPS ({own.perceptual_net}) with weight {own.perceptual:g}"] if own.perceptual else []
        terms += [f"both of downsampled latents with weight {own.scale_consistency:g}"] if own.scale_consistency else []
        return ", ".join([*terms, *(["over a learned variance"] if own.learned_logvar else [])])

    def prepare(self, batch: Batch, step: int) -> Batch:
        if not self.own.scale_consistency:
            return batch
        allowed = scales(self.own, batch.images.shape[-1], batch.noise.shape[-1])
        times = allowed[int(downsampling_number(self.run.seed, step) * len(allowed))]
        return batch._replace(second=partial(downsampled, times=times))

    def cost(self, step: int) -> float:
        return 0.5 - downsampling_number(self.run.seed, step) if self.own.scale_consistency else 0.0

    def backward(self, p: Pass) -> None:
        own, area = self.own, p.batch.area
        stated = None
        if own.pixel in STATED:
            assert p.out.stated is not None
            stated = p.out.stated.detach().requires_grad_()
        loss = area * self.loss(p, p.image, p.batch.target, stated=stated)
        if stated is not None and p.out.stated is not None:
            # mixtures do not depend on the image, which is their mean
            gradient, of_stated = torch.autograd.grad(loss, (p.image, stated), materialize_grads=True)
            p.send(p.out.stated, of_stated)
        elif not own.learned_logvar:
            (gradient,) = torch.autograd.grad(loss, p.image)
        elif own.pixel in LIKELIHOODS:
            gradient, p.global_means["reconstruction/logvar"] = torch.autograd.grad(loss, (p.image, self.logvar))
        else:
            # d/dr and d/ds of loss / exp(s) + s; s has no graph: its gradient is one number
            (gradient,) = torch.autograd.grad(loss, p.image)
            precision = torch.exp(-self.logvar.detach())
            gradient = gradient * precision
            p.global_means["reconstruction/logvar"] = area - loss.detach() * precision
        p.send_reconstruction(gradient)
        second = p.out.second
        if second is not None and p.batch.second is not None and second.requires_grad:
            small = second.detach().requires_grad_()
            loss = self.loss(p, small, p.batch.second(p.batch.target), "_downsampled")
            (gradient,) = torch.autograd.grad(loss, small)
            p.send(second, own.scale_consistency * gradient)

    def loss(self, p: Pass, image: Tensor, target: Tensor, ending: str = "", stated: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the pixel and LPIPS terms, with a graph at `image`, and log each term.

        Args:
            p: The pass.
            image: (N, C, H, W), reconstructions.
            target: (N, C, H, W), the images that they should be.
            ending: End of the terms' names in the log.
            stated: (N, P, H, W), what the decoder gives of a likelihood of STATED, with a graph.
        """
        own = self.own
        terms: list[Tensor] = []
        if own.pixel_weight:
            if own.pixel in LIKELIHOODS:
                if own.pixel == "logistic_mixture":
                    assert stated is not None
                    pixel = -mixture_log_likelihood(stated, target).mean() / target.shape[1]
                else:
                    if stated is not None:
                        known = 2.0 * stated
                    else:
                        known = self.logvar if own.learned_logvar else image.new_full((), 2.0 * math.log(own.scale))
                    pixel = -log_likelihood(own.pixel, image, target, known).mean()
                p.likelihood = own.pixel
            else:
                distance = partial(pixel_loss, cast(PixelLoss, own.pixel))
                pixel = mean_over_views(p.batch.compared, distance, image, target)
            p.logs[own.pixel + ending] = pixel.detach()
            terms.append(own.pixel_weight * pixel)
        if own.perceptual and self.perceptual is not None:
            rows, network = every_nth(p.batch, own.perceptual_every), self.perceptual
            # a sum over the chosen rows, scaled as if all rows had been computed: its mean over the global batch
            # is the same however the batch is split
            perceptual = image.new_zeros(())
            if range(*rows.indices(len(image))):
                with p.autocast():
                    distances = mean_over_views(p.batch.seen, lambda x, y: network(x[rows], y[rows]), image, target)
                perceptual = distances.sum() * (own.perceptual_every / len(image))
                terms.append(own.perceptual * perceptual)
            p.logs["lpips" + ending] = perceptual.detach()
        return torch.stack(terms).sum() if terms else (image * 0.0).sum()

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        if (gradient := means.get("reconstruction/logvar")) is not None:
            # gradient clipping leaves it alone, and one very large value would slow down Adam for many steps
            self.logvar.grad = gradient.detach().clamp(-1.0, 1.0)
            logs["logvar"] = self.logvar.detach().clone()

    def facts(self) -> dict[str, Any]:
        """Return the likelihood of which the pixel loss is the negative logarithm, or None."""
        own = self.own
        if own.pixel not in LIKELIHOODS:
            return {"likelihood": None}
        scale = math.exp(0.5 * self.logvar.item()) if own.learned_logvar else own.scale
        return {"likelihood": Likelihood(own.pixel, scale if own.pixel in SCALED else None)._asdict()}


def downsampled(x: Tensor, times: int) -> Tensor:
    """Return latents or images at a fraction of their side, bilinearly (Skorokhodov et al. 2025).

    Args:
        x: (N, C, H, W).
        times: Divisor of the sides.
    """
    return F.interpolate(x, scale_factor=1.0 / times, mode="bilinear", align_corners=False)


def scales(own: ReconstructionSettings, image_px: int, latent_px: int) -> tuple[int, ...]:
    """Return by how much latents and images can be downsampled for `loss.scale_consistency`: of 2 and 4.

    Args:
        own: The settings.
        image_px: Side of the images.
        latent_px: Side of the latents, in latent px, which must divide into whole ones.
    """
    least = Reconstruction.needs_px(own)
    return tuple(times for times in (2, 4) if latent_px % times == 0 and image_px // times >= least)


def scale_problems(own: ReconstructionSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
    """Yield what does not go with `loss.scale_consistency`, which is on.

    Args:
        own: The settings.
        run: Facts of the run.
        model: Facts of the autoencoder; None before they are known.
    """
    key = "loss.scale_consistency"
    if own.pixel in LIKELIHOODS or own.learned_logvar:
        which = "loss.learned_logvar" if own.learned_logvar else f"loss.pixel {own.pixel}"
        yield Problem(key, f"is no part of the likelihood that {which} makes of the loss: set it to 0")
    if not (own.pixel_weight or own.perceptual):
        yield Problem(key, "repeats loss.pixel and loss.perceptual, and both have weight 0: set it to 0")
    if not run.one_size:
        yield Problem(key, "downsamples latents, as latents.equivariance does in its steps: set one to 0")
    if len(run.crop_sizes) > 1:
        yield Problem(key, "downsamples images of one size: set it to 0, or leave data.buckets out")
    if run.compile:
        yield Problem(key, "decodes images of other sizes, for which networks are compiled again: set compile=false")
    if model is None:
        return
    if model.flow_matching:
        yield Problem(key, f"decodes a second time, which {model.name} does in steps from noise: set it to 0")
    elif not model.one_grid:
        yield Problem(key, model.fixed_latent)
    elif model.side is not None:
        yield Problem(key, f"downsamples images, and {model.name} takes images of {model.side} px only: set it to 0")
    elif not scales(own, run.resolution, run.resolution // model.factor):
        yield Problem(
            key,
            f"halves latents of {run.resolution // model.factor} px and images of {run.resolution} px, of which the "
            f"losses need {Reconstruction.needs_px(own)} px: raise data.resolution to a multiple of {2 * model.factor}",
        )


def every_nth(batch: Batch, every: int) -> slice:
    """Return the rows of the samples whose global number is a multiple of `every`."""
    return slice(-batch.numbers[0] % every, None, every)


def pixel_loss(kind: PixelLoss, reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the mean over all elements of |d|, d^2 or sqrt(d^2 + eps^2) - eps (Charbonnier et al. 1994).

    Args:
        kind: "l1", "l2" or "charbonnier" (eps is 1e-3).
        reconstruction: (N, C, H, W) in [-1, 1] units.
        target: (N, C, H, W); d is the difference.
    """
    if kind == "l1":
        return F.l1_loss(reconstruction, target)
    if kind == "l2":
        return F.mse_loss(reconstruction, target)
    difference = reconstruction - target
    return (torch.sqrt(difference.square() + CHARBONNIER_EPS**2) - CHARBONNIER_EPS).mean()
