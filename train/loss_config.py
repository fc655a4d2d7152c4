"""The settings of the losses, the adversarial one included, and of what shapes the latents."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from latent_ae.config import Fraction, NonNegative, Positive, Problem, Settings, Weight

Decay = Annotated[float, Field(ge=0, lt=1)]


def scaled_sides(side_px: int, factor: int, smallest_px: int) -> range:
    """Sides, latent px, that latents of `side_px` are scaled to: from a quarter to just below, as in EQ-VAE.

    None whose image would be smaller than `smallest_px`.
    """
    return range(max(-(-side_px // 4), -(-smallest_px // factor)), side_px)


class LossSettings(Settings):
    """All terms are means: per image element (pixel, kl) or per sample (perceptual). See docs/losses.md."""

    pixel: Literal["l1", "l2", "charbonnier", "bernoulli", "gaussian", "logistic"] = "l1"
    """A distance, or the negative logarithm of a likelihood in nats: with kl=1 and perceptual=0 the loss is minus the
    evidence lower bound."""
    pixel_weight: Weight = 1.0
    """Weight of that term."""
    scale: Annotated[float, Field(gt=0)] = 0.1
    """Of a likelihood: standard deviation (gaussian) or scale (logistic), in [-1, 1] units."""
    perceptual: Weight = 1.0
    """Weight of LPIPS; 0 neither loads nor computes it."""
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    """Network of LPIPS."""
    perceptual_every: Positive = 1
    """LPIPS on every n-th sample only (weighted so that its mean stays the same): cheaper steps on small machines."""
    learned_logvar: bool = False
    """Learn the log-variance s of the reconstruction's likelihood: loss / exp(s) + s. With pixel=gaussian or logistic s
    is that of the pixels alone, and begins at the logarithm of `scale` squared."""
    kl: Weight = 1e-6
    """Weight of the KL divergence, summed per sample and divided by the image's elements."""
    kl_warmup: NonNegative = 0
    """Steps over which that weight rises from 0."""
    kl_cycles: NonNegative = 0
    """So many times over the run it rises from 0 in half a cycle and then holds; 0: it does not."""
    kl_target: Weight = 0.0
    """Nats per latent dimension that a controller holds by changing the weight, which starts at `kl`; 0: no control."""
    free_bits: Weight = 0.0
    """Nats per latent dimension below which a sample's channel is not drawn to the prior any further."""

    kl_capacity: Weight = 0.0
    """Nats per image that the KL term draws the rate to, from either side, at the end; 0: it draws it down to 0."""
    kl_capacity_steps: Positive | None = None
    """Steps over which that rises from 0; null: all of them."""
    total_correlation: Weight = 0.0
    """Weight (gamma) of the latent dimensions' dependence on each other, in nats per image as `kl`; FactorVAE."""
    total_correlation_width: Positive = 1000
    """Of the discriminator that estimates it: units in each of its five hidden layers."""

    commitment: Weight = 0.25
    """Of a codebook: weight of the term that draws latents to their codes; codes are drawn to them with weight 1."""
    revive_after: NonNegative = 100
    """Of a codebook: steps without use after which a code starts again as a latent of the day; 0: never."""

    def problems(self) -> Iterator[Problem]:
        scaled = self.pixel in ("gaussian", "logistic")
        if self.scale != type(self).model_fields["scale"].default and not scaled:
            yield Problem("scale", f"pixel: {self.pixel} has none; it is for gaussian and logistic")
        if self.pixel in ("bernoulli", "gaussian", "logistic") and not self.pixel_weight:
            yield Problem(
                "pixel_weight", f"0 takes the likelihood away that loss.pixel {self.pixel} names: give it a weight"
            )
        if self.learned_logvar and self.pixel == "bernoulli":
            yield Problem("learned_logvar", "bernoulli has no variance to learn: set it to false")
        rate = [
            key for key in ("kl_warmup", "kl_cycles", "kl_target", "free_bits", "kl_capacity") if getattr(self, key)
        ]
        if rate and not self.kl:
            yield Problem("kl", f"0 takes the KL term away, which {', '.join(rate)} would shape: give it a weight")
        both = [key for key in rate if key not in ("free_bits", "kl_capacity")]
        if len(both) > 1:
            yield Problem(both[-1], f"{' and '.join(both)} all set the weight of the KL term: keep one of them")
        shaping = [key for key in rate if key != "kl_capacity"]
        if self.kl_capacity and shaping:
            yield Problem(
                "kl_capacity", f"draws the rate to a value of its own, and {', '.join(shaping)} would, too: keep one"
            )
        if self.kl_capacity_steps and not self.kl_capacity:
            yield Problem("kl_capacity_steps", "there is no kl_capacity that would rise: give it or leave this out")
        default = type(self).model_fields["total_correlation_width"].default
        if self.total_correlation_width != default and not self.total_correlation:
            yield Problem("total_correlation_width", "there is no discriminator without a total_correlation: give it")
        if self.kl_target and self.free_bits >= self.kl_target:
            yield Problem(
                "free_bits",
                f"{self.free_bits:g} nats are kept free of the KL term, so it cannot bring the rate down to kl_target "
                f"{self.kl_target:g}: lower free_bits or raise kl_target",
            )


