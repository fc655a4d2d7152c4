"""The layout of deep compression autoencoders (DC-AE).

The names are those of mit-han-lab/efficientvit, `efficientvit/models/efficientvit/dc_ae.py` and
`efficientvit/models/nn/ops.py`.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from latent_ae.config import UserError
from latent_ae.convert.layout import Config, Layout, Rule, levels_of, rules

if TYPE_CHECKING:
    from latent_ae.convert.layout import Tensors

RES_BLOCK = (("main.conv1.conv", "conv1"), ("main.conv2.conv", "conv2"), ("main.conv2.norm", "norm"))
TRANSFORMER_BLOCK = (
    ("context_module.main.aggreg.{s}.0", "attn.to_qkv_multiscale.{s}.proj_in"),
    ("context_module.main.aggreg.{s}.1", "attn.to_qkv_multiscale.{s}.proj_out"),
    ("context_module.main.proj.conv", "attn.to_out"),
    ("context_module.main.proj.norm", "attn.norm_out"),
    ("local_module.main.inverted_conv.conv", "conv_out.conv_inverted"),
    ("local_module.main.depth_conv.conv", "conv_out.conv_depth"),
    ("local_module.main.point_conv.conv", "conv_out.conv_point"),
    ("local_module.main.point_conv.norm", "conv_out.norm"),
)
PLAIN_OUT, SHORTCUT_OUT = "encoder.project_out.op_list.0.conv", "encoder.project_out.main.op_list.0.conv"
PLAIN_IN, SHORTCUT_IN = "decoder.project_in.conv", "decoder.project_in.main.conv"
"""The convolutions at the latent, without and with a shortcut around them."""
PIXEL_UNSHUFFLE = (("main.conv.conv", "conv"),)
STRIDED = (("main.conv", "conv"),)


def _rules(config: Config | None) -> tuple[Rule, ...]:
    down = {"pixel_unshuffle": PIXEL_UNSHUFFLE, "Conv": STRIDED}
    kind = None if config is None else str(config["downsample_block_type"])
    chosen = (
        PIXEL_UNSHUFFLE + STRIDED if kind is None else down["pixel_unshuffle" if kind == "pixel_unshuffle" else "Conv"]
    )
    found: tuple[Rule, ...] = ()
    for side, blocks, resample in (("encoder", "down_blocks", chosen), ("decoder", "up_blocks", PIXEL_UNSHUFFLE)):
        theirs, ours = f"{side}.stages.{{i}}.op_list.{{j}}", f"{side}.{blocks}.{{i}}.{{j}}"
        found += rules(theirs, ours, RES_BLOCK + resample)
        found += rules(theirs, ours, TRANSFORMER_BLOCK, ["context_module.main.proj.conv"])
        parts = tuple(f"{ours}.attn.{name}.{{leaf}}" for name in ("to_q", "to_k", "to_v"))
        found += (Rule(f"{theirs}.context_module.main.qkv.conv.{{leaf}}", parts, linear=True),)
    ends = (
        ("encoder.project_in.conv", "encoder.conv_in"),
        ("encoder.project_in.conv.conv", "encoder.conv_in.conv"),
        *_end(PLAIN_OUT, SHORTCUT_OUT, "encoder.conv_out", config["encoder_out_shortcut"] if config else None),
        *_end(PLAIN_IN, SHORTCUT_IN, "decoder.conv_in", config["decoder_in_shortcut"] if config else None),
        ("decoder.project_out.op_list.0", "decoder.norm_out"),
        ("decoder.project_out.op_list.2.conv", "decoder.conv_out"),
        ("decoder.project_out.op_list.2.conv.conv", "decoder.conv_out.conv"),
    )
    return found + tuple(Rule(f"{name}.{{leaf}}", (f"{own}.{{leaf}}",)) for name, own in ends)


def _end(plain: str, around: str, own: str, shortcut: bool | None) -> list[tuple[str, str]]:
    """Return the names of a convolution at the latent: by whether there is a shortcut around it; both for None."""
    return [(name, own) for name, fits in ((plain, not shortcut), (around, shortcut in (None, True))) if fits]


class _Stage(NamedTuple):
    width: int
    depth: int
    kind: str
    scales: tuple[int, ...]
    batch_norm: bool


def _stage(state: "Tensors", place: str) -> _Stage | None:
    """Return the blocks of one resolution; None if it has none. Raise UserError if it mixes kinds."""
    inside = {name.removeprefix(f"{place}."): tensor for name, tensor in state.items() if name.startswith(f"{place}.")}
    residual = [name for name in inside if re.fullmatch(r"\d+\.conv1\.weight", name)]
    transformers = [name for name in inside if re.fullmatch(r"\d+\.attn\.to_q\.weight", name)]
    if residual and transformers:
        raise UserError(f"{place} mixes residual and transformer blocks; AutoencoderDC has one kind in each stage")
    if not residual and not transformers:
        return None
    first = transformers[0].removesuffix("to_q.weight") if transformers else ""
    kernels = {
        int(re.sub(r".*multiscale\.(\d+)\..*", r"\1", name)): int(tensor.shape[-1])
        for name, tensor in inside.items()
        if first and name.startswith(f"{first}to_qkv_multiscale.") and name.endswith("proj_in.weight")
    }
    return _Stage(
        int(inside[(residual or transformers)[0]].shape[1]),
        len(residual or transformers),
        "ResBlock" if residual else "EfficientViTBlock",
        tuple(kernels[number] for number in sorted(kernels)),
        any(name.endswith("running_mean") for name in inside),
    )


def _stages(state: "Tensors", side: str, blocks: str) -> list[_Stage]:
    count = levels_of(state, re.escape(f"{side}.{blocks}"))
    found = [_stage(state, f"{side}.{blocks}.{level}") for level in range(count)]
    if not found or None in found[1:]:
        raise UserError(f"the {side} has no blocks in some of its stages after the first: the file is not complete")
    after = found[1] if len(found) > 1 else None
    if found[0] is None and after is not None:
        # nothing depends on the width of a stage without blocks; the published ones have half of the next
        found[0] = after._replace(width=after.width // 2, depth=0)
    return [stage for stage in found if stage is not None]


def _infer(state: "Tensors", words: Config) -> dict[str, Any]:
    down, up = _stages(state, "encoder", "down_blocks"), _stages(state, "decoder", "up_blocks")
    if any(stage.batch_norm for stage in down):
        raise UserError("the encoder has batch norms; that of AutoencoderDC has RMS norms")
    given, taken = state["encoder.conv_out.weight"].shape[0], state["decoder.conv_in.weight"].shape[1]
    if given != taken:
        raise UserError(f"the encoder gives latents of {given} channels and the decoder takes {taken}")
    heads = [int(tensor.shape[1]) for name, tensor in state.items() if name.endswith(".proj_out.weight")]
    in_conv = "encoder.conv_in.weight" if "encoder.conv_in.weight" in state else "encoder.conv_in.conv.weight"
    return {
        "in_channels": int(state[in_conv].shape[1]),
        "latent_channels": int(given),
        "attention_head_dim": heads[0] if heads else 32,
        "encoder_block_types": [stage.kind for stage in down],
        "decoder_block_types": [stage.kind for stage in up],
        "encoder_block_out_channels": [stage.width for stage in down],
        "decoder_block_out_channels": [stage.width for stage in up],
        "encoder_layers_per_block": [stage.depth for stage in down],
        "decoder_layers_per_block": [stage.depth for stage in up],
        "encoder_qkv_multiscales": [list(stage.scales) for stage in down],
        "decoder_qkv_multiscales": [list(stage.scales) for stage in up],
        "downsample_block_type": "pixel_unshuffle" if _shuffled(state, "down", down) else "Conv",
        "upsample_block_type": "pixel_shuffle" if _shuffled(state, "up", up) else "interpolate",
        "decoder_norm_types": ["batch_norm" if stage.batch_norm else "rms_norm" for stage in up],
        # no shape tells activations: every published model has ReLU beside batch norms and SiLU beside RMS norms, and
        # at its end ReLU behind transformers and SiLU where the decoder has none (DC-AE-Lite, 1.1 and 1.5)
        "decoder_act_fns": ["relu" if stage.batch_norm else "silu" for stage in up],
        "decoder_conv_act_fn": "relu" if any(stage.kind == "EfficientViTBlock" for stage in up) else "silu",
        **{key: words.get(key, True) for key in ("encoder_out_shortcut", "decoder_in_shortcut")},
    }


def _shuffled(state: "Tensors", way: str, stages: list[_Stage]) -> bool:
    """Return whether resampling moves pixels between channels, which the channels of its convolutions tell."""
    side = "encoder" if way == "down" else "decoder"
    for level in range(len(stages) - 1):
        stage, deeper = stages[level], stages[level + 1]
        number = stage.depth if way == "down" else 0
        weight = state.get(f"{side}.{way}_blocks.{level}.{number}.conv.weight")
        if weight is not None:
            return int(weight.shape[0]) != (deeper.width if way == "down" else stage.width)
    return True


def _misfit(model: Any) -> str:
    config = model.config
    if config.encoder_layers_per_block[0] == 0 and config.downsample_block_type != "pixel_unshuffle":
        return "a first stage without blocks goes with pixel_unshuffle only"
    return ""


LAYOUTS = {
    "dc-ae": Layout(
        title="DC-AE (f32c32, f64c128, f128c512; those of Sana, Lite, 1.1 and 1.5, too)",
        kind="AutoencoderDC",
        anchor=r"(?:encoder\.project_in\.conv(?:\.conv)?|decoder\.project_in\.(?:main\.)?conv)\.weight",
        recognise=lambda names: any(re.match(r"(?:en|de)coder\.stages\.\d+\.op_list\.", name) for name in names),
        rules=_rules,
        infer=_infer,
        facts=lambda config: {key: config[key] for key in ("encoder_out_shortcut", "decoder_in_shortcut")},
        told=lambda names: {
            "encoder_out_shortcut": f"{PLAIN_OUT}.weight" not in names,
            "decoder_in_shortcut": f"{PLAIN_IN}.weight" not in names,
        },
        factor=lambda config: int(2 ** (len(config["encoder_block_out_channels"]) - 1)),
        misfit=_misfit,
        wrapper="state_dict",
    ),
}
