"""The networks that a run starts from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config as functorch_config
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_ae.config import Problem, UserError
from latent_ae.models.build import build_autoencoder, factor_of, latent_channels_of, load_autoencoder
from latent_ae.models.discriminator import PatchDiscriminator
from latent_ae.models.registry import BLOCKS, family_of
from latent_ae.models.run_checkpoint import checkpoint_at
from latent_ae.models.settings import ModelSettings
from latent_ae.objectives.total_correlation import LARGEST, TotalCorrelation

from .checkpoint import misfits, read_state
from .distillation import take_its_scale
from .finish import finished_results
from .loss_config import LossSettings
from .settings import TrainSettings


def starting_autoencoder(settings: TrainSettings) -> ModelMixin:
    """A fresh autoencoder of model.*, or the one that init_from names; what does not learn is frozen.

    Raises UserError when the latter does not go with the other settings.
    """
    name, data = settings.init_from, settings.data
    if name is None:
        autoencoder = build_autoencoder(settings.model, sample_size=data.resolution, seed=settings.seed)
    else:
        autoencoder = load_autoencoder(_place_of_weights(name))
    refuse_misfit(autoencoder, settings)
    if settings.distillation.teacher is not None:
        take_its_scale(autoencoder)
    freeze_part(autoencoder.train(), settings)
    if settings.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    return autoencoder


def _place_of_weights(name: str) -> str:
    """Of a run its newest whole checkpoint, or its export if that is of the same step: it has the measured scaling."""
    place = Path(name).expanduser()
    folder = checkpoint_at(place)
    if folder is None:
        return name
    return str(place / "export" if finished_results(place, read_state(folder)["step"]) is not None else folder)


def freeze_part(autoencoder: ModelMixin, settings: TrainSettings) -> None:
    """Takes the gradient from what `train` leaves fixed, and from what no image reaches."""
    encoder = ("encoder", "quant_conv", "quantize", "flow")
    fixed = {"all": (), "decoder": encoder, "encoder": ("decoder", "post_quant_conv")}
    if hasattr(autoencoder.decoder, "condition_encoder"):  # of masks, which a first stage is not given
        autoencoder.decoder.condition_encoder.requires_grad_(False)
    for name in fixed[settings.train]:
        if (part := getattr(autoencoder, name, None)) is not None:  # not every model has all of them
            part.requires_grad_(False)


def starting_discriminator(settings: TrainSettings, channels: int) -> PatchDiscriminator:
    """A fresh discriminator for images of `channels` channels, or the one of the checkpoint gan.init_from."""
    gan = settings.gan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 1)
        network = PatchDiscriminator(channels, gan.channels, gan.layers, gan.norm, gan.blur)
    if gan.init_from is not None:
        network.load_state_dict(_discriminator_weights(Path(gan.init_from).expanduser(), network))
    return network


def starting_projection(settings: TrainSettings, latent_channels: int, features: int) -> nn.Conv2d:
    """A fresh map of latents to a vision model's features, 1 x 1 and without bias as VA-VAE's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 2)
        return nn.Conv2d(latent_channels, features, kernel_size=1, bias=False)


def starting_total_correlation(settings: TrainSettings, dimensions: int) -> TotalCorrelation:
    """A fresh discriminator of latents of so many numbers. Raises UserError for too many."""
    if dimensions > LARGEST:
        raise UserError(
            f"loss.total_correlation: the latent has {dimensions:,} dimensions, and what tells them from permuted ones "
            f"learns nothing of more than {LARGEST:,}: use fewer latent channels, a larger factor or smaller crops"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + 3)
        return TotalCorrelation(dimensions, settings.loss.total_correlation_width, settings.seed)


def compile_networks(autoencoder: ModelMixin, discriminator: PatchDiscriminator | None) -> None:
    """Compiles the autoencoder's blocks (BLOCKS) and the discriminator in place; names of weights do not change.

    Only blocks: the decoder's last layer stays outside, so that the adaptive weight's gradient of it alone does not run
    a compiled backward of the whole decoder, and equal blocks share their code.
    """
    # the step differentiates the discriminator's graph twice (retain_graph), so its buffers must stay
    functorch_config.donated_buffer = False
    # one code object serves every block, and each shape of block is a variant of it
    torch._dynamo.config.recompile_limit = max(128, torch._dynamo.config.recompile_limit)
    for module in autoencoder.modules():
        if isinstance(module, BLOCKS):
            module.compile()
    if discriminator is not None:
        discriminator.compile()


