"""The KL divergence of the posterior from the prior: its weight, schedules, controller, free bits and capacity."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from latent_ae.config import SWITCH, NonNegative, Positive, Problem, Settings, Weight
from latent_ae.models.likelihood import bits_per_dimension
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Objective, Pass, RunFacts, numbers, recent_means

ACTIVE_NATS = 0.01
"""KL per latent dimension from which a channel counts as active."""
CYCLE_RISE = 0.5
"""Fraction of a cycle in which the weight rises (R of Fu et al. 2019)."""
PROPORTIONAL, INTEGRAL = 2.0, 0.02
"""Gains of the controller: the change of the weight's logarithm per change of the error, and per error and step."""
LARGEST_ERROR = 1.0
"""Errors are clamped to this size: a KL that is far off changes the weight by a factor e in 50 steps."""
WEIGHT_RANGE = (1e-12, 1e3)
"""Range of the controlled weight."""
BALANCE_NATS = 0.01
"""Added to the KL of each level before it is balanced, nats per image."""
SHAPING = ("kl_warmup", "kl_cycles", "kl_target", "free_bits", "kl_capacity")
"""Settings that shape the KL term."""
CURES = "loss.kl_warmup, loss.free_bits or a weaker decoder (docs/vaes.md, posterior collapse)"
SILENT = 0.05
"""Fraction of active channels below which a level counts as collapsed, and of inactive ones that is not reported."""
COLLAPSED_NATS, AMPLE_NATS = 5.0, 20.0
"""Rates in nats per image below which a posterior counts as collapsed, and from which inactive channels may be harmless
(see `collapsed`)."""
OFF_TARGET = 0.1
"""Relative distance of the KL from its target above which it is reported."""


class KLSettings(Settings):
    """The KL term."""

    kl: Weight = 1e-6
    """Weight of the KL divergence, which is summed per sample and divided by the number of image elements."""
    kl_warmup: NonNegative = 0
    """Steps over which that weight rises from 0."""
    kl_warmup_shape: Literal["linear", "cosine"] = "linear"
    """Whether it rises in a straight line or along half a cosine."""
    kl_balance: Annotated[bool, SWITCH] = False
    """While kl_warmup lasts, weight the KL of each level of latents by what it was in the step before, relative to the
    level's size, so that no level of a HierarchicalVAE is left unused (NVAE)."""
    kl_cycles: NonNegative = 0
    """Number of cycles over the run; in each the weight rises from 0 in the first half and then holds; 0 has none."""
    kl_target: Annotated[Weight, SWITCH] = 0.0
    """Nats per latent dimension that a controller keeps by changing the weight, which starts at `kl`; 0 has no
    controller."""
    free_bits: Weight = 0.0
    """Nats per latent dimension below which a sample's channel has no KL gradient."""
    kl_capacity: Weight = 0.0
    """Final KL in nats per image, to which the KL term draws it from either side; 0 draws it to the prior."""
    kl_capacity_steps: Positive | None = None
    """Steps over which the capacity rises from 0; null takes all steps."""


