"""Which files are read: prefixes, wrappers, averaged weights, old names, pickles; and what a wrong one is told."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.convert.convert import convert_first_stage
from latent_ae.convert.layout import to_ours, to_theirs
from latent_ae.convert.registry import LAYOUTS
from latent_ae.convert.settings import ConvertSettings
from tests.convert.originals import LDM, randomised
from tests.convert.other_originals import LlamaGen
from tests.tiny_models import tiny

SCALED = ConvertSettings(scaling_factor=0.5, shift_factor=0.0)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return dict(randomised(LDM(attention=(False, False, True))).state_dict())


@pytest.fixture(scope="module")
def expected(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The folder's tensors, where the file holds nothing but the first stage."""
    folder = tmp_path_factory.mktemp("plain")
    save_file(weights, folder / "a.safetensors")
    return converted(folder / "a.safetensors", folder / "out")


def converted(path: Path, out: Path, settings: ConvertSettings = SCALED) -> Weights:
    result = convert_first_stage(path, out, settings)
    assert result["max_abs_difference"] == {"tensors": 0.0, "reconstruction": 0.0}
    return load_file(out / "diffusion_pytorch_model.safetensors")


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: tensor.clone() for name, tensor in weights.items()}


def old_attention(weights: Weights) -> Weights:
    """Attention blocks under diffusers' names in a file of LDM's, as tools have written it."""
    renamed = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
    found = {}
    for name, tensor in weights.items():
        for old, new in renamed.items():
            name = name.replace(old, new) if ".attn" in name else name
        found[name.replace("attn_1.norm", "attn_1.group_norm")] = tensor
    return found


FILES: dict[str, Callable[[Weights], Any]] = {
    "a full Stable Diffusion checkpoint": lambda weights: (
        prefixed(weights, "first_stage_model.") | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}
    ),
    "a checkpoint with the prefix vae.": lambda weights: prefixed(weights, "vae."),
    "compiled and run by DDP": lambda weights: prefixed(weights, "module._orig_mod."),
    "a trainer's, with losses, discriminator and VF loss": lambda weights: (
        weights
        | {name: torch.zeros(1) for name in ("loss.logvar", "loss.discriminator.main.0.weight", "logvar")}
        | {"linear_proj.weight": torch.zeros(1), "foundation_model.model.encoder.layer.0.norm1.weight": torch.zeros(1)}
    ),
    "with attention under diffusers' names": old_attention,
}
WRAPPED: dict[str, Callable[[Weights], Any]] = {
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3, "global_step": 4},
    "model": lambda weights: {"model": weights, "optimizer": {"state": {}, "param_groups": []}},
    "nested": lambda weights: {"model": {"module": weights}},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "epoch": 3},
    "autoencoder": lambda weights: {"autoencoder": weights, "optimizer": {"state": {}, "param_groups": []}},
    "beside a tensor": lambda weights: {"epoch": torch.tensor(3), "model": weights},
    "bare": lambda weights: weights,
    "a run of latent-diffusion": lambda weights: {
        "state_dict": weights | {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(1)},
        **{"epoch": 3, "global_step": 4, "callbacks": {}, "lr_schedulers": []},
        "optimizer_states": [{"state": {0: {"step": 4, "exp_avg": torch.zeros(1)}}, "param_groups": []}],
    },
}


@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_the_first_stage_is_found_in(
    change: Callable[[Weights], Any], weights: Weights, expected: Weights, tmp_path: Path
) -> None:
    """Other converters lose the first stage of a whole checkpoint (EveryDream2trainer #210, AnimateDiff #154), want one
    prefix (onnx-web #145: KeyError encoder.conv_in.weight), or make to_to_k of to_k (diffusers #4790).
    """
    save_file(change(weights), tmp_path / "a.safetensors")
    assert equal(converted(tmp_path / "a.safetensors", tmp_path / "out"), expected)


