"""The numbers of a model arrive in their dtypes, and a file is not written if its reader would make another model."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.convert.convert import convert_first_stage
from latent_ae.convert.settings import ConvertSettings
from tests.convert.originals import LDM, image, randomised
from tests.convert.other_originals import Flux2

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
SMALL: dict[str, Any] = BLOCKS | {"block_out_channels": [32, 64], "latent_channels": 4, "layers_per_block": 1}
DC: dict[str, Any] = {
    **{f"{side}_block_types": ["ResBlock"] * 2 for side in ("encoder", "decoder")},
    **{f"{side}_block_out_channels": [16, 32] for side in ("encoder", "decoder")},
    **{f"{side}_layers_per_block": [1, 1] for side in ("encoder", "decoder")},
    **{f"{side}_qkv_multiscales": [[], []] for side in ("encoder", "decoder")},
    **{"latent_channels": 4, "attention_head_dim": 8, "decoder_conv_act_fn": "silu"},
}
EXACT = {"tensors": 0.0, "reconstruction": 0.0}
SCALED = ConvertSettings(scaling_factor=0.5, shift_factor=0.0)
WEIGHTS = "diffusion_pytorch_model"


def small(kind: str = "AutoencoderKL", **changes: Any) -> Any:
    return randomised(getattr(diffusers, kind)(**(DC if kind == "AutoencoderDC" else SMALL) | changes))


def dtypes(tensors: dict[str, Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors.values()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


OTHERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "groups": ("AutoencoderKL", "ldm", {"norm_num_groups": 8}, "code normalises in 32 groups, this model in 8"),
    "groups of FLUX.1": (
        *("AutoencoderKL", "flux"),
        *({"norm_num_groups": 8, "use_quant_conv": False, "use_post_quant_conv": False}, "in 32 groups, this model in"),
    ),
    "groups of a codebook": ("VQModel", "taming", {"norm_num_groups": 16}, "in 32 groups, this model in 16"),
    "activation": ("AutoencoderKL", "ldm", {"act_fn": "relu"}, "act_fn relu, which becomes silu"),
    "epsilon": ("AutoencoderKLFlux2", "flux2", {"batch_norm_eps": 0.01}, "batch_norm_eps 0.01, which becomes 0.0001"),
    "activations of DC-AE": (
        *("AutoencoderDC", "dc-ae", {"decoder_act_fns": ["relu"] * 2}),
        r"decoder_act_fns \['relu', 'relu'\], which becomes \['silu', 'silu'\]",
    ),
}


@pytest.mark.parametrize(("kind", "to", "changes", "told"), OTHERS.values(), ids=OTHERS)
def test_a_file_that_would_be_read_as_another_model_is_not_written(
    kind: str, to: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    small(kind, **changes).save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match=told):
        convert_first_stage(tmp_path / "folder", tmp_path / "file.safetensors", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_config_that_says_the_same_otherwise_is_no_obstacle(tmp_path: Path) -> None:
    """Such as one word for all stages, or widths that are stated though they are those of the encoder."""
    small("AutoencoderDC", decoder_act_fns="silu").save_pretrained(tmp_path / "dc")
    small("AutoencoderKLFlux2", decoder_block_out_channels=[32, 64]).save_pretrained(tmp_path / "flux2")
    small(sample_size=64, scaling_factor=2.0, force_upcast=False, act_fn="swish").save_pretrained(tmp_path / "ldm")
    for name, to in (("dc", "dc-ae"), ("flux2", "flux2"), ("ldm", "ldm")):
        result = convert_first_stage(tmp_path / name, tmp_path / f"{name}.safetensors", to=to)
        assert result["max_abs_difference"] == EXACT
    original = LDM(widths=(32, 64), attention=(False, False)).eval()
    original.load_state_dict(load_file(tmp_path / "ldm.safetensors"))
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ldm").eval()
    with torch.no_grad():
        latent = model.encode(image(32)).latent_dist.mean
        torch.testing.assert_close(original(image(32))[1], model.decode(latent).sample, rtol=0, atol=5e-5)


def test_the_file_is_taken_that_diffusers_loads(tmp_path: Path) -> None:
    """A folder with float32 weights and the variant fp16 beside them is one of float32."""
    model = small()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "folder")
    model.half().save_pretrained(tmp_path / "folder", variant="fp16")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) == 2
    result = convert_first_stage(tmp_path / "folder", tmp_path / "a.safetensors", to="ldm")
    found = load_file(tmp_path / "a.safetensors")
    assert result["dtype"] == "float32" and dtypes(found) == {torch.float32}
    assert torch.equal(found["encoder.conv_in.weight"], expected["encoder.conv_in.weight"])


def test_a_variant_alone_and_shards_are_read(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert_first_stage(tmp_path / "shards", tmp_path / "a.safetensors", to="ldm")
    weight = model.encoder.conv_in.weight.detach()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["encoder.conv_in.weight"], weight)
    model.half().save_pretrained(tmp_path / "variant", variant="fp16")
    convert_first_stage(tmp_path / "variant", tmp_path / "b.safetensors", to="ldm")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["encoder.conv_in.weight"], weight.half())
    file = tmp_path / "variant" / f"{WEIGHTS}.fp16.safetensors"
    file.with_name(f"{WEIGHTS}.ema.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(
        UserError, match=rf"only the variants .*ema.*fp16.*; put one file there under the name {WEIGHTS}"
    ):
        convert_first_stage(tmp_path / "variant", tmp_path / "c.safetensors", to="ldm")
    for path in (tmp_path / "variant").glob(f"{WEIGHTS}*"):
        path.unlink()
    with pytest.raises(UserError, match="variant has no weights"):
        convert_first_stage(tmp_path / "variant", tmp_path / "c.safetensors", to="ldm")


def test_a_damaged_index_of_shards_is_told(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "folder", max_shard_size="200KB")
    (index,) = (tmp_path / "folder").glob("*.index.json")
    for content, told in (("{", "as JSON"), ("[]", "holds no mapping"), ('{"weight_map": [1]}', "has no weight_map")):
        index.write_text(content)
        with pytest.raises(UserError, match=told):
            convert_first_stage(tmp_path / "folder", tmp_path / "a.safetensors", to="ldm")


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    """diffusers' from_pretrained makes random numbers up for it."""
    small().save_pretrained(tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / f"{WEIGHTS}.safetensors")
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, tmp_path / "folder" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks decoder.conv_in.bias"):
        convert_first_stage(tmp_path / "folder", tmp_path / "a.safetensors", to="ldm")