class KL(Objective[KLSettings]):
    """The weighted KL term of a posterior; nothing is computed if the encoder is fixed or there is no posterior."""

    name, section, docs = "kl", "loss", "docs/latents.md"
    plan_line = "KL"
    charts = {
        "KL divergence per image (nats)": ("kl_per_image",),
        "KL divergence per latent dimension (nats)": ("kl_per_dimension",),
        "KL weight": ("kl_weight",),
    }

    control: Tensor
    level_rates: Tensor

    def __init__(self, own: KLSettings, run: RunFacts, levels: int = 1) -> None:
        super().__init__(own, run)
        if own.kl_balance:
            # KL of each level in the step before, nats per image
            self.register_buffer("level_rates", torch.zeros(levels))
        if own.kl_target:
            # the logarithm of the weight, and the last error
            self.register_buffer("control", torch.tensor([math.log(own.kl), 0.0]))

    @classmethod
    def enabled(cls, own: KLSettings) -> bool:
        return own.kl > 0

    @classmethod
    def problems(cls, own: KLSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        shaping = [key for key in SHAPING if getattr(own, key)]
        if shaping and not own.kl:
            yield Problem(
                "loss.kl", f"0 takes the KL term away, which {', '.join(shaping)} would shape: give it a weight"
            )
        both = [key for key in shaping if key not in ("free_bits", "kl_capacity")]
        if len(both) > 1:
            yield Problem(
                f"loss.{both[-1]}", f"{' and '.join(both)} all set the weight of the KL term: keep one of them"
            )
        others = [key for key in shaping if key != "kl_capacity"]
        if own.kl_capacity and others:
            yield Problem(
                "loss.kl_capacity",
                f"draws the rate to a value of its own, and {', '.join(others)} would, too: keep one",
            )
        if own.kl_capacity_steps and not own.kl_capacity:
            yield Problem(
                "loss.kl_capacity_steps", "there is no kl_capacity that would rise: give it or leave this out"
            )
        if own.kl_warmup_shape != "linear" and not own.kl_warmup:
            yield Problem("loss.kl_warmup_shape", "is the shape of kl_warmup, which is 0: give its steps")
        if own.kl_balance and not own.kl_warmup:
            yield Problem("loss.kl_balance", "lasts as long as kl_warmup, which is 0: give its steps")
        for key in ("free_bits", "kl_capacity"):
            if own.kl_balance and getattr(own, key):
                yield Problem(f"loss.{key}", "changes the KL that kl_balance weights by level: keep one of them")
        if own.kl_target and own.free_bits >= own.kl_target:
            yield Problem(
                "loss.free_bits",
                f"{own.free_bits:g} nats are kept free of the KL term, so it cannot bring the rate down to kl_target "
                f"{own.kl_target:g}: lower free_bits or raise kl_target",
            )
        if own.kl_capacity and len(run.crop_sizes) > 1:
            yield Problem(
                "loss.kl_capacity", "is in nats per image, and data.buckets has images of several sizes: keep one"
            )
        if 2 * own.kl_cycles > run.steps:
            yield Problem("loss.kl_cycles", f"{own.kl_cycles} cycles in {run.steps} steps: a cycle needs two")
        if run.train == "decoder":
            for key in shaping:
                yield Problem(f"loss.{key}", "shapes the posterior, which train leaves fixed: set it to 0")
        if model is None:
            return
        if shaping and not model.random:
            yield Problem(f"loss.{shaping[0]}", f"shapes a KL term, and {model.name} has no posterior: set it to 0")
        if own.kl_balance and model.latent != "hierarchy":
            yield Problem(
                "loss.kl_balance", f"is for the levels of a HierarchicalVAE, and {model.name} has none: set it to false"
            )
        of_each = [key for key in ("free_bits", "kl_capacity") if getattr(own, key)]
        if of_each and model.latent == "flow":
            yield Problem(
                f"loss.{of_each[0]}",
                f"the rates of {model.name} are of single samples and may be negative, so whether the KL is below it "
                "is not known: set it to 0 (loss.kl_warmup and loss.kl_target work)",
            )

    @classmethod
    def build(cls, own: KLSettings, run: RunFacts, autoencoder: nn.Module, device: torch.device) -> "KL":
        return cls(own, run, len(getattr(autoencoder, "shapes", [()]))).to(device)

    @classmethod
    def describe(cls, own: KLSettings, run: RunFacts) -> str:
        if run.train == "decoder":
            return ""
        along = " along a cosine" if own.kl_warmup_shape == "cosine" else ""
        parts = {
            f"weight {own.kl:g}": not own.kl_target,
            f"rising over {own.kl_warmup:,} steps{along}": own.kl_warmup,
            "balanced between levels meanwhile": own.kl_balance,
            f"rising {own.kl_cycles} times, every {run.steps / (own.kl_cycles or 1):,.0f} steps": own.kl_cycles,
            f"weight from {own.kl:g} on, controlled to {own.kl_target:g} nats per dimension": own.kl_target,
            f"{own.free_bits:g} nats per dimension free": own.free_bits,
            f"drawn to {own.kl_capacity:g} nats per image by step {own.kl_capacity_steps or run.steps:,}": (
                own.kl_capacity
            ),
        }
        return ", ".join(text for text, on in parts.items() if on)

    @classmethod
    def diagnose(cls, own: KLSettings, run: RunFacts, lines: Sequence[Mapping[str, Any]]) -> str:
        mean, target = recent_means(lines), own.kl_target
        if target and abs(mean.get("kl_per_dimension", target) - target) > OFF_TARGET * target:
            return (
                f"the rate is not at loss.kl_target: {mean['kl_per_dimension']:.2g} nats per dimension, on the way to "
                f"{target:g} with a KL weight of {mean['kl_weight']:.1e}"
            )
        if collapse := collapsed(mean):
            return collapse
        if (rise := rise_of(lines, "kl_per_dimension")) > 1.25:
            expected = "the latents still take in detail"
            return f"KL rising ({rise:.1f}x since step {lines[0]['step']:,}): expected while {expected}"
        return ""

    def backward(self, p: Pass) -> None:
        own, rates = self.own, p.out.rates
        if not any(rate.requires_grad for rate in rates):  # the encoder is fixed, or there is no posterior
            return
        capacity = capacity_at(p.step, own, self.run.steps)
        loss, logs = kl_terms(own, rates, p.batch.images[0].numel(), capacity)
        p.logs |= logs
        if own.kl_balance and p.step < own.kl_warmup:
            totals = torch.stack([rate.sum() / len(rate) for rate in rates])
            p.global_means["kl/levels"] = totals.detach()
            # of the step before, because the batch's own KL would depend on how it is split
            loss = (totals * balance(self.level_rates, rates)).sum() / p.batch.images[0].numel()
        if own.kl_target:
            p.global_means["kl/per_dimension"] = logs["kl_per_dimension"]
        weight = self.control[0].exp() if own.kl_target else weight_at(p.step, own, self.run.steps)
        p.logs["kl_weight"] = torch.ones_like(loss.detach()) * weight
        if p.likelihood is not None:
            p.logs["bits_per_dimension"] = bits_per_dimension(p.logs[p.likelihood] + logs["kl"], p.likelihood)
        p.send_loss(loss, weight * p.batch.encoded_area)

    def remember(self, means: Mapping[str, Tensor], logs: dict[str, Tensor]) -> None:
        if (kl_per_dimension := means.get("kl/per_dimension")) is not None:
            self.turn_controller(kl_per_dimension)
        if (level_rates := means.get("kl/levels")) is not None:
            self.level_rates.copy_(level_rates)

    def turn_controller(self, kl_per_dimension: Tensor) -> None:
        """Update the controlled weight: log w += P (e - e') + I e, e = log(KL / target), e' that of the step before.

        Proportional and integral control as in ControlVAE (Shao et al. 2020), on the weight's logarithm as in GECO
        (Rezende and Viola 2018): a KL that is off by a factor moves the weight by a factor, whatever their sizes.

        Args:
            kl_per_dimension: KL in nats per latent dimension, mean over the global batch; a scalar.
        """
        # the KL of `FlowAutoencoderKL` is an estimate from one sample and may be negative
        ratio = (kl_per_dimension / self.own.kl_target).clamp(min=1e-6)
        error = torch.log(ratio).clamp(-LARGEST_ERROR, LARGEST_ERROR)
        log_weight, before = self.control
        log_weight = log_weight + PROPORTIONAL * (error - before) + INTEGRAL * error
        low, high = (math.log(weight) for weight in WEIGHT_RANGE)
        moved = torch.stack([log_weight.clamp(low, high), error])
        self.control.copy_(torch.where(moved.isfinite().all(), moved, self.control))


def weight_at(step: int, own: KLSettings, steps: int) -> float:
    """Return the weight of the KL term in a step: constant, after a warm-up, or in cycles.

    A warm-up rises linearly or along half a cosine (Ramesh et al. 2021, appendix A.2). A cycle rises linearly from 0
    over its first half and then holds (Fu et al. 2019, eq. 6 and 7).

    Args:
        step: Number of the step, from 0.
        own: The settings.
        steps: Number of steps of the run.
    """
    if own.kl_cycles:
        period = steps / own.kl_cycles
        return own.kl * min(1.0, (step % math.ceil(period)) / period / CYCLE_RISE)
    done = min(1.0, (step + 1) / (own.kl_warmup + 1))
    return own.kl * (done if own.kl_warmup_shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * done))