def refuse_misfit(autoencoder: ModelMixin, settings: TrainSettings) -> None:
    """Raises UserError when an autoencoder, fresh or that of init_from, does not go with the other settings."""
    kind = type(autoencoder).__name__
    name = settings.init_from or f"this {kind}"
    factor = factor_of(autoencoder)
    channels = int(autoencoder.config.in_channels)
    if (given := autoencoder.config.get("out_channels", channels)) != channels:
        raise UserError(
            f"model.config: in_channels is {channels} and out_channels {given}: the loss compares output with input, "
            "so they must be equal"
        )
    if settings.init_from is not None and settings.model != ModelSettings():
        with torch.device("meta"):
            model = settings.model.model_copy(update={"init": "default"})
            asked = build_autoencoder(model, sample_size=settings.data.resolution).config
        if settings.model.kind != kind:
            raise UserError(
                f"model.kind: {settings.model.kind}, and init_from brings {kind}: its class "
                "stays, so give model={}, or remove init_from"
            )
        own = ModelSettings.model_fields.keys() - {"init", "kind", "config"}  # init: how fresh weights begin
        keys = own if settings.model.gives_shape else settings.model.config.keys()
        for key in sorted(key for key in keys if _plain(asked[key]) != _plain(autoencoder.config[key])):
            raise UserError(
                f"model.{key}: {_plain(asked[key])}, and init_from brings {_plain(autoencoder.config[key])}: its shape "
                "stays, so give model={}, or remove init_from"
            )
    sides = {"data.resolution": settings.data.resolution, "validate.crop_px": settings.validation.crop_px}
    for key, side in sides.items():
        if side is not None and side % factor:
            raise UserError(f"{key}: {side} is not a multiple of {name}'s factor {factor}")
    family = family_of(autoencoder)
    problems = () if family.one_grid else settings.packed_latent_problems(factor)
    for problem in [*settings.size_problems(factor), *problems, *_misfits_of_latents(family.latent, name, settings)]:
        raise UserError(f"{problem.key}: {problem.message}")
    checkpoints = autoencoder._supports_gradient_checkpointing and family.gradient_checkpointing
    if settings.gradient_checkpointing and not checkpoints:
        raise UserError(
            f"gradient_checkpointing: diffusers has none that is right for {name} ({kind}): set it to false; a smaller "
            "micro_batch_size saves memory, too"
        )
    least, latent_channels = settings.latents.min_channels, latent_channels_of(autoencoder)
    if least and least >= latent_channels:
        raise UserError(f"latents.min_channels: {least} of {name}'s {latent_channels} channels masks none: use fewer")
    if settings.alignment.model and channels not in (1, 3):
        raise UserError(f"alignment.model: {name} has {channels} channels, vision models see 1 or 3: set it to null")
    if settings.loss.perceptual and channels not in (1, 3):
        raise UserError(f"loss.perceptual: {name} has {channels} channels, LPIPS sees 1 or 3: set it to 0")


def _misfits_of_latents(latent: str, name: str, settings: TrainSettings) -> Iterator[Problem]:
    """Settings of the loss that mean nothing to latents of this sort (`registry.Family`)."""
    loss = settings.loss
    of_rate = [key for key in ("kl_warmup", "kl_cycles", "kl_target", "free_bits", "kl_capacity") if getattr(loss, key)]
    if of_rate and latent in ("deterministic", "codebook"):
        yield Problem(f"loss.{of_rate[0]}", f"shapes a KL term, and {name} has no posterior: set it to 0")
    of_codes = [key for key in ("commitment", "revive_after") if getattr(loss, key) != getattr(LossSettings(), key)]
    if of_codes and latent != "codebook":
        yield Problem(f"loss.{of_codes[0]}", f"is for a codebook, which {name} has not: leave it out")
    of_each = [key for key in ("free_bits", "kl_capacity") if getattr(loss, key)]
    if of_each and latent == "flow":
        yield Problem(
            f"loss.{of_each[0]}",
            f"the rates of {name} are of single samples and may be negative, so whether the KL is below it is not "
            "known: set it to 0 (loss.kl_warmup and loss.kl_target work)",
        )
    if loss.total_correlation and latent != "posterior":
        yield Problem("loss.total_correlation", f"needs a Gaussian posterior, which {name} has not: set it to 0")


def _discriminator_weights(folder: Path, network: PatchDiscriminator) -> dict[str, Tensor]:
    path = (checkpoint_at(folder) or folder) / "discriminator.safetensors"
    if not path.is_file():
        raise UserError(f"gan.init_from: {folder} is neither a checkpoint with a discriminator nor a run with one")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"gan.init_from: cannot read {path}: {error}") from error
    if differing := misfits(network, weights):
        raise UserError(
            f"gan.init_from: the discriminator of {path} has another shape (first difference: {differing[0]}): "
            "set gan.channels, gan.layers and gan.norm as in its run"
        )
    return weights


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
