"""Exported first stages inside real pipelines of diffusers, and the table of what those read against their source."""

import inspect
import json
import re
from pathlib import Path
from typing import get_args

import diffusers
import numpy as np
import pytest
import skimage
import torch
from diffusers import AutoencoderKL

from latent_ae.config import UserError
from latent_ae.export.pipelines import (
    PIPELINES,
    SCALING,
    PipelineName,
    before_measuring,
    misfits,
    refuse_misfit,
    remarks,
)
from latent_ae.export.write import CardFacts, export_autoencoder
from latent_ae.latents.statistics import LatentStatistics
from latent_ae.models.new_decoder import with_new_decoder
from latent_ae.models.settings import DecoderSettings
from tests.export.tiny_pipelines import LATENT_PX, asked, hardly_noise, pipeline

FACTOR = 8
SIDE = FACTOR * LATENT_PX
IMAGES = torch.from_numpy(skimage.data.astronaut()[:SIDE, 150 : 150 + SIDE] / 127.5 - 1).float().permute(2, 0, 1)[None]
WITH_IMAGES = [name for name in PIPELINES if "Img2Img" in PIPELINES[name].classes[-1]]


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


VIDEO = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, False, True]}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8,) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
OTHER_CLASSES = {
    "AutoencoderKLFlux2": BLOCKS,
    "AutoencoderDC": {
        "latent_channels": 32,
        "attention_head_dim": 4,
        "encoder_block_types": ("ResBlock",) * 6,
        "decoder_block_types": ("ResBlock",) * 6,
        "encoder_block_out_channels": (8,) * 5 + (32,),
        "decoder_block_out_channels": (8,) * 5 + (32,),
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
        "encoder_qkv_multiscales": ((),) * 6,
        "decoder_qkv_multiscales": ((),) * 6,
    },
    "AutoencoderKLQwenImage": VIDEO,
    "AutoencoderKLWan": VIDEO,
    "AutoencoderKLHunyuanImage": {
        **{"in_channels": 3, "out_channels": 3, "latent_channels": 64, "block_out_channels": (32,) * 5 + (128,)},
        **{"layers_per_block": 1, "spatial_compression_ratio": 32, "sample_size": SIDE},
    },
    "VQModel": BLOCKS
    | {"latent_channels": 4, "norm_type": "spatial", "block_out_channels": (32,) * 4, "norm_num_groups": 32},
}
"""Configs of the small first stages of the other classes, of the sizes that their denoisers take."""


def first_stage(kind: str) -> torch.nn.Module:
    """A small random instance of one of OTHER_CLASSES."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**OTHER_CLASSES[kind])
    if kind == "AutoencoderKLQwenImage":  # its image-to-image draws from the posterior: hardly any noise
        with torch.no_grad():
            model.quant_conv.weight[model.z_dim :] = 0
            model.quant_conv.bias[model.z_dim :] = -30
    return model.eval()


def raw(vae: torch.nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    """What the encoder gives, N x c x h x w."""
    with torch.no_grad():
        if "z_dim" in vae.config:
            return vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
        encoded = vae.encode(images)
    return encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]


def export(folder: Path, channels: int = 4, model: torch.nn.Module | None = None, **changes) -> dict:
    model = model or autoencoder(channels)
    statistics = LatentStatistics()
    with torch.no_grad():
        statistics.update(raw(model, IMAGES[:, : model.config.get("in_channels", 3)]))
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
    found = {name: names.get(min(family.published)) for name, family in PIPELINES.items()}
    with pytest.MonkeyPatch.context() as patch:  # the check in a fresh process takes seconds, and has tests of its own
        patch.setattr("latent_ae.export.write.verify_export", lambda *_: 0.0)
        for name, family in PIPELINES.items():
            if family.kind in OTHER_CLASSES:
                found[name] = folder / name
                export(folder / name, model=first_stage(family.kind), pipeline=name)
    return found | {"sdxl per channel": folder / "per channel"}


def loaded(folder: Path) -> torch.nn.Module:
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32).eval()


def scaled(vae: torch.nn.Module, family: str, latents: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Raw latents -> what the denoiser sees (or back), by the formulas of docs/export.md alone."""
    config, reads = vae.config, PIPELINES[family].reads
    if "bn" in reads:
        std = torch.sqrt(vae.bn.running_var + config.batch_norm_eps).view(1, -1, 1, 1)
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        patches = torch.nn.functional.pixel_unshuffle(latents, 2)
        return torch.nn.functional.pixel_shuffle(patches * std + mean if back else (patches - mean) / std, 2)
    shift = config.shift_factor if "shift_factor" in reads else 0.0
    scale = config.scaling_factor if "scaling_factor" in reads else 1.0
    if config.get("latents_mean") is not None and "latents_mean" in reads:
        shift, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        scale = scale / std
    return latents / scale + shift if back else (latents - shift) * scale


