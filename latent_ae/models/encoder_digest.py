"""A digest of what encodes: first stages with the same one have the same latents and scaling, whatever decodes them."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.models.borrowed_encoder import BorrowedEncoder
from latent_ae.models.family import SIDES
from latent_ae.models.new_decoder import DECODERS
from latent_ae.models.registry import family_name, family_of, scaling_of
from latent_ae.models.stored_encoder import StoredEncoder

KL_KEYS = ("in_channels", "latent_channels", "norm_num_groups", "act_fn", "down_block_types")
"""Keys that AutoencoderKL and AsymmetricAutoencoderKL share and that shape the encoder beside its weights."""
ENCODES = {*SIDES["encoder"], *SIDES["codebook"], *SIDES["flow"], "bn"}
"""Names of the modules whose weights make latents or scale them."""


def encoder_sha256(module: Any) -> str:
    """Return a digest of the weights and the config that encode, of the kind of latent and of its scaling.

    An AutoencoderKL and what it becomes with a new decoder, an AsymmetricAutoencoderKL or a FlowMatchingVAE, have the
    same digest. Layers
    that change nothing do not count: such a model has them where the original has none.

    Args:
        module: An instance of one of `registry.FAMILIES`.
    """
    encoder = getattr(module, "encoder", None)
    if isinstance(encoder, StoredEncoder):
        return encoder.encoder_sha256
    if isinstance(encoder, BorrowedEncoder):
        return hashlib.sha256(f"scaled by {encoder_sha256(encoder.original)}".encode()).hexdigest()
    kind, config = str(family_name(module)), dict(module.config)
    if kind in ("AutoencoderKL", "AsymmetricAutoencoderKL", "FlowMatchingVAE"):
        kind, config = "AutoencoderKL", {key: config[key] for key in KL_KEYS}
    # AutoencoderTiny repeats the widths of its decoder in block_out_channels; those of an encoder are in its weights
    foreign = {"sample_size", "block_out_channels", "force_upcast", *(DECODERS[kind][:2] if kind in DECODERS else ())}
    config = {key: config[key] for key in config.keys() - foreign if not key.startswith("_")}
    facts = [kind, family_of(module).latent, config, scaling_of(module)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in sorted(module.state_dict().items()):
        if name.split(".")[0] in ENCODES and not _changes_nothing(name, weight):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)};".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _changes_nothing(name: str, weight: Tensor) -> bool:
    """Return whether a weight is that of an added layer which passes its input on: zero, or the identity."""
    if name == "quant_conv.weight" and weight.shape[0] == weight.shape[1]:
        return torch.equal(weight.flatten(1), nn.init.eye_(torch.empty_like(weight.flatten(1))))
    return not weight.any()
