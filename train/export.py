"""latent-ae export: writes the weights of a run or checkpoint as a diffusers folder."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_ae.config import UserError
from latent_ae.export.pipelines import PIPELINES, PipelineName, before_measuring, refuse_misfit
from latent_ae.progress import now

from .settings import TrainSettings

if TYPE_CHECKING:  # brings torch
    from latent_ae.models.discriminator import Discriminator


def main(argv: list[str] | None = None) -> int:
    """Run the command `latent-ae export` and return its exit code. Raises UserError like `export`."""
    parser = argparse.ArgumentParser(
        prog="latent-ae export",
        description="Write a run's averaged weights as a folder that stock diffusers loads. The latents' scaling "
        "and shift are measured on the run's training data, which must still be available.",
        epilog="example: latent-ae export runs/mine my-vae --for sd",
    )
    parser.add_argument("source", metavar="RUN|CHECKPOINT", help="a run folder (its newest checkpoint) or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--for",
        dest="pipeline",
        choices=list(PIPELINES),
        metavar="FAMILY",
        help=f"check that these pipelines can use it: {', '.join(PIPELINES)}; an unfit model is refused before "
        "anything is written",
    )
    parser.add_argument(
        "--latents-mean-std",
        action="store_true",
        help="write the mean and spread of each channel, which SDXL's pipelines apply, in place of one scaling_factor",
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload it to this hub repository")
    arguments = parser.parse_args(argv)
    from latent_ae.distributed import refuse_several_processes

    refuse_several_processes("export")
    if arguments.push_to_hub:  # before the work
        from latent_ae.export.write import check_upload, push_to_hub

        check_upload(arguments.push_to_hub)
    facts = export(
        Path(arguments.source).expanduser(),
        Path(arguments.out).expanduser(),
        pipeline=arguments.pipeline,
        latents_mean_std=arguments.latents_mean_std,
        hub_id=arguments.push_to_hub,
    )
    for remark in facts.get("remarks", ()):
        print(f"{facts['pipeline']}: {remark}", file=sys.stderr)
    if arguments.push_to_hub:
        now(f"upload to {arguments.push_to_hub}")
        facts["hub"] = push_to_hub(arguments.out, arguments.push_to_hub)
    print(json.dumps(facts, indent=2))
    return 0


def export(
    source: Path,
    out: Path,
    *,
    pipeline: PipelineName | None = None,
    latents_mean_std: bool = False,
    hub_id: str | None = None,
) -> dict[str, Any]:
    """Export the newest checkpoint of a run, or a given checkpoint, with `export_autoencoder`.

    Args:
        source: A run folder or a checkpoint.
        out: The folder to write.
        pipeline: Family of pipelines that must be able to use the model; None takes the run's `export_for`.
        latents_mean_std: Write the mean and standard deviation of each latent channel.
        hub_id: The repository of the hub that the model card names; None takes the folder.

    Returns:
        The facts of the export, JSON-ready.

    Raises:
        UserError: If `source` is neither a run nor a checkpoint, its data are gone, or `pipeline` cannot use the model.
        RuntimeError: If the check of the export fails.
    """
    import torch
    from accelerate import Accelerator

    from latent_ae.data.loader import open_images
    from latent_ae.export.write import export_autoencoder, refuse_foreign
    from latent_ae.models.build import channels_of, factor_of
    from latent_ae.models.likelihood import read_likelihood
    from latent_ae.models.reconstruct import Reconstructor
    from latent_ae.models.run_checkpoint import checkpoint_at

    from .checkpoint import load_weights
    from .finish import card_facts, check_images, keeps_scaling, measure_latents
    from .report import read_log
    from .validate import Validator

    folder = checkpoint_at(source)
    if folder is None:
        raise UserError(f"{source}: neither a run with a complete checkpoint nor a checkpoint (from {Path.cwd()})")
    try:
        state = json.loads((folder / "state.json").read_text())
        # the settings passed every check when the run began; only the data must still be available
        settings, step = TrainSettings.model_validate(state["settings"]), int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'state.json'} is not a checkpoint's: {' '.join(str(error).split())[:300]}"
        ) from error
    refuse_foreign(out)  # before anything is measured
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    autoencoder = load_weights(folder).to(accelerator.device)
    kept = keeps_scaling(settings, autoencoder)
    if latents_mean_std and kept:
        origin = settings.distillation.teacher or settings.init_from
        raise UserError(
            f"--latents-mean-std: the latents of {source} and their scaling are those of {origin}; leave it out"
        )
    pipeline = pipeline or settings.export_for
    if pipeline is not None:  # before anything is measured
        known = before_measuring(autoencoder.config, keep_scaling=kept, latents_mean_std=latents_mean_std)
        refuse_misfit(pipeline, known, type(autoencoder).__name__)
    statistics = measure_latents(Reconstructor(autoencoder), settings, accelerator, open_images(settings.data, "train"))
    held_out = open_images(settings.data, "held_out")
    channels, factor = channels_of(autoencoder), factor_of(autoencoder)
    validator = Validator(settings, accelerator, held_out, channels, factor, None)
    run = folder.parent.parent
    named = run if folder == source else source  # a run in phases has its checkpoints in their folders
    log = {(event["event"], event["step"]): event for event in read_log(run)}
    card = card_facts(named, settings, step, log.get(("validate", step), {}), log.get(("baseline", 0), {}))
    return export_autoencoder(
        autoencoder,
        out,
        statistics=statistics,
        sample_size=settings.data.resolution,
        card=replace(card, hub_id=hub_id),
        check_images=check_images(validator),
        keep_scaling=kept,
        pipeline=pipeline,
        latents_mean_std=latents_mean_std,
        likelihood=read_likelihood(folder),
        discriminator=_discriminator_of(folder, settings, step),
        companions=_companions_of(folder, settings, state, autoencoder),
    )


def _discriminator_of(folder: Path, settings: TrainSettings, step: int) -> "Discriminator | None":
    """Return the discriminator of a checkpoint; None if it has none that was trained. Raises UserError if it is bad."""
    from latent_ae.models.discriminators import stored_discriminator

    return stored_discriminator(folder) if settings.gan.weight and step > settings.gan.start else None


def _companions_of(folder: Path, settings: TrainSettings, state: dict[str, Any], autoencoder: Any) -> dict[str, Any]:
    """Return the networks of a checkpoint that belong into exports, by folder. Raises UserError if one is bad."""
    import torch
    from safetensors.torch import load_file

    from latent_ae.models.build import facts_of
    from latent_ae.objectives import DensityObjective, SemiSupervised

    found = {}
    # where each lies in a checkpoint
    places: dict[Any, tuple[str, str]] = {
        SemiSupervised: ("heads.safetensors", "label_model."),
        DensityObjective: ("objectives.safetensors", "density."),
    }
    for kind, (file, part) in places.items():
        own = settings.section_of(kind)
        if not kind.enabled(own):
            continue
        objective = kind.build(own, settings.facts(facts_of(autoencoder)), autoencoder, torch.device("cpu"))
        name, network = objective.exported()
        prefix = f"{objective.name}.{part}"
        try:
            weights = load_file(folder / file)
            network.load_state_dict(
                {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            )
        except Exception as error:  # each reader raises its own kinds of errors for foreign content
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder / file} holds no {name} of its shape: {reason}") from error
        if isinstance(objective, SemiSupervised):
            objective.name_classes(state.get("class_names", ()))
        found[name] = network
    return found


if __name__ == "__main__":
    sys.exit(main())
