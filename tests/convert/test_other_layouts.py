"""FLUX.2, codebooks, DC-AE, TAESD and RAE: converted models give what the originals give, and go back unchanged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKLFlux2, AutoencoderTiny, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.convert.convert import convert_first_stage
from latent_ae.convert.rae import read_encoder
from latent_ae.convert.registry import LAYOUTS
from latent_ae.convert.settings import ConvertSettings
from latent_ae.models.quantize import Quantiser, quantised
from tests.convert.originals import image, randomised
from tests.convert.other_originals import DCAE, Flux2, LlamaGen, RAEDecoder, Taming, taesd

EXACT = {"tensors": 0.0, "reconstruction": 0.0}
ONE = ConvertSettings(scaling_factor=1.0)
Weights = dict[str, Tensor]


def saved(weights: nn.Module | Weights, path: Path) -> Path:
    weights = weights.state_dict() if isinstance(weights, nn.Module) else weights
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def same(found: Weights, weights: Weights) -> None:
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
def test_flux2(tmp_path: Path) -> None:
    original = randomised(Flux2())
    result = convert_first_stage(saved(original, tmp_path / "ae.safetensors"), tmp_path / "folder")
    assert result["from"] == "flux2" and result["scaling"] == "the batch norm in the file"
    assert result["max_abs_difference"] == EXACT
    converted = AutoencoderKLFlux2.from_pretrained(tmp_path / "folder").eval()
    mean, made = original(image())
    torch.testing.assert_close(converted.encode(image()).latent_dist.mean, mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(converted.decode(mean).sample, made, rtol=0, atol=5e-5)
    assert converted.config.batch_norm_eps == original.bn.eps and converted.config.patch_size == [2, 2]
    assert torch.equal(converted.bn.running_var, original.bn.running_var)
    convert_first_stage(tmp_path / "folder", tmp_path / "back.safetensors", to="flux2")
    same(load_file(tmp_path / "back.safetensors"), original.state_dict())


@torch.no_grad()
def test_the_small_decoder_of_flux2_takes_the_encoder_of_another_file(tmp_path: Path) -> None:
    """Its widths are others than the encoder's, so loaders of FLUX.2's whole file refuse it (InvokeAI #9032)."""
    full, small = randomised(Flux2()), randomised(Flux2(small=(32, 32)), seed=3)
    saved(full, tmp_path / "ae.safetensors")
    # the file holds a decoder whose names say nothing of decoders
    saved(small.decoder, tmp_path / "small_decoder.safetensors")
    with pytest.raises(UserError, match="holds a decoder alone: .*--encoder FILE .*ae.safetensors of FLUX.2"):
        convert_first_stage(tmp_path / "small_decoder.safetensors", tmp_path / "folder")
    result = convert_first_stage(
        tmp_path / "small_decoder.safetensors", tmp_path / "folder", encoder=tmp_path / "ae.safetensors"
    )
    assert result["config"]["decoder_block_out_channels"] == [32, 32]
    converted = AutoencoderKLFlux2.from_pretrained(tmp_path / "folder").eval()
    mean, _ = full(image())
    torch.testing.assert_close(converted.encode(image()).latent_dist.mean, mean, rtol=0, atol=2e-5)
    expected = small.decoder(small.decoder.post_quant_conv(mean))
    torch.testing.assert_close(converted.decode(mean).sample, expected, rtol=0, atol=5e-5)


def test_a_bundle_without_statistics_and_words_for_them_are_refused(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in Flux2().state_dict().items() if not name.startswith("bn.")}
    with pytest.raises(UserError, match="lacks bn.running_mean"):
        convert_first_stage(saved(weights, tmp_path / "a.safetensors"), tmp_path / "folder")
    saved(Flux2(), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="AutoencoderKLFlux2 has the statistics in its batch norm"):
        convert_first_stage(tmp_path / "b.safetensors", tmp_path / "folder", ONE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "original", "settings"), [("llamagen", LlamaGen, None), ("taming", Taming, ONE)])
