"""New decoders for latents that exist: what encodes stays bit for bit."""

import copy
import re
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin

from latent_ae.config import UserError
from latent_ae.models.loading import first_stage
from latent_ae.models.new_decoder import decoder_parameters, with_new_decoder
from latent_ae.models.posterior import draw, moments_of
from latent_ae.models.registry import scaling_of
from latent_ae.models.settings import DecoderSettings
from latent_ae_train.optim import Ema
from tests.tiny_models import TWO, pictures, tiny

BARE = TWO | {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
SCALED = {"scaling_factor": 0.4, "shift_factor": 0.1, "force_upcast": True}
PER_CHANNEL = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}


def original(name: str) -> ModelMixin:
    torch.manual_seed(0)
    configs = {"AutoencoderKL bare": BARE | SCALED, "AutoencoderKL per channel": TWO | PER_CHANNEL}
    return (AutoencoderKL(**configs[name]) if name in configs else tiny(name)).eval()


WANTED: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"block_out_channels": (4, 8)},
    "AutoencoderKL bare": {"block_out_channels": (12, 24), "layers_per_block": 2},
    "AutoencoderKL per channel": {"layers_per_block": 3},
    "AsymmetricAutoencoderKL": {"block_out_channels": (4, 8)},
    "AutoencoderKLFlux2": {"block_out_channels": (4, 8)},
    "AutoencoderDC": {"block_out_channels": (4, 8), "layers_per_block": (1, 2)},
    "AutoencoderTiny": {"block_out_channels": (4, 4, 4), "layers_per_block": 2},
}


@pytest.mark.parametrize("name", WANTED)
def test_latents_and_scaling_stay_bit_for_bit(name: str, tmp_path: Any) -> None:
    """Also in the folder that the stock class loads."""
    old = original(name)
    made = with_new_decoder(old, DecoderSettings(**WANTED[name]), seed=1)
    made.save_pretrained(tmp_path)
    new = type(made).from_pretrained(tmp_path).eval()
    assert type(new).__module__.startswith("diffusers.")
    images = pictures(32)
    if name == "AutoencoderKL bare":  # in the plain layout, convolutions after attention choose other algorithms
        with torch.no_grad():
            plain = [first_stage(model).encode(images).mean for model in (old, new)]
            torch.testing.assert_close(*plain, rtol=0, atol=2e-6)
            images, old, new = (one.to(memory_format=torch.channels_last) for one in (images, old, new))
    with torch.no_grad():
        before, after = first_stage(old).encode(images), first_stage(new).encode(images)
        assert torch.equal(before.mean, after.mean)
        assert before.std is None or torch.equal(before.std, after.std)
        assert before.mean.std() > 0
    assert scaling_of(new) == scaling_of(old)
    assert new.config.get("force_upcast") == old.config.get("force_upcast")  # which pipelines of SDXL read
    digest = first_stage(old).encoder_sha256
    assert first_stage(new).encoder_sha256 == digest and first_stage(new).sha256 != first_stage(old).sha256
    changed = copy.deepcopy(new)
    with torch.no_grad():
        next(changed.encoder.parameters()).add_(1e-3)
    assert first_stage(changed).encoder_sha256 != digest
    if hasattr(old, "bn"):
        assert torch.equal(old.bn.running_var, new.bn.running_var)
    assert new.decode(before.mean).sample.shape == images.shape
    assert decoder_parameters(new) != decoder_parameters(old)
    with torch.no_grad():
        seeds = [with_new_decoder(old, DecoderSettings(**WANTED[name]), seed=seed).eval() for seed in (1, 2)]
        same, other = (model.decode(before.mean).sample for model in seeds)
        assert torch.equal(same, made.eval().decode(before.mean).sample) and not torch.allclose(same, other)