@pytest.mark.parametrize("change", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("suffix", ["ckpt", "pth"])
def test_a_pickled_file_of_weights_is_read_in_its_wrapper(
    change: Callable[[Weights], Any], suffix: str, weights: Weights, expected: Weights, tmp_path: Path
) -> None:
    """diffusers' scripts fail on the .ckpt of a first stage that latent-diffusion has trained alone (diffusers #3264),
    and its loader on animevae.pt (diffusers #7101).
    """
    torch.save(change(weights), tmp_path / f"a.{suffix}", _use_new_zipfile_serialization=suffix == "ckpt")
    assert equal(converted(tmp_path / f"a.{suffix}", tmp_path / "out"), expected)


def test_callbacks_and_numbers_of_numpy_in_a_checkpoint_stand_for_nothing(
    weights: Weights, expected: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if name != module.__name__ else module)
    content = {"callbacks": {module.ModelCheckpoint: {"best": np.float64(1.0)}}, "state_dict": weights}
    torch.save(content, tmp_path / "v1-5.ckpt")
    monkeypatch.undo()
    assert equal(converted(tmp_path / "v1-5.ckpt", tmp_path / "out"), expected)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("echo harm > harmed",)


def test_a_hostile_pickle_is_refused_in_one_message(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": weights, "extra": Hostile()}, "bad.ckpt")
    assert main(["convert", "bad.ckpt", "out", "scaling_factor=1", "shift_factor=0"]) == 2
    text = capsys.readouterr().err
    assert (
        "bad.ckpt is refused: it holds more than weights" in text and "safetensors" in text and "Traceback" not in text
    )
    assert text.count("latent-ae convert:") == 1
    assert not (tmp_path / "harmed").exists() and not (tmp_path / "out").exists()


def averaged(weights: Weights) -> Weights:
    """What LitEma keeps of other weights: names without dots."""
    return {"model_ema." + name.replace(".", ""): tensor + 1 for name, tensor in weights.items()} | {
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.num_updates": torch.tensor(7),
    }


@pytest.mark.parametrize(
    ("ema", "whole", "shift", "told"),
    [(None, True, 0, "raw"), (True, True, 1, "averaged"), (False, True, 0, "raw"), (None, False, 1, "averaged")],
    ids=["the raw ones, as latent-diffusion loads", "averaged, as asked", "raw, as asked", "averaged, where alone"],
)
def test_averaged_weights_whose_names_have_lost_their_dots(
    ema: bool | None, whole: bool, shift: int, told: str, weights: Weights, expected: Weights, tmp_path: Path
) -> None:
    save_file((weights if whole else {}) | averaged(weights), tmp_path / "a.safetensors")
    settings = SCALED.model_copy(update={"ema": ema})
    result = convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", settings)
    found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert result["weights"] == told
    assert equal(found, {name: tensor + shift for name, tensor in expected.items()})


@pytest.mark.parametrize(("ema", "shift"), [(None, 1), (False, 0)])
def test_of_two_sets_in_a_pickle_the_averaged_one_is_read(
    ema: bool | None, shift: int, weights: Weights, expected: Weights, tmp_path: Path
) -> None:
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"model": weights, "ema": other}, tmp_path / "a.pt")
    found = converted(tmp_path / "a.pt", tmp_path / "out", SCALED.model_copy(update={"ema": ema}))
    assert equal(found, {name: tensor + shift for name, tensor in expected.items()})


@pytest.mark.parametrize("old", [False, True], ids=["present names", "names before 0.17"])
def test_a_file_of_diffusers_itself_without_its_config(old: bool, expected: Weights, tmp_path: Path) -> None:
    """Old files lack mid_block.attentions.0.to_q: they call it query, and store it as a convolution.

    TeCH #13, AnimateDiff #154 and audio-diffusion #53 end in "Missing key(s): mid_block.attentions.0.to_q".
    """
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in expected.items():
        for new, former in names.items():
            if old and f".attentions.0.{new}." in name:
                tensor = tensor[:, :, None, None] if name.endswith("weight") else tensor
                name = name.replace(new, former)
        state[name] = tensor.contiguous()
    save_file(state, tmp_path / "a.safetensors")
    result = convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", SCALED)
    assert result["from"] == "diffusers"
    assert equal(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), expected)