def decoded(vae: torch.nn.Module, latents: torch.Tensor) -> np.ndarray:
    """Raw latents -> NHWC in [0, 1]."""
    with torch.no_grad():
        if "z_dim" in vae.config:
            images = vae.decode(latents[:, :, None]).sample[:, :, 0]
        elif "num_vq_embeddings" in vae.config:
            images = vae.decode(latents, force_not_quantize=True).sample
        else:
            images = vae.decode(latents).sample
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def images_of(made) -> np.ndarray:
    """What a pipeline gives, without the frames of a video."""
    return made.frames[:, 0] if "frames" in made else made.images


def latents_of(pipe, family: str, arguments: dict) -> torch.Tensor:
    """What the denoiser leaves behind, N x c x h x w."""
    if family == "dit":  # it gives no latents: the same by hand
        return dit_latents(pipe)
    made = pipe(**arguments, output_type="latent")
    given = made.frames if family == "wan" else made.images
    if family in ("flux", "qwenimage"):
        given = pipe._unpack_latents(given, SIDE, SIDE, pipe.vae_scale_factor)
    if family == "flux2":  # patch after patch
        side = LATENT_PX // 2
        given = torch.nn.functional.pixel_shuffle(given.mT.reshape(1, -1, side, side), 2)
    return given[:, :, 0] if given.ndim == 5 else given


@pytest.mark.parametrize("name", [*PIPELINES, "sdxl per channel"])
def test_from_text_to_an_image(exported, name):
    family, vae = name.split()[0], loaded(exported[name])
    pipe = pipeline(family, vae)
    arguments = asked(family, SIDE) | {"num_inference_steps": 2}
    made = images_of(pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np"))
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
    arguments = asked(family, SIDE) | {"image": (IMAGES + 1) / 2} | hardly_noise(pipe)
    if family in ("sd", "sdxl"):  # the size is the image's
        arguments = {key: value for key, value in arguments.items() if key not in ("height", "width")}
    latents_were = raw(vae)
    latents = latents_of(pipe, family, arguments | {"generator": torch.Generator().manual_seed(0)})
    torch.testing.assert_close(latents, scaled(vae, family, latents_were), atol=3e-3, rtol=0)
    made = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    np.testing.assert_allclose(made, decoded(vae, latents_were), atol=5e-3)
    assert decoded(vae, latents_were).std() > 0.03  # else any image would pass


def test_the_table_is_what_the_pipelines_source_reads():
    keys = {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "bn"}
    for name, family in PIPELINES.items():
        for class_name in family.classes:
            source = inspect.getsource(getattr(diffusers, class_name))
            found = set(re.findall(r"(?:vae|movq)\.(?:config\.)?(\w+)", source)) & keys
            if class_name == "KandinskyV22Img2ImgPipeline":  # for images that it is never given: they are latents there
                found -= {"scaling_factor"}
            assert found == family.reads, (name, class_name)


def test_what_a_denoiser_sees_has_unit_variance(exported):
    with torch.no_grad():
        for name, folder in exported.items():
            vae = loaded(folder)
            seen = scaled(vae, name.split()[0], raw(vae))
            if name == "sdxl per channel":
                assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)
            if name in ("sdxl per channel", "flux2", "qwenimage", "wan"):
                channels = seen.shape[1]
                # Flux.2 adds batch_norm_eps to the variance
                rtol = 1e-2 if name == "flux2" else 1e-5
                torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(channels), rtol=rtol, atol=0)
                torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(channels), atol=1e-5, rtol=0)
            elif name == "kandinsky":  # its pipelines scale nothing
                assert torch.equal(seen, raw(vae))
            else:
                assert float(seen.std(correction=0)) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in PIPELINES if PIPELINES[name].kind == "AutoencoderKL"])