def test_codes_and_images_of_a_codebook(name: str, original: Any, settings: Any, tmp_path: Path) -> None:
    model = randomised(original())
    model.quantize.embedding.weight.mul_(torch.linspace(0.5, 2, len(model.quantize.embedding.weight))[:, None])
    torch.save({"model": model.state_dict()}, tmp_path / "vq.pt")
    if name == "taming":
        with pytest.raises(UserError, match="a transformer, scales nothing: scaling_factor=1"):
            convert_first_stage(tmp_path / "vq.pt", tmp_path / "folder")
    result = convert_first_stage(tmp_path / "vq.pt", tmp_path / "folder", settings)
    assert result["from"] == name and result["max_abs_difference"] == EXACT
    converted = VQModel.from_pretrained(tmp_path / "folder").eval()
    numbers, made = model(image(32))
    latent = converted.encode(image(32)).latents
    _, _, (_, _, found) = converted.quantize(latent)
    assert len(numbers.unique()) > 5 and torch.equal(found.view_as(numbers), numbers)
    torch.testing.assert_close(converted.decode(latent).sample, made, rtol=0, atol=5e-5)
    if name == "llamagen":  # training with codebook.normalised goes on with the same codes
        own, codes = quantised(latent, converted.quantize.embedding.weight, Quantiser(normalised=True))
        assert torch.equal(codes.indices.view_as(numbers), numbers)
        trained = converted.decode(own, force_not_quantize=True).sample
        torch.testing.assert_close(trained, made, rtol=0, atol=5e-5)
    convert_first_stage(tmp_path / "folder", tmp_path / "back.pt", to=name)
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model" if name == "llamagen" else "state_dict"]
    other = original().eval()
    other.load_state_dict(back)  # strict, with LlamaGen's buffer of usage
    assert torch.equal(other(image(32))[0], numbers)
    torch.testing.assert_close(other(image(32))[1], made, rtol=0, atol=5e-6)


def test_codes_of_other_lengths_are_not_written_as_llamagens(tmp_path: Path) -> None:
    shape = {"widths": (32, 64), "attention": (False, True)}
    saved(randomised(Taming(**shape)), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="LlamaGen compares codes by their direction"):
        convert_first_stage(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="llamagen")


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"down": (1, 1, 1), "up": (1, 1, 1), "strided": True, "scales": (5,), "batch": (False,) * 3},
        {"down": (1, 1, 1), "up": (0, 1, 1), "strided": True, "scales": (5,), "batch": (False,) * 3, "lite": True},
        {"batch": (False,) * 3, "transformer": (False,) * 3, "lite": True, "shortcuts": False},
    ],
    ids=["f32c32 in and mix", "Sana", "Lite", "1.1 and 1.5"],
)
@torch.no_grad()
def test_dc_ae(shape: dict[str, Any], tmp_path: Path) -> None:
    original = randomised(DCAE(**shape))
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(9)
    path = saved(original, tmp_path / "model.safetensors")
    result = convert_first_stage(path, tmp_path / "folder", ConvertSettings(scaling_factor=0.41407))
    assert result["from"] == "dc-ae" and result["max_abs_difference"] == EXACT
    assert result["config"]["scaling_factor"] == 0.41407
    converted = AutoencoderDC.from_pretrained(tmp_path / "folder").eval()
    latent, made = original(image(32))
    torch.testing.assert_close(converted.encode(image(32)).latent, latent, rtol=0, atol=5e-5)
    torch.testing.assert_close(converted.decode(latent).sample, made, rtol=0, atol=5e-5)
    convert_first_stage(tmp_path / "folder", tmp_path / "back.safetensors", to="dc-ae")
    same(load_file(tmp_path / "back.safetensors"), original.state_dict())


