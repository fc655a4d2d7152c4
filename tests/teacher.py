"""A small first stage that another one learns from."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from tests.runs import BLOCKS
from tests.tiny import MODEL

TEACHER = {**MODEL, "block_out_channels": (12, 16)}
"""f2 with 4 latent channels, like the students."""


SCALE, SHIFT = 1.7, 0.3


def save_teacher(folder: Path, seed: int = 0, **config: Any) -> Path:
    torch.manual_seed(seed)
    model = AutoencoderKL(**{**BLOCKS, **TEACHER, "scaling_factor": SCALE, "shift_factor": SHIFT, **config})
    with torch.no_grad():
        # latents of unit size, with a spread that is felt
        model.quant_conv.weight.mul_(3)
        model.quant_conv.bias[4:].fill_(-2.0)
    model.save_pretrained(folder)
    return folder