def test_an_unfit_model_is_refused_before_anything_is_written(tmp_path, name):
    other = 20 - min(PIPELINES[name].published)
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
        arguments = asked("sd3", SIDE) | {"num_inference_steps": 1, "output_type": "np"}
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
    assert remarks("flux", config | {"latent_channels": 16}, -0.5, 2.0) == []  # it subtracts the shift
    (factor,) = remarks("dit", config | {"block_out_channels": (8, 8, 8)}, 0.0, 1.0)
    assert "the factor is 4" in factor
    (upcast,) = remarks("sd", config | {"force_upcast": True}, 0.0, 1.0)
    assert "float32" in upcast and remarks("sdxl", config | {"force_upcast": True}, 0.0, 1.0) == []
    (missing,) = remarks("sdxl", config | {"force_upcast": True, "use_post_quant_conv": False}, 0.0, 1.0)
    assert "post_quant_conv" in missing
    (odd,) = remarks("flux", config | {"latent_channels": 16, "sample_size": 72}, 0.0, 1.0)
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


CLASS_OF_ITS_OWN = [name for name in PIPELINES if PIPELINES[name].kind in OTHER_CLASSES]


@pytest.mark.parametrize("name", CLASS_OF_ITS_OWN)
def test_an_unfit_model_of_another_class_is_refused(tmp_path, name):
    kind = PIPELINES[name].kind
    with pytest.raises(UserError, match=f"does not fit {name} .*\n.*take the class {kind}, not AutoencoderKL: .*flux"):
        export(tmp_path / "out", 4, pipeline=name)
    config = dict(first_stage(kind).config)
    config |= {key: 0.5 for key in ("scaling_factor",) if key in config}
    assert misfits(name, config) == []
    key = "z_dim" if "z_dim" in config else "latent_channels"
    line = misfits(name, config | {key: 5})[0]
    assert line.startswith("latent_channels is 5, its denoisers take")
    trained = kind in ("AutoencoderKLFlux2", "AutoencoderDC", "VQModel")
    told = "vq_embed_dim" if kind == "VQModel" else "latent_channels"
    assert (f"train with model.config.{told}=" if trained else "begin with a model of ") in line
    assert list(tmp_path.iterdir()) == []