def test_downsamplers_arrive(expected: Weights) -> None:
    """diffusers' script ends in "Missing key(s): encoder.down_blocks.0.downsamplers.0.conv.weight" (diffusers #11694),
    and its renaming applied twice makes to_to_k of to_k (diffusers #4790).
    """
    assert {f"encoder.down_blocks.{level}.downsamplers.0.conv.weight" for level in (0, 1)} <= expected.keys()
    assert not any("to_to_" in name for name in expected)


def test_level_1_is_not_level_10() -> None:
    """Substrings would take one for the other; only names are looked at, as twelve levels take large images."""
    names = [f"{side}.{number}.block.0.conv1.weight" for number in range(12) for side in ("encoder.down", "decoder.up")]
    tensors = {name: torch.tensor([float(position)]) for position, name in enumerate(names)}
    state, unknown = to_ours(tensors, LAYOUTS["ldm"].rules(None), 12)
    assert not unknown and len(state) == 24
    for number in range(12):
        down, up = f"encoder.down_blocks.{number}", f"decoder.up_blocks.{11 - number}"
        assert torch.equal(state[f"{down}.resnets.0.conv1.weight"], torch.tensor([2.0 * number]))
        assert torch.equal(state[f"{up}.resnets.0.conv1.weight"], torch.tensor([2.0 * number + 1]))
    back, unknown = to_theirs(state, LAYOUTS["ldm"].rules(None), 12)
    assert not unknown and equal(back, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype: torch.dtype, weights: Weights, tmp_path: Path) -> None:
    half = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_file(half, tmp_path / "a.safetensors")
    result = convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", SCALED)
    assert result["max_abs_difference"] == {"tensors": 0.0, "reconstruction": 0.0}
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors").values()
    } == {dtype}
    convert_first_stage(tmp_path / "out", tmp_path / "b.ckpt", to="ldm")
    assert equal(torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"], half)


def without(weights: Weights, begin: str) -> Weights:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(begin)}


def sixteen(weights: Weights) -> Weights:
    """A decoder for latents of sixteen channels behind an encoder of four."""
    other = randomised(LDM(latents=16, attention=(False, False, True))).state_dict()
    return without(weights, "decoder.") | {name: t for name, t in other.items() if name.startswith("decoder.")}


REFUSED: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "4 against 16 channels": (sixteen, "the encoder gives latents of 4 channels and the decoder takes 16"),
    "a decoder alone": (lambda weights: without(weights, "encoder."), "holds a decoder alone: give the file of its"),
    "an encoder alone": (lambda weights: without(weights, "decoder."), "holds an encoder alone; give the file of its"),
    "a tensor missing": (
        lambda weights: without(weights, "decoder.mid.block_1.conv1.w"),
        "lacks decoder.mid_block.res",
    ),
    "linear attention": (
        lambda weights: without(weights, "decoder.mid.attn_1") | {"decoder.mid.attn_1.to_qkv.weight": torch.zeros(1)},
        "decoder.mid.attn_1.to_qkv.weight besides, for which AutoencoderKL has no place",
    ),
    "resampling without convolutions": (
        lambda weights: without(weights, "encoder.down.0.downsample"),
        "the encoder's level 0 has no convolution that resamples",
    ),
    "something else": (lambda weights: {"text_model.weight": torch.zeros(1)}, "holds no first stage of a known layout"),
    "two first stages": (
        lambda weights: prefixed(weights, "student.") | prefixed(weights, "teacher."),
        "holds several first stages; give one of: prefix=student., prefix=teacher.",
    ),
}


