"""Settings of a run's optimizer, weight average, checkpoints, validation and log."""

from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import FIXED, SILENT, SWITCH, Decay, Fraction, NonNegative, Positive, Settings, Weight

Rate = Annotated[float, Field(gt=0)]


class OptimSettings(Settings):
    """The learning rate is used as written: nothing scales it by the batch. The discriminator has AdamW."""

    kind: Annotated[Literal["adamw", "muon"], FIXED] = "adamw"
    """muon: Muon for the autoencoder's convolutions and matrices except the first and last ones, AdamW for the rest."""
    lr: Rate = 1e-4
    """Learning rate of the autoencoder, used as written."""
    discriminator_lr: Rate | None = None
    """Learning rate of the discriminator; null takes lr."""
    layerwise: Annotated[bool | None, FIXED] = None
    """Steps of AdamW that do not depend on the width: a learning rate for each layer by the size of its inputs, and
    centred inputs (docs/linear-start.md). null: with model.init=linear, also in the phases after it, and else not."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Adam's betas for the autoencoder."""
    discriminator_betas: tuple[Decay, Decay] = (0.5, 0.9)
    """Adam's betas for the discriminator."""
    eps: Rate = 1e-13
    """Adam's epsilon for all networks, added to a gradient's root mean square. Losses are means here; the 1e-8 of
    trainers that sum over an image's C x H x W elements is 1e-8 / (C x H x W), 5e-14 at 256 px."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay, as in AdamW, of all networks."""
    warmup: NonNegative = 1000
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Schedule after the warm-up: cosine falls to final_lr at the last step."""
    final_lr: Fraction = 0.1
    """Learning rate at the end as a fraction of lr (cosine)."""
    clip: Weight = 1.0
    """Largest gradient norm of each network; 0 does not clip."""
    skip_above: Weight = 0.0
    """Gradient norm of the autoencoder, before it is clipped, above which a step changes nothing and is counted, as in
    very deep VAEs (Child 2021); 0 has no such limit."""
    max_skipped: Positive = 20
    """Number of steps in a row whose gradients are not finite, or above skip_above, that stops the run; fewer are
    skipped and reported. Three that are not finite at the end of a run are too many, too."""


class EmaSettings(Settings):
    """Moving average of the autoencoder's weights, used by validation and export."""

    decay: Annotated[Decay, SWITCH] = 0.9999
    """Decay of the average; 0 keeps none. In the first steps the decay is (1 + step) / (10 + step), if that is less."""


class CheckpointSettings(Settings):
    """Checkpoints, which hold everything that an exact resume needs."""

    every: Positive = 5000
    """Steps between two checkpoints; the last step has one, too."""
    keep: Positive = 2
    """Number of newest checkpoints that are kept, besides the best by held-out LPIPS and the last before the GAN."""
    keep_every: NonNegative = 0
    """Checkpoints at multiples of this step are kept for good; 0 keeps none."""


class ValidateSettings(Settings):
    """Measures held-out images with the averaged weights."""

    every: Annotated[Positive, SILENT] = 5000
    """Steps between two validations; there is also one before the first and one after the last step."""
    images: Annotated[Positive, FIXED] = 500
    """Largest number of images, spread over all held-out images, the same ones every time; of a stream the first."""
    crop_px: Annotated[Positive | None, FIXED] = None
    """Side of the centre crop, px; null takes data.resolution."""
    also_px: Annotated[tuple[Positive, ...], FIXED] = ()
    """More sides at which centre crops of the same images are measured; the figures at crop_px decide what is best."""
    preview_images: Annotated[Positive, SILENT] = 6
    """Number of measured images that previews show, spread over them."""


class LogSettings(Settings):
    """How often losses are read from the device, which is the only time that a step waits for it."""

    every: Positive = 50
    """Steps between two lines of the log."""