@pytest.mark.parametrize("name", ["AutoencoderKL bare", "AutoencoderKL per channel"])
def test_a_tiny_decoder_has_the_scaled_latents(name: str) -> None:
    """Of the mode and of a sample, with TAESD's shape, and after another change of its decoder."""
    old, images, noise = original(name), pictures(16), torch.randn(2, 4, 8, 8)
    made = with_new_decoder(old, DecoderSettings(kind="AutoencoderTiny"), seed=1)
    assert (list(made.config.decoder_block_out_channels), list(made.config.num_decoder_blocks)) == ([64, 64], [3, 1])
    shape = made.decode(noise).sample.shape
    posterior, config = moments_of(old.to(memory_format=torch.channels_last), images), old.config
    shift = torch.tensor(config.get("latents_mean") or [config.shift_factor]).view(-1, 1, 1)
    scale = config.scaling_factor / torch.tensor(config.get("latents_std") or [1.0]).view(-1, 1, 1)
    again = with_new_decoder(made, DecoderSettings(block_out_channels=(8, 8)), seed=1)
    for model in (made, again, copy.deepcopy(again).to(torch.float64).to(torch.float32)):
        for given in (None, noise):
            drawn = draw(model, images, given)
            latent = posterior[0] if given is None else posterior[0] + torch.exp(0.5 * posterior[1]) * given
            torch.testing.assert_close(drawn.latent, (latent - shift) * scale, rtol=0, atol=1e-5)
            assert drawn.logvar is None and not drawn.latent.requires_grad
        assert decoder_parameters(model) == sum(parameter.numel() for parameter in model.parameters())
    assert shape == (2, 3, 16, 16)
    average = Ema(again, 0.9).module
    assert average.encoder.original is again.encoder.original  # which is large, and never learns
    assert average.decoder is not again.decoder
    stock = copy.deepcopy(made)
    stock.encoder = tiny("AutoencoderTiny").encoder.requires_grad_(False)
    for weight in stock.encoder.parameters():
        weight.zero_()
    with pytest.raises(UserError, match="whose encoder is zero, so it only decodes"):
        first_stage(stock)
    before = first_stage(again).sha256
    with torch.no_grad():
        again.encoder.original.encoder.conv_in.bias.add_(1.0)
    assert first_stage(again).sha256 != before  # of what encodes, too


def test_the_wanted_shape_is_the_decoders() -> None:
    """The same decoder as a fresh AutoencoderKL of these widths, but for the weights of masks."""
    made = with_new_decoder(original("AutoencoderKL"), DecoderSettings(block_out_channels=(4, 8), layers_per_block=2))
    stock = AutoencoderKL(**TWO | {"block_out_channels": (4, 8), "layers_per_block": 2})
    shapes = {name: weight.shape for name, weight in stock.decoder.state_dict().items()}
    own = {name: weight.shape for name, weight in made.decoder.state_dict().items() if "condition" not in name}
    assert own == shapes
    assert decoder_parameters(made) == decoder_parameters(stock)


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("VQModel", {"layers_per_block": 2}, "brings a VQModel, whose decoder has no shape of its own"),
        ("AutoencoderKL", {"block_out_channels": (8,)}, "has 1 widths, .* are 1 doublings from the image: give 2"),
        ("AutoencoderKL", {"block_out_channels": (6, 8)}, r"\[6\] are no multiples of 4, the norm_num_groups"),
        ("AutoencoderKL", {"layers_per_block": (1, 2)}, "all levels of AsymmetricAutoencoderKL have the same number"),
        ("AutoencoderKLFlux2", {"layers_per_block": 2}, "as many as its encoder: leave it out"),
        ("AutoencoderDC", {"layers_per_block": (1, 1, 1)}, "has 3 numbers for 2 levels"),
        ("AutoencoderDC", {"block_out_channels": (4, 6)}, "AutoencoderDC refuses this one"),
        *(
            (name, {"kind": "AutoencoderTiny"}, f"the latents of an AutoencoderKL, and init_from brings a.? {name}")
            for name in ("VQModel", "AutoencoderDC", "AutoencoderTiny", "AsymmetricAutoencoderKL")
        ),
        ("AutoencoderKL", {"kind": "AutoencoderTiny", "block_out_channels": (8,)}, "has 1 widths, .*: give 2"),
        (
            "AutoencoderKL",
            {"kind": "AutoencoderTiny", "block_out_channels": (4, 8)},
            "all levels of an AutoencoderTiny have one width",
        ),
        ("AutoencoderKL", {"kind": "AutoencoderTiny", "layers_per_block": (1,)}, "has 1 numbers for 2 levels"),
    ],
)
def test_what_cannot_be_is_said_with_its_setting(name: str, wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^decoder.*{said}") as caught:
        with_new_decoder(original(name), DecoderSettings(**wanted))
    assert not re.search("None|Traceback", str(caught.value))