@torch.no_grad()
def test_taesd(tmp_path: Path) -> None:
    encoder, decoder = (randomised(half) for half in taesd())
    torch.save(encoder.state_dict(), tmp_path / "taesd_encoder.pth")
    torch.save(decoder.state_dict(), tmp_path / "taesd_decoder.pth")
    with pytest.raises(UserError, match="holds an encoder alone"):
        convert_first_stage(tmp_path / "taesd_encoder.pth", tmp_path / "folder")
    result = convert_first_stage(
        tmp_path / "taesd_decoder.pth", tmp_path / "folder", encoder=tmp_path / "taesd_encoder.pth"
    )
    assert result["from"] == "taesd" and result["max_abs_difference"] == EXACT
    assert result["config"]["scaling_factor"] == 1.0 and result["scaling"] == "taesd has it by design"
    converted = AutoencoderTiny.from_pretrained(tmp_path / "folder").eval()
    latent = encoder((image() + 1) / 2)
    torch.testing.assert_close(converted.encode(image()).latents, latent, rtol=0, atol=1e-5)
    torch.testing.assert_close(converted.decode(latent).sample, 2 * decoder(latent) - 1, rtol=0, atol=2e-5)
    written = convert_first_stage(tmp_path / "folder", tmp_path / "mine.safetensors", to="taesd")["written"]
    assert [Path(name).name for name in written] == ["mine_encoder.safetensors", "mine_decoder.safetensors"]
    same(load_file(written[0]), encoder.state_dict())
    same(load_file(written[1]), decoder.state_dict())


def test_variants_of_taesd_that_diffusers_has_not(tmp_path: Path) -> None:
    encoder, decoder = taesd(32)
    saved(decoder, tmp_path / "decoder.safetensors")
    pooled = encoder.state_dict() | {"12.pool.0.weight": torch.zeros(256, 64, 1, 1)}
    saved(pooled, tmp_path / "taef2_encoder.safetensors")
    sana = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("1.")}
    saved(sana, tmp_path / "taesana_encoder.safetensors")
    for name, told in (("taef2", "pooled branch"), ("taesana", r"\(taesana\)")):
        with pytest.raises(UserError, match=told):
            convert_first_stage(
                tmp_path / "decoder.safetensors", tmp_path / "out", encoder=tmp_path / f"{name}_encoder.safetensors"
            )


@torch.no_grad()
def test_rae(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_attention_heads=1, num_hidden_layers=1, image_size=518, patch_size=14
    )
    encoder = randomised(transformers.Dinov2WithRegistersModel(config))
    encoder.save_pretrained(tmp_path / "dino")
    decoder = randomised(RAEDecoder(64))
    decoder.decoder_pos_embed.copy_(RAEDecoder(64).decoder_pos_embed)
    torch.save(
        {"model": {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}}, tmp_path / "a.pt"
    )
    mean, var = torch.randn(64, 16, 16), torch.rand(64, 16, 16) + 0.5
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    with pytest.raises(UserError, match="a model of transformers, with --encoder FOLDER"):
        convert_first_stage(tmp_path / "a.pt", tmp_path / "folder")
    words = {"encoder": tmp_path / "dino", "statistics": tmp_path / "stat.pt"}
    with pytest.raises(UserError, match="decoder_num_attention_heads=N"):
        convert_first_stage(tmp_path / "a.pt", tmp_path / "folder", **words)
    settings = ConvertSettings(decoder_num_attention_heads=2)
    result = convert_first_stage(tmp_path / "a.pt", tmp_path / "folder", settings, **words)
    assert result["from"] == "rae" and result["max_abs_difference"] == EXACT
    converted = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "folder").eval()
    # RAE's own way: the encoder's last norm without weights, class token and four registers left out
    pixels, shift = torch.rand(1, 3, 224, 224), torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    scale = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    encoder.layernorm.weight.fill_(1)
    encoder.layernorm.bias.fill_(0)
    tokens = encoder((pixels - shift) / scale).last_hidden_state[:, 5:]
    latent = (tokens.transpose(1, 2).unflatten(2, (16, 16)) - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(converted.encode(pixels).latent, latent, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(converted.decode(latent).sample, decoder(tokens) * scale + shift, rtol=0, atol=5e-5)
    # measured on one image, its own latent has mean 0 and deviation 1 in each channel
    Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()).save(tmp_path / "one.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "one.png").rename(tmp_path / "images" / "one.png")
    settings = ConvertSettings(decoder_num_attention_heads=2, num_workers=0)
    words = {"encoder": tmp_path / "dino", "measure": str(tmp_path / "images")}
    convert_first_stage(tmp_path / "a.pt", tmp_path / "measured", settings, **words)
    measured = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "measured").eval()
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "images" / "one.png"))).movedim(-1, 0)[None] / 255
    values = measured.encode(pixels).latent[0].flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(64), rtol=0, atol=1e-3)
    torch.testing.assert_close(values.std(1, correction=0), torch.ones(64), rtol=0, atol=1e-3)
    written = convert_first_stage(tmp_path / "folder", tmp_path / "model.pt", to="rae")["written"]
    assert [Path(name).name for name in written] == ["model.pt", "model_statistics.pt"]
    same(torch.load(written[0], weights_only=True), decoder.state_dict())
    torch.testing.assert_close(torch.load(written[1], weights_only=True)["var"], var)
    assert F.l1_loss(torch.load(written[1], weights_only=True)["mean"], mean) == 0


