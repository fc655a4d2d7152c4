"""The layout of tiny first stages (TAESD): two files, whose tensors have the numbers of their layers in a sequence.

The names are those of madebyollin/taesd, `taesd.py`. There the decoder's sequence begins with a clamp, which has no
number in diffusers' AutoencoderTiny.
"""

import re
from typing import TYPE_CHECKING, Any

from latent_ae.config import UserError
from latent_ae.convert.layout import Config, Layout, Rule

if TYPE_CHECKING:
    from latent_ae.convert.layout import Tensors

RULES = (
    Rule("encoder.{i}.{rest}", ("encoder.layers.{i}.{rest}",)),
    Rule("decoder.{n}.{rest}", ("decoder.layers.{n}.{rest}",)),
)


def _sequence(state: "Tensors", side: str) -> tuple[list[int], list[int]]:
    """Return, for each convolution but the last, the number of residual blocks after it and its output channels."""
    pattern = re.compile(rf"{side}\.layers\.(\d+)\.(weight|conv\.0\.weight)")
    found = sorted((int(match[1]), match[2], name) for name in state if (match := pattern.fullmatch(name)))
    blocks, widths = list[int](), list[int]()
    for _, kind, name in found:
        if kind == "weight":
            blocks.append(0)
            widths.append(int(state[name].shape[0]))
        else:
            blocks[-1] += 1
    return blocks[:-1], widths[:-1]


def _infer(state: "Tensors", words: Config) -> dict[str, Any]:
    if any(".pool." in name for name in state):
        raise UserError("its blocks have a pooled branch (taef2), which AutoencoderTiny does not have")
    (down, widths), (up, up_widths) = _sequence(state, "encoder"), _sequence(state, "decoder")
    if "encoder.layers.1.conv.0.weight" not in state or len({*widths, *up_widths}) > 1:
        raise UserError(
            f"it has levels of {widths} and {up_widths} channels, or none of its blocks after the first convolution "
            "(taesana); AutoencoderTiny has as many channels on every level"
        )
    latents = int(state["decoder.layers.0.weight"].shape[1])
    given = max((name for name in state if re.fullmatch(r"encoder\.layers\.\d+\.weight", name)), key=_number)
    if state[given].shape[0] != latents:
        raise UserError(
            f"the encoder gives latents of {state[given].shape[0]} channels and the decoder takes {latents}: they "
            "do not belong together"
        )
    last = max((name for name in state if re.fullmatch(r"decoder\.layers\.\d+\.weight", name)), key=_number)
    return {
        "in_channels": int(state["encoder.layers.0.weight"].shape[1]),
        "out_channels": int(state[last].shape[0]),
        "latent_channels": latents,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": up_widths,
        "num_encoder_blocks": down,
        "num_decoder_blocks": up,
    }


def _number(name: str) -> int:
    return int(name.split(".")[2])


def _misfit(model: Any) -> str:
    config = model.config
    if config.act_fn != "relu" or config.upsample_fn != "nearest" or config.upsampling_scaling_factor != 2:
        return "TAESD's code has ReLU and upsamples 2x to the nearest pixel, this model does not"
    shape = (list(config.num_encoder_blocks), list(config.num_decoder_blocks), set(config.encoder_block_out_channels))
    if shape != ([1, 3, 3, 3], [3, 3, 3, 1], {64}):
        return "TAESD's code has 64 channels and 1, 3, 3, 3 blocks, this model does not have them"
    return ""


LAYOUTS = {
    "taesd": Layout(
        title="TAESD, TAESDXL, TAESD3, TAEF1: NAME_encoder and NAME_decoder",
        kind="AutoencoderTiny",
        anchor=r"(?:encoder\.0|decoder\.1)\.weight",
        recognise=lambda names: any(re.fullmatch(r"(?:en|de)coder\.\d+\.conv\.0\.weight", name) for name in names),
        rules=lambda config: RULES,
        infer=_infer,
        factor=lambda config: int(2 ** (len(config["encoder_block_out_channels"]) - 1)),
        misfit=_misfit,
        fixed_scaling={"scaling_factor": 1.0, "shift_factor": 0.0},
        files={"_encoder": "encoder.", "_decoder": "decoder."},
    ),
}
