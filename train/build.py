"""Builds or loads the networks with which a run starts."""

from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config as functorch_config
from diffusers import ModelMixin
from torch import nn

from latent_ae.config import UserError, refuse
from latent_ae.export import pipelines
from latent_ae.models.borrowed_encoder import BorrowedEncoder, borrowed_parameters
from latent_ae.models.build import build_autoencoder, channels_of, count_parameters, facts_of, load_autoencoder
from latent_ae.models.encoder_digest import encoder_sha256
from latent_ae.models.family import LatentScaling
from latent_ae.models.loading import first_stage
from latent_ae.models.new_decoder import with_new_decoder
from latent_ae.models.registry import BLOCKS, family_of, recompute_blocks_, recomputes, scaling_of
from latent_ae.models.run_checkpoint import checkpoint_at
from latent_ae.models.settings import ModelSettings
from latent_ae.models.stored_encoder import StoredEncoder
from latent_ae.objectives.base import Objective
from latent_ae.objectives.class_noise import ClassNoise

from .checkpoint import read_state
from .finish import finished_results
from .parts import trained_names
from .settings import TrainSettings
from .step import batch_norms


def starting_autoencoder(settings: TrainSettings) -> ModelMixin:
    """Return a new autoencoder of the section `model`, or the one that init_from names; fixed parts are frozen.

    With the section `decoder`, the one that init_from names has a new decoder.

    Raises:
        UserError: If it cannot be loaded or does not go with the other settings.
    """
    name, data, sha256, scalings = settings.init_from, settings.data, "", dict[str, LatentScaling]()
    if name is None and not settings.decoder.wanted:
        autoencoder = build_autoencoder(settings.model, sample_size=data.resolution, seed=settings.seed)
    else:
        autoencoder = load_original(settings)
        if "noise_tau" in settings.model.config and "noise_tau" in autoencoder.config:
            # it shapes no weights, so it may differ from init_from's
            autoencoder.register_to_config(noise_tau=settings.model.config["noise_tau"])
        if settings.decoder.latents is not None:
            sha256, scalings = str(first_stage(autoencoder).sha256), _scalings_of_stored(autoencoder, settings)
        if settings.decoder.wanted:
            _refuse_unmeasured(autoencoder, settings)
            autoencoder = with_new_decoder(autoencoder, settings.decoder, settings.seed)
        if settings.flow.teacher_steps and "sampling_steps" in autoencoder.config:
            autoencoder.register_to_config(sampling_steps=1)  # which is what distillation is for
        _refuse_stored_latents(autoencoder, settings)
    refuse_misfit(autoencoder, settings)
    if settings.export_for is not None:  # the settings do not know the shape of init_from
        kept = settings.train == "decoder" and name is not None
        known = pipelines.before_measuring(autoencoder.config, keep_scaling=kept, latents_mean_std=False)
        pipelines.refuse_misfit(settings.export_for, known, type(autoencoder).__name__)
    freeze_part(autoencoder.train(), settings)
    if settings.gradient_checkpointing:
        recompute_blocks_(autoencoder)
    if settings.decoder.latents is not None:
        autoencoder.encoder = StoredEncoder(
            lambda: _encoder_of_original(settings, sha256),
            encoder_sha256(autoencoder),
            scalings,
            count_parameters(autoencoder.encoder),
            borrowed_parameters(autoencoder),
        )
    return autoencoder


def planned_autoencoder(settings: TrainSettings) -> ModelMixin:
    """Return the autoencoder with which a run would start; without init_from it has shapes and no weights.

    Raises:
        UserError: If it cannot be loaded or does not go with the other settings.
    """
    if settings.init_from is not None or settings.decoder.wanted:
        return starting_autoencoder(settings)
    with torch.device("meta"):
        model = settings.model.model_copy(update={"init": "default"})
        autoencoder = build_autoencoder(model, sample_size=settings.data.resolution)
        refuse_misfit(autoencoder, settings)
        freeze_part(autoencoder, settings)
    return autoencoder