def test_an_rae_in_half_precision_has_its_positions_in_half_precision(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    decoder = randomised(RAEDecoder(64))
    decoder.decoder_pos_embed.data.copy_(RAEDecoder(64).decoder_pos_embed)
    half = {name: tensor.half() for name, tensor in decoder.state_dict().items()}
    torch.save({"model": prefixed_decoder(half)}, tmp_path / "a.pt")
    settings = ConvertSettings(decoder_num_attention_heads=2, latents_mean=(0.5,) * 64, latents_std=(2.0,) * 64)
    result = convert_first_stage(tmp_path / "a.pt", tmp_path / "folder", settings, encoder=tmp_path / "mae")
    assert result["dtype"] == "float16, float32" and result["max_abs_difference"]["reconstruction"] == 0
    convert_first_stage(tmp_path / "folder", tmp_path / "b.pt", to="rae")
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert {name: tensor.dtype for name, tensor in back.items()} == dict.fromkeys(half, torch.float16)
    torch.testing.assert_close(back, half, rtol=0, atol=5e-4)


def prefixed_decoder(weights: Weights) -> Weights:
    return {f"decoder.{name}": tensor for name, tensor in weights.items()}


def test_an_rae_of_another_grid_has_positions_that_diffusers_does_not_make(tmp_path: Path) -> None:
    """AutoencoderRAE stretches them over the span of 16 places, and does not store them; RAE numbers the places."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path / "mae")
    saved(RAEDecoder(64, grid=4), tmp_path / "a.safetensors")
    settings = ConvertSettings(decoder_num_attention_heads=2, scaling_factor=1.0)
    with pytest.raises(UserError, match="has another decoder.decoder_pos_embed than diffusers' AutoencoderRAE makes"):
        convert_first_stage(tmp_path / "a.safetensors", tmp_path / "folder", settings, encoder=tmp_path / "mae")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", "{", r"cannot read .*config.json as JSON"),
        ("config.json", "[]", r"config.json holds no mapping of names to values"),
        ("config.json", '{"model_type": ["x"]}', r"holds a \['x'\]; AutoencoderRAE knows dinov2"),
        ("preprocessor_config.json", "{", r"cannot read .*preprocessor_config.json as JSON"),
        ("preprocessor_config.json", '{"image_mean": 0.5}', "needs image_mean and image_std of three colours"),
    ],
)
def test_a_damaged_encoder_of_an_rae_ends_in_one_message(name: str, content: str, told: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        read_encoder(tmp_path)


def test_heads_that_a_file_cannot_tell_are_allowed_unless_they_contradict_the_published_ones() -> None:
    facts = LAYOUTS["rae"].facts
    config = {"encoder_type": "mae", "decoder_num_attention_heads": 4, "patch_size": 16}
    assert facts(config | {"decoder_hidden_size": 64}) == {"encoder_type": "mae", "decoder_num_attention_heads": 4}
    assert facts(config | {"decoder_hidden_size": 768}) == {"encoder_type": "mae"}


def test_a_layout_of_another_class_is_refused(tmp_path: Path) -> None:
    saved(randomised(Flux2()), tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match="--to ldm is a layout of AutoencoderKL, and this first stage is of AutoencoderKLFlux2"
    ):
        convert_first_stage(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="ldm")