def mixed(model: nn.Module) -> dict[str, Tensor]:
    """A decoder in bfloat16 behind an encoder in float32, as tuned decoders are kept."""
    state = model.state_dict()
    return {name: tensor.bfloat16() if name.startswith("decoder") else tensor for name, tensor in state.items()}


def test_each_tensor_keeps_its_dtype_from_a_folder_to_a_file_and_back(tmp_path: Path) -> None:
    original = mixed(randomised(LDM(widths=(32, 64), attention=(False, False))))
    save_file(original, tmp_path / "a.safetensors")
    result = convert_first_stage(tmp_path / "a.safetensors", tmp_path / "folder", SCALED)
    assert result["max_abs_difference"] == EXACT and result["dtype"] == "bfloat16, float32"
    written = load_file(tmp_path / "folder" / f"{WEIGHTS}.safetensors")
    assert written["encoder.conv_in.weight"].dtype == torch.float32
    assert written["decoder.conv_in.weight"].dtype == torch.bfloat16
    result = convert_first_stage(tmp_path / "folder", tmp_path / "b.safetensors", to="ldm")
    found = load_file(tmp_path / "b.safetensors")
    assert result["max_abs_difference"] == EXACT
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in original.items()
    )


def test_float16_in_a_pickled_folder_stays_float16(tmp_path: Path) -> None:
    small().half().save_pretrained(tmp_path / "folder", safe_serialization=False)
    assert (tmp_path / "folder" / f"{WEIGHTS}.bin").is_file()
    result = convert_first_stage(tmp_path / "folder", tmp_path / "a.safetensors", to="ldm")
    assert result["dtype"] == "float16" and dtypes(load_file(tmp_path / "a.safetensors")) == {torch.float16}


def test_flux2_in_bfloat16_keeps_its_statistics_in_float32(tmp_path: Path) -> None:
    state = randomised(Flux2()).state_dict()
    weights = {name: tensor if name.startswith("bn.") else tensor.bfloat16() for name, tensor in state.items()}
    save_file(weights, tmp_path / "ae.safetensors")
    convert_first_stage(tmp_path / "ae.safetensors", tmp_path / "folder")
    convert_first_stage(tmp_path / "folder", tmp_path / "back.safetensors", to="flux2")
    back = load_file(tmp_path / "back.safetensors")
    same(back, weights)


@pytest.mark.parametrize("folder", [False, True])
def test_quantised_weights_are_refused(folder: bool, tmp_path: Path) -> None:
    """Rounded to int8 they would need the scales with which a tool has rounded them."""
    model = small() if folder else randomised(LDM(widths=(32, 64), attention=(False, False)))
    quantised = {name: (tensor * 100).to(torch.int8) for name, tensor in model.state_dict().items()}
    if folder:
        model.save_pretrained(tmp_path / "in")
        save_file(quantised, tmp_path / "in" / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    else:
        save_file(quantised, tmp_path / "in.safetensors")
    words = {"to": "ldm"} if folder else {"settings": SCALED}
    source, out = ("in", "out.safetensors") if folder else ("in.safetensors", "out")
    with pytest.raises(UserError, match="has int8 numbers in .* quantised weights cannot be converted"):
        convert_first_stage(tmp_path / source, tmp_path / out, **words)
