"""What the step remembers besides weights and optimizers; saved with every checkpoint, equal on all processes.

All of it lags by one step. So it can rest on the global batch, whatever its split, without holding the graphs of all
micro-batches or a second backward pass, and no process waits for another inside the step.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latent_ae.models.likelihood import LIKELIHOODS, Likelihood
from latent_ae.objectives.base import adaptive_ratio
from latent_ae.objectives.codebook import perplexity

from .loss_config import LossSettings
from .schedule import GanPhase
from .settings import TrainSettings

LECAM_DECAY = 0.99
KL_PROPORTIONAL, KL_INTEGRAL = 2.0, 0.02
"""Gains of the controller of the rate: what the KL weight's logarithm gains per change of the error, and per step."""
KL_LARGEST_ERROR = 1.0
"""Errors count no more than this: a rate far off changes the weight by a factor e in 50 steps."""
ALIGNMENT_CAP, ALIGNMENT_SMOOTHING = 100.0, 0.9
"""As for the adversarial weight: the ratio lags, so one batch that is aligned already must not send it off."""
KL_WEIGHT_RANGE = (1e-12, 1e3)


class StepState(nn.Module):
    """The numbers of the adaptive and controlled weights; only what the settings use exists."""

    adaptive_weight: Tensor
    lecam_averages: Tensor
    lecam_share: Tensor
    kl_control: Tensor
    alignment_weight: Tensor
    code_age: Tensor

    def __init__(self, settings: TrainSettings, num_codes: int = 0) -> None:
        super().__init__()
        # 0 until the first measurement, so the first step with an adversarial term only measures
        self.register_buffer("adaptive_weight", torch.zeros(()))
        # of the logits of real and of reconstructed images, both begun at 0; and the share that is not that beginning
        self.register_buffer("lecam_averages", torch.zeros(2))
        self.register_buffer("lecam_share", torch.zeros(()))
        # of the likelihood: twice the logarithm of its scale
        scale = settings.loss.scale if settings.loss.pixel in ("gaussian", "logistic") else 1.0
        self.logvar = nn.Parameter(torch.tensor(2.0 * math.log(scale)))
        if settings.loss.kl_target:
            # the logarithm of the KL weight, and the last error
            self.register_buffer("kl_control", torch.tensor([math.log(settings.loss.kl), 0.0]))

        if settings.alignment.model and settings.alignment.adaptive:
            self.register_buffer("alignment_weight", torch.zeros(()))
        if num_codes:
            # steps since each code was last taken; at the start all wait for a latent to begin as
            self.register_buffer("code_age", torch.full((num_codes,), float(settings.loss.revive_after)))

    def likelihood(self, loss: LossSettings) -> Likelihood | None:
        """What the pixel loss is the negative logarithm of; reads the device."""
        if loss.pixel not in LIKELIHOODS:
            return None
        learned = math.exp(0.5 * self.logvar.item()) if loss.learned_logvar else loss.scale
        return Likelihood(loss.pixel, None if loss.pixel == "bernoulli" else learned)

    def adaptive_weight_of(self, area: float | Tensor, cap: float) -> Tensor:
        """The adaptive weight where the reconstruction's losses count only `area` of what they do at full size."""
        return (area * self.adaptive_weight).clamp(max=cap)

    @property
    def kl_weight(self) -> Tensor:
        """The controlled weight of the KL term."""
        return self.kl_control[0].exp()

    @property
    def lecam(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running averages of the logits of real and of reconstructed images; whether there are any yet, 0 or 1.

        Divided by the share of the weights that real steps have, as `zero_debias` of TensorFlow's moving averages
        does in the authors' code (google/lecam-gan, stylegan2/lecam_loss.py): after t steps 1 - decay^t.
        """
        real, fake = self.lecam_averages / self.lecam_share.clamp(min=1e-6)
        return real, fake, (self.lecam_share > 0).float()

    def remember(
        self, means: dict[str, Tensor], phase: GanPhase, settings: TrainSettings, accelerator: Accelerator
    ) -> dict[str, Tensor]:
        """Updates the adaptive weight, the LeCam averages and the log-variance's gradient from the global batch.

        `means` loses what is no number to log and gains the new values. Returns the means over all processes of what
        was looked at.
        """
        gan = settings.gan
        sought = ("layer_reconstruction", "layer_adversarial", "logvar_gradient", "encoder_image", "encoder_alignment")
        names: list[str] = [name for name in sought if name in means]
        names += ["logits_real", "logits_fake"] if phase.discriminator and gan.lecam else []
        names += ["code_counts"] if "code_counts" in means else []
        names += ["kl_per_dimension"] if settings.loss.kl_target and "kl_per_dimension" in means else []
        if not names:
            return {}
        values = [means[name] for name in names]
        if accelerator.num_processes > 1:
            flat = accelerator.reduce(torch.cat([value.flatten() for value in values]), "mean")
            pieces = flat.split([value.numel() for value in values])
            values = [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)]
        reduced = dict(zip(names, values, strict=True))
        for name in ("layer_reconstruction", "layer_adversarial", "encoder_image", "encoder_alignment"):
            means.pop(name, None)
        # of full size; latents.equivariance draws other sizes, by whose area the reconstruction's losses count
        area = means["scale"].square() if "scale" in means else 1.0
        if "layer_adversarial" in reduced:
            # the share that the adversarial term has just had in the last layer's gradient
            used = self.adaptive_weight_of(area, gan.adaptive_cap) if gan.adaptive else 1.0
            weight = phase.generator * used
            norms = (reduced["layer_adversarial"].norm(), reduced["layer_reconstruction"].norm())
            means["gradient_ratio"] = (weight * norms[0] / (norms[1] + 1e-12)).nan_to_num(0.0)
            if gan.adaptive:
                ratio = adaptive_ratio(reduced["layer_reconstruction"], reduced["layer_adversarial"], gan.adaptive_cap)
                smooth_(self.adaptive_weight, ratio / area, gan.adaptive_smoothing)
                means["adaptive_weight"] = self.adaptive_weight.clone()
        if "encoder_alignment" in reduced:
            ratio = adaptive_ratio(reduced["encoder_image"], reduced["encoder_alignment"], ALIGNMENT_CAP)
            # within both margins there is no gradient, and no ratio
            ratio = torch.where(reduced["encoder_alignment"].norm() > 0, ratio, torch.nan)
            smooth_(self.alignment_weight, ratio / area, ALIGNMENT_SMOOTHING)
            means["alignment_weight"] = settings.alignment.weight * self.alignment_weight
        if "code_counts" in reduced:
            del means["code_counts"]
            means["codebook_perplexity"] = perplexity(reduced["code_counts"])
            means["codebook_used"] = (reduced["code_counts"] > 0).float().mean()
        if "logvar_gradient" in reduced:
            # it has no upper norm of its own, and one that is far off would still the optimizer for long
            self.logvar.grad = reduced["logvar_gradient"].detach().clamp(-1.0, 1.0)
            del means["logvar_gradient"]
            means["logvar"] = self.logvar.detach().clone()
        if phase.discriminator and gan.lecam:
            averages = torch.stack([reduced["logits_real"], reduced["logits_fake"]])
            for old, new in ((self.lecam_averages, averages), (self.lecam_share, torch.ones_like(self.lecam_share))):
                old.copy_(torch.where(averages.isfinite().all(), torch.lerp(old, new, 1.0 - LECAM_DECAY), old))
        return reduced

    def hold_rate(self, kl_per_dimension: Tensor, target: float, bad: Tensor) -> None:
        """One turn of the controller: log w += P (e - e') + I e, e = log(rate / target) and e' that of the step before.

        Proportional and integral control as in ControlVAE (Shao et al. 2020), on the weight's logarithm as in GECO
        (Rezende and Viola 2018): a rate that is off by a factor moves the weight by a factor, whatever their sizes.
        Nothing moves in a step that was passed over (`bad`).
        """
        # one sample's estimate of a rate (`FlowAutoencoderKL`) may be negative
        error = torch.log((kl_per_dimension / target).clamp(min=1e-6)).clamp(-KL_LARGEST_ERROR, KL_LARGEST_ERROR)
        log_weight, before = self.kl_control
        log_weight = log_weight + KL_PROPORTIONAL * (error - before) + KL_INTEGRAL * error
        low, high = (math.log(weight) for weight in KL_WEIGHT_RANGE)
        moved = torch.stack([log_weight.clamp(low, high), error])
        self.kl_control.copy_(torch.where(bad | ~moved.isfinite().all(), self.kl_control, moved))


def smooth_(average: Tensor, value: Tensor, smoothing: float) -> None:
    """Moves the average towards the value, or to it where there is none yet (0); passes over what is not finite."""
    smoothed = torch.where(average > 0, torch.lerp(value, average, smoothing), value)
    average.copy_(torch.where(value.isfinite(), smoothed, average))
