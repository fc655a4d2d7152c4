"""The layouts of Gaussian first stages of latent-diffusion, Stable Diffusion, VA-VAE, FLUX.1 and FLUX.2.

The names are those of CompVis/latent-diffusion, `ldm/modules/diffusionmodules/model.py`, and black-forest-labs/flux2,
`src/flux2/autoencoder.py`. Levels may have attention at any resolution, which diffusers' own loader ignores.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from latent_ae.config import UserError
from latent_ae.convert.layout import Config, Layout, Rule, levels_of, rules

if TYPE_CHECKING:
    from torch import Tensor

    from latent_ae.convert.layout import Tensors

RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
LINEAR = ("q", "k", "v", "proj_out")
ENDS = (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out"))
GROUPS = 32
"""Groups of each norm in the original's code (`Normalize` in `model.py`), and in that of all layouts with its norms."""
QUANT = (("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv"))


class Names(NamedTuple):
    """A repository's names for the parts of an encoder and a decoder."""

    down: str
    up: str
    own_up: str
    """Diffusers' name of a decoder's level; its number is that of `up`, or counts from the other end."""
    resnet: str
    mid: tuple[str, str, str]


LDM = Names("down.{i}", "up.{u}", "up_blocks.{u}", "block", ("mid.block_1", "mid.attn_1", "mid.block_2"))


def coder_rules(names: Names) -> tuple[Rule, ...]:
    """Return the rules of an encoder and a decoder with residual and attention blocks."""
    found: tuple[Rule, ...] = ()
    for side, level, own, resample, own_resample in (
        ("encoder", names.down, "down_blocks.{i}", "downsample", "downsamplers.0"),
        ("decoder", names.up, names.own_up, "upsample", "upsamplers.0"),
    ):
        first, attention, second = names.mid
        found += rules(side, side, ENDS)
        found += rules(f"{side}.{level}.{names.resnet}.{{j}}", f"{side}.{own}.resnets.{{j}}", RESNET)
        found += rules(f"{side}.{level}.attn.{{j}}", f"{side}.{own}.attentions.{{j}}", ATTENTION, LINEAR)
        found += rules(f"{side}.{level}.{resample}", f"{side}.{own}.{own_resample}", [("conv", "conv")])
        found += rules(f"{side}.{first}", f"{side}.mid_block.resnets.0", RESNET)
        found += rules(f"{side}.{attention}", f"{side}.mid_block.attentions.0", ATTENTION, LINEAR)
        found += rules(f"{side}.{second}", f"{side}.mid_block.resnets.1", RESNET)
    return found


def quant_rules(theirs: tuple[tuple[str, str], ...] = QUANT) -> tuple[Rule, ...]:
    """Return the rules of the 1 x 1 convolutions next to the latent, from their names in both places."""
    return tuple(Rule(f"{name}.{{leaf}}", (f"{own}.{{leaf}}",)) for name, own in theirs)


LDM_RULES = coder_rules(LDM) + quant_rules()
FLUX2_RULES = (
    coder_rules(LDM)
    + quant_rules((("encoder.quant_conv", "quant_conv"), ("decoder.post_quant_conv", "post_quant_conv")))
    + quant_rules((("bn", "bn"),))
)


class Coder(NamedTuple):
    """The shape of an encoder or decoder, read from its tensors."""

    widths: tuple[int, ...]
    """Channels of the levels, from the finest."""
    layers: int
    """Residual blocks per level, for a decoder minus one."""
    attention: tuple[bool, ...]
    """Whether each block of diffusers, in its order, has attention."""
    mid_attention: bool


def _coder(state: "Tensors", side: str) -> Coder:
    blocks = f"{side}.{'down' if side == 'encoder' else 'up'}_blocks"
    levels = levels_of(state, re.escape(blocks))
    counts = [levels_of(state, re.escape(f"{blocks}.{level}.resnets")) for level in range(levels)]
    if not levels or min(counts) < 1:
        raise UserError(f"the {side} has levels without a residual block, or none: the file is not complete")
    if len(set(counts)) > 1:
        raise UserError(f"the {side} has {counts} residual blocks per level; diffusers' classes have as many in each")
    resample = "downsamplers" if side == "encoder" else "upsamplers"
    for level in range(levels - 1):
        if f"{blocks}.{level}.{resample}.0.conv.weight" not in state:
            raise UserError(
                f"the {side}'s level {level} has no convolution that resamples (resamp_with_conv: false), which "
                "diffusers' classes always have"
            )
    widths = [int(state[f"{blocks}.{level}.resnets.0.conv2.weight"].shape[0]) for level in range(levels)]
    attention = [any(name.startswith(f"{blocks}.{level}.attentions.") for name in state) for level in range(levels)]
    order = 1 if side == "encoder" else -1
    return Coder(
        tuple(widths[::order]),
        counts[0] - (side == "decoder"),
        tuple(attention),
        any(name.startswith(f"{side}.mid_block.attentions.") for name in state),
    )


