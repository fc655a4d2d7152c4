"""Exported first stages inside real pipelines of diffusers, and the table of what those read against their source."""

import inspect
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import skimage
import torch
from diffusers import AutoencoderKL

from latent_ae.config import UserError
from latent_ae.export.pipelines import PIPELINES, misfits, refuse_misfit, remarks
from latent_ae.export.write import CardFacts, export_autoencoder
from latent_ae.latents.statistics import LatentStatistics
from tests.export.tiny_pipelines import LATENT_PX, hardly_noise, pipeline

FACTOR = 8
SIDE = FACTOR * LATENT_PX
IMAGES = torch.from_numpy(skimage.data.astronaut()[:SIDE, 150 : 150 + SIDE] / 127.5 - 1).float().permute(2, 0, 1)[None]
WITH_IMAGES = [name for name in PIPELINES if len(PIPELINES[name].classes) > 1]


def autoencoder(channels: int, **changes) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4,
            latent_channels=channels,
            norm_num_groups=4,
            **changes,
        )
    with torch.no_grad():  # latents with a mean and a spread that nobody can overlook, and hardly any noise
        model.quant_conv.weight[:channels] *= 3
        model.quant_conv.bias[:channels] = torch.linspace(1, 2, channels)
        model.quant_conv.weight[channels:] = 0
        model.quant_conv.bias[channels:] = -30
    return model.eval()