def test_what_single_families_need_besides():
    good = {"shift_factor": 0.1, "scaling_factor": 0.5}
    deep = dict(autoencoder(16).config) | good
    assert misfits("lumina2", deep) == misfits("z_image", deep) == []
    (line,) = misfits("lumina2", deep | {"block_out_channels": (8, 8, 8)})
    assert "factor is 4, and its code takes 8 for granted" in line
    assert misfits("z_image", deep | {"block_out_channels": (8, 8, 8)}) == []
    (line,) = misfits("flux2", dict(first_stage("AutoencoderKLFlux2").config) | {"patch_size": [4, 4]})
    assert "patch_size is [4, 4]" in line
    video = dict(first_stage("AutoencoderKLWan").config)
    (line,) = misfits("wan", video | {"scale_factor_spatial": 16})
    assert "scale_factor_spatial is 16, and the model downsamples by 8" in line
    for name in ("wan", "qwenimage"):
        (line,) = misfits(name, video | {"input_channels": 3, "latents_std": None})
        assert "latents_std are null" in line
    (line,) = misfits("hunyuanimage", dict(first_stage("AutoencoderKLHunyuanImage").config))
    assert "scaling_factor is None" in line
    # Wan 2.2's: 48 channels, patches of 2 x 2 pixels, 1/16 of the side
    small = {"dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True], "patch_size": 2, "z_dim": 48}
    small |= {"in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    newer = video | small | {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    assert misfits("wan", newer) == remarks("wan", newer, 0.0, 3.0) == []


def test_what_is_not_ideal_about_other_classes_is_a_remark():
    codebook = dict(first_stage("VQModel").config) | {"sample_size": 64}
    assert remarks("kandinsky", codebook, 0.05, 1.0) == []
    (scale,) = remarks("kandinsky", codebook, 0.0, 0.3)
    assert "standard deviation is 0.3, and this pipeline scales nothing" in scale
    (sides,) = remarks("kandinsky", codebook | {"sample_size": 72}, 0.0, 1.0)
    assert "no multiple of 64" in sides
    deep = dict(first_stage("AutoencoderDC").config)
    assert remarks("sana", deep, 0.05, 3.0) == []
    (shift,) = remarks("sana", deep, 1.0, 2.0)
    assert "mean is 0.50" in shift and "--latents-mean-std" not in shift
    assert remarks("flux2", dict(first_stage("AutoencoderKLFlux2").config) | {"sample_size": 64}, 1.0, 2.0) == []


def test_what_is_known_before_measuring_leaves_the_scaling_out_unless_it_is_kept():
    config = dict(autoencoder(16).config) | {"latents_mean": [0.0] * 16, "latents_std": None, "scaling_factor": 0.0}
    fresh = before_measuring(config, keep_scaling=False, latents_mean_std=False)
    assert misfits("sd3", fresh) == [] and fresh.keys().isdisjoint(SCALING)
    kept = before_measuring(config, keep_scaling=True, latents_mean_std=False)
    assert kept["shift_factor"] == 0.0 and len(misfits("sd3", kept)) == 2  # no scaling, and means that it does not read
    own = before_measuring(config, keep_scaling=False, latents_mean_std=True)
    assert misfits("sd3", own)[0].startswith("latents_")


def test_channel_statistics_go_only_into_a_class_that_has_a_place_for_them(tmp_path):
    with pytest.raises(UserError, match="AutoencoderDC has no latents_mean"):
        export(tmp_path / "out", model=first_stage("AutoencoderDC"), latents_mean_std=True)


def test_the_page_has_the_table_of_families():
    rows = [
        f"| `{name}`: {family.title} | {', '.join(f'`{one}`' for one in family.classes)} | `{family.kind}` "
        f"| {', '.join(f'{channels} (1/{factor})' for channels, factor in family.published.items())} "
        f"| {', '.join(f'`{key}`' for key in sorted(family.reads)) or 'nothing'} "
        f"| {', '.join(str(family.multiple(factor)) for factor in family.published.values())} px |"
        for name, family in PIPELINES.items()
    ]
    page = Path("docs/export.md").read_text()
    assert "\n".join(rows) in page, "\n".join(rows)
    assert set(get_args(PipelineName)) == PIPELINES.keys()
    readme = " ".join(Path("README.md").read_text().split())
    assert all(f"`{name}`" in readme for name in PIPELINES)


@pytest.mark.parametrize("name", [name for name in PIPELINES if PIPELINES[name].kind == "AutoencoderKL"])
def test_a_new_decoder_works_in_the_pipelines_of_its_latents(exported, tmp_path, name):
    """An AsymmetricAutoencoderKL takes the place of the AutoencoderKL whose encoder and scaling it has."""
    old = loaded(exported["sdxl per channel" if name == "sdxl" else name])
    made = with_new_decoder(old, DecoderSettings(block_out_channels=(4,) * 4, layers_per_block=1))
    refuse_misfit(name, made.config, "AsymmetricAutoencoderKL")
    made.save_pretrained(tmp_path)
    vae = loaded(tmp_path)
    arguments = asked(name, SIDE) | {"num_inference_steps": 2}
    pipes = [pipeline(name, one) for one in (old, vae)]
    made = images_of(pipes[1](**arguments, generator=torch.Generator().manual_seed(0), output_type="np"))
    latents = latents_of(pipes[0], name, arguments | {"generator": torch.Generator().manual_seed(0)})
    np.testing.assert_allclose(made, decoded(vae, scaled(old, name, latents, back=True)), atol=2e-5)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_tiny_decoder_takes_what_the_denoiser_makes(exported, tmp_path, name):
    """As TAESD does, in the place of the AutoencoderKL for whose latents it is."""
    old = loaded(exported[name])
    made = with_new_decoder(old, DecoderSettings(kind="AutoencoderTiny", block_out_channels=(8,) * 4))
    made.save_pretrained(tmp_path)
    vae = diffusers.AutoencoderTiny.from_pretrained(tmp_path).eval()
    arguments = asked(name, SIDE) | {"num_inference_steps": 2}
    pipe, before = pipeline(name, vae), pipeline(name, old)
    made = images_of(pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="np"))
    latents = latents_of(before, name, arguments | {"generator": torch.Generator().manual_seed(0)})
    np.testing.assert_allclose(made, decoded(vae, latents), atol=2e-5)


def test_only_a_new_decoder_states_a_shift():
    fresh = with_new_decoder(autoencoder(16), DecoderSettings(layers_per_block=1))
    assert "shift_factor" not in fresh.config  # as in an AsymmetricAutoencoderKL that is trained from fresh weights
    with pytest.raises(UserError, match="has no shift_factor of its own, and the pipeline subtracts one"):
        refuse_misfit("sd3", fresh.config, "AsymmetricAutoencoderKL")