def infer_coders(state: "Tensors", words: Config, *, double_z: bool) -> dict[str, Any]:
    """Return the part of the config that AutoencoderKL, AutoencoderKLFlux2 and VQModel share, from the tensors' shapes.

    Args:
        state: Tensors by diffusers' names.
        words: The user's settings; `sample_size` and `norm_num_groups` are not in any shape.
        double_z: Whether the encoder gives mean and log-variance.

    Raises:
        UserError: If no model of these classes has such tensors.
    """
    encoder, decoder = _coder(state, "encoder"), _coder(state, "decoder")
    latents, given = state["decoder.conv_in.weight"].shape[1], state["encoder.conv_out.weight"].shape[0]
    if double_z and given % 2 == 0:
        given //= 2
    if given != latents:
        raise UserError(
            f"the encoder gives latents of {given} channels and the decoder takes {latents}: they do not belong to one "
            "model, or it is of another kind (a posterior without variances)"
        )
    if encoder.layers != decoder.layers or encoder.mid_attention != decoder.mid_attention:
        raise UserError(
            f"encoder and decoder differ in residual blocks per level ({encoder.layers} and {decoder.layers + 1}; a "
            "decoder has one more) or in attention in the middle; diffusers' classes have them alike"
        )
    groups = int(words.get("norm_num_groups") or GROUPS)
    wrong = [width for width in (*encoder.widths, *decoder.widths) if width % groups]
    if wrong:
        raise UserError(
            f"{wrong[0]} channels do not divide into {groups} groups, so the normalisation has other ones, which the "
            "file does not say: give norm_num_groups=N as in the original's code"
        )
    config: dict[str, Any] = {
        "in_channels": int(state["encoder.conv_in.weight"].shape[1]),
        "out_channels": int(state["decoder.conv_out.weight"].shape[0]),
        "latent_channels": int(latents),
        "block_out_channels": list(encoder.widths),
        "down_block_types": [f"{'Attn' * has}DownEncoderBlock2D" for has in encoder.attention],
        "up_block_types": [f"{'Attn' * has}UpDecoderBlock2D" for has in decoder.attention],
        "layers_per_block": encoder.layers,
        "norm_num_groups": groups,
        "mid_block_add_attention": encoder.mid_attention,
        "sample_size": int(words.get("sample_size") or 256),
    }
    if decoder.widths != encoder.widths:
        config["decoder_block_out_channels"] = list(decoder.widths)
    return config


