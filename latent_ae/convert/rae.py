"""The layout of representation autoencoders (RAE): a file of the trained decoder and a folder of the frozen encoder.

The names are those of bytetriper/RAE, `src/stage1/decoders/decoder.py`; the encoder is a model of transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_ae.config import UserError
from latent_ae.convert.layout import Config, Layout, Rule, levels_of, rules
from latent_ae.files import read_mapping
from latent_ae.text import printable

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
HALF = ([0.5] * 3, [0.5] * 3)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
ENCODERS = {
    "dinov2_with_registers": ("dinov2", "Dinov2WithRegistersModel", IMAGENET),
    "vit_mae": ("mae", "ViTMAEModel", IMAGENET),
    "siglip": ("siglip2", "SiglipVisionModel", HALF),
    "siglip_vision_model": ("siglip2", "SiglipVisionModel", HALF),
}
"""By the model_type of a transformers config: AutoencoderRAE's name, the class, and mean and std of images."""
HEAD_CHANNELS = 64
"""Channels of an attention head, which AutoencoderRAE assumes in an encoder."""


def read_encoder(folder: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read the frozen encoder in a folder of transformers.

    Returns:
        Its tensors with the prefix `encoder.`, without the weights of the final norm, which RAE removes; and the keys
        of AutoencoderRAE's config that describe it.

    Raises:
        UserError: If the folder holds no encoder that AutoencoderRAE knows, it cannot be read, or transformers is
            missing.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"--encoder: {folder} has no config.json; give the encoder's folder of transformers")
    try:
        import transformers
    except ImportError:
        raise UserError("RAE's encoders are transformers' models: pip install transformers") from None
    found = str(read_mapping(folder / "config.json").get("model_type"))
    if found not in ENCODERS:
        known = ", ".join(ENCODERS)
        raise UserError(f"--encoder: {folder} holds a {printable(found)[:100]}; AutoencoderRAE knows {known}")
    name, kind, (mean, std) = ENCODERS[found]
    try:
        model = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a missing, truncated or foreign file
        raise UserError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    config = model.config
    if config.hidden_size != HEAD_CHANNELS * config.num_attention_heads:
        raise UserError(f"--encoder: {folder} has no heads of {HEAD_CHANNELS} channels, which AutoencoderRAE needs")
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        said = read_mapping(processor)
        mean, std = said.get("image_mean", mean), said.get("image_std", std)
        if not all(isinstance(values, list) and len(values) == 3 for values in (mean, std)):
            raise UserError(f"{processor}: AutoencoderRAE needs image_mean and image_std of three colours")
    norms = ("layernorm.", "post_layernorm.", "vision_model.post_layernorm.")
    state = {f"encoder.{key}": value for key, value in model.state_dict().items() if not key.startswith(norms)}
    return state, {
        "encoder_type": name,
        "encoder_hidden_size": int(config.hidden_size),
        "encoder_patch_size": int(config.patch_size),
        "encoder_num_hidden_layers": int(config.num_hidden_layers),
        "encoder_norm_mean": mean,
        "encoder_norm_std": std,
    }


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
