"""The layout of representation autoencoders (RAE): a file of the trained decoder and a folder of the frozen encoder.

The names are those of bytetriper/RAE, `src/stage1/decoders/decoder.py`; the encoder is a model of transformers.
"""

from typing import TYPE_CHECKING, Any

from latent_ae.config import UserError
from latent_ae.convert.layout import Config, Layout, Rule, levels_of, rules
from latent_ae.models.representation import read_encoder

if TYPE_CHECKING:
    from torch import Tensor

    from latent_ae.convert.layout import Tensors

LAYER = (
    ("attention.attention.query", "attention.to_q"),
    ("attention.attention.key", "attention.to_k"),
    ("attention.attention.value", "attention.to_v"),
    ("attention.output.dense", "attention.to_out.0"),
    ("intermediate.dense", "intermediate.dense"),
    ("output.dense", "output.dense"),
    ("layernorm_before", "layernorm_before"),
    ("layernorm_after", "layernorm_after"),
)
RULES = (
    *rules("decoder.decoder_layers.{i}", "decoder.decoder_layers.{i}", LAYER),
    *rules("decoder", "decoder", [(name, name) for name in ("decoder_embed", "decoder_norm", "decoder_pred")]),
    *(Rule(f"decoder.{name}", (f"decoder.{name}",)) for name in ("trainable_cls_token", "decoder_pos_embed")),
    Rule("encoder.{rest}", ("encoder.{rest}",)),
    Rule("{leaf}", ("{leaf}",)),
)
HEADS = {768: 12, 1024: 16, 1152: 16}
"""Attention heads of the published decoders by their width (`configs/decoder/`)."""


def _infer(state: "Tensors", words: Config) -> dict[str, Any]:
    encoder = {key: value for key, value in words.items() if key.startswith("encoder_")}
    width, given = (int(size) for size in state["decoder.decoder_embed.weight"].shape)
    if given != encoder["encoder_hidden_size"]:
        raise UserError(
            f"the decoder takes latents of {given} channels and the encoder gives {encoder['encoder_hidden_size']}: it "
            "is that of another encoder"
        )
    heads = words.get("decoder_num_attention_heads") or HEADS.get(width)
    if heads is None:
        raise UserError(
            f"a decoder of {width} channels is none of the published ones ({', '.join(map(str, HEADS))}), and no shape "
            "tells its heads: give decoder_num_attention_heads=N of its config.json"
        )
    grid = round((state["decoder.decoder_pos_embed"].shape[1] - 1) ** 0.5)
    return encoder | {
        "encoder_input_size": grid * encoder["encoder_patch_size"],
        "patch_size": round((state["decoder.decoder_pred.weight"].shape[0] / 3) ** 0.5),
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": levels_of(state, r"decoder\.decoder_layers"),
        "decoder_num_attention_heads": int(heads),
        "decoder_intermediate_size": int(state["decoder.decoder_layers.0.intermediate.dense.weight"].shape[0]),
    }


def _facts(config: Config) -> dict[str, Any]:
    """Return what RAE's code reads from config files: the encoder and, where no published decoder is so wide, heads."""
    heads = {} if config["decoder_hidden_size"] in HEADS else {"decoder_num_attention_heads"}
    return {key: value for key, value in config.items() if key.startswith("encoder_") or key in heads}


def _decoder(tensors: "Tensors") -> dict[str, "Tensor"]:
    """Return only the decoder: the encoder in a whole checkpoint has the names of an older version of transformers."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}


def _with_positions(tensors: "Tensors", model: Any) -> dict[str, "Tensor"]:
    """Return the tensors with the position embedding, which the original stores and diffusers computes."""
    dtype = tensors["decoder.decoder_embed.weight"].dtype
    return {**tensors, "decoder.decoder_pos_embed": model.decoder.decoder_pos_embed.to(dtype)}


LAYOUTS = {
    "rae": Layout(
        title="RAE (its decoder; with --encoder FOLDER, and --statistics stat.pt)",
        kind="AutoencoderRAE",
        anchor=r"decoder\.decoder_embed\.weight",
        recognise=lambda names: "decoder.decoder_embed.weight" in names,
        rules=lambda config: RULES,
        infer=_infer,
        factor=lambda config: int(config["patch_size"]),
        prepare=_decoder,
        complete=_with_positions,
        facts=_facts,
        decoder_alone="give the folder of its encoder, a model of transformers, with --encoder FOLDER",
        read_encoder=read_encoder,
        files={"": "decoder."},
    ),
}
