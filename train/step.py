"""One training step of both networks from a single autoencoder pass per micro-batch.

The reconstruction is cut out of the graph: every loss is differentiated with respect to the *image*, and the summed
gradient is sent back through the autoencoder once. So the pixel, perceptual and adversarial gradients are available
apart (the adaptive weight needs them) without a second pass, no loss can reach a network that it must not train,
and the discriminator's one pass over real and reconstructed images serves both networks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latent_ae.diffaug import NUMBERS, augment
from latent_ae.losses import (
    adaptive_ratio,
    discriminator_loss,
    generator_loss,
    kl_loss,
    lecam_loss,
    pixel_loss,
    r1_penalty,
)
from latent_ae.models import Reconstruction

from .config import TrainSettings
from .ema import Ema
from .muon import Muon, inner_weights
from .schedule import GanPhase, gan_phase_at, lr_scale_at

LECAM_DECAY = 0.99
LOGVAR_LR = 10.0
"""Learning rate of the learned log-variance, relative to the networks': one number that has far to go."""


class MicroBatch(NamedTuple):
    """What one pass works on, on the device."""

    images: Tensor
    """float32 NCHW in [-1, 1], channels-last."""
    noise: Tensor
    """Standard normal, shaped like the latent."""
    perceptual_rows: slice
    """Rows that LPIPS looks at (loss.perceptual_every)."""
    augmentation: Tensor | None = None
    """Uniform numbers for gan.diffaug, N x 14: the first half for the real image, the other for its reconstruction."""


class StepState(nn.Module):
    """What the step remembers besides weights and optimizers; saved with every checkpoint."""

    adaptive_weight: Tensor
    lecam_averages: Tensor

    def __init__(self) -> None:
        super().__init__()
        # 0 until the first measurement, so the first step with an adversarial term only measures
        self.register_buffer("adaptive_weight", torch.zeros(()))
        self.register_buffer("lecam_averages", torch.zeros(2))
        self.logvar = nn.Parameter(torch.zeros(()))


