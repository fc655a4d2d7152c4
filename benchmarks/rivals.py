"""The schedules that others train with, re-created from their sources, for benchmarks only.

Each makes one update of both networks with L1, LPIPS, KL, hinge PatchGAN and the adaptive weight; the networks are the
same as ours, or latent-diffusion's own loss module is around ours.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latent_ae.objectives.adversarial_losses import discriminator_loss

KL_WEIGHT, GAN_WEIGHT = 1e-6, 0.5
CLAMP = 1e4
"""Of the adaptive weight, which is a ratio of gradients of sums over an image's elements."""


class Networks:
    """An autoencoder, a discriminator, LPIPS and one optimizer for each of the first two."""

    def __init__(self, autoencoder: AutoencoderKL, discriminator: nn.Module, perceptual: nn.Module, lr: float = 4.5e-6):
        self.autoencoder, self.discriminator, self.perceptual = autoencoder.train(), discriminator, perceptual
        self.optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.9)) for network in (autoencoder, discriminator)
        )


def latent_diffusion_step(
    nets: Networks, images: Tensor, discriminator_factor: float, gan_weight: float, every: int, rows: slice
) -> None:
    """CompVis/latent-diffusion ldm/models/autoencoder.py training_step, once for each optimizer.

    As Lightning does, the parameters of the other optimizer need no gradient meanwhile. The discriminator's pass
    repeats the autoencoder's forward pass and LPIPS, whose result it drops. All of the adversarial part is computed
    whatever its weights. `rows`, every `every`-th image, are those that LPIPS looks at, and count so many times.
    """
    for index, optimizer in enumerate((nets.optimizer, nets.discriminator_optimizer)):
        nets.autoencoder.requires_grad_(index == 0)
        nets.discriminator.requires_grad_(index == 1)
        posterior = nets.autoencoder.encode(images).latent_dist
        reconstruction = nets.autoencoder.decode(posterior.sample()).sample
        distances = nets.perceptual(images[rows], reconstruction[rows])
        nll = (images - reconstruction).abs().sum() + every * images[0].numel() * distances.sum()
        nll = nll / len(images)
        if index == 0:
            kl = posterior.kl().sum() / len(images)
            loss = _generator_objective(nets, nll, kl, reconstruction, gan_weight)
        else:
            logits = nets.discriminator(images), nets.discriminator(reconstruction.detach())
            loss = discriminator_factor * discriminator_loss("hinge", *logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def diffusers_example_step(nets: Networks, images: Tensor) -> None:
    """diffusers examples/research_projects/autoencoderkl: batches for the two networks in turns.

    LPIPS runs without gradient; nothing is frozen or detached, so each loss fills both networks' gradients.
    """
    weights_dtype = next(nets.autoencoder.parameters()).dtype
    targets = images.to(weights_dtype)
    for index in range(2):
        posterior = nets.autoencoder.encode(targets).latent_dist
        reconstruction = nets.autoencoder.decode(posterior.sample()).sample
        if index == 0:
            pixel = F.l1_loss(reconstruction.float(), targets.float(), reduction="none")
            with torch.no_grad():
                distance = nets.perceptual(reconstruction, targets)
            nll = (pixel + distance.view(-1, 1, 1, 1)).sum() / len(images)
            loss = _generator_objective(nets, nll, posterior.kl().sum() / len(images), reconstruction, GAN_WEIGHT)
            loss.backward()
            nn.utils.clip_grad_norm_(nets.autoencoder.parameters(), 1.0)
            nets.optimizer.step()
            nets.optimizer.zero_grad(set_to_none=True)
        else:
            logits = nets.discriminator(targets), nets.discriminator(reconstruction)
            discriminator_loss("hinge", *logits).backward()
            nn.utils.clip_grad_norm_(nets.discriminator.parameters(), 1.0)
            nets.discriminator_optimizer.step()
            nets.discriminator_optimizer.zero_grad(set_to_none=True)
            # the script leaves them there; freed here so that they do not cost the next contestant memory
            nets.optimizer.zero_grad(set_to_none=True)


def _generator_objective(nets: Networks, nll: Tensor, kl: Tensor, reconstruction: Tensor, gan_weight: float) -> Tensor:
    adversarial = -nets.discriminator(reconstruction).mean()
    last_layer = nets.autoencoder.decoder.conv_out.weight
    (nll_gradient,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (gan_gradient,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    weight = (nll_gradient.norm() / (gan_gradient.norm() + 1e-4)).clamp(0.0, CLAMP).detach()
    return nll + KL_WEIGHT * kl + gan_weight * weight * adversarial


def latent_diffusion_checkout_step(
    nets: Networks, latent_diffusion: Path, taming: Path, device: torch.device
) -> Callable[[Networks, Tensor], None]:
    """The same schedule around the checkout's own LPIPSWithDiscriminator (random LPIPS weights: only time counts).

    Its discriminator (batch norm, 64 channels) replaces that of `nets`.
    """
    import torchvision

    original = torchvision.models.vgg16
    torchvision.models.vgg16 = lambda pretrained=False, **_: original(weights=None)
    sys.path[:0] = [str(taming), str(latent_diffusion)]
    from taming.modules.losses import lpips

    lpips.LPIPS.load_from_pretrained = lambda self, name="": None
    from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator

    loss = LPIPSWithDiscriminator(disc_start=0, kl_weight=KL_WEIGHT, disc_weight=GAN_WEIGHT).to(device)
    loss.perceptual_loss.requires_grad_(False)
    nets.discriminator = loss.discriminator
    nets.discriminator_optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=4.5e-6, betas=(0.5, 0.9))

    def step(nets: Networks, images: Tensor) -> None:
        for index, optimizer in enumerate((nets.optimizer, nets.discriminator_optimizer)):
            nets.autoencoder.requires_grad_(index == 0)
            nets.discriminator.requires_grad_(index == 1)
            posterior = nets.autoencoder.encode(images).latent_dist
            reconstruction = nets.autoencoder.decode(posterior.sample()).sample
            last_layer = nets.autoencoder.decoder.conv_out.weight
            value, _ = loss(images, reconstruction, posterior, index, 1, last_layer=last_layer)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
