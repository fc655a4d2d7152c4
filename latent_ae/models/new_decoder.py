"""Gives a first stage a new decoder: its latents and everything that makes them stay bit for bit."""

import copy
import inspect
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin

from latent_ae.config import UserError
from latent_ae.models.borrowed_encoder import BorrowedEncoder
from latent_ae.models.registry import class_of, family_name
from latent_ae.models.settings import DecoderSettings


class Keys(NamedTuple):
    """The keys of a diffusers config that shape the decoder alone."""

    widths: str
    layers: str | None
    """Key of the blocks of each level; None if the encoder shares it."""
    levelwise: bool = False
    """Whether `layers` lists a number for each level."""


DECODERS = {
    "AsymmetricAutoencoderKL": Keys("up_block_out_channels", "layers_per_up_block"),
    "AutoencoderKLFlux2": Keys("decoder_block_out_channels", None),
    "AutoencoderDC": Keys("decoder_block_out_channels", "decoder_layers_per_block", levelwise=True),
    "AutoencoderTiny": Keys("decoder_block_out_channels", "num_decoder_blocks", levelwise=True),
}
"""The classes whose decoder has a shape of its own."""
UNSTATED = ("shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Keys of an AutoencoderKL that AsymmetricAutoencoderKL does not take. diffusers keeps such keys of a config.json,
so pipelines read them all the same; it prints a warning that it ignores them."""


def with_new_decoder(original: ModelMixin, wanted: DecoderSettings, seed: int = 0) -> ModelMixin:
    """Return a first stage with the encoder and the scaling of another one and a fresh decoder, float32 on the CPU.

    The decoder of a stock AutoencoderKL has the encoder's widths, so an AutoencoderKL becomes an
    AsymmetricAutoencoderKL. That class always has convolutions around the latent and attention in the middle of the
    encoder: where the original has none, the convolutions are the identity and the attention adds zeros. The attention
    also changes the memory layout of what follows, so that latents in the plain layout can differ in rounding (1e-6);
    in channels-last, in which this project computes, they do not.

    With `wanted.kind` an AutoencoderKL becomes an AutoencoderTiny that encodes with it (`BorrowedEncoder`), or a
    FlowMatchingVAE, which keeps the plain decoder as its base if it has residuals to make.

    Args:
        original: The first stage, which is left unchanged; the new one has copies of its weights.
        wanted: The section `decoder`. What it leaves out is as in the original.
        seed: Seed of the new decoder's weights. The global random state does not change.

    Raises:
        UserError: If the class has no decoder of its own shape, or refuses the wanted one.
    """
    kind, config = str(family_name(original)), dict(original.config)
    if wanted.kind == "FlowMatchingVAE":
        return _flow_matching(original, wanted, seed)
    if wanted.kind is not None:
        kind, config = wanted.kind, _tiny(original)
    elif kind == "AutoencoderKL":
        kind, config = "AsymmetricAutoencoderKL", _asymmetric(config)
    if kind not in DECODERS:
        raise UserError(
            f"decoder: init_from brings a {kind}, whose decoder has no shape of its own in its config; those that "
            f"have are AutoencoderKL, {', '.join(DECODERS)}"
        )
    config |= _changes(kind, config, wanted)
    model = _fresh(kind, config, seed)
    if wanted.kind is not None:
        model.encoder = BorrowedEncoder(copy.deepcopy(original), model.encoder.state_dict())
        return model
    model.register_to_config(**{key: config[key] for key in UNSTATED if key in config})
    model.load_state_dict(_kept_weights(model, original.state_dict()), strict=False)
    if isinstance(original.encoder, BorrowedEncoder):
        model.encoder = copy.deepcopy(original.encoder)
    return model


def _fresh(kind: str, config: dict[str, Any], seed: int) -> ModelMixin:
    """Return a fresh first stage of a class. Raises UserError if the class refuses the config."""
    cls = class_of(kind)
    known = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: ModelMixin = cls(**{key: value for key, value in config.items() if key in known})
            with torch.no_grad():  # some widths that do not go together are noticed by the first pass only
                model.decode(torch.zeros(1, int(config["latent_channels"]), 2, 2))
        except (TypeError, ValueError, AssertionError, IndexError, RuntimeError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"decoder: {kind} refuses this one: {reason}") from error
    return model


def _flow_matching(original: Any, wanted: DecoderSettings, seed: int) -> ModelMixin:
    """Return a FlowMatchingVAE with the weights of an AutoencoderKL and a fresh network beside them."""
    if (kind := family_name(original)) != "AutoencoderKL":
        raise UserError(
            f"decoder.kind: a FlowMatchingVAE is made from an AutoencoderKL, and init_from brings a {kind}: leave "
            "decoder.kind out"
        )
    if wanted.layers_per_block is not None and not isinstance(wanted.layers_per_block, int):
        raise UserError("decoder.layers_per_block: all levels of a FlowMatchingVAE have the same number: give one")
    shape = {
        "unet_block_out_channels": wanted.block_out_channels,
        "unet_layers_per_block": wanted.layers_per_block,
    }
    given = {key: value for key, value in shape.items() if value is not None}
    model: Any = _fresh("FlowMatchingVAE", {**original.config, **given, **wanted.config}, seed)
    model.encoder.load_state_dict(original.encoder.state_dict())
    for part, old in ((model.quant_conv, original.quant_conv), *_base_parts(model, original)):
        if part is not None:
            part.load_state_dict(old.state_dict())
    fresh: ModelMixin = model
    return fresh


def _base_parts(model: Any, original: Any) -> list[tuple[Any, Any]]:
    """Return the layers of a FlowMatchingVAE's plain decoder, each with those of the AutoencoderKL."""
    if model.base is None:
        return []
    return [(model.base.post_quant_conv, original.post_quant_conv), (model.base.decoder, original.decoder)]


def decoder_parameters(autoencoder: ModelMixin) -> int:
    """Return the number of parameters that decode images; the mask's of an AsymmetricAutoencoderKL do not count."""
    names = ("decoder.", "post_quant_conv.", "base.")
    return sum(
        parameter.numel()
        for name, parameter in autoencoder.named_parameters()
        if name.startswith(names) and not name.startswith("decoder.condition_encoder")
    )


def _tiny(original: ModelMixin) -> dict[str, Any]:
    """Return the config of an AutoencoderTiny with TAESD's decoder, for the latents of an AutoencoderKL."""
    if (kind := family_name(original)) != "AutoencoderKL":
        raise UserError(
            f"decoder.kind: an AutoencoderTiny decodes the latents of an AutoencoderKL, and init_from brings a {kind}: "
            "leave decoder.kind out"
        )
    levels = len(original.config.block_out_channels)
    return {
        **{key: original.config[key] for key in ("in_channels", "out_channels", "latent_channels")},
        # the smallest encoder with this downsampling factor, because it stays zero
        **{"encoder_block_out_channels": [1] * levels, "num_encoder_blocks": [0] * levels},
        **{"decoder_block_out_channels": [64] * levels, "num_decoder_blocks": [3] * (levels - 1) + [1]},
    }


def _asymmetric(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the AsymmetricAutoencoderKL with an AutoencoderKL's encoder, decoder and scaling."""
    same = ["in_channels", "out_channels", "down_block_types", "up_block_types", "act_fn", "latent_channels"]
    same += ["norm_num_groups", "sample_size", "scaling_factor"]
    unstated = {key: value for key in UNSTATED if (value := config.get(key)) is not None}
    return (
        {key: config[key] for key in same}
        | unstated
        | {
            "down_block_out_channels": config["block_out_channels"],
            "up_block_out_channels": config["block_out_channels"],
            "layers_per_down_block": config["layers_per_block"],
            "layers_per_up_block": config["layers_per_block"],
        }
    )


def _changes(kind: str, config: dict[str, Any], wanted: DecoderSettings) -> dict[str, Any]:
    """Return the keys of the config that the wanted decoder changes."""
    keys, changes = DECODERS[kind], dict[str, Any]()
    widths = wanted.block_out_channels or config.get(keys.widths) or config["block_out_channels"]
    levels = len(config.get(keys.widths) or config["block_out_channels"])
    if len(widths) != levels:
        raise UserError(
            f"decoder.block_out_channels: has {len(widths)} widths, and the latents of init_from are "
            f"{levels - 1} doublings from the image: give {levels}"
        )
    if kind == "AutoencoderTiny" and len({*widths}) > 1:
        raise UserError(
            f"decoder.block_out_channels: {list(widths)}, and all levels of an AutoencoderTiny have one width"
        )
    groups = config.get("norm_num_groups", 1)
    if wrong := [width for width in widths if width % groups]:
        raise UserError(
            f"decoder.block_out_channels: {wrong} are no multiples of {groups}, the norm_num_groups that the decoder "
            f"shares with the encoder of init_from"
        )
    changes[keys.widths] = list(widths)
    layers = wanted.layers_per_block
    if layers is None:
        return changes
    if keys.layers is None:
        raise UserError(f"decoder.layers_per_block: the decoder of {kind} has as many as its encoder: leave it out")
    if not keys.levelwise and not isinstance(layers, int):
        raise UserError(f"decoder.layers_per_block: all levels of {kind} have the same number: give one")
    if not isinstance(layers, int) and len(layers) != levels:
        raise UserError(f"decoder.layers_per_block: has {len(layers)} numbers for {levels} levels")
    number = [layers] * levels if isinstance(layers, int) else list(layers)
    return changes | {keys.layers: number if keys.levelwise else layers}


def _kept_weights(model: ModelMixin, old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of all but the decoder: the original's, or those of layers that change nothing."""
    kept = {}
    for name, weight in model.state_dict().items():
        if name.startswith("decoder."):
            continue
        if name in old:
            kept[name] = old[name]
        elif name.endswith("quant_conv.weight"):
            kept[name] = torch.eye(len(weight))[:, :, None, None]
        else:  # a bias of such a convolution, or the attention, whose output is added to its input
            kept[name] = torch.zeros_like(weight)
    return kept
