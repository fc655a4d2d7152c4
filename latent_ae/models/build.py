"""Builds an autoencoder from settings, loads one, and reads facts from it."""

import inspect

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import nn

from latent_ae.config import UserError
from latent_ae.models.borrowed_encoder import BorrowedEncoder, borrowed_parameters
from latent_ae.models.linear_init import linear_start_
from latent_ae.models.loading import load_first_stage
from latent_ae.models.reconstruct import codebooks_of, end_layers
from latent_ae.models.registry import class_of, family_of
from latent_ae.models.representation import with_encoder
from latent_ae.models.settings import ModelFacts, ModelSettings
from latent_ae.models.stored_encoder import StoredEncoder


def build_autoencoder(settings: ModelSettings, *, sample_size: int, seed: int = 0) -> ModelMixin:
    """Return a fresh float32 autoencoder. The global random state does not change.

    Args:
        settings: The section `model`.
        sample_size: Side of the training images, px, for the config.
        seed: Seed of the initial weights.

    Raises:
        UserError: If the class refuses the keys of `config`, or the folder of an encoder cannot be read.
    """
    if not settings.gives_shape:
        return _of_another_class(settings, sample_size, seed)
    levels = len(settings.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = AutoencoderKL(
            in_channels=settings.in_channels,
            out_channels=settings.out_channels,
            down_block_types=settings.down_block_types or ("DownEncoderBlock2D",) * levels,
            up_block_types=settings.up_block_types or ("UpDecoderBlock2D",) * levels,
            block_out_channels=settings.block_out_channels,
            layers_per_block=settings.layers_per_block,
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_num_groups,
            act_fn=settings.act_fn,
            mid_block_add_attention=settings.mid_block_add_attention,
            use_quant_conv=settings.use_quant_conv,
            use_post_quant_conv=settings.use_post_quant_conv,
            sample_size=sample_size,
            # 1.0 until export measures it: the default 0.18215 belongs to another model
            scaling_factor=1.0,
        )
    if settings.init == "linear":
        linear_start_(autoencoder)
    return autoencoder


def _of_another_class(settings: ModelSettings, sample_size: int, seed: int) -> ModelMixin:
    kind = class_of(settings.kind)
    known = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    if unknown := sorted(settings.config.keys() - known):
        raise UserError(
            f"model.config.{unknown[0]}: {settings.kind} has no such key; it has {', '.join(sorted(known))}"
        )
    own = {key: value for key, value in (("sample_size", sample_size), ("scaling_factor", 1.0)) if key in known}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if settings.encoder is not None:
                return with_encoder(settings.encoder, settings.config, sample_size)
            autoencoder = kind(**own | settings.config)
        except UserError:
            raise
        except (TypeError, ValueError, AssertionError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(
                f"model.config: {settings.kind} refuses it: {' '.join(str(error).split())[:300]}"
            ) from error
    return autoencoder


def load_autoencoder(location: str, *, subfolder: str | None = None, revision: str | None = None) -> ModelMixin:
    """Return a first stage in float32.

    Args:
        location: Run, checkpoint, diffusers folder, pipeline's folder or hub id, as for `load_first_stage`.
        subfolder: Subfolder that holds the model.
        revision: Commit or tag of a hub model.

    Raises:
        UserError: If there is no such model.
    """
    return load_first_stage(location, subfolder=subfolder, revision=revision).module


def factor_of(autoencoder: ModelMixin) -> int:
    """Return the image px per latent px along one side."""
    return int(family_of(autoencoder).factor(autoencoder.config))


def facts_of(autoencoder: ModelMixin, name: str | None = None) -> ModelFacts:
    """Return the facts about an autoencoder that the rules of settings use.

    Args:
        autoencoder: An instance of one of FAMILIES.
        name: What messages call it if it is an existing first stage; None takes its class.
    """
    family = family_of(autoencoder)
    names = {
        id(parameter): key
        for key, parameter in autoencoder.named_parameters()
        if not family.unreached or family.unreached not in key
    }
    last_layers = {}
    for side in ("encoder", "decoder"):  # classes that are only measured may lack one, or end differently
        part = getattr(autoencoder, side, None)
        foreign = part is None or isinstance(part, (StoredEncoder, BorrowedEncoder))
        layers = [None] if foreign else end_layers(part) or [None]  # a vision transformer has none by these names
        last_layers[side] = names.get(id(getattr(layers[-1], "weight", None)), "")
    if family.latent in ("codebook", "code_levels"):
        last_layers["codes"] = names.get(id(codebooks_of(autoencoder)[0]), "")
    section = "model" if type(autoencoder) is AutoencoderKL else "model.config"
    keys = [key for key in ("in_channels", "out_channels") if name is None and key in autoencoder.config]
    return ModelFacts(
        name or f"this {type(autoencoder).__name__}",
        family.latent,
        factor_of(autoencoder),
        channels_of(autoencoder),
        latent_channels_of(autoencoder),
        family.side(autoencoder.config),
        ("decoder",) if borrowed_parameters(autoencoder) else family.trains,
        tuple(names.values()),
        last_layers,
        family.codes(autoencoder.config) if family.latent == "codebook" else None,
        family.flow_matching,
        family.states(autoencoder.config),
        tuple(f"{section}.{key}" for key in keys),
        name is None and family.scaled_by_positions and not family.scaling(autoencoder.config).inside,
    )


def channels_of(autoencoder: ModelMixin) -> int:
    """Return the number of channels of the images."""
    return int(family_of(autoencoder).channels(autoencoder.config))


def latent_channels_of(autoencoder: ModelMixin) -> int:
    """Return the number of channels of a latent."""
    return int(family_of(autoencoder).latent_channels(autoencoder.config))


def count_parameters(module: nn.Module) -> int:
    """Return the number of scalar parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
