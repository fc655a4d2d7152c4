"""The training run from top to bottom."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from latent_ae.arithmetic import float32_arithmetic, lay_out, training_memory_format
from latent_ae.config import UserError
from latent_ae.data.loader import open_images
from latent_ae.models.build import channels_of, factor_of, facts_of
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives import OBJECTIVES, Reconstruction
from latent_ae.objectives.base import Objective

from .agreement import Agreed, gathered, hosts, on_main, stop_on_drift
from .build import build_objectives, compile_blocks, starting_autoencoder
from .checkpoint import (
    complete_checkpoints,
    kept_steps,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from .data import Feed, stored_latents, stream_state_of
from .finish import finish_run, finished_results, push_export, show_results
from .log import Log
from .optim import Ema
from .preflight import preflight, try_passes
from .report import held_out_distances
from .run import changes_since, cut_back, only_training_in, write_config
from .settings import TrainSettings
from .signals import Stopped, StopSignals
from .step import TrainStep
from .validate import Validator


def train(settings: TrainSettings, objectives: Sequence[Objective[Any]] = ()) -> dict[str, Any]:
    """Train until `settings.steps`, resuming the run folder's newest checkpoint if there is one; export and report.

    Args:
        settings: The run's settings, for example `TrainSettings.load("quickstart", "steps=100")`.
        objectives: More terms of training besides those of the settings (docs/objectives.md); they act after them.

    Returns:
        The content of results.json: held-out metrics before and after, statistics of the latents, facts of the export.
        With several processes, only the main process has them at the end of a training.

    Raises:
        UserError: If the settings, data or folders do not allow the run, or training diverges.
        Stopped: If a signal ended the run after a checkpoint.
    """
    run = Path(settings.output_dir).expanduser()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        # the step has its own autocast; a launcher's configuration must not add another one
        mixed_precision="no",
        dynamo_backend="no",  # `compile` compiles blocks; a launcher's setting would compile whole networks
        log_with=list(settings.report_to) or None,
        project_dir=run,
        # gradients are views of the buckets in which they are reduced, which saves a copy
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    hosts()  # its first call must be made while all processes are here
    with float32_arithmetic(tf32=settings.tf32), only_training_in(run, accelerator):
        return _train(run, settings, accelerator, objectives)


def _train(
    run: Path, settings: TrainSettings, accelerator: Accelerator, more: Sequence[Objective[Any]]
) -> dict[str, Any]:
    # one process looks, because on a shared disk others may see a newer or an older state
    checkpoint = on_main(accelerator, lambda: newest_checkpoint(run))
    first_step = checkpoint.step if checkpoint is not None else 0
    with Agreed(accelerator):
        changes = changes_since(checkpoint, settings) if checkpoint is not None else {}
        if first_step > settings.steps:
            raise UserError(f"steps: {run} is at step {first_step:,} already, past {settings.steps:,}: raise steps")
    results = on_main(accelerator, lambda: finished_results(run, settings.steps))
    if first_step == settings.steps and results is not None:
        with Agreed(accelerator):
            if accelerator.is_main_process:
                write_config(run, settings)
                show_results(run, results)
        return _ended(accelerator, run, settings, results)

    with Agreed(accelerator):  # an error on one process stops all, and is printed once
        source, held_out = open_images(settings.data, "train"), open_images(settings.data, "held_out")
        autoencoder = starting_autoencoder(settings).to(accelerator.device)
        pairs = stored_latents(settings, accelerator, source, autoencoder)
        source = source if pairs is None else pairs.images
        objectives = [*build_objectives(settings, autoencoder, accelerator.device), *more]
        facts, state = settings.facts(facts_of(autoencoder)), checkpoint.state() if checkpoint is not None else None
        for objective in objectives:
            objective.run = facts
            if state is not None:
                objective.refuse_another(state)
        ema = Ema(autoencoder, settings.ema.decay) if settings.ema.decay else None
        if accelerator.is_main_process:  # only now, because everything above may refuse the settings
            write_config(run, settings)
    if settings.compile:
        compile_blocks(autoencoder)
    step = TrainStep(settings, accelerator, autoencoder, objectives, ema)
    averaged = Reconstructor(ema.module if ema is not None else autoencoder)
    lay_out(averaged, training_memory_format(accelerator.device))
    perceptual = next((one.perceptual for one in objectives if isinstance(one, Reconstruction)), None)
    factor, channels = factor_of(autoencoder), channels_of(autoencoder)
    validator = Validator(settings, accelerator, held_out, channels, factor, perceptual)

    with Agreed(accelerator):
        if checkpoint is not None:
            load_checkpoint(checkpoint, step)
        stream_state = stream_state_of(checkpoint, accelerator)
        validator.try_one_batch(averaged)
        if accelerator.is_main_process:
            preflight(run, settings, step)
            cut_back(run, first_step if checkpoint is not None else -1)
        log = Log(run, accelerator, settings, [*OBJECTIVES, *(type(objective) for objective in more)])
    feed = Feed(step, source, log, first_step, stream_state, pairs)
    with Agreed(accelerator):
        if first_step < settings.steps:
            try_passes(step, feed.on_device(feed.gray()))

    number = first_step
    try:
        log.begin(first_step, changes if checkpoint is not None else None, validator)
        if due(first_step, settings.validation.every, settings.steps):
            validate(log, validator, averaged, first_step)
        prune(run, settings, accelerator)
        with StopSignals() as stop:
            for number in range(first_step, settings.steps):
                means = step(number, feed)
                done = number + 1
                feed.bad_files.settle(done)
                log.advance(settings.batch_size)
                logging = due(done, settings.log.every, settings.steps)
                saving = due(done, settings.checkpoint.every, settings.steps)
                if logging:
                    log.train(done, means)  # the only place where numbers leave the device
                    stop_on_drift(accelerator, done, step.networks)
                # weights without finite gradients must not replace those of good checkpoints
                if (logging or saving) and log.skipped(done, step.skipped_steps) and saving:
                    log.say(f"step {done:,}: no checkpoint, its gradients were not finite")
                    saving = False
                if saving:
                    save(run, step, feed, log, done)
                if (name := stop.wanted()) and done < settings.steps:
                    if not saving and not log.skipped(done, step.skipped_steps):
                        save(run, step, feed, log, done)
                    raise Stopped(name)  # a resumed run makes up for a validation and pruning that are due
                if due(done, settings.validation.every, settings.steps):
                    validate(log, validator, averaged, done)
                    log.restart_clock(done)
                if saving:
                    prune(run, settings, accelerator)
        log.close()
        results = finish_run(run, settings, accelerator, averaged, source, validator, objectives)
    except BaseException:
        log.close()
        _say_how_to_go_on(run, number, accelerator)
        raise
    return _ended(accelerator, run, settings, results)


def due(done: int, every: int, steps: int) -> bool:
    """Return whether something is due after `done` steps that happens at every `every`-th and at the last step."""
    return done % every == 0 or done == steps


def save(run: Path, step: TrainStep, feed: Feed, log: Log, done: int) -> None:
    """Write the checkpoint after `done` steps. Every process calls this. Raises UserError if it cannot be written."""
    settings, accelerator = step.settings, step.accelerator
    state = {
        "step": done,
        "num_images_seen": done * settings.batch_size,
        "num_processes": accelerator.num_processes,
        "stream_states": gathered(feed.stream_state),
        "settings": settings.model_dump(mode="json", by_alias=True),
    }
    for objective in step.objectives.values():
        state |= objective.facts()
    with Agreed(accelerator):
        if accelerator.is_main_process:
            log.sync()
            save_checkpoint(run, step, state)


def validate(log: Log, validator: Validator, averaged: Reconstructor, done: int) -> None:
    """Measure held-out images after `done` steps, unless the log has that step already. Every process calls this."""
    run = log.path.parent
    if not log.has("validate", done):
        log.write("validate", done, validator.measure_model(averaged, run / f"previews/step-{done:08d}.png"))
    log.gan_alarm(done, run)


def prune(run: Path, settings: TrainSettings, accelerator: Accelerator) -> None:
    """Remove old checkpoints, after the validation that determines the best one. Every process calls this."""
    with Agreed(accelerator):
        if accelerator.is_main_process:
            saved = [checkpoint.step for checkpoint in complete_checkpoints(run)]
            prune_checkpoints(run, kept_steps(saved, settings.checkpoint, settings.gan, held_out_distances(run)))


def _ended(accelerator: Accelerator, run: Path, settings: TrainSettings, results: dict[str, Any]) -> dict[str, Any]:
    """End training on all processes, then upload from the main one, so that the others need not wait."""
    accelerator.end_training()
    if accelerator.is_main_process:
        push_export(run, settings)
    return results


def _say_how_to_go_on(run: Path, number: int, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    saved = complete_checkpoints(run)
    if saved:
        where = f"the checkpoint of step {saved[-1].step:,} is kept; the same command resumes from it"
    else:
        where = "no checkpoint was due yet (checkpoint.every); the same command starts from the beginning"
    print(f"training stopped in step {number + 1:,}: {where}", file=sys.stderr)
