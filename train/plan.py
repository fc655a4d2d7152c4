"""The plan of a run, as `--dry-run` prints it."""

from collections.abc import Mapping

import torch
import yaml
from diffusers import ModelMixin

from latent_ae.data.settings import Bucket, MixedSource
from latent_ae.models.borrowed_encoder import borrowed_parameters
from latent_ae.models.build import (
    channels_of,
    count_parameters,
    factor_of,
    facts_of,
    latent_channels_of,
)
from latent_ae.models.new_decoder import decoder_parameters
from latent_ae.models.stored_encoder import out_of_memory_parameters
from latent_ae.objectives import GAN, KL, OBJECTIVES, Codebook, CodeRelaxation, FlowMatching
from latent_ae.objectives.class_noise import ClassNoise

from .build import load_original, planned_autoencoder
from .cost import Gpu, describe_cost
from .parts import collapsed, trained_names
from .phases import merged, phases_of
from .settings import TrainSettings

MOST_NAMES = 8
"""Number of names of trained parts that are shown."""
BYTES = 4
"""Bytes of a float32."""


def described(part: MixedSource) -> str:
    """Return a source of a mixture and how much of it is taken, in words."""
    return f"{part.source} ({f'weight {part.weight:g}' if part.weight else f'{part.repeats:g} x'})"


def share_in_words(bucket: Bucket) -> str:
    """Return a bucket and its weight in words."""
    return f"{bucket.title} (weight {bucket.weight:g})"


def describe_plan(settings: TrainSettings, gpu: Gpu | None = None) -> str:
    """Return the plan as lines of text: parameters, steps, batch, objectives and disk space, for each phase its own.

    Args:
        settings: The run's settings.
        gpu: The GPU for which memory and arithmetic are computed; None leaves them out.

    Raises:
        UserError: If the autoencoder cannot be loaded or does not go with the settings.
    """
    plans = []
    for phase in phases_of(settings):
        with phase.named_in_errors():
            autoencoder = planned_autoencoder(phase.first_start)
            costs = describe_cost(phase.settings, autoencoder, gpu) if gpu is not None else {}
        plan = _plan_of_a_run(phase.settings, autoencoder, phase.first_start, costs)
        if not phase.alone:
            entry = merged(settings.phases[phase.number - 1], phase.implied)
            differences = yaml.safe_dump(entry, sort_keys=False, default_flow_style=None, width=100)
            plan = f"{phase.title}, where these settings differ:\n\n{differences}\n{plan}"
        plans.append(plan)
    return "\n\n".join(plans)


def _plan_of_a_run(
    settings: TrainSettings, autoencoder: ModelMixin, start: TrainSettings, costs: Mapping[str, str]
) -> str:
    weights, discriminator = count_parameters(autoencoder) + out_of_memory_parameters(autoencoder), 0
    if settings.gan.weight:
        with torch.device("meta"):
            discriminator = count_parameters(
                GAN.network(
                    settings.gan,
                    channels_of(autoencoder),
                    settings.data.resolution,
                    latent_channels_of(autoencoder),
                )
            )
    facts = facts_of(autoencoder)
    run = settings.facts(facts)
    learning = sum(parameter.numel() for parameter in autoencoder.parameters() if parameter.requires_grad)
    # weights and their average; AdamW's two moments of trained weights, or Muon's one
    moments = 1 if settings.optim.kind == "muon" else 2
    copies = (2 if settings.ema.decay else 1) * weights + moments * learning + 3 * discriminator
    copies += borrowed_parameters(autoencoder)
    if settings.gan.weight:
        images, latents = settings.data.resolution**2, (settings.data.resolution // factor_of(autoencoder)) ** 2
        stored = channels_of(autoencoder) * images + latent_channels_of(autoencoder) * latents
        copies += settings.gan.replay * stored
    part = "" if learning == weights else f" ({learning:,} train)"
    factor = factor_of(autoencoder)
    side = settings.data.resolution // factor
    latent = f"{latent_channels_of(autoencoder)} x {side} x {side}"
    texts: dict[str, list[str]] = {}
    for objective in OBJECTIVES:
        clauses = texts.setdefault(objective.plan_line, [])
        if objective in settings.objectives and (text := objective.describe(settings.section_of(objective), run)):
            clauses.append(text)
    if (noise := ClassNoise.of(autoencoder)) is not None:
        texts[noise.plan_line].insert(0, f"noise of deviations up to {noise.tau:g} added (noise_tau)")
    if not facts.random:
        texts[KL.plan_line] = []
    if facts.no_codebook:
        del texts[Codebook.plan_line]
    if not facts.flow_matching:
        del texts[FlowMatching.plan_line]
    if facts.latent != "categorical":
        del texts[CodeRelaxation.plan_line]
    most, micro_batch = settings.micro_batch_size, settings.micro_batch
    fewer = f" (micro_batch_size {most} is the most; {micro_batch} divides)" if most and most > micro_batch else ""
    trains = {}
    if settings.train != "all":
        whole = collapsed(trained_names(settings.train, facts.parameters), facts.parameters)
        shown, more = whole[:MOST_NAMES], len(whole) - MOST_NAMES
        trains["trains"] = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    replaced = {}
    if settings.decoder.wanted:
        before = decoder_parameters(load_original(start))
        kind = f"{settings.decoder.kind} with " if settings.decoder.kind is not None else ""
        replaced["decoder"] = f"{kind}{decoder_parameters(autoencoder):,} parameters, in place of {before:,}"
    if borrowed := borrowed_parameters(autoencoder):
        replaced["encoder"] = f"that of {start.init_from}, whose {borrowed:,} parameters stay"
    if settings.decoder.latents is not None:
        replaced["encoder"] = f"not in memory; its latents are read from {settings.decoder.latents}"
    scale = settings.data.scale
    lines = {
        "autoencoder": f"{weights:,} parameters{part}, factor {factor}, latent {latent} for "
        f"{settings.data.resolution} px",
        **replaced,
        **trains,
        **({"buckets": ", ".join(map(share_in_words, settings.data.buckets))} if settings.data.buckets else {}),
        **({"crop scale": f"{scale[0]:g} to {scale[1]:g} of the largest crop that fits"} if scale else {}),
        **({"mixture": ", ".join(map(described, settings.data.mixture))} if settings.data.mixture else {}),
        "discriminator": f"{discriminator:,} parameters",
        "steps": f"{settings.steps:,}, {settings.steps * settings.batch_size:,} crops",
        "global batch": f"{settings.batch_size} = {settings.processes} process(es) x {micro_batch} "
        f"micro-batch x {settings.accumulation} accumulation{fewer}",
        **{
            name: ", ".join(clauses) or ("unchanged" if name == "latents" else "off") for name, clauses in texts.items()
        },
        **costs,
        "checkpoint": f"{copies * BYTES / 1e6:,.0f} MB each, every {settings.checkpoint.every:,} steps, "
        f"the newest {settings.checkpoint.keep} kept",
        "output": settings.output_dir,
    }
    rows = [*lines.items(), *(("warning", text) for text in settings.warnings())]
    return "\n".join(f"{name + ':':<15}{text}" for name, text in rows)
