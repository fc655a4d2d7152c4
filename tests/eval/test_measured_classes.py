"""Every command that takes a MODEL, on classes that are measured only: videos, other ranges, one size, quantised."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderVidTok, DiTTransformer2DModel
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.latents.cache import open_latents
from latent_ae.latents.encode import encode_images
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.loading import first_stage
from latent_ae.models.registry import scaling_of
from latent_ae_eval.generation.sampling import StandInDecoder
from latent_ae_eval.job import evaluate
from tests.eval.generation.small import SMALL
from tests.tiny_models import MEASURED, VIDTOK, pictures, tiny

KINDS = ("AutoencoderRAE", "AutoencoderKLQwenImage", "AutoencoderVidTok FSQ")
"""[0, 1] and one size; one frame with a mean of each channel; quantised, without scaling."""
QUICK = {"num_workers": 0, "crop_px": 32}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Smooth pictures of two classes, 40 x 32 px."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(24):
        path = folder / ("cold", "warm")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        corners = Image.fromarray((rng.random((2, 2, 3)) * 255).astype(np.uint8))
        corners.resize((40, 32), Image.Resampling.BILINEAR).save(path)
    return folder


@pytest.mark.parametrize("name", MEASURED)
def test_latents_are_stored_with_the_scaling_of_the_class(name, photos, tmp_path):
    vae = tiny(name).eval()
    encode_images(vae, photos, tmp_path, EncodeSettings(resolution=32, num_workers=0, flips=False, stored="fp32"))
    latents, stage = open_latents(tmp_path), first_stage(vae)
    assert latents.has_posterior == stage.has_posterior
    raw = latents.batch([0, 1])
    scaled, config = latents.scaled(raw), vae.config
    if name.startswith(("AutoencoderKLQwen", "AutoencoderKLWan")):  # as their pipelines do
        mean, std = (torch.tensor(config[key]).view(1, config.z_dim, 1, 1) for key in ("latents_mean", "latents_std"))
        expected = (raw - mean) / std
    elif name == "AutoencoderKLCosmos":  # CosmosTextToWorldPipeline, of one latent frame
        mean, std = (
            torch.tensor(config[key]).view(1, config.latent_channels, -1, 1, 1)[:, :, :1, 0]
            for key in ("latents_mean", "latents_std")
        )
        expected = (raw - mean) / std
    elif name.startswith("AutoencoderKLHunyuan") or name in ("ConsistencyDecoderVAE", "FlowMatchingVAE"):
        assert config.scaling_factor != 1
        expected = raw * config.scaling_factor
    else:  # scaled inside, or not at all
        expected = raw
    torch.testing.assert_close(scaled, expected)
    torch.testing.assert_close(latents.unscaled(scaled), raw)


JOBS = {
    "recon": QUICK | {"lpips": (), "frechet": (), "limit": 3},
    "latents": QUICK | {"resize_px": None, "lpips": None, "limit": 3, "num_decoded": 2, "noise": (0.1,)},
    "interpolate": QUICK | {"lpips": None, "steps": 3, "frames": 1, "num_images": 2},
    "probe": QUICK | {"labels_per_class": (4,), "draws": 2, "neighbours": (1,), "l2": (0.1,)},
    "anomaly": QUICK | {"lpips": None, "defects": True, "limit": 3},
    "likelihood": QUICK | {"likelihood": "gaussian", "limit": 2, "samples": 4},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_job_measures_them(name, photos, tmp_path):
    vae = tiny(name)
    results = {}
    for job, quick in JOBS.items():
        # smaller is faster; AutoencoderRAE has one size
        settings = quick if name == "AutoencoderRAE" else quick | {"crop_px": 16}
        if job == "likelihood" and not first_stage(vae).random:
            with pytest.raises(UserError, match=f"latents of {name.split()[0]} are not random"):
                evaluate(job, vae, photos, **settings)
            continue
        out = tmp_path / job if job == "recon" else None  # the pages are the same for every class
        results[job] = evaluate(job, vae, photos, out=out, **settings)
        assert results[job]["model"]["class"] == name.split()[0]
        json.dumps(results[job], allow_nan=False)
    halves = [row for row in results["latents"]["health"]["transforms"] if row["transform"] == "half size"]
    fixed = any("half size was left out" in note for note in results["latents"]["notes"])
    assert fixed == (not halves) == (name == "AutoencoderRAE")
    assert (
        main(["eval", "compare", str(tmp_path / "recon"), str(tmp_path / "recon"), "--out", str(tmp_path / "c")]) == 0
    )


@pytest.mark.parametrize("name", KINDS)
def test_diffusion_models_learn_their_scaled_latents(name, photos, tmp_path, lpips_vgg):
    vae = tiny(name).eval()
    if name == "AutoencoderKLQwenImage":
        vae.register_to_config(latents_mean=[1.0] * 4)
    settings = SMALL | {"resolution": 32, "steps": 2, "samples": 4, "validations": 2, "validation_images": 2}
    result = evaluate("diffusion", vae, photos, out=tmp_path, **settings, eval_fraction=0.2)
    assert result["metrics"]["samples"]["frechet_vgg16"] > 0
    assert any(f"DiTPipeline cannot decode with {name.split()[0]}" in note for note in result["notes"])
    DiTTransformer2DModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer")
    train = open_latents(tmp_path / "latents/train")
    fed = train.scaled(train.batch(range(len(train))))
    # of mirror images and samples of the posterior, too
    assert result["latents"]["scaled_mean"] == pytest.approx(float(fed.mean()), abs=0.02)
    moved = abs(float(train.batch(range(len(train))).mean() - fed.mean())) > 0.04
    assert moved == (name == "AutoencoderKLQwenImage")


def test_a_stand_in_decodes_what_a_transformer_was_fed():
    vae = tiny("AutoencoderKLQwenImage").eval()
    stage = first_stage(vae)
    with torch.no_grad():
        raw = stage.encode(pictures()).mean
        made = StandInDecoder(stage).decode(scaling_of(vae).scaled(raw)).sample
        torch.testing.assert_close(made, vae.decode(raw[:, :, None]).sample[:, :, 0])


def test_samples_of_the_prior_are_drawn_where_there_is_one(photos):
    settings = {"num_workers": 0, "resolution": 32, "samples": 4}
    result = evaluate("sample", tiny("AutoencoderKLQwenImage"), **settings)
    assert result["shape"] == [4, 16, 16]
    with pytest.raises(UserError, match="prior: AutoencoderRAE was trained without one; prior=flow or prior=gaussian"):
        evaluate("sample", tiny("AutoencoderRAE"), **settings)


def test_what_a_class_cannot_do_ends_in_a_message(photos, tmp_path, capsys):
    def said(place, *words):
        assert (
            main(
                ["eval", "recon", str(tmp_path / place), str(photos), "lpips=[]", "frechet=[]", "num_workers=0", *words]
            )
            == 2
        )
        return capsys.readouterr().err

    tiny("AutoencoderRAE").save_pretrained(tmp_path / "rae")
    assert "takes images of 32 x 32 px, not 24 x 24: cut them to that (crop_px=32" in said("rae", "crop_px=24")
    config = json.loads((tmp_path / "rae/config.json").read_text()) | {"reshape_to_2d": False}
    (tmp_path / "rae/config.json").write_text(json.dumps(config))
    assert "its latents are tokens without a grid: set reshape_to_2d" in said("rae")
    AutoencoderVidTok(**VIDTOK | {"is_causal": False}).save_pretrained(tmp_path / "clips")
    assert "takes videos of 16 frames and no still images" in said("clips")
