"""The layouts of first stages with a codebook: VQ models of taming-transformers, latent-diffusion and LlamaGen.

The names are those of CompVis/taming-transformers, `taming/models/vqgan.py`, and FoundationVision/LlamaGen,
`tokenizer/tokenizer_image/vq_model.py`.
"""

from typing import TYPE_CHECKING, Any

from latent_ae.config import UserError
from latent_ae.convert.layout import Config, Layout, Rule
from latent_ae.convert.ldm import (
    ANCHOR,
    LDM_RULES,
    Names,
    coder_rules,
    factor,
    infer_coders,
    one_attention,
    other_groups,
    quant_rules,
    refuse_other_widths,
)

if TYPE_CHECKING:
    from torch import Tensor

    from latent_ae.convert.layout import Tensors

CODEBOOK = (Rule("quantize.embedding.weight", ("quantize.embedding.weight",)),)
TAMING_RULES = LDM_RULES + CODEBOOK
LLAMAGEN = Names("conv_blocks.{i}", "conv_blocks.{i}", "up_blocks.{i}", "res", ("mid.0", "mid.1", "mid.2"))
LLAMAGEN_RULES = coder_rules(LLAMAGEN) + quant_rules() + CODEBOOK
USAGE = 65536
"""Length of a buffer of recently used codes, which LlamaGen's model requires in a file and uses only in training."""


def _infer(state: "Tensors", words: Config) -> dict[str, Any]:
    config = refuse_other_widths(infer_coders(state, words, double_z=False), "VQModel")
    codes, dimensions = state["quantize.embedding.weight"].shape
    given = state["quant_conv.weight"].shape[0]
    if given != dimensions:
        raise UserError(f"quant_conv gives {given} channels, and the codes have {dimensions}: not one vector per place")
    return config | {"num_vq_embeddings": int(codes), "vq_embed_dim": int(dimensions)}


def _normalised(tensors: "Tensors") -> dict[str, "Tensor"]:
    """Return the tensors with codes of length 1, as in LlamaGen's quantiser: the nearest has the largest cosine."""
    from torch.nn.functional import normalize

    kept = {name: tensor for name, tensor in tensors.items() if name != "quantize.codebook_used"}
    codes = kept.get("quantize.embedding.weight")
    if codes is not None:
        kept["quantize.embedding.weight"] = normalize(codes.float(), dim=-1).to(codes.dtype)
    return kept


def _with_usage(tensors: "Tensors", model: Any) -> dict[str, "Tensor"]:
    import torch

    return {**tensors, "quantize.codebook_used": torch.zeros(USAGE)}


def _not_normalised(model: Any) -> str:
    lengths = model.quantize.embedding.weight.float().norm(dim=-1)
    if float((lengths - 1).abs().max()) > 0.01:
        return (
            "LlamaGen compares codes by their direction, and these have other lengths than 1, so it would choose "
            "others; take taming"
        )
    return ""


def _attention_below(model: Any) -> str:
    """Return why a model does not have attention where LlamaGen's has it: on the coarsest level and in the middle."""
    config = model.config
    wanted = [level == len(config.block_out_channels) - 1 for level in range(len(config.block_out_channels))]
    down = [kind.startswith("Attn") for kind in config.down_block_types]
    up = [kind.startswith("Attn") for kind in reversed(config.up_block_types)]
    if down != wanted or up != wanted or not config.mid_block_add_attention:
        return "LlamaGen's model has attention on the coarsest level and in the middle, this one elsewhere; take taming"
    return ""


LAYOUTS = {
    "llamagen": Layout(
        title="LlamaGen's VQ-8 and VQ-16 (codes of length 1)",
        kind="VQModel",
        anchor=ANCHOR,
        recognise=lambda names: {"encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"} <= names,
        rules=lambda config: LLAMAGEN_RULES,
        infer=_infer,
        factor=factor,
        prepare=_normalised,
        complete=_with_usage,
        misfit=lambda model: _not_normalised(model) or _attention_below(model) or other_groups(model),
        wrapper="model",
        fixed_scaling={"scaling_factor": 1.0},
    ),
    "taming": Layout(
        title="taming-transformers' VQGAN, latent-diffusion's vq-f4 to vq-f16",
        kind="VQModel",
        anchor=ANCHOR,
        recognise=lambda names: {"encoder.down.0.block.0.conv1.weight", "quantize.embedding.weight"} <= names,
        rules=lambda config: TAMING_RULES,
        infer=_infer,
        factor=factor,
        prepare=one_attention,
        misfit=other_groups,
        wrapper="state_dict",
    ),
}