def refuse_other_widths(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the config if encoder and decoder have the same widths.

    Args:
        config: Config from `infer_coders`.
        kind: Class of diffusers, for the message.

    Raises:
        UserError: If the widths differ.
    """
    if "decoder_block_out_channels" in config:
        raise UserError(
            f"the encoder has {config['block_out_channels']} channels and the decoder "
            f"{config['decoder_block_out_channels']}; {kind} needs equal ones, AutoencoderKLFlux2 does not"
        )
    return config


def _infer_kl(state: "Tensors", words: Config) -> dict[str, Any]:
    config = refuse_other_widths(infer_coders(state, words, double_z=True), "AutoencoderKL")
    return config | {
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def _infer_flux2(state: "Tensors", words: Config) -> dict[str, Any]:
    config = infer_coders(state, words, double_z=True)
    if "bn.running_mean" not in state:
        raise UserError("it lacks bn.running_mean and bn.running_var, by which FLUX.2's latents are scaled")
    side = round((state["bn.running_mean"].shape[0] / config["latent_channels"]) ** 0.5)
    return config | {
        "patch_size": [side, side],
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


ATTENTION_NAMES = {
    **{name: "q" for name in ("to_q", "query")},
    **{name: "k" for name in ("to_k", "key")},
    **{name: "v" for name in ("to_v", "value")},
    **{name: "proj_out" for name in ("to_out.0", "proj_attn")},
    "group_norm": "norm",
}
"""Original names by the names of diffusers, now and before 0.17, which tools have mixed into files of other layouts."""


def one_attention(tensors: "Tensors") -> dict[str, "Tensor"]:
    """Return the tensors with the original's names for attention, whichever names the file uses."""
    mixed = re.compile(rf"(.*\.(?:attn_1|attn\.\d+))\.({'|'.join(map(re.escape, ATTENTION_NAMES))})\.(weight|bias)")

    def renamed(name: str) -> str:
        match = mixed.fullmatch(name)
        return f"{match[1]}.{ATTENTION_NAMES[match[2]]}.{match[3]}" if match else name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def present_attention(tensors: "Tensors") -> dict[str, "Tensor"]:
    """Return a diffusers file's tensors, with the names and shapes of attention that diffusers has used since 0.17."""
    present = dict(ATTENTION)
    old = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
    state = dict[str, "Tensor"]()
    for name, tensor in tensors.items():
        match = old.fullmatch(name)
        if match:
            name = f"{match[1]}.{present[ATTENTION_NAMES[match[2]]]}.{match[3]}"
            tensor = tensor.flatten(1) if match[3] == "weight" else tensor
        state[name] = tensor
    return state


def factor(config: Config) -> int:
    """Return the downsampling factor: each level but the last halves the sides."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _whole(names: frozenset[str]) -> bool:
    return bool({"encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"} & names)


def other_groups(model: Any) -> str:
    """Return why the original's code, which has a fixed number of groups, makes another model; or an empty string."""
    groups = model.config.norm_num_groups
    if groups == GROUPS:
        return ""
    return (
        f"its code normalises in {GROUPS} groups, this model in {groups} (norm_num_groups), so it would give other "
        f"images; keep the folder of diffusers, or train a model with norm_num_groups {GROUPS}"
    )


def _without_quant_convs(model: Any) -> str:
    has = model.config.use_quant_conv or model.config.use_post_quant_conv
    return "FLUX.1 has no quant convolutions, this model has; take ldm" if has else other_groups(model)


ANCHOR = r"(?:encoder|decoder)\.conv_in\.weight"
SMALL_DECODER = (
    "it is a decoder for the latents of another file: give that one, which holds the encoder, with --encoder FILE "
    "(for FLUX.2's small decoder ae.safetensors of FLUX.2, which has the statistics in its bn, too)"
)
LAYOUTS = {
    "flux2": Layout(
        title="FLUX.2 and its small decoder",
        kind="AutoencoderKLFlux2",
        anchor=ANCHOR,
        recognise=lambda names: (
            _whole(names)
            and bool({"bn.running_mean", "encoder.quant_conv.weight", "decoder.post_quant_conv.weight"} & names)
        ),
        rules=lambda config: FLUX2_RULES,
        infer=_infer_flux2,
        factor=factor,
        prepare=one_attention,
        misfit=other_groups,
        decoder_alone=SMALL_DECODER,
    ),
    "flux": Layout(
        title="FLUX.1 (ae.safetensors), Stable Diffusion 3",
        kind="AutoencoderKL",
        anchor=ANCHOR,
        recognise=lambda names: (
            _whole(names)
            and "decoder.mid.attn_1.norm.weight" in names
            and not any(name.startswith(("quant_conv", "post_quant_conv", "quantize.")) for name in names)
        ),
        rules=lambda config: LDM_RULES,
        infer=_infer_kl,
        factor=factor,
        prepare=one_attention,
        misfit=_without_quant_convs,
        decoder_alone=SMALL_DECODER,
    ),
    "ldm": Layout(
        title="latent-diffusion (kl-f4 to kl-f32), Stable Diffusion 1, 2, XL, VA-VAE, EQ-VAE",
        kind="AutoencoderKL",
        anchor=ANCHOR,
        recognise=lambda names: _whole(names) and not any(name.startswith("quantize.") for name in names),
        rules=lambda config: LDM_RULES,
        infer=_infer_kl,
        factor=factor,
        prepare=one_attention,
        misfit=other_groups,
        wrapper="state_dict",
    ),
    "diffusers": Layout(
        title="the weights of an AutoencoderKL of diffusers without their config.json, old names of attention, too",
        kind="AutoencoderKL",
        anchor=ANCHOR,
        recognise=lambda names: (
            "encoder.down_blocks.0.resnets.0.conv1.weight" in names
            and not any(name.startswith(("quantize.", "bn.")) for name in names)
        ),
        rules=lambda config: (Rule("{rest}", ("{rest}",)),),
        infer=_infer_kl,
        factor=factor,
        prepare=present_attention,
    ),
}
