"""The exported folder: what stock diffusers reads from it, and that the check of it can fail."""

import copy
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from latent_ae.config import UserError, to_yaml
from latent_ae.export import write as export
from latent_ae.export.model_card import CardFacts, loading_lines, model_card
from latent_ae.export.write import export_autoencoder, push_to_hub, verify_export
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.models.discriminator import read_network
from latent_ae.models.patch_discriminator import PatchDiscriminator
from latent_ae_train.settings import TrainSettings


def tiny_autoencoder(seed: int = 0) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )


def statistics_of(autoencoder: AutoencoderKL, images: torch.Tensor) -> LatentStatistics:
    statistics = LatentStatistics()
    with torch.no_grad():
        statistics.update(autoencoder.encode(images).latent_dist.mean)
    return statistics


IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
FACTS = CardFacts(
    name="tiny: a 'test'",
    data_name="photos",
    split="held out",
    steps=1200,
    num_images=5,
    metrics={"n": 5, "psnr": 27.5, "ssim": 0.8, "lpips_vgg": 0.25, "lpips_alex": None, "notes": ["x"]},
    baseline={"psnr": 24.0, "ssim": 0.7, "lpips_vgg": 0.4},
    settings_yaml="steps: 1200\n",
)


def test_a_folder_that_cannot_be_replaced_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder in which this command runs"):
        write(tiny_autoencoder(), Path("."))
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(UserError, match="is a mount point"):
        write(tiny_autoencoder(), tmp_path / "volume")


def test_a_card_is_fit_for_the_hub(tmp_path):
    """It names the repository, and of this machine's paths the last part alone: the hub refuses others as a model."""
    (tmp_path / "base/export").mkdir(parents=True)
    settings = to_yaml(TrainSettings.load("quickstart", "output_dir=/home/ada/runs/x"))
    named = {"data_name": "/home/ada/pictures", "settings_yaml": settings, "hub_id": "ada/vae"}
    local = replace(FACTS, base_model=str(tmp_path / "base/export"), **named)
    write(tiny_autoencoder(), tmp_path / "export", card=local)
    text = (tmp_path / "export/README.md").read_text()
    assert "AutoencoderKL.from_pretrained('ada/vae'" in text and "'export'" not in text
    assert "Trained on pictures for 1,200 steps from base." in text
    assert str(tmp_path) not in text and "/home/ada" not in text and "output_dir: x\n" in text
    assert ModelCard(text).data.base_model is None
    write(tiny_autoencoder(), tmp_path / "export", card=replace(FACTS, base_model="stabilityai/sd-vae-ft-mse"))
    card = ModelCard((tmp_path / "export/README.md").read_text())
    assert card.data.base_model == "stabilityai/sd-vae-ft-mse" and "from_pretrained('export'" in card.text


def write(autoencoder: AutoencoderKL, folder: Path, **changes) -> dict:
    arguments = {"statistics": statistics_of(autoencoder, IMAGES), "sample_size": 32, "card": FACTS}
    return export_autoencoder(autoencoder, folder, check_images=IMAGES, **(arguments | changes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    autoencoder = tiny_autoencoder()
    folder = tmp_path_factory.mktemp("run") / "größe export"
    # conditions of a training loop that must not leak into the export
    autoencoder.train()
    autoencoder.to(memory_format=torch.channels_last)
    # an older export to replace
    autoencoder.save_pretrained(folder)
    autoencoder.register_to_config(_name_or_path=str(folder))
    (folder / "diffusion_pytorch_model.bin").write_text("of the older export")
    before = copy.deepcopy(autoencoder.state_dict()), dict(autoencoder.config), torch.get_rng_state()
    facts = write(autoencoder, folder)
    return autoencoder, folder, facts, before


def test_measured_scaling_replaces_all_older_statistics(tmp_path: Path) -> None:
    published = tiny_autoencoder()
    published.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    published.save_pretrained(tmp_path / "published")
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "published")
    write(autoencoder, tmp_path / "new")
    write(autoencoder, tmp_path / "kept", keep_scaling=True)
    new, kept = (AutoencoderKL.load_config(tmp_path / name) for name in ("new", "kept"))
    assert new["latents_mean"] is None and new["latents_std"] is None
    assert kept["latents_std"] == [2.0] * 4 and kept["scaling_factor"] == autoencoder.config.scaling_factor


def test_stock_diffusers_loads_bitwise_equal_weights(exported):
    autoencoder, folder, facts, _ = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # who may read one may read all
    loaded = AutoencoderKL.from_pretrained(folder)
    trained = autoencoder.state_dict()
    assert loaded.state_dict().keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.state_dict().items())
    assert 0 <= facts["max_abs_difference"] <= 1e-5
    assert facts["parameters"] == sum(tensor.numel() for tensor in trained.values())
    json.dumps(facts)


