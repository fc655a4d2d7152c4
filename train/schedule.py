"""Learning rates and loss weights as pure functions of the step, so that resuming needs the step alone."""

import math
from typing import NamedTuple

from latent_ae.data.rng import equivariance_numbers

from .loss_config import GanSettings, LossSettings, scaled_sides
from .run_config import OptimSettings
from .settings import TrainSettings


def lr_scale_at(step: int, steps: int, optim: OptimSettings) -> float:
    """Fraction of the learning rate for this step (0-based): linear warm-up, then constant or cosine."""
    warm = min(1.0, (step + 1) / (optim.warmup + 1))
    if optim.schedule == "constant":
        return warm
    progress = min(1.0, max(0, step - optim.warmup) / max(1, steps - optim.warmup))
    return warm * (optim.final_lr + (1.0 - optim.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)))


KL_CYCLE_RISE = 0.5
"""Part of a cycle in which the KL weight rises (R of Fu et al. 2019)."""


def kl_weight_at(step: int, loss: LossSettings, steps: int) -> float:
    """Weight of the KL term in this step (0-based): constant, after a linear warm-up, or in cycles.

    A cycle rises linearly from 0 over its first half and then holds (Fu et al. 2019, eq. 6 and 7).
    """
    if loss.kl_cycles:
        period = steps / loss.kl_cycles
        return loss.kl * min(1.0, (step % math.ceil(period)) / period / KL_CYCLE_RISE)
    return loss.kl * min(1.0, (step + 1) / (loss.kl_warmup + 1))


def kl_capacity_at(step: int, loss: LossSettings, steps: int) -> float:
    """Nats per image that the rate is drawn to in this step (0-based): from 0 up in a line, then constant."""
    return loss.kl_capacity * min(1.0, step / (loss.kl_capacity_steps or steps))


class GanPhase(NamedTuple):
    """What the adversarial part does in one step."""

    discriminator: bool
    """The discriminator trains."""
    generator: float
    """Weight of the autoencoder's adversarial term before the adaptive factor."""
    r1: float = 0.0
    """Weight of the discriminator's gradient penalty."""


def gan_phase_at(step: int, gan: GanSettings) -> GanPhase:
    """Nothing before `start`; then the discriminator alone; then the autoencoder's term rises linearly."""
    if not gan.weight or step < gan.start:
        return GanPhase(False, 0.0)
    since = step - gan.start - gan.discriminator_warmup
    r1 = gan.r1 * gan.r1_every if (step - gan.start) % gan.r1_every == 0 else 0.0
    return GanPhase(True, gan.weight * min(1.0, max(0, since + 1) / (gan.warmup + 1)), r1)


class Equivariance(NamedTuple):
    """What is scaled and turned in one step."""

    side_px: int
    """Latent px."""
    quarter_turns: int
    of_latent: bool
    """The latent, and its target image with it; False: the image before it is encoded."""


LOW_RESOLUTION = 0.25
"""Part of the steps without a scaled latent whose images are scaled down instead (p_prior_s of EQ-VAE)."""


def equivariance_at(step: int, settings: TrainSettings, side_px: int, factor: int) -> Equivariance | None:
    """How this step's latents, or its images, are scaled and turned; a function of seed and step alone.

    EQ-VAE (Kouzelis et al. 2025) as its authors' code has it: with probability `latents.equivariance` the latent is
    scaled by a uniform choice of factors in [1/4, 1) and turned by 1 to 3 quarters; otherwise, with probability 1/4,
    the image is scaled before it is encoded, so that reconstruction at low resolution stays.
    """
    if not settings.latents.equivariance:
        return None
    of_latent, low, size, turns = equivariance_numbers(settings.seed, step)
    sides = scaled_sides(side_px, factor, settings.smallest_px)
    side = sides[int(size * len(sides))]
    if of_latent < settings.latents.equivariance:
        return Equivariance(side, 1 + int(turns * 3), True)
    return Equivariance(side, 0, False) if low < LOW_RESOLUTION else None


def ema_decay_at(step: int, decay: float) -> float:
    """The average's decay: short at first, so that it does not remember the initial weights."""
    return min(decay, (1.0 + step) / (10.0 + step))