class TrainStep:
    """Holds the networks and optimizers; calling it with the step's number makes one update."""

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        reconstructor: nn.Module,
        discriminator: nn.Module | None,
        perceptual: nn.Module | None,
        ema: Ema | None,
    ):
        self.settings, self.accelerator = settings, accelerator
        # the wrapped networks are called, the bare ones own parameters and state
        self.reconstructor, self.discriminator = reconstructor, discriminator
        self.bare_reconstructor = accelerator.unwrap_model(reconstructor)
        self.bare_discriminator = accelerator.unwrap_model(discriminator) if discriminator is not None else None
        self.perceptual, self.ema = perceptual, ema
        self.state = StepState().to(accelerator.device)
        self.bad_steps: list[tuple[int, Tensor]] = []
        self.bad_in_a_row = 0
        optim = settings.optim
        inner = inner_weights(self.bare_reconstructor) if optim.kind == "muon" else []
        self.muon = Muon(inner, optim.lr, optim.weight_decay) if inner else None
        taken = {id(parameter) for parameter in inner}
        rest = [p for p in self.bare_reconstructor.parameters() if p.requires_grad and id(p) not in taken]
        groups: list[dict[str, Any]] = [{"params": rest, "lr_scale": 1.0}]
        if settings.loss.learned_logvar:
            groups.append({"params": [self.state.logvar], "lr_scale": LOGVAR_LR, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.discriminator_lr = optim.discriminator_lr or optim.lr
        self.discriminator_optimizer = (
            torch.optim.AdamW(
                self.bare_discriminator.parameters(),
                lr=self.discriminator_lr,
                betas=optim.discriminator_betas,
                weight_decay=optim.weight_decay,
                fused=True,
            )
            if self.bare_discriminator is not None
            else None
        )

    @property
    def networks(self) -> list[nn.Module]:
        """What trains, bare."""
        return [net for net in (self.bare_reconstructor, self.bare_discriminator) if net is not None]

    def __call__(self, step: int, micro_batches: Iterator[MicroBatch]) -> dict[str, Tensor]:
        """Update number `step` (0-based) from `settings.accumulation` micro-batches.

        Returns this process's mean losses and diagnostics as tensors on the device; nothing waits for them.
        """
        settings = self.settings
        phase = gan_phase_at(step, settings.gan)
        sums: dict[str, Tensor] = {}
        for index in range(settings.accumulation):
            last = index == settings.accumulation - 1
            with nullcontext() if last else self._without_synchronisation():
                # spectral norm takes one power iteration per step, however the batch is split
                if self.bare_discriminator is not None:
                    self.bare_discriminator.train(index == 0)
                for name, value in self._accumulate(next(micro_batches), phase).items():
                    sums[name] = sums[name] + value if name in sums else value
        means = {name: value / settings.accumulation for name, value in sums.items()}
        self._remember(means, phase)
        means |= self._update(step, phase)
        return means

    def _accumulate(self, batch: MicroBatch, phase: GanPhase) -> dict[str, Tensor]:
        """Adds this micro-batch's gradients of both networks; returns what to average over micro-batches."""
        settings, share = self.settings, 1.0 / self.settings.accumulation
        with self._autocast():
            result: Reconstruction = self.reconstructor(batch.images, batch.noise)
        image = result.image.detach().requires_grad_()

        means, objective = self._reconstruction_losses(image, batch)
        (gradient,) = torch.autograd.grad(objective, image)
        if settings.loss.learned_logvar:
            # d/dr and d/ds of objective / exp(s) + s; s has no graph: its gradient is one number
            precision = torch.exp(-self.state.logvar.detach())
            gradient = gradient * precision
            means["logvar_gradient"] = 1.0 - objective.detach() * precision

        if phase.discriminator:
            adversarial, logs = self._adversarial(batch, image, phase)
            means |= logs
            if adversarial is not None:
                weight: Tensor | float = phase.generator
                if self.bare_reconstructor.last_layer.requires_grad:
                    means["layer_reconstruction"] = self._at_last_layer(result.image, gradient)
                    means["layer_adversarial"] = self._at_last_layer(result.image, adversarial)
                if settings.gan.adaptive:
                    weight = phase.generator * self.state.adaptive_weight
                gradient = torch.add(gradient, adversarial * weight)

        outputs, gradients = [result.image], [gradient * share]
        if settings.loss.kl and result.mean.requires_grad:  # not when the encoder is fixed
            kl = kl_loss(result.mean, result.logvar, image_elements=batch.images[0].numel())
            means["kl"] = kl.detach()
            means["kl_per_dimension"] = kl.detach() * (batch.images[0].numel() / result.mean[0].numel())
            outputs.append(kl)
            gradients.append(torch.full_like(kl, settings.loss.kl * share))
        torch.autograd.backward(outputs, gradients)
        means["latent_std"] = result.latent.detach().std()
        return means

    def _reconstruction_losses(self, image: Tensor, batch: MicroBatch) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted sum of the pixel and perceptual losses, and both apart."""
        loss = self.settings.loss
        means: dict[str, Tensor] = {}
        terms: list[Tensor] = []
        if loss.pixel_weight:
            pixel = pixel_loss(loss.pixel, image, batch.images)
            means[loss.pixel] = pixel.detach()
            terms.append(loss.pixel_weight * pixel)
        if loss.perceptual and self.perceptual is not None:
            rows = batch.perceptual_rows
            # a sum over the chosen rows, scaled as if every row had been looked at: the mean over the global
            # batch is then the same however it is split
            perceptual = image.new_zeros(())
            if range(*rows.indices(len(image))):
                with self._autocast():
                    distances = self.perceptual(image[rows], batch.images[rows])
                perceptual = distances.sum() * (loss.perceptual_every / len(image))
                terms.append(loss.perceptual * perceptual)
            means["lpips"] = perceptual.detach()
        return means, torch.stack(terms).sum() if terms else (image * 0.0).sum()

    def _adversarial(
        self, batch: MicroBatch, image: Tensor, phase: GanPhase
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Adds the discriminator's gradient; returns the adversarial gradient at the image (None: not wanted)."""
        assert self.discriminator is not None and self.bare_discriminator is not None
        gan = self.settings.gan
        real = batch.images.detach().requires_grad_() if phase.r1 else batch.images
        fake = image if phase.generator else image.detach()
        with self._autocast(enabled=not phase.r1):  # a second derivative in bf16 is far off
            real_logits, fake_logits = self._judge(real, fake, batch.augmentation)
        adversarial = None
        means = {
            "logits_real": real_logits.detach().mean(),
            "logits_fake": fake_logits.detach().mean(),
            "accuracy": 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()),
        }
        if phase.generator:
            objective = generator_loss(gan.loss, fake_logits)
            (adversarial,) = torch.autograd.grad(objective, image, retain_graph=True)
            means["generator"] = objective.detach()
        loss = discriminator_loss(gan.loss, real_logits, fake_logits)
        means["discriminator"] = loss.detach()
        if gan.lecam:
            real_average, fake_average = self.state.lecam_averages
            lecam = lecam_loss(real_logits, fake_logits, real_average, fake_average)
            means["lecam"] = lecam.detach()
            loss = loss + gan.lecam * lecam
        if phase.r1:
            penalty = r1_penalty(real_logits, real)
            means["r1"] = penalty.detach()
            loss = loss + phase.r1 * penalty
        # `inputs`: the reconstruction must not receive the discriminator's gradient
        (loss / self.settings.accumulation).backward(inputs=list(self.bare_discriminator.parameters()))
        return adversarial, means

    def _judge(self, real: Tensor, fake: Tensor, augmentation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of real and reconstructed images, float32."""
        gan = self.settings.gan
        if gan.diffaug:
            assert augmentation is not None
            real = augment(real, augmentation[:, :NUMBERS], gan.diffaug)
            fake = augment(fake, augmentation[:, NUMBERS:], gan.diffaug)
        assert self.discriminator is not None
        if gan.norm == "batch":  # each kind by its own statistics, as published
            return self.discriminator(real), self.discriminator(fake)
        real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).chunk(2)
        return real_logits, fake_logits

    def _at_last_layer(self, image: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of the decoder's output convolution for a gradient at the image; costs one small product."""
        (layer,) = torch.autograd.grad(image, self.bare_reconstructor.last_layer, gradient, retain_graph=True)
        return layer

    def _remember(self, means: dict[str, Tensor], phase: GanPhase) -> None:
        """Updates the adaptive weight, the LeCam averages and the log-variance's gradient, equal on all processes.

        The first two lag by one step. So they can rest on the global batch, whatever its split, without holding the
        graphs of all micro-batches or a second backward pass, and no process waits for another inside the step.
        """
        gan, state = self.settings.gan, self.state
        sought = ("layer_reconstruction", "layer_adversarial", "logvar_gradient")
        names: list[str] = [name for name in sought if name in means]
        names += ["logits_real", "logits_fake"] if phase.discriminator and gan.lecam else []
        if not names:
            return
        values = [means[name] for name in names]
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([value.flatten() for value in values]), "mean")
            pieces = flat.split([value.numel() for value in values])
            values = [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)]
        reduced = dict(zip(names, values, strict=True))
        for name in ("layer_reconstruction", "layer_adversarial"):
            means.pop(name, None)
        if "layer_adversarial" in reduced:
            # the share that the adversarial term has just had in the last layer's gradient
            weight = phase.generator * (state.adaptive_weight if gan.adaptive else 1.0)
            norms = (reduced["layer_adversarial"].norm(), reduced["layer_reconstruction"].norm())
            means["gradient_ratio"] = (weight * norms[0] / (norms[1] + 1e-12)).nan_to_num(0.0)
            if gan.adaptive:
                ratio = adaptive_ratio(reduced["layer_reconstruction"], reduced["layer_adversarial"], gan.adaptive_cap)
                smoothed = torch.where(
                    state.adaptive_weight > 0,
                    torch.lerp(ratio, state.adaptive_weight, gan.adaptive_smoothing),
                    ratio,
                )
                state.adaptive_weight.copy_(torch.where(ratio.isfinite(), smoothed, state.adaptive_weight))
                means["adaptive_weight"] = state.adaptive_weight.clone()
        if "logvar_gradient" in reduced:
            state.logvar.grad = reduced["logvar_gradient"].detach().clone()
            del means["logvar_gradient"]
            means["logvar"] = state.logvar.detach().clone()
        if phase.discriminator and gan.lecam:
            averages = torch.stack([reduced["logits_real"], reduced["logits_fake"]])
            averages = torch.where(averages.isfinite().all(), averages, state.lecam_averages)
            state.lecam_averages.lerp_(averages, 1.0 - LECAM_DECAY)

    def _update(self, step: int, phase: GanPhase) -> dict[str, Tensor]:
        """Clips and applies both networks' gradients, then averages the weights.

        A step whose gradients are not all finite changes neither network nor their optimizers. Nobody waits to find
        that out: the optimizers' kernels read the flag on the device, and it is equal on all processes because the
        gradients were averaged over them.
        """
        settings = self.settings
        scale = lr_scale_at(step, settings.steps, settings.optim)
        families = {"grad_norm": ([self.optimizer, *([self.muon] if self.muon else [])], settings.optim.lr * scale)}
        if phase.discriminator and self.discriminator_optimizer is not None:
            families["grad_norm_discriminator"] = ([self.discriminator_optimizer], self.discriminator_lr * scale)
        limit = settings.optim.clip or float("inf")
        norms = {
            name: nn.utils.clip_grad_norm_(
                [p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]], limit, foreach=True
            )
            for name, (optimizers, _) in families.items()
        }
        checked = [*norms.values(), *([self.state.logvar.grad] if self.state.logvar.grad is not None else [])]
        bad = ~torch.stack([value.float() for value in checked]).isfinite().all()
        self.bad_steps.append((step, bad))
        for optimizers, lr in families.values():
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                optimizer.found_inf = bad.float()  # what a GradScaler sets; the kernels then skip their update
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.bare_reconstructor.autoencoder, step)
        return norms

    def skipped_steps(self) -> tuple[list[int], int]:
        """Steps since the last call that were skipped, and how many of the newest ones in a row; reads the device."""
        steps, flags = [step for step, _ in self.bad_steps], [flag for _, flag in self.bad_steps]
        self.bad_steps.clear()
        bad: list[bool] = torch.stack(flags).tolist() if flags else []
        unbroken = len(bad) + self.bad_in_a_row
        self.bad_in_a_row = next((age for age, flag in enumerate(reversed(bad)) if not flag), unbroken)
        return [step for step, flag in zip(steps, bad, strict=True) if flag], self.bad_in_a_row

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _without_synchronisation(self) -> ExitStack:
        stack = ExitStack()
        for network in (self.reconstructor, self.discriminator):
            if network is not None:
                stack.enter_context(self.accelerator.no_sync(network))
        return stack