def test_config_carries_the_measured_statistics(exported):
    autoencoder, folder, facts, _ = exported
    config = json.loads((folder / "config.json").read_text())
    assert "_name_or_path" not in config
    with torch.no_grad():
        means = autoencoder.encode(IMAGES).latent_dist.mean.double()
    assert config["scaling_factor"] == facts["scaling_factor"] == pytest.approx(1 / float(means.std(correction=0)))
    assert config["shift_factor"] == pytest.approx(float(means.mean()))
    assert config["sample_size"] == 32
    assert config["force_upcast"] is facts["precision"]["force_upcast"] is False
    assert config["_class_name"] == "AutoencoderKL"


def test_the_callers_model_and_random_state_are_left_alone(exported):
    autoencoder, _, _, (weights, config, random_state) = exported
    assert dict(autoencoder.config) == config
    assert autoencoder.training and all(parameter.requires_grad for parameter in autoencoder.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in autoencoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_model_card_metadata_reads_back(exported):
    _, folder, facts, _ = exported
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.model_name == FACTS.name
    assert card.data.license is None
    results = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results == {"PSNR (dB)": ("psnr", 27.5), "SSIM": ("ssim", 0.8), "LPIPS (VGG)": ("lpips", 0.25)}
    assert {result.dataset_name for result in card.data.eval_results} == {"photos"}
    assert "| bicubic, 2x down and up | 24 | 0.7 | 0.4 |" in card.text and "1,200 steps" in card.text
    assert (
        f"| fp16, emulated | {facts['precision']['fp16']['psnr']:.1f} | 0 |" in card.text
        and "fp16 is safe: " in card.text
    )
    assert "An image of 48 px decoded in tiles of 32 px" in card.text


def test_a_card_without_results_is_valid(tmp_path):
    autoencoder = tiny_autoencoder()
    text = model_card(autoencoder, CardFacts(name="x", data_name="y"), statistics_of(autoencoder, IMAGES), "x", 0.0)
    text.save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "## Reconstruction" not in card.text


def test_the_lines_and_the_snippet_of_the_card_run(exported):
    autoencoder, folder, facts, _ = exported
    names: dict = {}
    exec(loading_lines(folder), names)
    assert names["vae"].config.shift_factor == facts["shift_factor"]
    assert len(loading_lines(folder).splitlines()) == 3
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    images = IMAGES.clone()
    names = {"images": images}
    exec(snippet.replace(repr(folder.name), repr(str(folder))).replace(".sample()", ".mode()"), names)
    with torch.no_grad():
        expected = autoencoder.decode(autoencoder.encode(IMAGES).latent_dist.mode()).sample
    torch.testing.assert_close(names["images"], expected, atol=1e-5, rtol=0)


def test_the_check_sees_one_altered_weight_and_an_unloadable_folder(exported, tmp_path, monkeypatch):
    autoencoder, folder, facts, _ = exported
    with monkeypatch.context() as patch:
        patch.setattr(export, "subprocess", subprocess)  # as users have it: see tests/distributed/warm.py
        assert verify_export(folder, autoencoder, IMAGES) == facts["max_abs_difference"]
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"][0] += 1e-3
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"differ by up to 0\.001"):
        verify_export(tmp_path, autoencoder, IMAGES)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(RuntimeError, match="stock diffusers cannot load"):
        verify_export(tmp_path, autoencoder, IMAGES)


