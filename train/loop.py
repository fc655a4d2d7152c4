"""The training run from top to bottom."""

import copy
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
from latent_ae.objectives import OBJECTIVES, Reconstruction, SemiSupervised
from latent_ae.objectives.base import Objective

from .agreement import Agreed, gathered, hosts, on_main, stop_on_drift
from .build import (
    build_objectives,
    compile_blocks,
    split_dependence,
    starting_autoencoder,
    unmeasured_scaling,
)
from .checkpoint import (
    complete_checkpoints,
    kept_steps,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from .data import Feed, labelled_images, stored_latents, stream_state_of
from .finish import finish_run, finished_results, push_export, show_results
from .log import Log
from .optim import Ema
from .phase_folders import publish, refuse_later_misfits, refuse_other_phases
from .phases import Phase, phases_of
from .preflight import preflight, try_passes
from .report import held_out_distances
from .run import changes_since, cut_back, only_training_in, set_results_aside, write_config
from .settings import TrainSettings
from .signals import Stopped, StopSignals
from .step import TrainStep
from .validate import Validator


def train(settings: TrainSettings, objectives: Sequence[Objective[Any]] = ()) -> dict[str, Any]:
    """Train until `settings.steps`, resuming the run folder's newest checkpoint if there is one; export and report.

    With `settings.phases` this is done for each phase in its own folder, one after another; finished ones are skipped.

    Args:
        settings: The run's settings, for example `TrainSettings.load("quickstart", "steps=100")`.
        objectives: More terms of training besides those of the settings (docs/objectives.md); they act after them.

    Returns:
        The content of results.json: held-out metrics before and after, statistics of the latents, facts of the export;
        with phases those of the last one, and under "phases" a summary of each. With several processes, only the main
        process has them at the end of a training.

    Raises:
        UserError: If the settings, data or folders do not allow the run, or training diverges.
        Stopped: If a signal ended the run after a checkpoint.
    """
    run, phases = Path(settings.output_dir).expanduser(), phases_of(settings)
    accelerator, results = _accelerator(phases[0]), dict[str, Any]()
    hosts()  # its first call must be made while all processes are here
    with only_training_in(run, accelerator):
        with Agreed(accelerator):
            if accelerator.is_main_process:
                refuse_other_phases(run, phases)
                refuse_later_misfits(phases)
        for phase in phases:
            if phase is not phases[0]:
                accelerator = _accelerator(phase)
            with (
                phase.named_in_errors(),
                float32_arithmetic(tf32=phase.settings.tf32, benchmark=phase.settings.cudnn_benchmark),
            ):
                # their state must not go on into the next phase, where a resumed run would not have it
                results = _train(phase, accelerator, objectives if phase.alone else copy.deepcopy(objectives))
            with Agreed(accelerator):
                if accelerator.is_main_process:
                    results = publish(phases, phase, results)
            if not phase.last:  # the processes stay connected
                for tracker in accelerator.trackers:
                    tracker.finish()
                accelerator.free_memory()
        accelerator.end_training()
        if accelerator.is_main_process:  # from here on the others need not wait
            push_export(run, settings)
    return results


def _accelerator(phase: Phase) -> Accelerator:
    """Return the connection between the processes, with a phase's trackers; the first call connects them."""
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        # the step has its own autocast; a launcher's configuration must not add another one
        mixed_precision="no",
        dynamo_backend="no",  # `compile` compiles blocks; a launcher's setting would compile whole networks
        log_with=list(phase.settings.report_to) or None,
        project_dir=phase.folder,
        # gradients are views of the buckets in which they are reduced, which saves a copy
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _train(phase: Phase, accelerator: Accelerator, more: Sequence[Objective[Any]]) -> dict[str, Any]:
    run, settings = phase.folder, phase.settings
    # one process looks, because on a shared disk others may see a newer or an older state
    checkpoint = on_main(accelerator, lambda: newest_checkpoint(run))
    first_step = checkpoint.step if checkpoint is not None else 0
    with Agreed(accelerator):
        changes = changes_since(checkpoint, settings, phase) if checkpoint is not None else {}
        if first_step > settings.steps:
            raise UserError(f"steps: {run} is at step {first_step:,} already, past {settings.steps:,}: raise steps")
    results = on_main(accelerator, lambda: finished_results(run, settings.steps))
    if first_step == settings.steps and results is not None:
        with Agreed(accelerator):
            if accelerator.is_main_process and phase.last:
                if settings.export_for not in (None, results["export"].get("pipeline")):
                    raise UserError(
                        f"export_for: {run} is finished, and its export was not checked for {settings.export_for}: "
                        f"latent-ae export {run} OUT --for {settings.export_for} writes one that is"
                    )
                write_config(phase)
                show_results(phase, results)
            elif accelerator.is_main_process:
                print(f"{phase.title} is finished", file=sys.stderr)
        return results

    if accelerator.is_main_process and not phase.alone:
        print(f"{phase.title}: {run}", file=sys.stderr)
    with Agreed(accelerator):  # an error on one process stops all, and is printed once
        source, held_out = open_images(settings.data, "train"), open_images(settings.data, "held_out")
        autoencoder = starting_autoencoder(settings).to(accelerator.device)
        pairs = stored_latents(settings, accelerator, source, autoencoder)
        source = source if pairs is None else pairs.images
        objectives = [*build_objectives(settings, autoencoder, accelerator.device), *more]
        fed, labels = source, None
        for semi_supervised in (one for one in objectives if isinstance(one, SemiSupervised)):
            fed, labels = labelled_images(settings, source, held_out)
            semi_supervised.name_classes(labels.names)
        facts, state = settings.facts(facts_of(autoencoder)), checkpoint.state() if checkpoint is not None else None
        for objective in objectives:
            objective.run = facts
            if state is not None:
                objective.refuse_another(state)
        ema = Ema(autoencoder, settings.ema.decay) if settings.ema.decay else None
        if accelerator.is_main_process:
            for warning in (unmeasured_scaling, split_dependence):
                if text := warning(settings, autoencoder):
                    print(f"warning: {text}", file=sys.stderr)
        if accelerator.is_main_process:  # only now, because everything above may refuse the settings
            write_config(phase)
    if facts.compiles_on(accelerator.device):
        compile_blocks(autoencoder)
    step = TrainStep(settings, accelerator, autoencoder, objectives, ema)
    averaged = Reconstructor(autoencoder) if ema is None else Reconstructor(ema.module).eval()
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
            preflight(phase, step)
            cut_back(run, first_step if checkpoint is not None else -1)
            set_results_aside(phase.whole)
        label = "" if phase.alone else f"phase {phase.number}/{len(phase.recipe.phases)}, "
        kinds = [*OBJECTIVES, *(type(objective) for objective in more)]
        log = Log(run, accelerator, settings, kinds, fed, label)
    feed = Feed(step, fed, log, first_step, stream_state, pairs, labels)
    with Agreed(accelerator):
        if first_step < settings.steps:
            try_passes(step, feed.on_device(feed.gray()))

    number, stopped_by, overdue = first_step, None, False
    try:
        with StopSignals() as stop:
            log.begin(first_step, changes if checkpoint is not None else None, validator)
            if due(first_step, settings.validation.every, settings.steps):
                validate(log, validator, averaged, first_step)
            prune(run, settings, accelerator)
            for number in range(first_step, settings.steps):
                means = step(number, feed)
                done = number + 1
                feed.bad_files.settle(done)
                log.advance(settings.batch_size)
                logging = due(done, settings.log.every, settings.steps)
                saving = overdue or due(done, settings.checkpoint.every, settings.steps)
                if logging:
                    log.train(done, means)
                    stop_on_drift(accelerator, done, step.networks)
                stopped_by = stop.wanted()
                looking = logging or saving or stopped_by
                changed_nothing = log.skipped(done, step.skipped_steps) if looking else 0
                # where training diverges, weights that get no finite gradients must not replace good checkpoints
                overdue = bool(saving and changed_nothing and done < settings.steps)
                saving = saving and not overdue
                if saving:
                    save(run, step, feed, log, done)
                if stopped_by and done < settings.steps:
                    if not saving:
                        save(run, step, feed, log, done)
                    raise Stopped(stopped_by)  # a resumed run makes up for a validation and pruning that are due
                if due(done, settings.validation.every, settings.steps):
                    validate(log, validator, averaged, done)
                    log.restart_clock(done)
                if saving:
                    prune(run, settings, accelerator)
            if first_step == settings.steps and (stopped_by := stop.wanted()):  # nothing was left but what follows
                raise Stopped(stopped_by)
        feed.close()  # the workers' memory is free for what follows
        log.close()
        results = finish_run(phase, accelerator, averaged, source, validator, objectives)
        if stopped_by and not phase.last:  # a signal in the last step of a phase keeps the next one from beginning
            raise Stopped(stopped_by)
    except BaseException:
        log.close()
        _say_how_to_go_on(phase, number, accelerator)
        raise
    finally:
        feed.close()
    return results


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


def _say_how_to_go_on(phase: Phase, number: int, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    saved = complete_checkpoints(phase.folder)
    if saved:
        where = f"the checkpoint of step {saved[-1].step:,} is kept; the same command resumes from it"
    else:
        start = "from the beginning" if phase.alone else f"{phase.title} from its beginning"
        where = f"no checkpoint was due yet (checkpoint.every); the same command starts {start}"
    print(f"training stopped in step {number + 1:,}: {where}", file=sys.stderr)
