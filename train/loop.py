"""The training run, top to bottom."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from tqdm import tqdm

from latent_ae.arithmetic import float32_arithmetic, training_memory_format
from latent_ae.config import UserError
from latent_ae.data.loader import open_images, training_batches
from latent_ae.export.pipelines import SHAPE, refuse_misfit
from latent_ae.models.build import factor_of, latent_channels_of
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.pretrained.vision import VisionModel

from .agreement import Agreed, gathered, hosts, on_main, stop_on_drift
from .build import (
    compile_networks,
    starting_autoencoder,
    starting_discriminator,
    starting_projection,
    starting_total_correlation,
)
from .checkpoint import (
    complete_checkpoints,
    kept_steps,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from .data import BadFiles, Feed, stream_state_of
from .distillation import Teacher
from .finish import finish_run, finished_results, push_export, show_results
from .log import Log
from .optim import Ema
from .preflight import preflight
from .report import held_out_distances
from .run import changes_since, cut_back, only_training_in, write_config
from .settings import TrainSettings
from .signals import Stopped, StopSignals
from .step import TrainStep
from .validate import Validator


def train(settings: TrainSettings) -> dict[str, Any]:
    """Trains (or goes on training) until `settings.steps`, then exports and reports. Returns the final results."""
    run = Path(settings.output_dir).expanduser()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        # the step has its own autocast; a launcher's configuration must not lay another one over it
        mixed_precision="no",
        dynamo_backend="no",  # `compile` compiles blocks; a launcher's would compile whole networks
        log_with=list(settings.report_to) or None,
        project_dir=run,
        # the gradients lie where they are reduced: one copy less
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    hosts()  # while all processes are here
    with float32_arithmetic(tf32=settings.tf32), only_training_in(run, accelerator):
        return _train(run, settings, accelerator)


def _train(run: Path, settings: TrainSettings, accelerator: Accelerator) -> dict[str, Any]:
    # one process looks: on a shared disk others may see a newer or an older state
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
    with Agreed(accelerator):
        source = open_images(settings.data, "train")
        held_out = open_images(settings.data, "held_out")
        autoencoder = starting_autoencoder(settings)
        if settings.export_for is not None:  # of init_from, whose shape the settings do not know
            shape = {key: autoencoder.config.get(key) for key in SHAPE}
            refuse_misfit(settings.export_for, shape, type(autoencoder).__name__)
        factor, channels = factor_of(autoencoder), int(autoencoder.config.in_channels)
        perceptual = None
        if settings.loss.perceptual:  # one process of a machine fetches the weights, the others wait and find them
            weights_dir = Path(settings.weights_dir).expanduser() if settings.weights_dir else None
            perceptual = LPIPS(settings.loss.perceptual_net, weights_dir).to(accelerator.device)
        vision = projection = None
        if settings.alignment.model:
            vision = VisionModel(settings.alignment.model, settings.data.resolution // factor).to(accelerator.device)
            projection = starting_projection(settings, latent_channels_of(autoencoder), vision.num_features)
        latent_shape = (latent_channels_of(autoencoder), *(2 * [settings.data.resolution // factor]))
        judge = None
        if settings.loss.total_correlation:
            judge = starting_total_correlation(settings, math.prod(latent_shape)).to(accelerator.device)
        teacher = None
        if settings.distillation.teacher is not None:
            teacher = Teacher(settings, autoencoder).to(accelerator.device)
            if checkpoint is not None:
                teacher.refuse_another(checkpoint.state().get("teacher_sha256"))
        ema = Ema(autoencoder.to(accelerator.device), settings.ema.decay) if settings.ema.decay else None
        discriminator = starting_discriminator(settings, channels) if settings.gan.weight else None
        if accelerator.is_main_process:  # now that nothing above has refused the settings
            write_config(run, settings)
    if settings.compile:
        compile_networks(autoencoder, discriminator)
    layout = training_memory_format(accelerator.device)
    train_step = TrainStep(
        settings,
        accelerator,
        accelerator.prepare_model(Reconstructor(autoencoder, projection).to(memory_format=layout)),
        accelerator.prepare_model(discriminator.to(memory_format=layout)) if discriminator is not None else None,
        perceptual,
        ema,
        vision,
        judge,
        teacher,
    )
    averaged = Reconstructor(ema.module if ema is not None else autoencoder).to(memory_format=layout)
    validator = Validator(settings, accelerator, held_out, channels, factor, perceptual)

    with Agreed(accelerator):
        if checkpoint is not None:
            load_checkpoint(checkpoint, train_step)
        stream_state = stream_state_of(checkpoint, accelerator)
        validator.try_one_batch(averaged)
        if accelerator.is_main_process:
            preflight(run, settings, train_step)
            cut_back(run, first_step if checkpoint is not None else -1)
        log = Log(run, accelerator, settings)
    if validator.chosen[1]["method"] == "first":
        log.say(
            f"held-out images come as a stream: its first {settings.validation.images:,} are measured, not a choice "
            "spread over all of it"
        )
    batches = training_batches(
        source,
        settings.data,
        channels=channels,
        seed=settings.seed,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_batch=first_step,
        stream_state=stream_state,
    )
    bad_files = BadFiles(accelerator, settings.data, source, log)
    feed = Feed(batches, settings, latent_shape, accelerator.device, channels, bad_files)
    with Agreed(accelerator):
        if first_step < settings.steps:
            train_step.try_passes(feed.on_device(feed.gray()))
    progress = tqdm(
        total=settings.steps * settings.batch_size,
        initial=first_step * settings.batch_size,
        unit="img",
        disable=not accelerator.is_main_process,
        mininterval=0.5 if sys.stderr.isatty() else 15,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    step = first_step

    def save(done: int) -> None:
        likelihood = train_step.state.likelihood(settings.loss)
        state = {
            "step": done,
            "num_images_seen": done * settings.batch_size,
            "num_processes": accelerator.num_processes,
            "stream_states": gathered(feed.stream_state),
            "settings": settings.model_dump(mode="json", by_alias=True),
            "likelihood": likelihood and likelihood._asdict(),
            **({"teacher_sha256": teacher.sha256} if teacher is not None else {}),
        }
        with Agreed(accelerator):
            if accelerator.is_main_process:
                log.sync()
                save_checkpoint(run, train_step, state)

    def validation_due(done: int) -> bool:
        return done % settings.validation.every == 0 or done == settings.steps

    def validate(done: int) -> None:
        """Measures, unless that was done before the run was killed."""
        if not log.has("validate", done):
            log.write("validate", done, validator.measure_model(averaged, run / f"previews/step-{done:08d}.png"))
        log.gan_alarm(done, run)

    def prune() -> None:
        """Comes after the validation, which tells the best."""
        with Agreed(accelerator):
            if accelerator.is_main_process:
                saved = [checkpoint.step for checkpoint in complete_checkpoints(run)]
                prune_checkpoints(run, kept_steps(saved, settings.checkpoint, settings.gan, held_out_distances(run)))

    try:
        if checkpoint is None:
            log.write("baseline", 0, validator.measure_baseline())
        else:
            log.resumed(first_step, changes)
        if validation_due(first_step):
            validate(first_step)
        prune()
        with StopSignals() as stop:
            for step in range(first_step, settings.steps):
                means = train_step(step, feed)
                done = step + 1
                bad_files.settle(done)
                progress.update(settings.batch_size)
                logs = done % settings.log.every == 0 or done == settings.steps
                saves = done % settings.checkpoint.every == 0 or done == settings.steps
                if logs:
                    log.train(done, means, progress)
                    stop_on_drift(accelerator, done, train_step.networks)
                # weights that give no finite gradient must not take the place of those that do
                if (logs or saves) and log.skipped(done, train_step) and saves:
                    log.say(f"step {done:,}: no checkpoint, its gradients were not finite")
                    saves = False
                if saves:
                    save(done)
                if (name := stop.wanted()) and done < settings.steps:
                    if not saves and not log.skipped(done, train_step):
                        save(done)
                    raise Stopped(name)  # a validation and pruning that are due are made up for when it goes on
                if validation_due(done):
                    validate(done)
                    log.restart_clock(done)
                if saves:
                    prune()
        progress.close()
        likelihood = train_step.state.likelihood(settings.loss)
        results = finish_run(run, settings, accelerator, averaged, source, validator, likelihood)
    except BaseException:
        progress.close()
        _say_how_to_go_on(run, step, accelerator)
        raise
    return _ended(accelerator, run, settings, results)


def _ended(accelerator: Accelerator, run: Path, settings: TrainSettings, results: dict[str, Any]) -> dict[str, Any]:
    """Lets the processes go, then uploads from one: nobody waits for that, and all it could lose is on the disk."""
    accelerator.end_training()
    if accelerator.is_main_process:
        push_export(run, settings)
    return results


def _say_how_to_go_on(run: Path, step: int, accelerator: Accelerator) -> None:
    if not accelerator.is_main_process:
        return
    saved = complete_checkpoints(run)
    if saved:
        where = f"the checkpoint of step {saved[-1].step:,} is kept; the same command goes on from it"
    else:
        where = "no checkpoint was due yet (checkpoint.every); the same command starts from the beginning"
    print(f"training stopped in step {step + 1:,}: {where}", file=sys.stderr)