def test_a_model_that_magnifies_rounding_is_exported_and_an_altered_weight_of_it_is_seen(tmp_path, monkeypatch):
    """Its images may differ between two processes, which round otherwise, by more than those of most models do."""

    def rounded_otherwise(folder, model, images, device):
        loaded = AutoencoderKL.from_pretrained(folder)
        return loaded(torch.nextafter(images, torch.zeros(()))).sample

    monkeypatch.setattr(export, "_reconstruct_in_fresh_process", torch.no_grad()(rounded_otherwise))
    autoencoder = tiny_autoencoder()
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(1e3)
    facts = write(autoencoder, tmp_path / "export")
    assert 1e-5 < facts["max_abs_difference"] < 0.1
    weights = load_file(tmp_path / "export/diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.weight"] *= 1.001
    save_file(weights, tmp_path / "export/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="does not reconstruct like the trained one"):
        verify_export(tmp_path / "export", autoencoder, IMAGES)


def test_the_check_runs_where_the_model_was_trained_and_else_on_the_cpu(exported, tmp_path, capsys, monkeypatch):
    """The meta device stands for an accelerator: it is everywhere, and what ran on it has no numbers to give back."""
    autoencoder, folder, _, _ = exported
    meta = torch.device("meta")
    with pytest.raises(RuntimeError, match="stock diffusers cannot load(.|\n)*meta"):
        export._reconstruct_in_fresh_process(folder, autoencoder, IMAGES, meta)
    assert 0 <= verify_export(folder, autoencoder, IMAGES, meta) <= 1e-5
    error = capsys.readouterr().err
    assert "on 2 images (meta)" in error and "does not pass on meta: " in error and "on 2 images (cpu)" in error
    model = tiny_autoencoder()
    monkeypatch.setattr(AutoencoderKL, "device", property(lambda self: meta))
    with pytest.raises(RuntimeError, match="scalarType|meta"):  # the trial in half precision
        write(model, tmp_path / "export")
    monkeypatch.setattr(export, "_tried", lambda *_: None)
    write(model, tmp_path / "export")
    assert "on 2 images (meta)" in capsys.readouterr().err


def test_tiles_that_are_large_for_a_cpu_are_not_tried(tmp_path):
    facts = write(tiny_autoencoder(), tmp_path / "export", sample_size=1024)
    assert "tiling" not in facts["precision"] and facts["precision"]["fp16"]["psnr"] > 40
    assert "Decoding in tiles was not tried" in (tmp_path / "export/README.md").read_text()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_that_fails_leaves_the_older_one_whole(exported):
    _, folder, _, _ = exported
    before = snapshot(folder)
    broken = tiny_autoencoder(seed=2)
    with torch.no_grad():
        broken.decoder.conv_out.bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        write(broken, folder)
    assert snapshot(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("foreign", [".gitattributes", "optimizer.pt", "photo of a holiday.jpg"])
def test_a_folder_that_holds_more_than_an_export_is_not_replaced(tmp_path, foreign):
    """A clone, a checkpoint or a folder of one's own may have a config.json, too."""
    folder = tmp_path / "export"
    write(tiny_autoencoder(), folder)
    (folder / foreign).write_text("of the user")
    before = snapshot(folder)
    with pytest.raises(UserError, match=f"holds {re.escape(foreign)}, which no export has"):
        write(tiny_autoencoder(1), folder)
    assert snapshot(folder) == before


def test_a_last_rename_that_fails_undoes_the_first(tmp_path):
    folder, previous = tmp_path / "export", tmp_path / "scratch"
    folder.mkdir()
    (folder / "config.json").write_text("older")
    with pytest.raises(FileNotFoundError):
        export.take_place(tmp_path / "never written", folder, previous)
    assert (folder / "config.json").read_text() == "older" and not previous.exists()


def test_a_model_that_overflows_in_half_precision_is_upcast(tmp_path):
    autoencoder = tiny_autoencoder()
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight *= 1e6  # a group norm follows
    autoencoder.register_to_config(force_upcast=False)
    facts = write(autoencoder, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["force_upcast"] is True
    assert facts["precision"]["fp16"]["first_not_finite"] == "decoder.conv_in"
    text = (tmp_path / "export" / "README.md").read_text()
    assert (
        "fp16 is not safe: values are not finite from decoder.conv_in on" in text
        and "| fp16, emulated | – | 2,304 |" in text
    )


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="not an export"):
        write(tiny_autoencoder(), tmp_path)
    assert snapshot(tmp_path) == {"holiday.jpg": b"precious"}


def test_latents_that_cannot_be_scaled_are_not_exported(tmp_path):
    constant = LatentStatistics()
    constant.update(torch.ones(1, 4, 2, 2))
    with pytest.raises(UserError, match="equal"):
        write(tiny_autoencoder(), tmp_path / "export", statistics=constant)
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_fails_says_what_to_do_and_loses_nothing(exported, tmp_path, monkeypatch):
    _, folder, _, _ = exported
    before = snapshot(folder)
    with pytest.raises(UserError, match="cannot upload .* Repo id"):
        push_to_hub(folder, "not a valid/repo/id", token="none")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="complete on this machine"):
        push_to_hub(folder, "user/name", token="none")
    assert snapshot(folder) == before
    with pytest.raises(UserError, match="not an export"):
        push_to_hub(tmp_path, "user/name")


def test_a_discriminator_lies_beside_the_weights_and_diffusers_passes_it_over(tmp_path):
    autoencoder, network = tiny_autoencoder(), PatchDiscriminator(3, 4, 1, "spectral", True)
    facts = write(autoencoder, tmp_path / "export", discriminator=network)
    loaded, report = AutoencoderKL.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(loaded.state_dict()[name], own) for name, own in autoencoder.state_dict().items())
    tensors, shape = read_network(tmp_path / "export/discriminator.safetensors")
    again = PatchDiscriminator(**shape)
    again.load_state_dict(tensors)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.eval()(images), network.eval()(images)) and facts["discriminator"] == shape
    card = (tmp_path / "export/README.md").read_text()
    assert "gan.init_from=export gan.start=0 gan.channels=4 gan.layers=1 gan.norm=spectral gan.blur=true\n" in card
    write(autoencoder, tmp_path / "export")
    assert not (tmp_path / "export/discriminator.safetensors").exists(), "it would be that of another model"
    assert "discriminator" not in (tmp_path / "export/README.md").read_text()
