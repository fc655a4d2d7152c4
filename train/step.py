"""One training step of both networks from a single autoencoder pass per micro-batch.

The reconstruction is cut out of the graph: every loss is differentiated with respect to the *image*, and the summed
gradient is sent back through the autoencoder once. So the pixel, perceptual and adversarial gradients are available
apart (the adaptive weight needs them) without a second pass, no loss can reach a network that it must not train,
and the discriminator's one pass over real and reconstructed images serves both networks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.models.likelihood import LIKELIHOODS, bits_per_dimension
from latent_ae.models.reconstruct import Reconstruction
from latent_ae.objectives.codebook import code_counts, codebook_loss
from latent_ae.objectives.diffaug import NUMBERS, augment
from latent_ae.objectives.gan import discriminator_loss, generator_loss, lecam_loss, r1_penalty
from latent_ae.objectives.total_correlation import TotalCorrelation
from latent_ae.pretrained.vision import VisionModel

from .distillation import Teacher
from .micro_batch import MicroBatch, as_drawn
from .optim import Ema, Update
from .revival import revive_codes
from .schedule import GanPhase, equivariance_at, gan_phase_at, kl_capacity_at, kl_weight_at
from .settings import TrainSettings
from .step_state import StepState
from .terms import aligning_gradient, image_losses, rate_loss


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
        vision: VisionModel | None = None,
        total_correlation: TotalCorrelation | None = None,
        teacher: Teacher | None = None,
    ):
        self.settings, self.accelerator = settings, accelerator
        # the wrapped networks are called, the bare ones own parameters and state
        self.reconstructor, self.discriminator = reconstructor, discriminator
        self.bare_reconstructor = accelerator.unwrap_model(reconstructor)
        self.bare_discriminator = accelerator.unwrap_model(discriminator) if discriminator is not None else None
        self.perceptual, self.ema, self.vision, self.teacher = perceptual, ema, vision, teacher
        self.total_correlation = total_correlation
        self.state = StepState(settings, self.bare_reconstructor.num_codes).to(accelerator.device)
        self.update = Update(
            settings, self.bare_reconstructor, self.bare_discriminator, self.state.logvar, total_correlation
        )
        self.optimizer, self.muon = self.update.optimizer, self.update.muon
        self.discriminator_optimizer = self.update.discriminator_optimizer
        self.total_correlation_optimizer = self.update.total_correlation_optimizer
        self.skipped_steps = self.update.skipped_steps

    @property
    def networks(self) -> list[nn.Module]:
        """What trains, bare."""
        networks = (self.bare_reconstructor, self.bare_discriminator, self.total_correlation)
        return [network for network in networks if network is not None]

    def __call__(self, step: int, micro_batches: Iterator[MicroBatch]) -> dict[str, Tensor]:
        """Update number `step` (0-based) from `settings.accumulation` micro-batches.

        Returns this process's mean losses and diagnostics as tensors on the device; nothing waits for them.
        """
        settings = self.settings
        phase = gan_phase_at(step, settings.gan)
        sums: dict[str, Tensor] = {}
        self.fresh_codes: Tensor | None = None
        for index in range(settings.accumulation):
            last = index == settings.accumulation - 1
            with nullcontext() if last else self._without_synchronisation():
                # spectral norm takes one power iteration per step, however the batch is split
                if self.bare_discriminator is not None:
                    self.bare_discriminator.train(index == 0)
                for name, value in self._accumulate(next(micro_batches), step, phase).items():
                    sums[name] = sums[name] + value if name in sums else value
        means = {name: value / settings.accumulation for name, value in sums.items()}
        before = [number.clone() for number in self.state.buffers()]
        reduced = self.state.remember(means, phase, settings, self.accelerator)
        norms, bad = self.update(step, phase)
        for number, old in zip(self.state.buffers(), before, strict=True):
            number.copy_(torch.where(bad, old, number))
        if settings.loss.kl_target and "kl_per_dimension" in reduced:
            self.state.hold_rate(reduced["kl_per_dimension"], settings.loss.kl_target, bad)
        if "code_counts" in reduced and settings.loss.revive_after:
            revive_codes(self, step, reduced["code_counts"], bad)
        if self.ema is not None:
            self.ema.update(self.bare_reconstructor.autoencoder, step)
        return means | norms

    def try_passes(self, batch: MicroBatch) -> None:
        """One micro-batch as the run's last steps have it, beside the optimizers' state; leaves everything as it was.

        Waits for no other process. Raises UserError when the device has not enough memory.
        """
        settings = self.settings
        phase = gan_phase_at(settings.steps - 1, settings.gan)
        if phase.discriminator:  # its dearest step
            phase = phase._replace(r1=settings.gan.r1 * settings.gan.r1_every)
        side, image_px = batch.noise.shape[-1], batch.images.shape[-1]
        # one at full size, where there is any
        sizes = (equivariance_at(step, settings, side, image_px // side) for step in range(100))
        step = next((step for step, drawn in enumerate(sizes) if drawn is None), 0)
        buffers = [buffer for network in self.networks for buffer in network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        wrapped = self.reconstructor, self.discriminator
        # those that are wrapped would wait for the others' buffers
        self.reconstructor, self.discriminator = self.bare_reconstructor, self.bare_discriminator
        if self.bare_discriminator is not None:
            self.bare_discriminator.train()
        self.fresh_codes = None
        try:
            room = self.update.room()
            self._accumulate(batch, step, phase)
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            del room
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a micro-batch of {len(batch.images)} images of {image_px} px does not fit into the memory of "
                f"{self.accelerator.device} as the last steps will have it: lower micro_batch_size, or set "
                f"gradient_checkpointing=true or precision=bf16 ({' '.join(str(error).split())[:200]})"
            ) from error
        finally:
            self.reconstructor, self.discriminator = wrapped
            for network in self.networks:
                network.zero_grad(set_to_none=True)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def _accumulate(self, batch: MicroBatch, step: int, phase: GanPhase) -> dict[str, Tensor]:
        """Adds this micro-batch's gradients of both networks; returns what to average over micro-batches."""
        settings, share = self.settings, 1.0 / self.settings.accumulation
        full_size = batch.images[0].numel()
        batch, images, means = as_drawn(batch, step, settings)
        # of the image to reconstruct and of that to encode: sums over a sample weigh them so, as EQ-VAE's losses are
        area, encoded_area = batch.images[0].numel() / full_size, images[0].numel() / full_size
        with self._autocast():
            taught = self.teacher(images, batch.noise) if self.teacher is not None else None
            given = taught.latent if taught is not None and settings.distillation.decode == "teacher" else None
            result: Reconstruction = self.reconstructor(images, batch.noise, batch.change, given)
        image = result.image.detach().requires_grad_()

        logvar = self.state.logvar if settings.loss.learned_logvar else None
        logs, objective = image_losses(settings.loss, self.perceptual, image, batch, logvar, self._autocast())
        objective, means = area * objective, means | logs
        if logvar is not None and settings.loss.pixel in LIKELIHOODS:
            gradient, means["logvar_gradient"] = torch.autograd.grad(objective, (image, logvar))
        else:
            (gradient,) = torch.autograd.grad(objective, image)
        if logvar is not None and settings.loss.pixel not in LIKELIHOODS:
            # d/dr and d/ds of objective / exp(s) + s; s has no graph: its gradient is one number
            precision = torch.exp(-logvar.detach())
            gradient = gradient * precision
            means["logvar_gradient"] = area - objective.detach() * precision

        if phase.discriminator:
            adversarial, logs = self._adversarial(batch, image, phase)
            means |= logs
            if adversarial is not None:
                weight: Tensor | float = phase.generator
                if self.bare_reconstructor.last_layer.requires_grad:
                    means["layer_reconstruction"] = self._at_last_layer(result.image, gradient)
                    means["layer_adversarial"] = self._at_last_layer(result.image, adversarial)
                if settings.gan.adaptive:
                    weight = phase.generator * self.state.adaptive_weight_of(area, settings.gan.adaptive_cap)
                gradient = torch.add(gradient, adversarial * weight)

        outputs, gradients = [result.image], [gradient * share]
        if result.codes is not None and result.mean.requires_grad:
            objective = codebook_loss(result.mean, result.codes.vectors, settings.loss.commitment)
            means["codebook"] = objective.detach()
            outputs.append(objective)
            gradients.append(torch.full_like(objective, share))
        if result.codes is not None:
            means["code_counts"] = code_counts(result.codes.indices, self.bare_reconstructor.num_codes)
            if self.fresh_codes is None:  # of the step's first sample, which is the same however the batch is split
                self.fresh_codes = result.mean.detach()[0].flatten(1).T
        # not when the encoder is fixed, or there is no posterior
        if settings.loss.kl and any(rate.requires_grad for rate in result.rates):
            weight = (
                self.state.kl_weight if settings.loss.kl_target else kl_weight_at(step, settings.loss, settings.steps)
            )
            capacity = kl_capacity_at(step, settings.loss, settings.steps)
            objective, logs = rate_loss(settings.loss, result.rates, images[0].numel(), capacity)
            means |= logs | {"kl_weight": torch.ones_like(objective.detach()) * weight}
            if settings.loss.pixel in LIKELIHOODS and settings.loss.pixel in means:
                nats = means[settings.loss.pixel] + means["kl"]
                means["bits_per_dimension"] = bits_per_dimension(nats, settings.loss.pixel)
            outputs.append(objective)
            gradients.append(torch.ones_like(objective) * (weight * share * encoded_area))
        if taught is not None and result.mean.requires_grad:
            objective = F.mse_loss(result.mean, taught.mean)
            means["distillation"] = objective.detach()
            outputs.append(objective)
            gradients.append(torch.full_like(objective, settings.distillation.latents * share))
        if self.total_correlation is not None:
            slope, logs = self.total_correlation.gradient(result, step)
            means |= logs
            outputs.append(result.latent)
            gradients.append(slope * (settings.loss.total_correlation / images[0].numel()))
        layers: list[Tensor] = []
        if result.projected is not None:
            assert self.vision is not None
            with self._autocast():
                features = self.vision(images, result.latent.shape[-1])
            layer = self.bare_reconstructor.encoder_last_layer
            aligning, logs = aligning_gradient(settings.alignment, self.state, area, result, features, layer, layers)
            means |= logs
            outputs.append(result.projected)
            gradients.append(aligning * share)
        torch.autograd.backward(outputs, gradients)
        if layers:
            means["encoder_image"] = layers[0] * settings.accumulation
        means["latent_std"] = result.latent.detach().std()
        return means

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
            real_average, fake_average, known = self.state.lecam
            lecam = known * lecam_loss(real_logits, fake_logits, real_average, fake_average)
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

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _without_synchronisation(self) -> ExitStack:
        stack = ExitStack()
        for network in (self.reconstructor, self.discriminator):
            if network is not None:
                stack.enter_context(self.accelerator.no_sync(network))
        return stack