@pytest.mark.parametrize(("change", "told"), REFUSED.values(), ids=REFUSED)
def test_what_is_told_of(change: Callable[[Weights], Weights], told: str, weights: Weights, tmp_path: Path) -> None:
    """4 against 16 channels show elsewhere only at the first image, as a convolution that expects other channels
    (stable-diffusion-webui-forge #2255, ComfyUI #6769).
    """
    save_file(change(weights), tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", SCALED)
    assert told in str(error.value), error.value
    assert not (tmp_path / "out").exists()


def test_one_of_several_first_stages_is_chosen_by_its_prefix(
    weights: Weights, expected: Weights, tmp_path: Path
) -> None:
    other = {name: tensor + 1 for name, tensor in weights.items()}
    save_file(prefixed(weights, "student.") | prefixed(other, "teacher."), tmp_path / "a.safetensors")
    assert equal(
        converted(tmp_path / "a.safetensors", tmp_path / "out", SCALED.model_copy(update={"prefix": "student."})),
        expected,
    )


def test_nothing_is_overwritten(weights: Weights, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    for out, to in (("a.safetensors", "ldm"), ("b.safetensors", "ldm"), (".", None)):
        with pytest.raises(UserError, match="exists; give a new name"):
            convert_first_stage(tmp_path / "a.safetensors", tmp_path / out, SCALED if to is None else None, to=to)
    assert (tmp_path / "b.safetensors").read_bytes() == b"mine"


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    (tmp_path / "a.ckpt").write_bytes(b"nonsense")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    for name, told in (
        ("a.safetensors", "cannot read"),
        ("a.ckpt", "a.ckpt"),
        ("list.pt", "holds no tensors by name"),
        ("none.ckpt", "no such file"),
    ):
        with pytest.raises(UserError, match=told):
            convert_first_stage(tmp_path / name, tmp_path / "out", SCALED)


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "cannot load"), ('{"_class_name": "UNet2DModel"}', "holds the class UNet2DModel; layouts of originals are")],
)
def test_folders_of_something_else(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=told):
        convert_first_stage(tmp_path, tmp_path / "out.safetensors", to="ldm")


def test_tensors_of_no_shape_and_words_without_effect_are_told(weights: Weights, tmp_path: Path) -> None:
    flat = {name: tensor.sum() for name, tensor in weights.items()}
    save_file(flat, tmp_path / "flat.safetensors")
    save_file(weights, tmp_path / "a.safetensors")
    not_finite = {name: tensor * float("nan") for name, tensor in weights.items()}
    save_file(not_finite, tmp_path / "nan.safetensors")
    for name, words, told in (
        ("flat", {}, "for which AutoencoderKL has no place"),
        ("nan", {}, "NaN or infinity"),
        ("a", {"resolution": 128}, "resolution: nothing is measured"),
        ("a", {"decoder_num_attention_heads": 2}, "decoder_num_attention_heads: AutoencoderKL has no such key"),
        ("a", {"norm_num_groups": 24}, "32 channels do not divide into 24 groups"),
    ):
        settings = ConvertSettings(scaling_factor=0.5, shift_factor=0.0, **words)
        with pytest.raises(UserError, match=told):
            convert_first_stage(tmp_path / f"{name}.safetensors", tmp_path / "out", settings)


def test_a_folder_and_its_pipeline_go_back(expected: Weights, weights: Weights, tmp_path: Path) -> None:
    """Users look for a way from a split folder to latent-diffusion's file and back (diffusers #8320)."""
    save_file(weights, tmp_path / "a.safetensors")
    convert_first_stage(tmp_path / "a.safetensors", tmp_path / "pipeline" / "vae", SCALED)
    convert_first_stage(tmp_path / "pipeline", tmp_path / "b.safetensors", to="ldm")
    assert equal(load_file(tmp_path / "b.safetensors"), weights)
    assert isinstance(AutoencoderKL.from_pretrained(tmp_path / "pipeline", subfolder="vae"), AutoencoderKL)


class NotTold:
    """Neither of the harmless kinds nor hostile."""


