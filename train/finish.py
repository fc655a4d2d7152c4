"""The end of a run: latent statistics, export, results and report."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor

from latent_ae.config import UserError, to_yaml
from latent_ae.data.loader import ImageSource, posterior_noise, training_batches
from latent_ae.export.precision import verdict
from latent_ae.export.write import CardFacts, export_autoencoder, loading_lines, push_to_hub
from latent_ae.files import write_json
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.models.build import channels_of, factor_of, facts_of, latent_channels_of
from latent_ae.models.discriminator import Discriminator
from latent_ae.models.likelihood import Likelihood
from latent_ae.models.posterior import draw
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.models.registry import family_of
from latent_ae.models.stored_encoder import encoder_in_memory
from latent_ae.objectives import GAN
from latent_ae.objectives.base import Objective
from latent_ae.progress import now, progress_bar

from .agreement import Agreed, gathered
from .phases import Phase, phases_of
from .report import decline, read_log, remarks_on, result_rows, text_table, write_report
from .settings import TrainSettings
from .validate import Validator

STATISTICS_CROPS = 512
"""Number of training crops whose latents determine scaling_factor and shift_factor."""
CHECK_IMAGES = 4
"""Number of held-out images on which an export is compared with the trained model and tried in half precision."""
CPU_SIDE, CPU_PIXELS = 512, 4 * 256**2
"""Limits of these images on a CPU: side in px, and pixels in all. Each image is reconstructed five times, which takes
Stable Diffusion's first stage about ten seconds per 256 x 256 pixels on one core."""
RESULTS = "results.json"


def finish_run(
    phase: Phase,
    accelerator: Accelerator,
    averaged: Reconstructor,
    source: ImageSource,
    validator: Validator,
    objectives: Sequence[Objective[Any]],
) -> dict[str, Any]:
    """Export the averaged weights, write results.json and report.html, and print the table. Every process calls this.

    Args:
        phase: The run, or one phase of it.
        accelerator: Connects the processes.
        averaged: The autoencoder with averaged weights.
        source: The training images.
        validator: The held-out images.
        objectives: The objectives in use.

    Returns:
        The content of results.json on the main process, an empty dict on others.

    Raises:
        UserError: If images cannot be read, the latents cannot be scaled, or files cannot be written.
        RuntimeError: If the check of the export fails.
    """
    run, settings = phase.folder, phase.settings
    facts = {key: value for objective in objectives for key, value in objective.facts().items()}
    statistics = measure_latents(averaged, settings, accelerator, source)
    results: dict[str, Any] = {}
    with Agreed(accelerator):
        if accelerator.is_main_process:
            log = {(event["event"], event["step"]): event for event in read_log(run)}
            baseline = f"bicubic /{validator.factor}"
            results["held_out"] = {
                baseline: log.get(("baseline", 0), {}),
                "before": log.get(("validate", 0), {}),
                "after": log.get(("validate", settings.steps), {}),
            }
            results["latents"] = statistics.summary()
            results["export"] = export_autoencoder(
                averaged.autoencoder,
                run / "export",
                statistics=statistics,
                sample_size=settings.data.resolution,
                card=_whole_card(phase, results["held_out"]["after"], results["held_out"][baseline]),
                check_images=check_images(validator),
                keep_scaling=keeps_scaling(settings, averaged.autoencoder),
                pipeline=settings.export_for,
                likelihood=Likelihood(**facts["likelihood"]) if facts.get("likelihood") else None,
                discriminator=trained_discriminator(objectives, settings.steps),
                companions=dict(one for one in (objective.exported() for objective in objectives) if one is not None),
            )
            for remark in results["export"].get("remarks", ()):
                print(f"{settings.export_for}: {remark}", file=sys.stderr)
            results["step"] = settings.steps
            rows = result_rows(results["held_out"], settings.validation.also_px)
            results["below_its_start"] = decline(rows)
            now("report")
            write_report(run, settings, rows, remarks_on(results["held_out"]), [type(one) for one in objectives])
            # written last, because it means that all of the above is complete
            write_json(run / RESULTS, results)
            show_results(phase, results)
    return results