def _refuse_stored_latents(autoencoder: ModelMixin, settings: TrainSettings) -> None:
    """Raise UserError if a decoder cannot train on stored latents of its class without the encoder."""
    family = family_of(autoencoder)
    if settings.decoder.latents is not None and (
        family.latent not in ("posterior", "deterministic") or not family.plain
    ):
        raise UserError(
            f"decoder.latents: training on stored latents is for classes with one Gaussian posterior or none, and not "
            f"for {type(autoencoder).__name__}: leave it out"
        )


def _scalings_of_stored(original: ModelMixin, settings: TrainSettings) -> dict[str, LatentScaling]:
    """Return how the decoder takes stored latents, by the digests of the first stages that may have made them."""
    plain = LatentScaling()
    makers = [(original, scaling_of(original) if settings.decoder.kind == "AutoencoderTiny" else plain)]
    if isinstance(original.encoder, BorrowedEncoder):  # which scales what its original encodes
        makers.append((original.encoder.original, scaling_of(original.encoder.original)))
    stages = [(first_stage(maker), scaling) for maker, scaling in makers]
    return {str(digest): how for stage, how in stages for digest in (stage.sha256, stage.encoder_sha256)}


def _refuse_unmeasured(original: ModelMixin, settings: TrainSettings) -> None:
    """Raise UserError if a new decoder needs scaled latents and init_from's scaling is not known."""
    tiny = settings.decoder.kind == "AutoencoderTiny"
    if tiny and settings.init_from is not None and not scaling_of(original).measured:
        raise UserError(
            f"decoder.kind: an AutoencoderTiny decodes scaled latents, and {settings.init_from} has no measured "
            f"scaling_factor: give init_from the folder that `latent-ae export {settings.init_from} OUT` writes"
        )


def unmeasured_scaling(settings: TrainSettings, autoencoder: ModelMixin) -> str:
    """Return a warning if a new decoder is for latents whose scaling is not known, otherwise an empty text."""
    family = family_of(autoencoder)
    unscaled = borrowed_parameters(autoencoder) or family.scaled_by_patches or family.latent != "posterior"
    if not settings.decoder.wanted or unscaled or scaling_of(autoencoder).measured:
        return ""
    return (
        f"{settings.init_from} has no measured scaling_factor, so the export will have none: to have one, give "
        f"init_from the folder that `latent-ae export {settings.init_from} OUT` writes"
    )


def split_dependence(settings: TrainSettings, autoencoder: ModelMixin) -> str:
    """Return a warning if a batch normalisation takes its statistics from less than a whole batch, or an empty text."""
    norms = [norm for norm in batch_norms(autoencoder) if norm.weight.requires_grad]
    if not norms or settings.micro_batch == settings.batch_size:
        return ""
    return (
        f"the {len(norms)} batch normalisations of this {type(autoencoder).__name__} take their "
        f"statistics from each pass of {settings.micro_batch} images, so unlike with other networks the result depends "
        "on micro_batch_size and on the number of processes"
    )


def _encoder_of_original(settings: TrainSettings, sha256: str) -> nn.Module:
    """Return the frozen encoder of init_from. Raises UserError if init_from is no longer what the run began with."""
    original = load_original(settings)
    if first_stage(original).sha256 != sha256:
        raise UserError(f"init_from: {settings.init_from} has changed since this process loaded it: restore it")
    if settings.decoder.wanted:
        original = with_new_decoder(original, settings.decoder)
    encoder: nn.Module = original.encoder
    return encoder.requires_grad_(False)


def load_original(settings: TrainSettings) -> ModelMixin:
    """Return the first stage that init_from names, in float32. Raises UserError if it cannot be loaded.

    Before the first of several phases has trained, a fresh one stands for it.
    """
    if settings.init_from is None:
        return build_autoencoder(settings.model, sample_size=settings.data.resolution, seed=settings.seed)
    return load_autoencoder(place_of_weights(str(settings.init_from)))