def export(folder: Path, channels: int = 4, model: AutoencoderKL | None = None, **changes) -> dict:
    model = model or autoencoder(channels)
    statistics = LatentStatistics()
    with torch.no_grad():
        statistics.update(model.encode(IMAGES[:, : model.config.in_channels]).latent_dist.mean)
    card = CardFacts(name="tiny", data_name="photos")
    words = {"statistics": statistics, "sample_size": SIDE, "card": card, "check_images": IMAGES}
    return export_autoencoder(model, folder, **(words | changes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """The folder that each family gets, and SDXL once more with its own mean and spread of each channel."""
    folder = tmp_path_factory.mktemp("exports")
    export(folder / "four", 4, pipeline="sd")
    export(folder / "sixteen", 16, pipeline="sd3")
    export(folder / "per channel", 4, pipeline="sdxl", latents_mean_std=True)
    names = {4: folder / "four", 16: folder / "sixteen"}
    found = {name: names[family.latent_channels] for name, family in PIPELINES.items()}
    return found | {"sdxl per channel": folder / "per channel"}


def loaded(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


def scaled(vae: AutoencoderKL, family: str, latents: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Raw latents -> what the denoiser sees (or back), by the formulas of docs/export.md alone."""
    config, reads = vae.config, PIPELINES[family].reads
    shift, scale = config.shift_factor if "shift_factor" in reads else 0.0, config.scaling_factor
    if config.latents_mean is not None and "latents_mean" in reads:
        shift, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        scale = scale / std
    return latents / scale + shift if back else (latents - shift) * scale


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> np.ndarray:
    """Raw latents -> NHWC in [0, 1]."""
    with torch.no_grad():
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def words(family: str) -> dict:
    if family == "dit":
        return {"class_labels": [3]}
    sizes = {"prompt": "a cat", "height": SIDE, "width": SIDE}
    return sizes | ({} if family == "flux" else {"guidance_scale": 2.0})


def latents_of(pipe, family: str, arguments: dict) -> torch.Tensor:
    """What the denoiser leaves behind."""
    if family == "dit":  # it gives no latents: the same by hand
        return dit_latents(pipe)
    given = pipe(**arguments, output_type="latent").images
    return pipe._unpack_latents(given, SIDE, SIDE, pipe.vae_scale_factor) if family == "flux" else given


@pytest.mark.parametrize("name", [*PIPELINES, "sdxl per channel"])
def test_from_text_to_an_image(exported, name):
    family, vae = name.split()[0], loaded(exported[name])
    pipe = pipeline(family, vae)
    arguments = words(family) | {"num_inference_steps": 2}
    made = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert made.shape == (1, SIDE, SIDE, 3) and np.isfinite(made).all() and made.std() > 0
    latents = latents_of(pipe, family, arguments | {"generator": torch.Generator().manual_seed(0)})
    np.testing.assert_allclose(made, decoded(vae, scaled(vae, family, latents, back=True)), atol=2e-5)


def dit_latents(pipe) -> torch.Tensor:
    """Two steps of DiT's pipeline: class 3 guided by 4 away from no class."""
    x = torch.randn(1, 4, LATENT_PX, LATENT_PX, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            pair = pipe.transformer(
                torch.cat([x, x]), timestep=t.expand(2), class_labels=torch.tensor([3, 1000])
            ).sample
        (with_class, without), guidance = pair[:, None, :4], 4.0
        x = pipe.scheduler.step(without + guidance * (with_class - without), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", [*WITH_IMAGES, "sdxl per channel"])
def test_an_image_that_is_not_noised_comes_back_as_its_reconstruction(exported, name):
    family, vae = name.split()[0], loaded(exported[name])
    pipe = pipeline(family, vae, image_to_image=True)
    arguments = words(family) | {"image": (IMAGES + 1) / 2} | hardly_noise(pipe)
    if family in ("sd", "sdxl"):  # the size is the image's
        arguments = {key: value for key, value in arguments.items() if key not in ("height", "width")}
    with torch.no_grad():
        raw = vae.encode(IMAGES).latent_dist.mode()
    latents = latents_of(pipe, family, arguments | {"generator": torch.Generator().manual_seed(0)})
    torch.testing.assert_close(latents, scaled(vae, family, raw), atol=3e-3, rtol=0)
    made = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    np.testing.assert_allclose(made, decoded(vae, raw), atol=4e-3)
    assert decoded(vae, raw).std() > 0.05  # else any image would pass


def test_the_table_is_what_the_pipelines_source_reads():
    keys = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}
    for name, family in PIPELINES.items():
        for class_name in family.classes:
            source = inspect.getsource(getattr(diffusers, class_name))
            assert set(re.findall(r"vae\.config\.(\w+)", source)) & keys == family.reads, (name, class_name)


def test_what_a_denoiser_sees_has_unit_variance(exported):
    with torch.no_grad():
        for name, folder in exported.items():
            vae = loaded(folder)
            seen = scaled(vae, name.split()[0], vae.encode(IMAGES).latent_dist.mode())
            if name == "sdxl per channel":
                assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)
                torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(4))
                torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
            else:
                assert float(seen.std(correction=0)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_an_unfit_model_is_refused_before_anything_is_written(tmp_path, name):
    other = 20 - PIPELINES[name].latent_channels
    with pytest.raises(UserError, match=rf"(?s){PIPELINES[name].classes[0]}.*model\.latent_channels={20 - other}"):
        export(tmp_path / "out", other, pipeline=name)
    with pytest.raises(UserError, match=r"in_channels is 1, .*\n.*out_channels is 1"):
        gray = autoencoder(20 - other, in_channels=1, out_channels=1)
        export(tmp_path / "out", model=gray, pipeline=name)
    if "latents_mean" not in PIPELINES[name].reads:
        with pytest.raises(UserError, match="latents_mean and latents_std are set, which the pipeline does not read"):
            export(tmp_path / "out", 20 - other, pipeline=name, latents_mean_std=True)
    assert list(tmp_path.iterdir()) == []


def test_misfits_are_what_really_fails():
    """A null shift, a scaling of 0 and statistics of other channels stop or spoil the pipelines themselves."""
    good = dict(autoencoder(16).config) | {"shift_factor": 0.1, "scaling_factor": 0.5}
    assert misfits("sd3", good) == []
    for change in ({"shift_factor": None}, {"scaling_factor": 0.0}):
        (line,) = misfits("sd3", good | change)
        assert line.startswith(next(iter(change)))
        vae = autoencoder(16)
        vae.register_to_config(**(good | change))
        arguments = words("sd3") | {"num_inference_steps": 1, "output_type": "np"}
        try:
            with np.errstate(invalid="ignore"):
                spoilt = not np.isfinite(pipeline("sd3", vae)(**arguments).images).all()
        except TypeError:
            spoilt = True
        assert spoilt
    assert misfits("sd", dict(autoencoder(4).config)) == []  # a null shift is none of its business
    per_channel = dict(autoencoder(4).config) | {"latents_mean": [0.0] * 4}
    (line,) = misfits("sdxl", per_channel)
    assert "alone" in line
    (line,) = misfits("sdxl", per_channel | {"latents_std": [1.0] * 3})
    assert "3 values for 4" in line


def test_what_is_not_ideal_is_a_remark():
    config = dict(autoencoder(4).config) | {"force_upcast": False, "sample_size": 64}
    assert remarks("sd", config, 0.05, 1.0) == remarks("sdxl", config, -0.05, 1.0) == []
    (shift,) = remarks("sdxl", config, -0.5, 2.0)
    assert "mean is -0.25" in shift and "--latents-mean-std" in shift
    assert remarks("sdxl", config | {"latents_mean": [0.0] * 4}, -0.5, 2.0) == []
    assert remarks("flux", config, -0.5, 2.0) == []  # it subtracts the shift
    (factor,) = remarks("dit", config | {"block_out_channels": (8, 8, 8)}, 0.0, 1.0)
    assert "the factor is 4" in factor
    (upcast,) = remarks("sd", config | {"force_upcast": True}, 0.0, 1.0)
    assert "float32" in upcast and remarks("sdxl", config | {"force_upcast": True}, 0.0, 1.0) == []
    (missing,) = remarks("sdxl", config | {"force_upcast": True, "use_post_quant_conv": False}, 0.0, 1.0)
    assert "post_quant_conv" in missing
    (odd,) = remarks("flux", config | {"sample_size": 72}, 0.0, 1.0)
    assert "16" in odd and remarks("sd", config | {"sample_size": 72}, 0.0, 1.0) == []
    # these two check their sides against 8, whatever the factor is
    of_factor_4 = config | {"block_out_channels": (8, 8, 8), "sample_size": 36}
    for name in ("sd", "sdxl"):
        assert "multiple of 8" in remarks(name, of_factor_4, 0.0, 1.0)[-1]
        assert len(remarks(name, of_factor_4 | {"sample_size": 40}, 0.0, 1.0)) == 1
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    small = AutoencoderKL(block_out_channels=(8,) * 3, norm_num_groups=4, **blocks)
    with pytest.raises(ValueError, match="divisible by 8"):
        pipeline("sd", small)("a", height=36, width=36, num_inference_steps=1)


def test_other_classes_than_autoencoderkl_are_refused():
    with pytest.raises(UserError, match="only an AutoencoderKL can be checked against flux"):
        refuse_misfit("flux", {"latent_channels": 16, "in_channels": 3, "out_channels": 3}, "VQModel")
