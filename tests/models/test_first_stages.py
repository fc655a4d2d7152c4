"""Every class of first stage against diffusers itself, on tiny real instances."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    AutoencoderKL,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from latent_ae.config import UserError
from latent_ae.models.density import Density, stored_density
from latent_ae.models.label_model import stored_label_model
from latent_ae.models.likelihood import Likelihood
from latent_ae.models.loading import first_stage, load, load_first_stage
from latent_ae.models.registry import FAMILIES, OWN
from latent_ae.models.settings import Kind
from latent_ae_train.settings import TrainSettings
from tests.tiny import reseal
from tests.tiny_models import CONFIGS, MEASURED, TRAINED, pictures, tiny


def by_hand(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Reconstructions as pipelines of the class make them, or else its own `forward`."""
    name, video = type(model).__name__, images[:, :, None]
    if name == "AutoencoderTiny":  # its own forward squeezes latents through bytes
        return model.decode(model.encode(images).latents).sample
    if name == "AutoencoderRAE":
        return model(images / 2 + 0.5).sample * 2 - 1
    if name == "AutoencoderKLQwenImage21":  # QwenImage21Pipeline: image.convert("RGBA")
        opaque = torch.cat([video, torch.ones_like(video[:, :1])], 1)
        return model(opaque).sample[:, :3, 0]
    if name == "AutoencoderVidTok":
        return model(video, sample_posterior=False).sample[:, :, 0]
    if name == "ConsistencyDecoderVAE":  # as diffusers' own tests: the noise is given
        return torch.cat([model(image[None], generator=torch.Generator().manual_seed(0)).sample for image in images])
    if "Wan" in name or "Qwen" in name or "Cosmos" in name or "Refiner" in name:
        return model(video).sample[:, :, 0]
    return model(images).sample


@pytest.mark.parametrize("name", [*MEASURED, *TRAINED])
def test_each_class_reconstructs_as_diffusers_does(name, tmp_path):
    model = tiny(name).eval()
    model.save_pretrained(tmp_path / "model")
    stage = load_first_stage(str(tmp_path / "model"))
    images = pictures()
    with torch.no_grad():
        encoded, made = stage.encode(images), stage.reconstruct(images)
        expected = by_hand(model, images)
    assert stage.name == name.split()[0] and stage.channels == 3 and stage.latent_channels == encoded.mean.shape[1]
    assert images.shape[-1] == encoded.mean.shape[-1] * stage.factor
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert made.shape == images.shape
    assert stage.sha256 == first_stage(tiny(name)).sha256 != first_stage(tiny(name, seed=1)).sha256
    assert stage.describe()["parameters"] == sum(p.numel() for p in model.parameters())
    assert stage.family is not None
    assert stage.has_posterior == (encoded.std is not None) == (stage.family.latent == "posterior")
    with torch.no_grad():  # the lines that a model card gives
        encoded_line = stage.family.encoded.replace("latent_dist.sample()", "latent_dist.mode()")
        z = eval(encoded_line, {"vae": model, "images": images, "torch": torch})
        torch.testing.assert_close(z, encoded.mean, rtol=0, atol=0)
        made = stage.decode(z)
        torch.testing.assert_close(eval(stage.family.decoded, {"vae": model, "z": z, "torch": torch}), made)


def test_a_sample_is_the_posteriors(tmp_path):
    model = tiny("AutoencoderKL").eval()
    stage, images = first_stage(model), pictures()
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
        expected = model.decode(posterior.mean + posterior.std * noise).sample
        torch.testing.assert_close(stage.reconstruct(images, noise), expected)
        assert not torch.allclose(stage.reconstruct(images), expected)


def test_half_precision_is_the_models_own_and_results_stay_float32():
    stage = first_stage(tiny("AutoencoderKL"), dtype="bf16")
    with torch.no_grad():
        made = stage.reconstruct(pictures())
    assert stage.dtype == torch.bfloat16 and made.dtype == torch.float32
    assert stage.describe()["dtype"] == "bfloat16"
    # the checksum names the weights, not the precision they are used in
    assert stage.sha256 == first_stage(tiny("AutoencoderKL")).sha256


