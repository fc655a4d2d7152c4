"""latent-ae eval diffusion: the flow against closed forms, the stock pipeline, and equal runs."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DiTPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image

from latent_ae.config import UserError
from latent_ae.data.rng import posterior_noise, spread
from latent_ae.latents.cache import LatentCache, open_latents
from latent_ae.models.build import build_autoencoder
from latent_ae.models.settings import ModelSettings
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.__main__ import main
from latent_ae_eval.diffusion.measure import evaluate_diffusion
from latent_ae_eval.generation.flow import NULL_CLASS, Trivial, Validation, classes_of, flow_batch, training_batch
from latent_ae_eval.generation.sampling import distance, samples, stock_pipeline
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.generation.training import Trainer
from tests.eval.generation.small import SMALL, GaussianFlow
from tests.tiny_models import tiny


class HalvedLatents(ModelMixin, ConfigMixin):
    """A first stage whose images are its latents; the pipeline is to undo the scaling."""

    @register_to_config
    def __init__(self, scaling_factor: float = 2.0):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def decode(self, latents):
        return DecoderOutput(sample=latents)


@pytest.mark.parametrize("mean, std", [(0.3, 0.3), (-0.5, 0.6)])
def test_the_stock_pipeline_follows_a_known_flow_to_its_data(mean, std):
    pipeline = stock_pipeline(GaussianFlow(mean, std**2), HalvedLatents())
    settings = DiffusionSettings(sampling_steps=25, images_at_a_time=200)
    found = torch.cat(list(samples(pipeline, [0] * 400, settings))).double() / 127.5 - 1
    # 19,200 values of this mean and deviation, divided by the scaling factor; a level of 8 bits is 0.008
    assert found.mean().item() == pytest.approx(mean / 2, abs=0.006)
    assert found.std().item() == pytest.approx(std / 2, rel=0.025)


def test_a_flow_to_one_point_ends_in_it():
    pipeline = stock_pipeline(GaussianFlow(0.81, 0.0), HalvedLatents())
    found = torch.cat(list(samples(pipeline, [0] * 4, DiffusionSettings())))
    assert set(found.unique().tolist()) == {math.floor(0.405 * 127.5 + 128)}


def test_a_sample_depends_on_seed_and_number_and_not_on_its_batch():
    pipeline = stock_pipeline(GaussianFlow(0.0, 1.0), HalvedLatents())

    def draw(**changes):
        settings = DiffusionSettings(sampling_steps=3, **changes)
        return torch.cat(list(samples(pipeline, [0] * 7, settings)))

    drawn = draw(images_at_a_time=7)
    assert torch.equal(drawn, draw(images_at_a_time=2))
    assert not torch.equal(drawn, draw(seed=1))
    assert len(drawn.flatten(1).unique(dim=0)) == 7


@pytest.mark.parametrize("t", [0.1, 0.5, 0.95])
def test_the_trivial_predictor_is_the_best_linear_one(t):
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([0.5, -2.0]), torch.tensor([0.2, 3.0])
    x0 = mean + std * torch.randn(200_000, 2, generator=generator)
    noise = torch.randn(200_000, 2, generator=generator)
    x, velocity = (1 - t) * x0 + t * noise, noise - x0
    found = Trivial(mean.view(2, 1, 1), std.square().view(2, 1, 1)).velocity(
        x.view(-1, 2, 1, 1), torch.full((200_000,), t)
    )
    for channel in range(2):
        slope, offset = np.polyfit(x[:, channel].double(), velocity[:, channel].double(), 1)
        expected = slope * x[:, channel] + offset
        assert (found[:, channel, 0, 0] - expected).abs().max() < 0.03 * velocity[:, channel].std()


def test_a_batch_is_a_line_from_the_latent_to_the_noise(latents):
    numbers, rows = range(40), [(7 * number) % len(latents) for number in range(40)]
    batch = flow_batch(latents, 3, numbers, rows)
    s = batch.t.view(-1, 1, 1, 1)
    x0, noise = batch.x - s * batch.velocity, batch.x + (1 - s) * batch.velocity
    drawn = posterior_noise(3, numbers, (2, *latents.shape))
    assert torch.allclose(noise, drawn[:, 1], atol=1e-5)
    either = torch.stack([latents.batch(rows, [flip] * 40, drawn[:, 0]) * 1.5 for flip in (False, True)])
    nearest = (either - x0).abs().amax((2, 3, 4)).min(0)
    assert nearest.values.max() < 1e-4 and 8 < nearest.indices.sum() < 32
    # one sample, whatever else is in the batch
    alone = flow_batch(latents, 3, [11], [rows[11]])
    assert all(torch.equal(one[0], many[11]) for one, many in zip(alone, batch, strict=True))
    assert not torch.equal(flow_batch(latents, 4, [11], [rows[11]]).x, alone.x)


def test_times_are_logit_normal_and_a_tenth_loses_its_class(latents):
    batch = flow_batch(latents, 0, range(4000), [number % len(latents) for number in range(4000)])
    below = [(batch.t < 1 / (1 + math.exp(-z))).float().mean().item() for z in (-1, 0, 1)]
    assert below == pytest.approx([0.1587, 0.5, 0.8413], abs=0.025)
    dropped = batch.classes == NULL_CLASS
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    labels = torch.tensor(latents.labels)[torch.arange(4000) % len(latents)]
    assert torch.equal(batch.classes[~dropped], labels[~dropped])


def test_images_without_a_label_have_the_null_class(latents, monkeypatch):
    monkeypatch.setitem(latents.__dict__, "labels", np.array([1, -1, 0]))
    assert classes_of(latents, [2, 1, 0]).tolist() == [0, NULL_CLASS, 1]
    monkeypatch.setitem(latents.__dict__, "labels", None)
    assert classes_of(latents, [2, 1]).tolist() == [0, 0]


def test_every_image_is_seen_once_an_epoch(latents):
    settings = DiffusionSettings(**SMALL)
    means = latents.batch(range(80)).flatten(1)
    flipped = latents.batch(range(80), [True] * 80).flatten(1)
    seen = []
    for step in range(10):
        batch = training_batch(latents, settings, step)
        x0 = (batch.x - batch.t.view(-1, 1, 1, 1) * batch.velocity).flatten(1) / 1.5
        seen += torch.minimum(torch.cdist(x0, means), torch.cdist(x0, flipped)).argmin(1).tolist()
    assert sorted(seen[:80]) == sorted(seen[80:]) == list(range(80)) and seen[:80] != seen[80:]


def test_noise_for_latents_has_the_known_loss(latents, monkeypatch):
    # latents of pure noise: x_0 ~ N(0, 1), whose best predictor has the error 1 / ((1 - t)^2 + t^2), pi / 2 on average
    noise = torch.randn(80, *latents.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(LatentCache, "batch", lambda self, rows, *_: noise[list(rows)] / 1.5)
    settings = DiffusionSettings(**SMALL | {"validation_images": 80})
    validation = Validation(latents, Trivial(torch.zeros(latents.shape), torch.ones(latents.shape)), settings)
    assert validation.trivial.mean().item() == pytest.approx(math.pi / 2, rel=0.03)
    assert validation.trivial.argmax() in (4, 5)
    measured = Trivial.of(latents, 0)
    assert measured.mean.mean().abs() < 0.02 and measured.variance.mean().item() == pytest.approx(1, rel=0.05)
    # before training the last layer is zero: the error is the velocity's power, 1 + 1
    fresh = validation.measure(Trainer(latents, settings, torch.device("cpu")).average, torch.device("cpu"))
    assert fresh["loss"] == pytest.approx(2, rel=0.03)
    assert fresh["relative_loss"] == pytest.approx(fresh["loss"] / validation.trivial.mean().item(), rel=1e-6)
    assert len(fresh["relative_loss_by_time"]) == 10


def test_distance_is_that_of_gaussians_and_its_interval_that_of_repeats():
    rng = np.random.default_rng(0)

    def draw() -> tuple[float, list[float]]:
        a, b = rng.normal(0, 1, (900, 4)), rng.normal(1, 2, (700, 4))
        value, interval = distance(a, b)
        assert interval is not None and interval[0] < value < interval[1]
        return value, interval

    repeats = [draw() for _ in range(40)]
    values = [value for value, _ in repeats]
    assert np.mean(values) == pytest.approx(4 * (1 + 1), rel=0.05)  # 4 |0 - 1|^2 + 4 (1 - 2)^2
    widths = [high - low for _, (low, high) in repeats]
    assert np.median(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.5)
    few = rng.normal(size=(60, 100)), rng.normal(size=(60, 100))
    assert distance(*few)[1] is not None and distance(few[0][:40], few[1])[1] is None


def without_time(result):
    return {key: value for key, value in result.items() if key != "seconds"}


def test_the_whole_way_is_repeatable_resumable_and_loads_as_stock(
    model, images, tmp_path, monkeypatch, capsys, lpips_vgg
):
    words = [str(model), str(images), *(f"{key}={value}" for key, value in SMALL.items())]
    assert main(["diffusion", *words, "--out", str(tmp_path / "a")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["latents"] | {"classes": 2, "train": 80, "held_out": 64, "shape": [4, 8, 8]} == result["latents"]
    assert [point["step"] for point in result["curve"]] == [0, 4, 8, 12]
    # reconstructions of held-out images lie further off than the images, and near their originals
    metrics = {kind: values["frechet_vgg16"] for kind, values in result["metrics"].items()}
    assert 0 < metrics["reconstructions_of_originals"] < metrics["reconstructions"] < metrics["samples"]
    assert metrics["held_out"] < metrics["samples"] and result["metrics"]["held_out"]["n"] == 60
    assert set(result["metrics"]["samples"]) == {"n", "reference_images", "frechet_vgg16"}  # never called an FID
    page = (tmp_path / "a" / "diffusion.html").read_text()
    assert page.count("<img") == 4 and page.count("<svg") == 2
    assert not (tmp_path / "a" / "unfinished").exists()

    # a stock load gives the pictures that were judged
    pipeline = DiTPipeline.from_pretrained(tmp_path / "a" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    settings = DiffusionSettings(**SMALL)
    labels = open_latents(tmp_path / "a" / "latents" / "train").labels
    classes = [int(labels[row]) for row in spread(0, 80, 60)]
    drawn = torch.cat(list(samples(pipeline, classes, settings))).float() / 127.5 - 1
    expected = np.asarray(picture_grid([list(row) for row in drawn.split(8)]))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "samples.png")), expected)

    # killed after the second checkpoint, then started again, with the latents of the first run
    at_hand = {"latents": "train", "held_out_latents": "held_out"}
    given = {key: str(tmp_path / "a" / "latents" / part) for key, part in at_hand.items()}
    settings = DiffusionSettings(**SMALL | given)
    measure, calls = Validation.measure, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr("latent_ae_eval.generation.training.CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(Validation, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_diffusion(model, images, settings, out=tmp_path / "b")
    again = evaluate_diffusion(model, images, settings, out=tmp_path / "b")
    assert "resuming from step 7" in capsys.readouterr().err
    for key in ("curve", "metrics", "intervals", "loss"):
        assert again[key] == result[key], key
    assert not (tmp_path / "b" / "latents").exists()
    other = evaluate_diffusion(model, images, settings.model_copy(update={"seed": 1, "steps": 4}))
    assert other["curve"][0]["loss"] != result["curve"][0]["loss"]


def test_latents_that_say_nothing_of_the_image_make_worse_samples(model, images, tmp_path, lpips_vgg):
    changes = {"steps": 100, "lr": 2e-3, "ema_decay": 0.9, "sampling_steps": 8, "batch_size": 32, "validations": 2}
    settings = DiffusionSettings(**SMALL | changes)
    good = build_autoencoder(
        ModelSettings(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, init="linear"), sample_size=16
    )
    good.register_to_config(scaling_factor=1.5)
    broken = build_autoencoder(
        ModelSettings(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, init="linear"), sample_size=16
    )
    with torch.no_grad():  # mean 0, log-variance 0: standard normal, whatever the image
        broken.quant_conv.weight.zero_()
        broken.quant_conv.bias.zero_()
    results = [evaluate_diffusion(vae, images, settings) for vae in (good, broken)]
    found, lost = (result["metrics"]["samples"]["frechet_vgg16"] for result in results)
    assert found < 0.8 * lost
    # there is nothing to be learned of noise, and much of pictures
    assert results[0]["loss"]["relative_loss"] < 0.7 < 0.97 < results[1]["loss"]["relative_loss"]


@pytest.mark.parametrize("name", ["AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel"])
def test_other_first_stages_work(name, images, tmp_path, lpips_vgg):
    settings = DiffusionSettings(**SMALL | {"steps": 2, "samples": 4, "validations": 2, "precision": "bf16"})
    result = evaluate_diffusion(tiny(name), images, settings, out=tmp_path)
    assert result["metrics"]["samples"]["frechet_vgg16"] > 0
    assert type(DiTPipeline.from_pretrained(tmp_path / "pipeline").vae).__name__ == name


def test_mistakes_end_with_a_message(model, images, latents, tmp_path, capsys, monkeypatch, lpips_vgg):
    def message(first_stage, *changes: str, data=images) -> str:
        words = [*(f"{key}={value}" for key, value in SMALL.items()), *changes, "--out", str(tmp_path / "out")]
        with pytest.raises(UserError) as caught:
            main(["diffusion", str(first_stage), str(data), *words])
        return str(caught.value)

    assert "width" in message(model, "width=100")
    assert "frechet" in message(model, "frechet=[]")
    assert "no such folder" in message(model, "latents=/nowhere")
    tiny("AutoencoderKLFlux2").save_pretrained(tmp_path / "flux2")
    assert "scaling_factor" in message(tmp_path / "flux2")
    tiny("AutoencoderKL").save_pretrained(tmp_path / "other")
    assert "another model" in message(tmp_path / "other", f"latents={latents.folder}")
    assert "framed" in message(model, f"latents={latents.folder}", "resolution=32")
    assert "80 of its 80 images" in message(model, f"latents={latents.folder}", f"held_out_latents={latents.folder}")
    assert "patch_size" in message(model, "patch_size=3")
    assert "too small" in message(model, "resolution=8")
    others = shutil.copytree(images, tmp_path / "others")
    for path in sorted(others.rglob("*.png")):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert "of other images" in message(model, f"latents={latents.folder}", data=others)
    monkeypatch.setattr(
        "latent_ae_eval.generation.base.processes", lambda device: (SimpleNamespace(num_processes=2), device)
    )
    assert "one process" in message(model)
