"""One plain line on how training goes, for people who do not read twelve curves."""

from collections.abc import Sequence
from typing import Any

from .settings import TrainSettings
from .terms import ACTIVE_NATS

RECENT = 5
"""Training lines that a verdict rests on: single steps are noise."""
SURE, BLIND = 0.97, 0.53
"""Discriminator accuracy above which it has won, and below which it sees nothing."""
YOUNG_STEPS = 1000
"""Steps that a discriminator has before it is called blind."""
CURES = "loss.kl_warmup, loss.free_bits or a weaker decoder (docs/family.md, posterior collapse)"
SILENT = 0.05
"""Share of active channels below which a level counts as collapsed; so many may be silent without a word."""
OFF_TARGET = 0.1
"""Distance of the rate from its target, relative to that, which is worth a word."""
DOMINANT, FAINT = 2.0, 0.005
"""The adversarial gradient at the last layer, relative to the reconstruction's, that is too much; almost nothing."""


def verdict(lines: Sequence[dict[str, Any]], settings: TrainSettings) -> str:
    """Judges the newest training lines of log.jsonl (oldest first, at least one)."""
    recent, gan = lines[-RECENT:], settings.gan
    mean = {key: sum(values) / len(values) for key in recent[-1] if len(values := _numbers(recent, key)) == len(recent)}
    step = recent[-1]["step"]
    said = []
    target = settings.loss.kl_target
    if target and abs(mean.get("kl_per_dimension", target) - target) > OFF_TARGET * target:
        said.append(
            f"the rate is not at loss.kl_target: {mean['kl_per_dimension']:.2g} nats per dimension, on the way to "
            f"{target:g} with a KL weight of {mean['kl_weight']:.1e}"
        )
    elif collapse := _collapse(mean):
        said.append(collapse)
    elif (rise := _rise(lines, "kl_per_dimension")) > 1.25:
        expected = "the latents still take in detail"
        said.append(f"KL rising ({rise:.1f}x since step {lines[0]['step']:,}): expected while {expected}")
    if not gan.weight:
        said.append("reconstruction losses only (gan.weight is 0)")
    elif step <= gan.start:
        said.append(f"reconstruction losses only; the discriminator starts at step {gan.start:,}")
    elif "accuracy" not in mean:
        said.append("the discriminator has just started")
    else:
        said.append(_adversarial(mean, step, settings))
    return "; ".join(said)


def _collapse(mean: dict[str, float]) -> str:
    """What part of the latent says nothing; empty where there is none. Averages of single passes, so a channel that is
    silent for most of the time counts."""
    levels = {key: share for key, share in mean.items() if key.startswith("active_level_") and share < SILENT}
    # a rate that is not finite is not in the log
    if "kl_per_dimension" not in mean:
        return ""
    if mean.get("active_channels", 1.0) < SILENT or mean["kl_per_dimension"] < ACTIVE_NATS:
        return (
            f"posterior collapse: the latents say almost nothing of the image ({mean['kl_per_dimension']:.2g} nats per "
            f"dimension); lower loss.kl, or try {CURES}"
        )
    if levels:
        names = ", ".join(key.removeprefix("active_level_") for key in levels)
        return f"posterior collapse in part: level {names} of the latent says almost nothing of the image; try {CURES}"
    if mean.get("active_channels", 1.0) < 1.0 - SILENT:
        return (
            f"posterior collapse in part: {1 - mean['active_channels']:.0%} of the latent's channels say almost "
            f"nothing of the image; harmless where the latent is larger than needed, else try {CURES}"
        )
    return ""


def _adversarial(mean: dict[str, float], step: int, settings: TrainSettings) -> str:
    gan = settings.gan
    tells = f"it tells {mean['accuracy']:.0%} of real and reconstructed patches apart"
    if step <= gan.start + gan.discriminator_warmup:
        return f"the discriminator learns alone until step {gan.start + gan.discriminator_warmup:,}: {tells}"
    # a cap that binds is usual; a gradient that is small even so is not
    risen = step > gan.start + gan.discriminator_warmup + gan.warmup
    capped = gan.adaptive and mean.get("adaptive_weight", 0.0) >= 0.99 * gan.adaptive_cap
    if risen and capped and mean.get("gradient_ratio", 1.0) < FAINT:
        return (
            f"the adversarial gradient is {mean['gradient_ratio']:.1g}x the reconstruction's at the last layer, and "
            "the adaptive weight is at gan.adaptive_cap: raise gan.adaptive_cap or gan.weight"
        )
    if mean.get("gradient_ratio", 0.0) > DOMINANT:
        return (
            f"the adversarial gradient is {mean['gradient_ratio']:.1f}x the reconstruction's at the last layer: "
            "expect invented texture; lower gan.weight"
        )
    if mean["accuracy"] > SURE:
        return (
            f"discriminator wins: {tells}, the gradient it gives is poor; "
            "lower optim.discriminator_lr, or try gan.lecam, gan.r1 or gan.diffaug"
        )
    if step - gan.start < YOUNG_STEPS:
        return f"the discriminator is still young: {tells}"
    if mean["accuracy"] < BLIND:
        return f"discriminator blind: {tells}; raise optim.discriminator_lr or give it more steps"
    return f"balanced: {tells}"


def _numbers(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if isinstance(line.get(key), (int, float))]


def _rise(lines: Sequence[dict[str, Any]], key: str) -> float:
    """Newest third over oldest third; 1 when there is too little to compare."""
    values = _numbers(lines, key)
    third = len(values) // 3
    if third < 2:
        return 1.0
    return sum(values[-third:]) / max(sum(values[:third]), 1e-12)