def test_a_function_is_a_first_stage():
    stage = first_stage(lambda images: images * 0.5)
    images = pictures()
    assert torch.equal(stage.reconstruct(images), images * 0.5)
    assert (stage.factor, stage.channels, stage.has_posterior, stage.sha256) == (1, None, False, None)


def test_the_model_is_found_in_a_pipeline_a_run_or_a_checkpoint(tmp_path):
    raw, averaged, exported = (tiny("AutoencoderKL", seed) for seed in range(3))
    tiny("VQModel").save_pretrained(tmp_path / "pipeline/vqvae")
    assert load_first_stage(str(tmp_path / "pipeline")).name == "VQModel"
    run = tmp_path / "run"
    for step in (10, 20):
        folder = run / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        raw.save_config(folder)
        for name in ("state.json", "optimizer.pt"):
            (folder / name).write_text("{}")
        for name, model in (("autoencoder", raw), ("ema", averaged)):
            save_file({k: v.contiguous() + step for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")
        reseal(folder)

    def weight(*words, **options):
        stage = load_first_stage(*map(str, words), **options)
        return stage.weights, float(next(stage.module.parameters()).flatten()[0])

    first = {model: float(next(model.parameters()).flatten()[0]) for model in (raw, averaged, exported)}
    newest = run / "checkpoints/step-00000020"
    assert weight(run) == ("averaged, step-00000020", pytest.approx(first[averaged] + 20))
    assert weight(run, ema=False) == ("raw, step-00000020", pytest.approx(first[raw] + 20))
    assert weight(run / "checkpoints/step-00000010") == (
        "averaged, step-00000010",
        pytest.approx(first[averaged] + 10),
    )
    exported.save_pretrained(run / "export")
    assert weight(run) == ("as stored", pytest.approx(first[exported]))
    assert weight(run, ema=True) == ("averaged, step-00000020", pytest.approx(first[averaged] + 20))
    (newest / "ema.safetensors").unlink()
    reseal(newest)
    assert weight(newest)[0] == "raw, step-00000020"
    with pytest.raises(UserError, match=r"ema: .*step-00000020 was trained without an average"):
        load_first_stage(str(newest), ema=True)
    (newest / "autoencoder.safetensors").write_bytes(b"cut")
    reseal(newest)
    with pytest.raises(UserError, match=r"cannot load .*autoencoder.safetensors"):
        load_first_stage(str(run), ema=False)


def test_no_broken_checkpoint_is_taken_for_the_newest(tmp_path, capsys):
    """One with a flipped bit, and what saving, pruning and setting aside leave when they are killed."""
    model = tiny("AutoencoderKL")
    for step in ("step-00000009", "step-00000010"):
        folder = tmp_path / "checkpoints" / step
        folder.mkdir(parents=True)
        model.save_config(folder)
        for name in ("state.json", "optimizer.pt"):
            (folder / name).write_text("{}")
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "autoencoder.safetensors")
        reseal(folder)
    for kind in ("tmp", "old", "damaged"):
        shutil.copytree(folder, folder.with_name(f"step-00000011.{kind}"))
    assert load_first_stage(str(tmp_path)).weights == "raw, step-00000010"
    content = bytearray((folder / "autoencoder.safetensors").read_bytes())
    content[-3] ^= 4
    (folder / "autoencoder.safetensors").write_bytes(content)
    assert load_first_stage(str(tmp_path)).weights == "raw, step-00000009"
    assert "step-00000010 is damaged (autoencoder.safetensors has another checksum)" in capsys.readouterr().err
    with pytest.raises(UserError, match="step-00000010 is damaged"):
        load_first_stage(str(folder))


def test_averaged_and_raw_weights_of_diffusers_folders(tmp_path):
    plain, average, half = (tiny("AutoencoderKL", seed) for seed in range(3))
    plain.save_pretrained(tmp_path / "vae")
    average.save_pretrained(tmp_path / "vae_ema")
    half.save_pretrained(tmp_path / "vae", variant="non_ema")
    sums = {first_stage(model).sha256: name for name, model in (("plain", plain), ("ema", average), ("raw", half))}
    for options, name in (
        ({}, "plain"),
        ({"ema": True}, "ema"),
        ({"ema": False}, "raw"),
        ({"variant": "non_ema"}, "raw"),
    ):
        assert sums[load_first_stage(str(tmp_path), **options).sha256] == name, options
    with pytest.raises(UserError, match=r"ema: .*holds no averaged weights"):
        load_first_stage(str(tmp_path / "vae_ema"), ema=True)
    with pytest.raises(UserError, match="ema: .*non_ema"):
        load_first_stage(str(tmp_path / "vae_ema"), ema=False)


def test_what_is_none_gets_a_message(tmp_path):
    (tmp_path / "empty").mkdir()
    UNet2DModel(block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                norm_num_groups=4, layers_per_block=1).save_pretrained(tmp_path / "unet")  # fmt: skip
    tiny("AutoencoderKL").save_pretrained(tmp_path / "cut")
    (tmp_path / "cut/diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    tiny("AutoencoderKL").save_pretrained(tmp_path / "lacking")
    weights = load_file(tmp_path / "lacking/diffusion_pytorch_model.safetensors")
    part = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.conv_in")}
    save_file(part, tmp_path / "lacking/diffusion_pytorch_model.safetensors")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text(json.dumps({"_class_name": "LlamaModel"}))
    for place, message in (
        ("nowhere/at/all", "no such model folder"),
        ("empty", "no config.json"),
        ("unet", "holds a UNet2DModel, which is not a first stage known here: AutoencoderKL, "),
        ("cut", "cannot load a first stage"),
        ("lacking", r"its files lack the weights decoder.conv_in.\w+ and 1 more, which its config.json asks for"),
        ("foreign", "holds a LlamaModel"),
    ):
        with pytest.raises(UserError, match=message):
            load_first_stage(str(tmp_path / place))
    with pytest.raises(ValueError, match="a function is needed"):
        first_stage(3)
    with pytest.raises(UserError, match="3 channels and gives 1"):
        first_stage(AutoencoderKL(in_channels=3, out_channels=1))


def test_the_only_variant_of_the_weights_is_loaded_and_said(tmp_path, capsys):
    model = tiny("AutoencoderKL")
    model.save_pretrained(tmp_path / "vae", variant="fp16")
    assert [path.name for path in (tmp_path / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    loaded = load_first_stage(str(tmp_path / "vae")).module
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert "has weights of the variant fp16 only" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "vae")
    load_first_stage(str(tmp_path / "vae"))
    assert capsys.readouterr().err == ""


def test_a_file_is_pointed_to_its_conversion(tmp_path):
    (tmp_path / "vae.safetensors").touch()
    with pytest.raises(UserError, match=r"vae\.safetensors is a file: latent-ae convert .* OUT writes the folder"):
        load_first_stage(str(tmp_path / "vae.safetensors"))
    with pytest.raises(UserError, match=r"init_from: .*vae\.safetensors is a file: latent-ae convert"):
        TrainSettings.load("quickstart", f"init_from={tmp_path}/vae.safetensors")


def test_older_names_of_attention_weights_are_whole(tmp_path):
    """Those in the files of Stable Diffusion's own first stages, which diffusers renames."""
    model = tiny("AutoencoderKL")
    model.save_pretrained(tmp_path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for new, old in older.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert any("proj_attn" in name for name in weights)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert load_first_stage(str(tmp_path)).sha256 == first_stage(model).sha256


def test_an_export_on_the_hub_brings_what_it_holds(tmp_path, monkeypatch):
    """From the hub's cache, without a network."""
    repository = tmp_path / "models--user--vae"
    commit = "0123456789" * 4
    snapshot = repository / "snapshots" / commit
    tiny("AutoencoderKL").save_pretrained(snapshot)
    (snapshot / "likelihood.json").write_text(json.dumps({"kind": "logistic", "scale": 0.25}))
    density = Density(2, 4)
    density.save_pretrained(snapshot / "density")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stage = load_first_stage("user/vae")
    assert stage.sha256 == first_stage(tiny("AutoencoderKL")).sha256
    assert stage.likelihood == Likelihood("logistic", 0.25)
    stored = stored_density("user/vae")
    assert stored is not None
    assert all(torch.equal(tensor, stored.state_dict()[name]) for name, tensor in density.state_dict().items())
    assert stored_label_model("user/vae") is None and stored_density("user/other") is None
    (snapshot / "density/config.json").write_text('{"components": "two"}')
    with pytest.raises(UserError, match="user/vae: its Density cannot be loaded"):
        stored_density("user/vae")


def test_a_dtype_that_a_layer_does_not_have_ends_in_one_message():
    """PyTorch has no avg_pool3d in bfloat16 on a CPU."""
    stage = load(tiny("AutoencoderKLCosmos"), device="cpu", dtype="bf16")
    with pytest.raises(UserError, match="cannot compute in it on this device .*; set dtype=fp32"):
        stage.encode(torch.zeros(1, 3, 32, 32))


class Counted(ModelHook):
    """Counts the calls before which a model that is offloaded would be moved to its device."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("name", OWN)
def test_pipelines_can_offload_our_classes(name):
    """`enable_model_cpu_offload` moves a model in a hook that diffusers calls before `encode` and `decode`."""
    model, hook = tiny(name).eval(), Counted()
    add_hook_to_module(model, hook)
    with torch.no_grad():
        encoded = model.encode(pictures())
        assert hook.calls == 1
        model.decode(encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent)
    assert hook.calls == 2


def test_the_pages_name_the_classes_that_are_known():
    root = Path(__file__).parents[2]
    others = "VQModel|HierarchicalVAE|DiscreteVAE|VQVAE2|FlowMatchingVAE|ConsistencyDecoderVAE"
    named = re.compile(rf"\b(?:\w*Autoencoder\w+|{others})\b")
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    sentence = text[text.index("MODEL is a first stage of a class") : text.index("any other is refused")]
    assert sorted(named.findall(sentence)) == sorted(FAMILIES)
    text = (root / "README.md").read_text(encoding="utf-8")
    sentence = text[text.index("classes of diffusers (") : text.index("by named protocols")]
    assert sorted(named.findall(sentence)) == sorted(set(FAMILIES) - set(OWN))
    text = (root / "docs" / "family.md").read_text(encoding="utf-8")
    sections = text[: text.index("## Classes that are measured")], text[text.index("## Classes that are measured") :]
    row = re.compile(r"^\| (\w*Autoencoder\w*|VQModel|\w+VAE2?)", re.MULTILINE)
    trained, measured = (row.findall(part) for part in sections)
    measured = measured[: len({name.split()[0] for name in CONFIGS} - set(get_args(Kind)))]
    assert sorted([*trained, *measured]) == sorted(FAMILIES) and sorted(trained) == sorted(get_args(Kind))
    text = " ".join((root / "docs" / "encode.md").read_text(encoding="utf-8").split())
    sentence = text[text.index("First stages without a posterior") : text.index("have no `logvar`")]
    plain = {name for name in MEASURED if first_stage(tiny(name)).family.latent == "deterministic"}
    assert set(named.findall(sentence)) == {name.split()[0] for name in plain} | {
        name for name, family in FAMILIES.items() if family.latent in ("deterministic", "codebook")
    }