def check_images(validator: Validator) -> Tensor:
    """Return the held-out images on which an export is tried, (N, C, H, W) in [-1, 1]; fewer and smaller on a CPU."""
    images = validator.some(CHECK_IMAGES)
    if validator.accelerator.device.type != "cpu":
        return images
    most = CPU_SIDE // validator.factor * validator.factor
    height, width = (min(side, most) for side in images.shape[2:])
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    count = max(1, CPU_PIXELS // (height * width))
    return images[:count, :, top : top + height, left : left + width]


def push_export(run: Path, settings: TrainSettings) -> None:
    """Upload the export if the settings ask for it. A failure is printed and does not end the run."""
    if settings.push_to_hub is None:
        return
    now(f"upload to {settings.push_to_hub}")
    try:
        print(f"uploaded to {push_to_hub(run / 'export', settings.push_to_hub)}", file=sys.stderr)
    except UserError as error:
        print(f"push_to_hub: {error}", file=sys.stderr)


def finished_results(run: Path, step: int) -> dict[str, Any] | None:
    """Return the results of a run that was exported and reported at `step`; None if something is missing."""
    try:
        results: dict[str, Any] = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(results, dict):
        return None
    return results if results.get("step") == step and (run / "export/config.json").is_file() else None


def measure_latents(
    reconstructor: Reconstructor, settings: TrainSettings, accelerator: Accelerator, source: ImageSource
) -> LatentStatistics:
    """Return statistics of posterior samples of the first training crops, over all processes. Every process calls this.

    Args:
        reconstructor: Holds the autoencoder.
        settings: The run's settings.
        accelerator: Connects the processes.
        source: The training images.

    Raises:
        UserError: On every process, if images cannot be read on one of them.
    """
    # of one size, because the bucket of a crop depends on the size of the batch
    autoencoder, data = reconstructor.autoencoder, settings.data.model_copy(update={"buckets": ()})
    factor, processes = factor_of(autoencoder), accelerator.num_processes
    shape = (latent_channels_of(autoencoder), data.resolution // factor, data.resolution // factor)
    micro_batch = settings.micro_batch
    batches = training_batches(
        source,
        data,
        channels=channels_of(autoencoder),
        seed=settings.seed,
        batch_size=micro_batch * processes,
        micro_batch_size=micro_batch,
        rank=accelerator.process_index,
        world_size=processes,
    )
    statistics, failure = LatentStatistics(family_of(autoencoder).scaled_by_positions), ""
    progress = progress_bar("latent statistics", STATISTICS_CROPS, "img", disable=not accelerator.is_main_process)
    with torch.no_grad(), progress, encoder_in_memory(autoencoder):
        for _ in range(-(-STATISTICS_CROPS // (micro_batch * processes))):
            try:
                batch = next(batches)
            except UserError as error:  # raised below, where the other processes wait
                failure = str(error)
                break
            noise = None
            if family_of(autoencoder).latent != "categorical":  # whose most likely codes are what `encode` gives
                noise = posterior_noise(settings.seed, batch.numbers, shape).to(accelerator.device)
            drawn = draw(autoencoder, batch.images.to(accelerator.device), noise)
            # the same crops, however the batch is split
            rows = [row for row, number in enumerate(batch.numbers) if number < STATISTICS_CROPS]
            if rows and family_of(autoencoder).latent == "hierarchy":
                # thousands of channels of 1 x 1 px would have a covariance matrix of millions of numbers
                statistics.update(drawn.latent[rows].movedim(1, 2))
            elif rows and drawn.logvar is None:
                statistics.update(drawn.latent[rows])
            elif rows and drawn.logvar is not None:
                statistics.update(drawn.latent[rows], drawn.mean[rows], drawn.logvar[rows])
            progress.update(min(micro_batch * processes, STATISTICS_CROPS - progress.n))
    failures = [text for text in gathered(failure) if text]
    if failures:
        raise UserError(failures[0])
    statistics.gather()
    return statistics


def keeps_scaling(settings: TrainSettings, autoencoder: ModelMixin) -> bool:
    """Return whether the latents are those of init_from or of a teacher, so that their scaling is known."""
    decoder_only = settings.facts(facts_of(autoencoder)).train == "decoder"
    return settings.distillation.teacher is not None or (decoder_only and settings.init_from is not None)


def trained_discriminator(objectives: Sequence[Objective[Any]], steps: int) -> Discriminator | None:
    """Return the discriminator of images; None if there is none, or if `steps` updates end before it trains."""
    gan = next((one for one in objectives if isinstance(one, GAN)), None)
    return gan.adversary if gan is not None and steps > gan.own.start else None


def card_facts(
    run: Path, settings: TrainSettings, step: int, after: dict[str, Any], baseline: dict[str, Any]
) -> CardFacts:
    """Return the model card's facts about the weights after `step` updates.

    Args:
        run: The run folder, whose name becomes the model's.
        settings: The run's settings.
        step: Number of updates.
        after: Validation of these weights; may be empty.
        baseline: Metrics of the bicubic baseline; may be empty.
    """
    return CardFacts(
        name=run.absolute().name,
        data_name=settings.data.eval_source or settings.data.title,
        steps=step,
        num_images=after.get("n"),
        metrics=after,
        baseline=baseline,
        split="held out",
        base_model=settings.init_from,
        hub_id=settings.push_to_hub,
        settings_yaml=to_yaml(settings),
    )


def _whole_card(phase: Phase, after: dict[str, Any], baseline: dict[str, Any]) -> CardFacts:
    """Return the model card's facts about the weights at the end of a phase, with the phases before it."""
    card = card_facts(phase.whole, phase.settings, phase.settings.steps, after, baseline)
    if phase.alone:
        return card
    recipe = phase.recipe.model_copy(update={"phases": phase.recipe.phases[: phase.number]})
    steps, hub_id = sum(one.settings.steps for one in phases_of(recipe)), phase.recipe.push_to_hub
    return replace(card, steps=steps, base_model=recipe.init_from, hub_id=hub_id, settings_yaml=to_yaml(recipe))


def show_results(phase: Phase, results: dict[str, Any]) -> None:
    """Print the final table on stdout, and at the end of the whole run how to load the export."""
    run, held_out, export = phase.whole, results["held_out"], results["export"]
    count = held_out["after"].get("n", 0)
    which = "" if phase.alone else f"{phase.title}: "
    print(f"{which}Held-out images ({count}), before and after training:\n")
    rows = result_rows(held_out, phase.settings.validation.also_px)
    print(text_table(rows))
    for remark in (*remarks_on(held_out), decline(rows)):
        if remark:
            print(f"\n{remark}")
    if not phase.last:
        print()
        return
    factors = [f"{key} {export[key]:.4f}" for key in ("scaling_factor", "shift_factor") if export[key] is not None]
    print("   ".join([f"\nexport   {run / 'export'}", *factors]))
    print(f"         a fresh process reloads it with a largest difference of {export['max_abs_difference']:.1e}")
    if export.get("precision"):  # missing for other classes, and in results of an older version
        print(f"         {verdict(export['precision'])}")
    print(f"report   {run / 'report.html'}\n\nLoad it with\n")
    print(loading_lines(run / "export", export.get("class", "AutoencoderKL")))
