"""What a run will do, before it does it."""

import torch

from latent_ae.models.build import build_autoencoder, count_parameters, factor_of, latent_channels_of
from latent_ae.models.discriminator import PatchDiscriminator
from latent_ae.models.registry import family_of

from .build import freeze_part, refuse_misfit, starting_autoencoder
from .settings import TrainSettings

BYTES = 4
"""Per float32."""


def describe_plan(settings: TrainSettings) -> str:
    """Parameters, steps, batch and disk, as lines of text."""
    if settings.init_from is None:
        with torch.device("meta"):
            model = settings.model.model_copy(update={"init": "default"})
            autoencoder = build_autoencoder(model, sample_size=settings.data.resolution)
            refuse_misfit(autoencoder, settings)
            freeze_part(autoencoder, settings)
    else:
        autoencoder = starting_autoencoder(settings)
    weights, judge = count_parameters(autoencoder), 0
    if settings.gan.weight:
        with torch.device("meta"):
            channels = int(autoencoder.config.in_channels)
            gan = settings.gan
            judge = count_parameters(PatchDiscriminator(channels, gan.channels, gan.layers, gan.norm, gan.blur))
    learning = sum(parameter.numel() for parameter in autoencoder.parameters() if parameter.requires_grad)
    # weights and their average; AdamW's two moments where something learns, or the one of Muon
    moments = 1 if settings.optim.kind == "muon" else 2
    copies = (2 if settings.ema.decay else 1) * weights + moments * learning + 3 * judge
    part = "" if learning == weights else f" ({learning:,} learn)"
    factor = factor_of(autoencoder)
    side = settings.data.resolution // factor
    latent = f"{latent_channels_of(autoencoder)} x {side} x {side}"
    gan_lines = "off"
    if settings.gan.weight:
        start, felt = settings.gan.start, settings.gan.start + settings.gan.discriminator_warmup
        gan_lines = f"discriminator from step {start:,}, in the autoencoder's loss from {felt:,}"
        if felt >= settings.steps:
            gan_lines += f": never, the run ends at {settings.steps:,}"
    loss = settings.loss
    shaping = {
        f"weight {loss.kl:g}": not loss.kl_target,
        f"rising over {loss.kl_warmup:,} steps": loss.kl_warmup,
        f"rising {loss.kl_cycles} times, every {settings.steps / (loss.kl_cycles or 1):,.0f} steps": loss.kl_cycles,
        f"weight from {loss.kl:g} on, controlled to {loss.kl_target:g} nats per dimension": loss.kl_target,
        f"{loss.free_bits:g} nats per dimension free": loss.free_bits,
        f"drawn to {loss.kl_capacity:g} nats per image by step {loss.kl_capacity_steps or settings.steps:,}": (
            loss.kl_capacity
        ),
    }
    latents = settings.latents
    regularisers = {
        f"scaled and turned in {latents.equivariance:.0%} of the steps": latents.equivariance,
        f"mixed with noise of standard deviation {latents.noise:g}": latents.noise,
        f"{latents.min_channels} channels or more kept": latents.min_channels,
        f"independent of each other with weight {loss.total_correlation:g}": loss.total_correlation,
        f"aligned to {settings.alignment.model}": settings.alignment.model,
        f"drawn to those of {settings.distillation.teacher}": settings.distillation.teacher,
    }
    has_rate = family_of(autoencoder).random
    learns = loss.kl and has_rate and settings.train != "decoder"
    most, micro_batch = settings.micro_batch_size, settings.micro_batch
    fewer = f" (micro_batch_size {most} is the most; {micro_batch} divides)" if most and most > micro_batch else ""
    lines = {
        "autoencoder": f"{weights:,} parameters{part}, factor {factor}, latent {latent} for "
        f"{settings.data.resolution} px",
        "discriminator": f"{judge:,} parameters",
        "steps": f"{settings.steps:,}, {settings.steps * settings.batch_size:,} crops",
        "global batch": f"{settings.batch_size} = {settings.processes} process(es) x {micro_batch} "
        f"micro-batch x {settings.accumulation} accumulation{fewer}",
        "adversarial": gan_lines,
        "KL": ", ".join(text for text, on in shaping.items() if on) if learns else "off",
        "latents": ", ".join(text for text, on in regularisers.items() if on) or "as they are",
        "checkpoint": f"{copies * BYTES / 1e6:,.0f} MB each, every {settings.checkpoint.every:,} steps, "
        f"the newest {settings.checkpoint.keep} kept",
        "output": settings.output_dir,
    }
    told = [*lines.items(), *(("warning", text) for text in settings.warnings())]
    return "\n".join(f"{name + ':':<15}{text}" for name, text in told)