def test_llamagens_own_training_checkpoint(tmp_path: Path) -> None:
    """Its trainer saves model, ema, optimizer, discriminator, steps and its arguments, an argparse.Namespace."""
    original = randomised(LlamaGen()).state_dict()
    average = {name: tensor + 0.01 if "conv" in name else tensor for name, tensor in original.items()}
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in original.items()},
        **{"ema": average, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
        **{"discriminator": {"weight": torch.zeros(1)}, "optimizer_disc": {}, "steps": 3},
        "args": argparse.Namespace(data_path="x", ema=True, folder=Path("/somewhere"), lr=1e-4, dtype=torch.bfloat16),
    }
    torch.save(content, tmp_path / "0003.pt")
    for ema, expected in ((None, average), (False, original)):
        settings = ConvertSettings(ema=ema)
        convert_first_stage(tmp_path / "0003.pt", tmp_path / f"out-{ema}", settings)
        found = load_file(tmp_path / f"out-{ema}" / "diffusion_pytorch_model.safetensors")
        assert torch.equal(found["encoder.conv_in.weight"], expected["encoder.conv_in.weight"])
    torch.save(content | {"args": NotTold()}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"is refused: it holds more than weights \(.*NotTold\)"):
        convert_first_stage(tmp_path / "other.pt", tmp_path / "out")


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "module.first_stage_model."])
def test_averages_beside_a_first_stage_with_a_prefix(
    prefix: str, weights: Weights, expected: Weights, tmp_path: Path
) -> None:
    save_file(prefixed(weights | averaged(weights), prefix), tmp_path / "a.safetensors")
    for ema, told, shift in ((True, "averaged", 1), (None, "raw", 0)):
        out, settings = tmp_path / str(ema), SCALED.model_copy(update={"ema": ema})
        assert convert_first_stage(tmp_path / "a.safetensors", out, settings)["weights"] == told
        found = load_file(out / "diffusion_pytorch_model.safetensors")
        assert equal(found, {name: tensor + shift for name, tensor in expected.items()})


def test_averages_of_some_tensors_are_counted(weights: Weights, expected: Weights, tmp_path: Path) -> None:
    """LitEma keeps no averages of what does not train, such as a frozen encoder."""
    some = {name: tensor for name, tensor in averaged(weights).items() if not name.startswith("model_ema.encoder")}
    save_file(weights | some, tmp_path / "a.safetensors")
    settings = SCALED.model_copy(update={"ema": True})
    result = convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", settings)
    count = sum(not name.startswith("encoder.") for name in weights)
    assert result["weights"] == f"averaged where the file has an average ({count} of {len(weights)} tensors)"
    found = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    shifted = {name: tensor + (not name.startswith("encoder.")) for name, tensor in expected.items()}
    assert equal(found, shifted)


def test_averages_of_another_first_stage_are_none_of_this_one(weights: Weights, tmp_path: Path) -> None:
    other = prefixed(weights, "teacher.") | prefixed(weights | averaged(weights), "student.")
    save_file(other, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="ema: .* holds no averages of the first stage 'teacher.'"):
        convert_first_stage(
            tmp_path / "a.safetensors", tmp_path / "out", SCALED.model_copy(update={"ema": True, "prefix": "teacher."})
        )


def test_a_folder_in_place_of_an_encoders_file_is_told(weights: Weights, expected: Weights, tmp_path: Path) -> None:
    save_file(without(weights, "encoder."), tmp_path / "decoder.safetensors")
    save_file(weights, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path / "folder")
    words = {"settings": SCALED, "encoder": tmp_path / "folder"}
    with pytest.raises(UserError, match="give the file that this writes: latent-ae convert .*folder whole.* --to ldm"):
        convert_first_stage(tmp_path / "decoder.safetensors", tmp_path / "out", **words)
    convert_first_stage(tmp_path / "folder", tmp_path / "whole.safetensors", to="ldm")
    words["encoder"] = tmp_path / "whole.safetensors"
    convert_first_stage(tmp_path / "decoder.safetensors", tmp_path / "out", **words)
    assert equal(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), expected)


@pytest.mark.parametrize("kind", ["AutoencoderKLFlux2", "VQModel", "AutoencoderDC", "AutoencoderTiny"])
def test_weights_of_a_class_of_diffusers_need_their_config(kind: str, tmp_path: Path) -> None:
    save_file(tiny(kind).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"which cannot be told without its config.json: put that beside the file"):
        convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", SCALED)


def test_several_processes_are_refused(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would write the same folder."""
    save_file(weights, tmp_path / "a.safetensors")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="convert runs on one process, and 2 were launched"):
        convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", SCALED)
    assert not (tmp_path / "out").exists()


def test_a_family_of_pipelines_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pipeline: there is no family 'nonsense'; known are sd, sdxl"):
        convert_first_stage(tmp_path / "a.safetensors", tmp_path / "out", SCALED, pipeline="nonsense")
