"""The settings of the losses and of what shapes the latents."""

from collections.abc import Iterator
from typing import Literal

from latent_ae.config import NonNegative, Positive, Problem, Settings, Weight


class LossSettings(Settings):
    """All terms are means: per image element (pixel, kl) or per sample (perceptual). See docs/losses.md."""

    pixel: Literal["l1", "l2", "charbonnier"] = "l1"
    pixel_weight: Weight = 1.0
    perceptual: Weight = 1.0
    """Weight of LPIPS; 0 neither loads nor computes it."""
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    perceptual_every: Positive = 1
    """LPIPS on every n-th sample only (weighted so that its mean stays the same): cheaper steps on small machines."""
    learned_logvar: bool = False
    """Learn the log-variance s of the reconstruction's likelihood: loss / exp(s) + s."""
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

    def problems(self) -> Iterator[Problem]:
        rate = [key for key in ("kl_warmup", "kl_cycles", "kl_target", "free_bits") if getattr(self, key)]
        if rate and not self.kl:
            yield Problem("kl", f"0 takes the KL term away, which {', '.join(rate)} would shape: give it a weight")
        both = [key for key in rate if key != "free_bits"]
        if len(both) > 1:
            yield Problem(both[-1], f"{' and '.join(both)} all set the weight of the KL term: keep one of them")
        if self.kl_target and self.free_bits >= self.kl_target:
            yield Problem(
                "free_bits",
                f"{self.free_bits:g} nats are kept free of the KL term, so it cannot bring the rate down to kl_target "
                f"{self.kl_target:g}: lower free_bits or raise kl_target",
            )
