"""Representation autoencoders (RAE, Zheng et al. 2025): a decoder for the features of a frozen vision transformer.

The class is diffusers' AutoencoderRAE; here its frozen encoder comes from a folder of transformers.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_ae.config import UserError
from latent_ae.files import read_mapping
from latent_ae.text import printable

if TYPE_CHECKING:
    from torch import Tensor, nn

KIND = "AutoencoderRAE"
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
ASSUMED = (
    *("image_size", "num_channels", "intermediate_size", "mlp_ratio", "num_register_tokens", "use_swiglu_ffn"),
    *("hidden_act", "layer_norm_eps", "qkv_bias"),
)
"""Keys of an encoder's config that AutoencoderRAE's config has no place for: its encoder has fixed values of them."""
GRID = 16
"""Places of a latent along one side. On another grid AutoencoderRAE stretches the position embedding of its decoder
over the span of 16 places, where RAE numbers the places."""
MEASURED = ("latents_mean", "latents_std", "scaling_factor")
"""Keys of AutoencoderRAE's config that an export measures."""


def read_encoder(folder: Path, key: str = "--encoder") -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Read the frozen encoder in a folder of transformers.

    Args:
        folder: The folder: config.json, weights and, if they are not the usual ones, mean and standard deviation of
            the images in preprocessor_config.json.
        key: The setting or option that names it, for messages.

    Returns:
        Its tensors with the prefix `encoder.`, without the weights of the final norm, which RAE removes; and the keys
        of AutoencoderRAE's config that describe it.

    Raises:
        UserError: If the folder holds no encoder that AutoencoderRAE knows, it cannot be read, or transformers is
            missing.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{key}: {folder} has no config.json (from {Path.cwd()}); give the encoder's folder of transformers"
        )
    try:
        import transformers
    except ImportError:
        raise UserError("RAE's encoders are transformers' models: pip install transformers") from None
    found = str(read_mapping(folder / "config.json").get("model_type"))
    if found not in ENCODERS:
        known = ", ".join(ENCODERS)
        hint = " (that is DINOv2 without registers)" if found == "dinov2" else ""
        raise UserError(f"{key}: {folder} holds a {printable(found)[:100]}{hint}; AutoencoderRAE knows {known}")
    name, kind, (mean, std) = ENCODERS[found]
    try:
        model, loading = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds for a missing, truncated or foreign file
        raise UserError(f"cannot load {folder}: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them anew
        raise UserError(f"{key}: {folder} lacks weights of a {kind}: {', '.join(missing[:4])}")
    config = model.config
    if config.hidden_size != HEAD_CHANNELS * config.num_attention_heads:
        raise UserError(f"{key}: {folder} has no heads of {HEAD_CHANNELS} channels, which AutoencoderRAE needs")
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        said = read_mapping(processor)
        mean, std = said.get("image_mean", mean), said.get("image_std", std)
        if not all(isinstance(values, list) and len(values) == 3 for values in (mean, std)):
            raise UserError(f"{processor}: AutoencoderRAE needs image_mean and image_std of three colours")
    norms = ("layernorm.", "post_layernorm.", "vision_model.post_layernorm.")
    state = {f"encoder.{name}": value for name, value in model.state_dict().items() if not name.startswith(norms)}
    return state, {
        "encoder_type": name,
        "encoder_hidden_size": int(config.hidden_size),
        "encoder_patch_size": int(config.patch_size),
        "encoder_num_hidden_layers": int(config.num_hidden_layers),
        "encoder_norm_mean": mean,
        "encoder_norm_std": std,
    }


def with_encoder(folder: str, config: dict[str, Any], image_px: int) -> "nn.Module":
    """Return an AutoencoderRAE with the encoder of a folder and a fresh decoder.

    Args:
        folder: Folder of the encoder, a model of transformers.
        config: Keys of AutoencoderRAE's config that describe the decoder. Without `encoder_input_size` the encoder
            sees images of 16 x 16 of its patches, without `patch_size` the decoder makes images of `image_px`.
        image_px: Side of the images, px.

    Raises:
        UserError: If the folder cannot be read, or the class cannot compute what this encoder computes.
        ValueError: If the class refuses the config.
    """
    import torch
    from diffusers import AutoencoderRAE

    # the decoder's weights must not depend on what transformers draws, and a plan has no memory for weights
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        state, facts = read_encoder(Path(folder).expanduser(), "model.encoder")
    for key in config:
        if key in facts:
            raise UserError(f"model.config.{key}: model.encoder gives it: leave it out")
        if key in MEASURED:
            raise UserError(f"model.config.{key}: is measured at the export: leave it out")
    default = {"encoder_input_size": GRID * facts["encoder_patch_size"], "patch_size": max(1, image_px // GRID)}
    try:
        model = AutoencoderRAE(**default | config | facts)
    except AttributeError as error:  # an older diffusers and a newer transformers
        raise UserError(f"model.encoder: this diffusers cannot build the encoder: {error}") from error
    if (grid := math.isqrt(model.num_patches)) != GRID:
        raise UserError(
            f"model.config.encoder_input_size: a grid of {grid} x {grid} patches; AutoencoderRAE stretches the "
            f"decoder's position embedding there, unlike RAE: set it to {GRID * facts['encoder_patch_size']}, which "
            f"is {GRID} x {GRID}; model.config.patch_size gives the side of the images"
        )
    _refuse_another_encoder(Path(folder), model.encoder.config)
    own = model.encoder.state_dict()
    given = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    if own.keys() != given.keys() or any(own[name].shape != given[name].shape for name in own):
        raise UserError(f"model.encoder: the weights in {folder} are not those that AutoencoderRAE's encoder has")
    if next(model.parameters()).device != torch.device("meta"):
        model.encoder.load_state_dict(given)
    return model


def _refuse_another_encoder(folder: Path, built: Any) -> None:
    """Raise UserError if the config in a folder differs from that of AutoencoderRAE's encoder where weights do not."""
    import transformers

    own = transformers.AutoConfig.from_pretrained(folder.expanduser(), local_files_only=True)
    own = getattr(own, "vision_config", own)  # SigLIP's holds a text model, too
    for key in ASSUMED:
        ours, theirs = getattr(built, key, None), getattr(own, key, None)
        if ours != theirs:
            raise UserError(f"model.encoder: {folder} has {key} {theirs}, and AutoencoderRAE computes with {ours}")