class LatentSettings(Settings):
    """What the latents must bear while they train; all off by default. See docs/latents.md."""

    equivariance: Fraction = 0.0
    """Part of the steps whose latents are scaled and turned before decoding, and the images with them (EQ-VAE: 0.5)."""
    noise: Weight = 0.0
    """Standard deviation of noise that latents are mixed with, in raw latent units (l-DeTok: 3)."""
    min_channels: Positive | None = None
    """Least number of a sample's first channels that are kept, the rest is masked (DC-AE 1.5: an eighth of them)."""


class DistillationSettings(Settings):
    """Draws the latents to those of a larger first stage, as TAESD's are to Stable Diffusion's. See docs/family.md."""

    teacher: str | None = None
    """Folder, run or hub id of that first stage; null: off."""
    latents: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the mean squared error between the student's latents and the teacher's scaled ones."""
    decode: Literal["teacher", "own"] = "teacher"
    """What the decoder learns on: samples of the teacher's scaled latents, or the student's own."""


class AlignmentSettings(Settings):
    """Draws the latents to the features of a frozen vision model, as VA-VAE does; its published values."""

    model: str | None = None
    """Folder of a vision transformer that transformers loads (config.json, model.safetensors,
    preprocessor_config.json); null: off."""
    weight: Annotated[float, Field(gt=0)] = 0.1
    """Weight of both terms."""
    adaptive: bool = True
    """Scale the term by the ratio of gradient norms at the encoder's last layer; false uses the weight as it is."""
    cosine_margin: Fraction = 0.5
    """Below so much cosine distance of a latent to its feature nothing is drawn any further."""
    distance_margin: Fraction = 0.25
    """The same of the difference between similarities of latents and those of features."""


class GanSettings(Settings):
    """The adversarial term."""

    weight: Weight = 0.5
    """0 builds no discriminator."""
    start: NonNegative = 50_000
    """First step at which the discriminator trains."""
    discriminator_warmup: NonNegative = 500
    """Steps from `start` during which only the discriminator trains."""
    warmup: NonNegative = 2000
    """Steps over which the autoencoder's adversarial term then rises to its weight."""
    loss: Literal["hinge", "vanilla", "non_saturating"] = "hinge"
    """hinge, or cross-entropy in the discriminator with -D(fake) (vanilla) or softplus(-D(fake)) in the autoencoder."""
    init_from: str | None = None
    """A checkpoint, or a run with one, whose discriminator to start with."""
    channels: Positive = 64
    """Width of the discriminator's first layer; the further ones have up to eight times as many."""
    layers: Positive = 3
    """Layers of the discriminator that halve the resolution."""
    norm: Literal["group", "spectral", "batch", "none"] = "group"
    """Normalisation in the discriminator."""
    blur: bool = False
    """Low-pass filter before the discriminator subsamples."""
    diffaug: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """Differentiable augmentations of what the discriminator sees; they help on small data."""
    adaptive: bool = True
    """Scale the term by the ratio of gradient norms at the last layer; false uses the weight as it is."""
    adaptive_cap: Annotated[float, Field(gt=0)] = 0.0509
    """Largest such ratio, in per-element means as all losses are. The default is latent diffusion's clamp, 1e4 of its
    sums, for RGB at 256 px: 1e4 / (3 x 256 x 256). Taming's VQ loss takes means, and there 1e4 is 1e4."""
    adaptive_smoothing: Decay = 0.9
    """Share of the former value that the ratio keeps in each step; 0: every step has the ratio of the one before."""
    lecam: Weight = 0.0
    """Weight of LeCam's regularisation of the discriminator."""
    alarm: Annotated[float, Field(gt=1)] = 1.25
    """Held-out LPIPS so many times that before the adversarial term is worth a warning."""
    r1: Weight = 0.0
    """Weight (gamma) of the discriminator's gradient penalty on real images."""
    r1_every: Positive = 16
    """The penalty is computed on every n-th step and weighs n times as much."""
