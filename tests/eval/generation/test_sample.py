"""latent-ae eval sample: each prior against its own formula, fitted ones against the latents, and equal runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, DiTPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image

from latent_ae.config import UserError
from latent_ae.data.images import to_uint8
from latent_ae.data.rng import posterior_noise, spread
from latent_ae.latents.cache import open_latents
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.__main__ import main
from latent_ae_eval.diffusion.measure import evaluate_diffusion
from latent_ae_eval.generation.sampling import image_set
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.generation.training import new_transformer
from latent_ae_eval.sample.measure import gaussian_prior, sample
from latent_ae_eval.sample.settings import SampleSettings
from tests.eval.generation.small import SMALL
from tests.tiny_models import TWO, tiny

QUICK = SMALL | {"samples": 20}


def noise_of(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """As documented: that of torch.Generator().manual_seed(1,000,000 seed + i)."""
    generators = [torch.Generator().manual_seed(1_000_000 * seed + number) for number in range(count)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def shown(decoded: torch.Tensor) -> np.ndarray:
    return np.asarray(picture_grid([list(row) for row in (to_uint8(decoded).float() / 127.5 - 1).split(8)]))


def pixels(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "samples.png")).astype(int)


@torch.no_grad()
def test_samples_of_a_standard_normal_are_its_decoded_noise(model, tmp_path, capsys):
    words = [str(model), *(f"{key}={value}" for key, value in QUICK.items()), "seed=3"]
    assert main(["sample", *words, "--out", str(tmp_path / "a")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["metrics"] == {"samples": {"n": 20}} and result["shape"] == [4, 8, 8]
    vae = AutoencoderKL.from_pretrained(model).eval()
    assert np.abs(pixels(tmp_path / "a") - shown(vae.decode(noise_of(20, (4, 8, 8), 3)).sample)).max() <= 1
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<img") == 1 and "N(0, I) in raw latent units" in page
    # in other batches the same samples, with another seed others
    settings = SampleSettings(**QUICK | {"images_at_a_time": 7, "seed": 3})
    sample(model, settings=settings, out=tmp_path / "b")
    assert np.abs(pixels(tmp_path / "b") - pixels(tmp_path / "a")).max() <= 1
    sample(model, settings=settings.model_copy(update={"seed": 4}), out=tmp_path / "c")
    assert np.abs(pixels(tmp_path / "c") - pixels(tmp_path / "a")).max() > 20


@torch.no_grad()
def test_samples_that_are_not_finite_are_left_out(tmp_path, monkeypatch):
    """They would count as black images."""

    class Overflows(AutoencoderKL):
        def decode(self, z, **words):
            out = super().decode(z, **words)
            return replace(out, sample=torch.where(z.mean((1, 2, 3), keepdim=True) > 0, out.sample, torch.nan))

    vae = Overflows(**TWO, latent_channels=4).eval()
    expected = int((noise_of(20, (4, 8, 8)).mean((1, 2, 3)) > 0).sum())
    settings = SampleSettings(**QUICK)
    result = sample(vae, settings=settings, out=tmp_path)
    assert 1 < expected < 20 and result["metrics"]["samples"]["n"] == expected
    assert f"samples: {20 - expected} are not finite and left out" in result["notes"]
    nothing = torch.full((1, 3, 16, 16), torch.nan)
    monkeypatch.setattr(Overflows, "decode", lambda _, z, **words: DecoderOutput(nothing.repeat(len(z), 1, 1, 1)))
    with pytest.raises(UserError, match="0 of 20 images are finite"):
        sample(vae, settings=settings, out=tmp_path / "none")


def test_a_sheet_shows_64_images_spread_over_all_and_one_where_few_are_left():
    numbered = [torch.full((10, 3, 2, 2), batch, dtype=torch.uint8) for batch in range(20)]
    found = image_set(numbered, {}, 200, lambda _: None)
    assert found.size == 200 and len(found.shown) == 64
    levels = ((found.shown[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(levels.bincount(), torch.tensor(spread(0, 200, 64)).div(10, rounding_mode="floor").bincount())
    assert len(image_set(numbered[:1], {}, 5000, lambda _: None).shown) == 1


class WithPrior(AutoencoderKL):
    """Of a model that has a prior of its own."""

    def sample_prior(self, noise):
        return 3 * noise + 1


@torch.no_grad()
def test_a_model_is_sampled_by_its_own_prior(tmp_path):
    torch.manual_seed(0)
    vae = WithPrior(**TWO, latent_channels=4).eval()
    result = sample(vae, settings=SampleSettings(**QUICK), out=tmp_path)
    assert result["prior"]["method"] == "the model's own prior"
    expected = shown(vae.decode(3 * noise_of(20, (4, 8, 8)) + 1).sample)
    assert np.abs(pixels(tmp_path) - expected).max() <= 1


def test_a_gaussian_has_the_moments_of_the_latents(latents):
    prior = gaussian_prior(latents, 0)
    drawn = prior(torch.randn(20_000, *latents.shape, generator=torch.Generator().manual_seed(0))).flatten(1).double()
    numbers = [2**62 + number for number in range(80)]
    noise = posterior_noise(0, numbers, (2, *latents.shape))[:, 0]
    # which mirror image is taken of each is random, too: the moments of both together
    both = [latents.batch(range(80), [flip] * 80, noise).flatten(1).double() for flip in (False, True)]
    expected = torch.cat(both)
    spread = expected.std(0).mean()
    assert (drawn.mean(0) - expected.mean(0)).abs().mean() < 0.15 * spread
    off_diagonal = torch.corrcoef(drawn.T) - torch.corrcoef(expected.T)
    assert off_diagonal.abs().mean() < 0.15 and torch.corrcoef(expected.T).abs().mean() > 0.3


class Captured(ModelMixin, ConfigMixin):
    """Keeps the latents that a pipeline would decode."""

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def decode(self, latents):
        self.latents = latents
        return DecoderOutput(sample=latents[:, :3])


def test_a_fitted_flow_finds_shifted_latents_and_is_sampled_again_bit_for_bit(
    model, images, tmp_path, capsys, lpips_vgg
):
    vae = AutoencoderKL.from_pretrained(model)
    with torch.no_grad():  # latents 1.5 off, and the decoder made to take it back
        vae.quant_conv.bias[:4] += 1.5
        vae.post_quant_conv.bias -= 1.5 * vae.post_quant_conv.weight.sum((1, 2, 3))
    vae.save_pretrained(tmp_path / "shifted")
    changes = {"steps": 150, "lr": 2e-3, "ema_decay": 0.9, "sampling_steps": 8, "batch_size": 32, "validations": 2}
    settings = QUICK | changes
    words = [str(tmp_path / "shifted"), str(images), *(f"{key}={value}" for key, value in settings.items())]
    assert main(["sample", *words, "prior=flow", "--out", str(tmp_path / "flow")]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert fitted["recipe"]["patch_size"] == 2 and fitted["latents"]["classes"] == 0
    page = (tmp_path / "flow" / "report.html").read_text()
    assert page.count("<img") == 4 and "a flow fitted to the latents" in page

    cache = open_latents(tmp_path / "flow" / "latents" / "train")
    known = cache.batch(range(80), noise=posterior_noise(0, range(80), cache.shape))
    pipeline = DiTPipeline.from_pretrained(tmp_path / "flow" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(80)]
    pipeline.vae = Captured(scaling_factor=1.5)
    pipeline([0] * 80, guidance_scale=1.0, generator=generators, num_inference_steps=8, output_type="pt")
    found, noise = pipeline.vae.latents, noise_of(80, cache.shape)

    def misfit(drawn: torch.Tensor) -> float:
        """Of the channels' means and deviations, root mean square."""
        pairs = [(drawn.mean((0, 2, 3)), known.mean((0, 2, 3))), (drawn.std((0, 2, 3)), known.std((0, 2, 3)))]
        return math.sqrt(sum(float((a - b).square().mean()) for a, b in pairs))

    assert misfit(found) < 0.2 * misfit(noise)

    # again from the folder: the same pictures and figures, and better ones than without
    assert main(["sample", *words, f"prior={tmp_path / 'flow'}", "--out", str(tmp_path / "again")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == fitted["metrics"] and again["intervals"] == fitted["intervals"]
    assert np.array_equal(pixels(tmp_path / "again"), pixels(tmp_path / "flow"))
    assert main(["sample", *words, "--out", str(tmp_path / "normal")]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert fitted["metrics"]["samples"]["frechet_vgg16"] < 0.95 * plain["metrics"]["samples"]["frechet_vgg16"]
    assert not (tmp_path / "normal" / "latents").exists(), "nothing is encoded for it"

    # what is not of the prior is as eval diffusion measures it
    own = {key: value for key, value in settings.items() if key != "steps"} | {"steps": 1}
    at_hand = {"latents": "train", "held_out_latents": "held_out"}
    given = {key: str(tmp_path / "flow" / "latents" / part) for key, part in at_hand.items()}
    other = evaluate_diffusion(tmp_path / "shifted", images, DiffusionSettings(**own | given | {"label_column": None}))
    for kind in ("reconstructions", "held_out", "reconstructions_of_originals"):
        assert plain["metrics"][kind] == fitted["metrics"][kind] == other["metrics"][kind], kind

    def message(*more: str, first_stage: Path = tmp_path / "shifted") -> str:
        place = ["--out", str(tmp_path / "refused")]
        with pytest.raises(UserError) as caught:
            main(["sample", str(first_stage), str(images), *(f"{k}={v}" for k, v in QUICK.items()), *more, *place])
        return str(caught.value)

    assert "another model" in message(f"prior={tmp_path / 'flow'}", first_stage=model)
    assert "set resolution=16" in message(f"prior={tmp_path / 'flow'}", "resolution=32")
    result = json.loads((tmp_path / "flow" / "result.json").read_text())
    result["latents"]["classes"] = 2
    (tmp_path / "flow" / "result.json").write_text(json.dumps(result))
    assert "a model of 2 classes" in message(f"prior={tmp_path / 'flow'}")
    assert "holds no fitted flow" in message(f"prior={tmp_path / 'normal'}")


@pytest.mark.parametrize("side, patch", [(1, 1), (3, 1), (4, 2)])
@torch.no_grad()
def test_transformers_fit_latents_of_any_side(side, patch):
    settings = SampleSettings(width=64, depth=1)
    transformer = new_transformer((5, side, side), settings)
    assert transformer.config.patch_size == patch
    made = transformer(torch.randn(2, 5, side, side), timestep=torch.rand(2), class_labels=torch.zeros(2).long()).sample
    assert made.shape == (2, 5, side, side)


def test_a_latent_vector_has_a_flow_and_a_gaussian(images, tmp_path, lpips_vgg):
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,) * 5, **levels, norm_num_groups=4, latent_channels=6, scaling_factor=2.0)
    settings = SampleSettings(**QUICK | {"steps": 2, "validations": 2})
    result = sample(vae, images, "flow", settings, out=tmp_path)
    assert result["shape"] == [6, 1, 1] and result["recipe"]["patch_size"] == 1
    assert result["metrics"]["samples"]["frechet_vgg16"] > 0
    given = settings.model_copy(update={"latents": str(tmp_path / "latents" / "train")})
    gaussian = sample(vae, images, "gaussian", given)
    assert gaussian["metrics"]["held_out"] == result["metrics"]["held_out"]
    assert gaussian["metrics"]["samples"] != result["metrics"]["samples"]


def test_mistakes_end_with_a_message(model, images, latents, tmp_path, monkeypatch, lpips_vgg):
    def message(first_stage, *changes: str, data: str = "") -> str:
        words = [*(f"{key}={value}" for key, value in QUICK.items()), *changes, "--out", str(tmp_path / "out")]
        with pytest.raises(UserError) as caught:
            main(["sample", str(first_stage), *([data] if data else []), *words])
        return str(caught.value)

    assert "give DATA" in message(model, "prior=flow")
    assert "give DATA" in message(model, "prior=gaussian")
    assert "neither one of normal, gaussian, flow, codes nor a folder" in message(model, "prior=norml")
    assert "holds no fitted flow" in message(model, f"prior={images}")
    assert "has no classes" in message(model, "label_column=auto")
    assert "not a multiple of the model's factor 2; use 14" in message(model, "resolution=15")
    assert "too small" in message(model, "resolution=8", data=str(images))
    for name in ("VQModel", "AutoencoderTiny"):
        tiny(name).save_pretrained(tmp_path / name)
        assert f"prior: {name} was trained without one; prior=flow" in message(tmp_path / name)
    tiny("HierarchicalVAE").save_pretrained(tmp_path / "levels")
    said = message(tmp_path / "levels", "prior=normal", "resolution=64")
    assert said == "resolution: HierarchicalVAE makes images of 32 px alone; use that"
    tiny("AutoencoderKLFlux2").save_pretrained(tmp_path / "flux2")
    assert "scaling_factor" in message(tmp_path / "flux2", "prior=flow", data=str(images))
    monkeypatch.setattr("latent_ae_eval.sample.measure.MOST_VALUES", 100)
    given = f"latents={latents.folder}"
    assert "these latents have 256; take prior=flow" in message(model, "prior=gaussian", given, data=str(images))
    with pytest.raises(UserError, match="the function <lambda> has none"):
        sample(lambda x: x)


def test_a_first_stage_with_other_latents_gets_a_note(images, tmp_path):
    vae = tiny("AutoencoderKL")
    vae.register_to_config(scaling_factor=0.18215)
    result = sample(vae, settings=SampleSettings(**QUICK))
    assert "standard deviation is 5.49, not 1" in result["notes"][0]
    vae.register_to_config(scaling_factor=0.9)
    assert sample(vae, settings=SampleSettings(**QUICK))["notes"] == []