def place_of_weights(name: str) -> str:
    """Return where to load weights from: for a run its newest whole checkpoint, or the export beside it if that is of
    the same step, because the export has the measured scaling.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    place = Path(name).expanduser()
    folder = checkpoint_at(place)
    if folder is None:
        return name
    run = folder.parent.parent  # with phases, the folder of one of them
    exported = folder != place and finished_results(run, read_state(folder)["step"]) is not None
    return str(run / "export" if exported else folder)


def freeze_part(autoencoder: ModelMixin, settings: TrainSettings) -> None:
    """Freeze the parameters that the setting `train` leaves fixed, and those that no image reaches."""
    trained = set(trained_names(settings.train, facts_of(autoencoder).parameters))
    for name, parameter in autoencoder.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trained)


def build_objectives(settings: TrainSettings, autoencoder: ModelMixin, device: torch.device) -> list[Objective[Any]]:
    """Return the enabled objectives, with their networks on the device.

    Raises:
        UserError: If one of them cannot be built.
    """
    run = settings.facts(facts_of(autoencoder))
    objectives = [one.build(settings.section_of(one), run, autoencoder, device) for one in settings.objectives]
    if (noise := ClassNoise.of(autoencoder)) is not None:
        objectives.insert(0, noise)
    if not any(parameter.requires_grad for parameter in autoencoder.parameters()):
        raise UserError("train: names only codes, which no gradient moves with these settings of codebook: name more")
    return objectives


def compile_blocks(autoencoder: ModelMixin) -> None:
    """Compile the autoencoder's blocks (BLOCKS) in place; names of weights do not change.

    Only blocks are compiled, so that equal blocks share their code. The decoder's last layer stays outside, so that the
    adaptive weight's gradient at this layer does not run a compiled backward pass of the whole decoder.
    """
    # the step differentiates the discriminator's graph twice (retain_graph), so its buffers must be kept
    functorch_config.donated_buffer = False
    # one code object serves all blocks, and each shape of block needs its own compilation of it
    torch._dynamo.config.recompile_limit = max(128, torch._dynamo.config.recompile_limit)
    for module in autoencoder.modules():
        if isinstance(module, BLOCKS):
            module.compile()


def refuse_misfit(autoencoder: ModelMixin, settings: TrainSettings) -> None:
    """Raise UserError if an autoencoder, new or from init_from, does not go with the other settings."""
    kind = type(autoencoder).__name__
    channels = channels_of(autoencoder)
    if (out_channels := family_of(autoencoder).out_channels(autoencoder.config) or channels) != channels:
        raise UserError(
            f"model.config: in_channels is {channels} and out_channels {out_channels}: the loss compares output with "
            "input, so they must be equal"
        )
    if settings.init_from is not None and settings.model != ModelSettings():
        with torch.device("meta"):
            model = settings.model.model_copy(update={"init": "default"})
            requested = build_autoencoder(model, sample_size=settings.data.resolution).config
        if settings.model.kind != kind:
            raise UserError(
                f"model.kind: {settings.model.kind}, and init_from brings {kind}: its class "
                "stays, so give model={}, or remove init_from"
            )
        own = ModelSettings.model_fields.keys() - {"init", "kind", "config", "encoder"}  # of new weights
        keys = own if settings.model.gives_shape else settings.model.config.keys()
        for key in sorted(key for key in keys if _plain(requested[key]) != _plain(autoencoder.config[key])):
            raise UserError(
                f"model.{key}: {_plain(requested[key])}, and init_from brings {_plain(autoencoder.config[key])}: its "
                "shape stays, so give model={}, or remove init_from"
            )
    if settings.gradient_checkpointing and not recomputes(autoencoder):
        raise UserError(
            f"gradient_checkpointing: diffusers has no correct one for {settings.init_from or f'this {kind}'} "
            f"({kind}): set it to false; a smaller micro_batch_size saves memory, too"
        )
    if settings.compile and not any(isinstance(module, BLOCKS) for module in autoencoder.modules()):
        raise UserError(f"compile: this project does not know which blocks of a {kind} to compile: set it to false")
    known = set(settings.problems_with(None))  # reported before the autoencoder was loaded
    problems = settings.problems_with(facts_of(autoencoder, settings.init_from))
    refuse((problem for problem in problems if problem not in known), " with this autoencoder")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
