"""latent-diffusion's Gaussian first stages: the converted model makes the images that the original makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latent_ae.config import UserError
from latent_ae.convert.convert import convert_first_stage
from latent_ae.convert.settings import ConvertSettings
from tests.convert.originals import LDM, image, randomised

SCALED = ConvertSettings(scaling_factor=0.5, shift_factor=0.0)
SHAPES: dict[str, dict[str, Any]] = {
    "kl-f4": {},
    "kl-f16 and VA-VAE, with attention on the coarsest level": {"attention": (False, False, True)},
    "kl-f32, with attention on two levels of six": {
        "widths": (32, 32, 32, 32, 64, 64),
        "attention": (False,) * 4 + (True, True),
    },
    "MAR, with attention in the encoder only": {"attention": (False, False, True), "up_attention": (False,) * 3},
    "attention-free": {"mid": False},
    "one level": {"widths": (32,), "attention": (False,), "layers": 2},
    "FLUX.1, without quant convolutions": {"quant": False, "latents": 16, "layers": 2},
    "three residual blocks, four levels": {"widths": (32, 64, 96, 96), "attention": (False,) * 4, "layers": 3},
}


def saved(model: torch.nn.Module, path: Path, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_converted_model_makes_the_images_of_the_original(shape: dict[str, Any], tmp_path: Path) -> None:
    """With attention on levels, too, which diffusers' conversion leaves out (diffusers #11077)."""
    original = randomised(LDM(**shape))
    result = convert_first_stage(saved(original, tmp_path / "a.safetensors"), tmp_path / "folder", SCALED)
    converted = AutoencoderKL.from_pretrained(tmp_path / "folder").eval()
    side = 4 * 2 ** (len(shape.get("widths", (1, 2, 3))) - 1)
    with torch.no_grad():
        mean, made = original(image(side))
        latent = converted.encode(image(side)).latent_dist.mean
        again = converted.decode(latent).sample
    assert mean.std() > 0.05 and made.std() > 0.05
    torch.testing.assert_close(latent, mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(again, made, rtol=0, atol=5e-5)
    assert result["max_abs_difference"] == {"tensors": 0.0, "reconstruction": 0.0}
    assert result["config"]["scaling_factor"] == 0.5 and result["config"]["shift_factor"] == 0.0
    assert result["from"] == ("flux" if "quant" in shape else "ldm")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_folder_becomes_the_file_that_the_original_loads(shape: dict[str, Any], tmp_path: Path) -> None:
    original = randomised(LDM(**shape))
    convert_first_stage(saved(original, tmp_path / "a.safetensors"), tmp_path / "folder", SCALED)
    layout = "ldm" if shape.get("quant", True) else "flux"
    result = convert_first_stage(tmp_path / "folder", tmp_path / "b.safetensors", to=layout)
    assert result["max_abs_difference"] == {"tensors": 0.0, "reconstruction": 0.0}
    back = load_file(tmp_path / "b.safetensors")
    other = LDM(**shape)
    other.load_state_dict(back)  # strict: every name, every shape
    assert all(torch.equal(tensor, back[name]) for name, tensor in original.state_dict().items())


def test_the_scaling_is_asked_for_and_never_guessed(tmp_path: Path) -> None:
    path = saved(randomised(LDM()), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not say how its latents are scaled") as told:
        convert_first_stage(path, tmp_path / "folder")
    assert "scaling_factor=" in str(told.value) and "--measure" in str(told.value)
    assert not (tmp_path / "folder").exists()