def capacity_at(step: int, own: KLSettings, steps: int) -> float:
    """Return the capacity in a step, in nats per image: it rises linearly from 0 and is then constant.

    Args:
        step: Number of the step, from 0.
        own: The settings.
        steps: Number of steps of the run.
    """
    return own.kl_capacity * min(1.0, step / (own.kl_capacity_steps or steps))


def kl_terms(
    own: KLSettings, rates: Sequence[Tensor], image_elements: int, capacity: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the unweighted KL term, and values to log.

    Args:
        own: The settings: free bits, and whether there is a capacity.
        rates: KL of each latent dimension in nats, (N, c, h, w), for each level of the latent.
        image_elements: C x H x W.
        capacity: Capacity in this step, nats per image.
    """
    loss = kl = kl_loss(rates, image_elements)
    dimensions = sum(rate[0].numel() for rate in rates)
    logs = {"kl": kl.detach(), "kl_per_dimension": kl.detach() * (image_elements / dimensions)}
    logs["kl_per_image"] = kl.detach() * image_elements
    # for this micro-batch; in the log these are averaged over passes and processes
    active = [(rate.detach().mean((0, 2, 3)) >= ACTIVE_NATS).float() for rate in rates]
    logs["active_channels"] = torch.cat(active).mean()
    if len(rates) > 1:
        logs |= {f"kl_level_{n}": kl_loss([rate.detach()], image_elements) for n, rate in enumerate(rates, start=1)}
        logs |= {f"active_level_{n}": part.mean() for n, part in enumerate(active, start=1)}
    if own.free_bits:
        loss, logs["kl_free"] = free_bits_loss(rates, image_elements, own.free_bits)
    if own.kl_capacity:
        loss = capacity_loss(rates, image_elements, capacity)
        logs["kl_capacity"] = torch.full_like(kl.detach(), capacity)
    return loss, logs


def balance(level_rates: Tensor, rates: Sequence[Tensor]) -> Tensor:
    """Return the weights of the levels' KL, whose mean is 1 (Vahdat and Kautz 2020, appendix A, and their code).

    The weight is proportional to the KL over the positions that a level would have if those of its grid were shared out
    between the levels on it: a level that has much pays more, one that has little may take in more.

    Args:
        level_rates: (levels,), KL of each level, nats per image.
        rates: Tensors of the levels' shapes, (N, c, h, w) each.
    """
    grids = [tuple(rate.shape[-2:]) for rate in rates]
    sizes = [height * width / grids.count((height, width)) for height, width in grids]
    weights = (level_rates + BALANCE_NATS) / level_rates.new_tensor(sizes)
    return weights / weights.mean()


def kl_loss(rates: Sequence[Tensor], image_elements: int) -> Tensor:
    """Return the KL in nats summed over a sample's latent, divided by C x H x W image elements, averaged over samples.

    Latent diffusion sums the pixel loss and the KL over a sample and weights the KL with 1e-6. Dividing both sums by
    the number of image elements keeps their ratio, so with a per-element pixel loss the weight 1e-6 means the same
    here.

    Args:
        rates: KL of each latent dimension in nats, (N, c, h, w), for each level of the latent.
        image_elements: C x H x W.
    """
    return torch.stack([rate.sum() for rate in rates]).sum() / (rates[0].shape[0] * image_elements)


def free_bits_loss(rates: Sequence[Tensor], image_elements: int, floor: float) -> tuple[Tensor, Tensor]:
    """Return `kl_loss` in which a channel below `floor` counts as `floor`, and the fraction of such channels.

    Free bits of Kingma et al. 2016 (section 3 and appendix C.8): sum over channels of max(floor, KL), so a channel
    below the floor has no gradient. KL is a sample's mean over the channel's positions; the paper's mean over the
    minibatch as well would make the gradient depend on how a batch is split over passes and processes.

    Args:
        rates: KL of each latent dimension in nats, (N, c, h, w), for each level of the latent.
        image_elements: C x H x W.
        floor: Nats per latent dimension.
    """
    channels = [rate.mean((2, 3)) for rate in rates]
    elements = rates[0].shape[0] * image_elements
    terms = [
        means.clamp(min=floor).sum() * (rate[0, 0].numel() / elements)
        for means, rate in zip(channels, rates, strict=True)
    ]
    return torch.stack(terms).sum(), (torch.cat(channels, 1).detach() < floor).float().mean()


def capacity_loss(rates: Sequence[Tensor], image_elements: int, capacity: float) -> Tensor:
    """Return |KL - C| of each sample's whole latent, divided by the image elements, averaged over samples.

    Burgess et al. 2018, eq. 8, for each sample as in their equation. With the batch's mean the gradient would depend on
    how a batch is split over passes and processes.

    Args:
        rates: KL of each latent dimension in nats, (N, c, h, w), for each level of the latent.
        image_elements: C x H x W.
        capacity: C in nats per image.
    """
    totals = torch.stack([rate.flatten(1).sum(1) for rate in rates]).sum(0)
    return (totals - capacity).abs().mean() / image_elements


def collapsed(mean: Mapping[str, float]) -> str:
    """Return which part of the latent has collapsed to the prior, as a clause; empty if none has.

    The rate in nats per image decides, and not the share of inactive channels: that is large, too, where a latent is
    larger than needed. The rate bounds the mutual information of image and latent (Hoffman and Johnson 2016), so R nats
    tell apart at most about e^R images. Below COLLAPSED_NATS these are 150: the latent says less than one code of a
    small codebook. From AMPLE_NATS on they are 5e8, more than the images of almost any data set, so channels without a
    rate need not be a loss. The means are averages of single passes, so a channel that is inactive most of the time
    counts as inactive.

    Args:
        mean: Means of logged values by name.
    """
    if (rate := mean.get("kl_per_image")) is None:  # the log leaves out a KL that is not finite
        return ""
    said, nats = "say almost nothing of the image", f"{rate:.2g} nats per image"
    # while a small capacity is given, the rate is drawn to it
    if rate < min(COLLAPSED_NATS, 0.5 * mean.get("kl_capacity", math.inf)):
        return f"posterior collapse: the latents {said} ({nats}); lower loss.kl, or try {CURES}"
    levels = [key for key, share in mean.items() if key.startswith("active_level_") and share < SILENT]
    if levels:
        names = ", ".join(key.removeprefix("active_level_") for key in levels)
        return f"posterior collapse in part: level {names} of the latent says almost nothing of the image; try {CURES}"
    if (inactive := 1.0 - mean.get("active_channels", 1.0)) > SILENT:
        harmless = "harmless where the latent is larger than needed, else " if rate >= AMPLE_NATS else ""
        return (
            f"posterior collapse in part: {inactive:.0%} of the latent's channels {said}, all together {nats}; "
            f"{harmless}try {CURES}"
        )
    return ""


def rise_of(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of the newest third of the logged values over that of the oldest; 1 if there are too few."""
    values = numbers(lines, key)
    third = len(values) // 3
    if third < 2:
        return 1.0
    return sum(values[-third:]) / max(sum(values[:third]), 1e-12)
