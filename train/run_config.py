"""The settings of how a run goes: optimizer, average, checkpoints, validation and log."""

from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import FIXED, SILENT, SWITCH, Decay, Fraction, NonNegative, Positive, Settings, Weight

Rate = Annotated[float, Field(gt=0)]


class OptimSettings(Settings):
    """The learning rate is used as written: nothing scales it by the batch. The discriminator has AdamW."""

    kind: Annotated[Literal["adamw", "muon"], FIXED] = "adamw"
    """muon: Muon for the autoencoder's convolutions and matrices but the first and last, AdamW for the rest of it."""
    lr: Rate = 1e-4
    """Learning rate of the autoencoder, used as written."""
    discriminator_lr: Rate | None = None
    """null: the same as lr."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's betas for the autoencoder."""
    discriminator_betas: tuple[Decay, Decay] = (0.5, 0.9)
    """Adam's betas for the discriminator."""
    eps: Rate = 1e-13
    """What Adam adds to a gradient's root mean square, for all networks. Losses are means here; the 1e-8 of trainers
    that sum over an image's C x H x W elements is 1e-8 / (C x H x W), 5e-14 at 256 px."""
    weight_decay: Weight = 0.0
    """Decoupled, as in AdamW, of both networks."""
    warmup: NonNegative = 1000
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """What follows the warm-up: cosine falls to final_lr at the last step."""
    final_lr: Fraction = 0.1
    """Learning rate at the end as a fraction of lr (cosine)."""
    clip: Weight = 1.0
    """Largest gradient norm of each network; 0 does not clip."""
    max_skipped: Positive = 20
    """So many steps in a row with gradients that are not finite stop the run; single ones are skipped and named."""


class EmaSettings(Settings):
    """Average of the autoencoder's weights; it is what validation and export use."""

    decay: Annotated[Decay, SWITCH] = 0.9999
    """0 keeps no average. Early on the decay is min(decay, (1 + step) / (10 + step))."""


class CheckpointSettings(Settings):
    """Checkpoints hold all that a resumed run needs to go on exactly."""

    every: Positive = 5000
    """Steps from one to the next; the last step has one, too."""
    keep: Positive = 2
    """How many of the newest stay. The best by held-out LPIPS and the last one before the GAN stay besides."""
    keep_every: NonNegative = 0
    """Checkpoints at multiples of this step stay for good; 0: none."""


class ValidateSettings(Settings):
    """Measures held-out images with the averaged weights."""

    every: Annotated[Positive, SILENT] = 5000
    """Also before the first and after the last step."""
    images: Annotated[Positive, FIXED] = 500
    """At most this many, spread over all held-out images, the same ones every time; of a stream the first ones."""
    crop_px: Annotated[Positive | None, FIXED] = None
    """Centre crop, px; null takes data.resolution."""
    preview_images: Annotated[Positive, SILENT] = 6
    """How many of the measured images are shown, spread over them."""


class LogSettings(Settings):
    """How often losses are read from the device: the only time that a step waits for it."""

    every: Positive = 50
    """Steps from one line of the log to the next."""
