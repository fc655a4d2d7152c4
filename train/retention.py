"""Which checkpoints stay on the disk."""

from collections.abc import Iterable, Mapping

from .loss_config import GanSettings
from .run_config import CheckpointSettings


def kept_steps(
    steps: Iterable[int], settings: CheckpointSettings, gan: GanSettings, distances: Mapping[int, float]
) -> set[int]:
    """Of the checkpoints at `steps`: the newest `keep`, each multiple of `keep_every`, the best, and the last one
    before the adversarial term (the place to return to when it goes wrong).

    `distances`: held-out LPIPS by step, of the steps that were validated; the lowest is the best.
    """
    ordered = sorted(steps)
    kept = set(ordered[-settings.keep :])
    if settings.keep_every:
        kept |= {step for step in ordered if step % settings.keep_every == 0}
    if validated := [step for step in ordered if step in distances]:
        kept.add(min(validated, key=lambda step: (distances[step], -step)))
    if before := before_gan(ordered, gan):
        kept.add(before)
    return kept


def before_gan(steps: Iterable[int], gan: GanSettings) -> int | None:
    """The last of `steps` whose weights no discriminator has moved."""
    if not gan.weight:
        return None
    return max((step for step in steps if step <= gan.start + gan.discriminator_warmup), default=None)
