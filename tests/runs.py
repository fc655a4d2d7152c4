"""Training runs of a few seconds, and how two of them differ."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import children


def words(pictures: Path, run: Path, *more: str) -> list[str]:
    """A run of a few seconds with every loss but LPIPS."""
    return [
        *("train", "quickstart", f"output_dir={run}", f"data.source={pictures}", "data.eval_fraction=0.25"),
        *("data.resolution=16", "data.num_workers=0", "steps=6", "batch_size=4", "optim.warmup=0"),
        *("model.block_out_channels=[16,16]", "model.norm_num_groups=4", "model.latent_channels=4"),
        *("loss.perceptual=0", "gan.start=1", "gan.discriminator_warmup=1", "gan.warmup=1", "gan.lecam=0.01"),
        *(
            "gan.channels=8",
            "gan.layers=1",
            "gan.adaptive_cap=100",
            "checkpoint.every=2",
            "validate.every=3",
            "validate.crop_px=16",
        ),
        *("validate.preview_images=2", "log.every=2", *more),
    ]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizers' included."""
    tensors = {
        f"{path.stem}.{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    for network, state in torch.load(folder / "optimizer.pt", weights_only=True).items():
        for index, values in state["state"].items():
            tensors |= {f"optimizer.{network}.{index}.{key}": value for key, value in values.items()}
    return tensors


def largest_difference(a: Path, b: Path) -> float:
    """Of each network's first moments, and of the step's state, relative to its norm.

    After one step from equal checkpoints, the moments differ as much as the gradients do. The weights may differ by far
    more: Adam turns a gradient that is 0 but for rounding into a step of full size.
    """
    first, second = checkpoint_tensors(a), checkpoint_tensors(b)
    assert first.keys() == second.keys() and len(first) > 100
    moments = [name for name in first if name.endswith(".exp_avg")]
    groups = [
        [name for name in moments if name.startswith(f"optimizer.{key}.")] for key in ("autoencoder", "discriminator")
    ]
    groups.append([name for name in first if name.startswith("objectives.")])
    differences = []
    for names in groups:
        ours, theirs = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (first, second))
        differences.append(float((ours - theirs).norm() / ours.norm()))
    return max(differences)


def difference_of_the_third_step(run: Path, command: list[str]) -> float:
    """`largest_difference` of step 3 on one process and on two, both from the checkpoint of step 2 in `run`."""
    ends = []
    for processes in (1, 2):
        copy = shutil.copytree(run, run.with_name(f"{run.name}-on-{processes}"))
        code, error = children.run([*command, f"output_dir={copy}", "steps=3"], run.with_name("said"), processes)
        assert code == 0, error
        ends.append(copy / "checkpoints/step-00000003")
    return largest_difference(*ends)


def differing_tensors(a: Path, b: Path) -> list[str]:
    """Names of tensors that are not equal bit for bit, the optimizers' included."""
    first, second = checkpoint_tensors(a), checkpoint_tensors(b)
    assert first.keys() == second.keys() and len(first) > 100
    return [name for name in first if not torch.equal(first[name], second[name])]


BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
KL_LIKE = {**BLOCKS, "block_out_channels": [16, 16], "norm_num_groups": 4, "mid_block_add_attention": False}
SHAPES: dict[str, dict[str, Any]] = {
    "VQModel": {**KL_LIKE, "latent_channels": 4, "vq_embed_dim": 3, "num_vq_embeddings": 32},
    "AutoencoderTiny": {
        **{"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]},
        **{"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]},
    },
    "AutoencoderDC": {
        **{"latent_channels": 4, "attention_head_dim": 4},
        **{key: ["ResBlock", "EfficientViTBlock"] for key in ("encoder_block_types", "decoder_block_types")},
        **{"encoder_block_out_channels": [8, 16], "decoder_block_out_channels": [8, 16]},
        **{"encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1]},
        **{"encoder_qkv_multiscales": [[], [5]], "decoder_qkv_multiscales": [[], [5]]},
    },
    "AsymmetricAutoencoderKL": {
        **BLOCKS,
        **{"down_block_out_channels": [16, 16], "up_block_out_channels": [16, 24], "norm_num_groups": 4},
    },
    "AutoencoderKLFlux2": {**KL_LIKE, "latent_channels": 4},
    "HierarchicalVAE": {
        **{"width": 16, "level_sides": [4, 8, 8], "level_channels": [3, 2, 0]},
        **{"blocks": 1, "norm_num_groups": 4},
    },
    "DiscreteVAE": {**KL_LIKE, "latent_channels": 3, "num_vq_embeddings": 32},
    "VQVAE2": {
        **{"block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 4},
        **{"latent_channels": 3, "num_vq_embeddings": 32},
    },
    "FlowAutoencoderKL": {**KL_LIKE, "latent_channels": 4, "flow_layers": 2, "flow_width": 8},
}


def family_words(pictures: Path, run: Path, kind: str, *more: str) -> list[str]:
    """Of tests.train.test_train's run, with another class in place of the AutoencoderKL."""
    model = ["model={}", f"model.kind={kind}", f"model.config={json.dumps(SHAPES[kind])}"]
    kept = [word for word in words(pictures, run) if not word.startswith("model.")]
    return [*kept, *model, *more]


def only_message(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command ends with."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("latent-ae ")]
    return line
