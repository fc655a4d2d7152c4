"""Decoders that carry noise to an image: the path, its Euler steps, what trains them and what teaches them."""

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.held_out import HeldOutImage
from latent_ae.data.loader import open_images
from latent_ae.data.rng import decoder_generators
from latent_ae.models.flow_matching import FlowMatchingVAE
from latent_ae.models.loading import FirstStage, first_stage
from latent_ae.models.new_decoder import with_new_decoder
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.models.settings import DecoderSettings
from latent_ae_eval.generation.sampling import StandInDecoder, samples, stock_pipeline
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.ifid.measure import interpolated_distance
from latent_ae_eval.ifid.settings import IfidSettings
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.shard import Measurer
from latent_ae_eval.sample.measure import sample
from latent_ae_eval.sample.settings import SampleSettings
from latent_ae_train.settings import TrainSettings
from latent_ae_train.validate import Validator
from tests.distributed.split import Distance
from tests.eval.generation.small import GaussianFlow
from tests.eval.small import settings_with, write_photos
from tests.tiny import build_step, micro_batches, settings_for, weights
from tests.tiny_models import TWO, pictures, tiny

SHAPE = {"kind": "FlowMatchingVAE", "block_out_channels": (8,), "config": {"unet_norm_num_groups": 4}}

KIND = "decoder.kind=FlowMatchingVAE"


def original() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**TWO, latent_channels=4, scaling_factor=0.4, shift_factor=0.1).eval()


def made(moved: bool = False, **config: Any) -> FlowMatchingVAE:
    """A decoder that begins as `original`; `moved`: with random last weights."""
    wanted = DecoderSettings(**{**SHAPE, "config": {**SHAPE["config"], **config}})
    model = with_new_decoder(original(), wanted, seed=1).eval()
    assert isinstance(model, FlowMatchingVAE)
    if moved:
        torch.manual_seed(2)
        model.decoder.conv_out.reset_parameters()
    return model


@torch.no_grad()
def test_it_begins_as_the_plain_decoder_and_keeps_the_latents(tmp_path: Any) -> None:
    """Bit for bit, with any number of steps, from a folder, too; one of pixels begins gray."""
    old, images = original(), pictures(16)
    latents = old.encode(images).latent_dist.mean
    for steps in (1, 3):
        model = made(sampling_steps=steps)
        model.save_pretrained(tmp_path / str(steps))
        loaded = FlowMatchingVAE.from_pretrained(tmp_path / str(steps)).eval()
        assert torch.equal(loaded.encode(images).latent_dist.mean, latents)
        assert torch.equal(loaded.decode(latents).sample, old.decode(latents).sample)
    assert first_stage(model).encoder_sha256 == first_stage(old).encoder_sha256
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.4, 0.1)
    pixels = made(residual=False)
    assert pixels.base is None and not pixels.decode(latents).sample.any()
    assert torch.equal(pixels.encode(images).latent_dist.mean, latents)


@torch.no_grad()
def test_the_noise_is_the_same_for_each_image_unless_a_generator_draws_it() -> None:
    model, latents = made(moved=True), torch.randn(3, 4, 8, 8)
    whole = model.decode(latents).sample
    torch.testing.assert_close(model.decode(latents[1:2]).sample, whole[1:2], rtol=0, atol=1e-5)
    torch.manual_seed(0)
    drawn = model.decode(latents, generator=torch.Generator().manual_seed(3)).sample
    assert not torch.allclose(drawn, whole, atol=1e-3)


@torch.no_grad()
def test_slices_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices give the same images; tiles are those of an AutoencoderKL, each with the noise over it."""
    model, old, latents = made(moved=True), original(), torch.randn(2, 4, 12, 16)
    whole = model.decode(latents).sample
    model.enable_slicing()
    calls = []
    carried = model.carried
    monkeypatch.setattr(model, "carried", lambda *given: calls.append(len(given[0])) or carried(*given))
    torch.testing.assert_close(model.decode(latents).sample, whole, rtol=0, atol=1e-5)
    assert calls == [1, 1]
    model, fresh = made(moved=True), made()
    for one in (model, fresh, old):
        one.enable_tiling()
        one.tile_sample_min_size, one.tile_latent_min_size = 16, 8
    torch.testing.assert_close(fresh.decode(latents).sample, old.decode(latents).sample, rtol=0, atol=1e-6)
    assert not torch.allclose(model.decode(latents).sample, whole, atol=1e-4)
    # a network that finds y in the noise itself
    monkeypatch.setattr(model, "_clean", lambda state, *_: state)
    noise = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model.decode(latents).sample, old.decode(latents).sample + 0.15 * noise, rtol=0, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4])
def test_euler_steps(steps: int) -> None:
    """Against the method as textbooks write it: x += v / n."""
    model, latents, noise = made(moved=True), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 16, 16)
    base = model.base(latents)
    state = noise.clone()
    for number in range(steps):
        times = torch.full((2,), number / steps)
        clean = model._clean(state, times, base, latents)
        state = state + (clean - state) / (1.0 - number / steps) / steps
    torch.testing.assert_close(model.carried(latents, noise, steps), base + 0.15 * state, rtol=0, atol=1e-5)


@torch.no_grad()
def test_many_steps_draw_from_the_distribution_whose_mean_the_network_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact expectation of Gaussian pixels N(m, s^2) given x_t, the images are distributed like them."""
    mean, spread, scale = 0.3, 0.6, 0.5

    def expectation(state: Tensor, times: Tensor, base: Tensor, latents: Tensor) -> Tensor:
        t = times.view(-1, 1, 1, 1)  # x_t = (1 - t) e + t y is Gaussian together with y
        gain = t * spread**2 / ((1 - t) ** 2 + t**2 * spread**2)
        return mean + gain * (state - t * mean)

    model = made(residual=False, noise_scale=scale)
    monkeypatch.setattr(model, "_clean", expectation)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = model.carried(torch.zeros(1, 4, 32, 32), noise, 200) / scale
    torch.testing.assert_close(images, mean + spread * noise, rtol=0, atol=0.03)


@torch.no_grad()
@pytest.mark.parametrize("name", ["FlowMatchingVAE", "ConsistencyDecoderVAE"])
def test_evaluations_decode_each_image_from_its_own_noise(name: str) -> None:
    """A function of the seed and the image's number: alone or in a batch, in any order, bit for bit."""
    model = made(moved=True) if name == "FlowMatchingVAE" else tiny(name)
    stage, image = first_stage(model), pictures(16)[:1]
    items = [HeldOutImage(number, f"{number}", image[0], digest=f"{number}") for number in (7, 8)]
    measurer = Measurer(stage, settings_with(latents=("mode",), seed=3), torch.device("cpu"), {}, {})
    (_, both), (_, again), (_, turned) = (measurer.reconstruct(one) for one in (items, items, items[::-1]))
    assert torch.equal(both["mode"], again["mode"])
    # equal latents: without noise of their own the images would be equal
    assert (both["mode"][0] - both["mode"][1]).abs().max() > 1e-3
    torch.testing.assert_close(turned["mode"].flip(0), both["mode"], rtol=0, atol=1e-5)
    for number, item in enumerate(items):
        alone = measurer.reconstruct([item])[1]["mode"]
        torch.testing.assert_close(alone[0], both["mode"][number], rtol=0, atol=1e-5)
    other = Measurer(stage, settings_with(latents=("mode",), seed=4), torch.device("cpu"), {}, {})
    assert not torch.allclose(other.reconstruct(items)[1]["mode"], both["mode"], atol=1e-3)
    # plain `decode` goes on giving all images the same noise
    same = stage.decode(stage.encode(image).mean.expand(2, -1, -1, -1))
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5)
    assert [g.initial_seed() for g in decoder_generators(3, [7, 8])] == [
        g.initial_seed() for n in (7, 8) for g in decoder_generators(3, [n])
    ]


def test_every_distance_gives_each_image_noise_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lpips_vgg: Any
) -> None:
    """A flow to one latent makes different images; those whose sets are compared begin with what is documented."""
    stage = first_stage(made(moved=True, noise_scale=0.5))
    pipeline = stock_pipeline(GaussianFlow(0.81, 0.0, in_channels=4, out_channels=4), StandInDecoder(stage))
    found, again = (
        torch.cat(list(samples(pipeline, [0] * 5, DiffusionSettings(images_at_a_time=size)))).float() for size in (2, 5)
    )
    assert torch.pdist(found.flatten(1), p=1).min() / found[0].numel() > 1, "levels of 255, 0.1 by rounding"
    assert (found - again).abs().max() <= 1

    decoded: list[int] = []
    decode = FirstStage.decode

    def recorded(self: Any, latents: Tensor, generators: Any = None) -> Tensor:
        assert len(generators) == len(latents)
        decoded.extend(generator.initial_seed() for generator in generators)
        return decode(self, latents, generators)

    monkeypatch.setattr(FirstStage, "decode", recorded)
    held_out = write_photos(tmp_path / "val", 6, side=16)
    write_photos(tmp_path / "train", 12, side=16, seed=1)
    seeds = [generator.initial_seed() for generator in decoder_generators(3, range(9))]
    settings = {"resolution": 16, "samples": 9, "images_at_a_time": 4, "num_workers": 0, "seed": 3}
    flow = {"width": 64, "depth": 1, "steps": 2, "sampling_steps": 2, "validation_images": 2, "validations": 2}
    result = sample(stage.module, tmp_path, settings=SampleSettings(prior="flow", **settings, **flow))
    assert decoded == seeds + seeds[:6], "samples and reconstructions"
    assert any("would decode all images from the same noise" in note for note in result["notes"])
    decoded.clear()
    quick = {"neighbours": 2, "frechet": ("vgg16",), "num_workers": 0, "num_pictures": 1}
    interpolated_distance(stage.module, held_out, IfidSettings(seed=3, **quick), out=tmp_path / "ifid")
    assert decoded[:12] == 2 * seeds[:6], "reconstructions and midpoints"
    assert len(decoded) == 14 and set(decoded[12:]) <= set(seeds[:6]), "the midpoints that the page shows"
    decoded.clear()
    (held_out / "002.png").write_bytes(b"not an image")
    sample(stage.module, tmp_path, settings=SampleSettings(prior="gaussian", **settings))
    assert decoded == [*seeds, *seeds[:2], *seeds[3:6]], "an image keeps its number where another is unreadable"


def test_validation_measures_like_the_evaluation(tmp_path: Path) -> None:
    """With noise of its own for each image, in batches of other sizes."""
    photos = write_photos(tmp_path / "photos", 5)
    values = {"source": str(photos), "eval_source": str(photos), "resolution": 32, "num_workers": 0}
    settings = TrainSettings.model_validate(
        {"data": values, "validate": {"images": 4, "crop_px": 32}, "loss": {"perceptual": 0.0}, "gan": {"weight": 0.0}}
    )
    validator = Validator(settings, Accelerator(cpu=True), open_images(settings.data, "held_out"), 3, 2, None)
    model = made(moved=True, noise_scale=0.5)
    summary = validator.measure_model(Reconstructor(model))
    one = settings_with(latents=("mode",), limit=4, batch_size=1)
    result = evaluate_reconstruction(model, photos, one)["metrics"]["mode"]
    assert summary["psnr"] == pytest.approx(result["psnr"], abs=1e-4)


def of_run(folder: Any, **changes: Any) -> TrainSettings:
    """Of a run on the first stage in a folder; one that is no FlowMatchingVAE yet needs a `decoder`."""
    values = {
        "init_from": str(folder),
        "train": "decoder",
        "model": TrainSettings().model.model_dump(),
        "batch_size": 2,
        "loss": {"pixel_weight": 0.0},
    }
    found: TrainSettings = settings_for(**{**values, **changes})
    return found


@pytest.mark.parametrize("flow", [{}, {"time_mean": -0.7, "time_std": 0.4}, {"time_mean": 4.0}])
def test_the_loss_is_the_squared_error_of_the_velocity(tmp_path: Any, flow: dict[str, float]) -> None:
    """Its gradient by autograd of the velocity itself, at x_t made by hand; nothing but the network moves.

    Late on the path the error is divided by 0.05 in place of 1 - t.
    """
    original().save_pretrained(tmp_path)
    settings = of_run(tmp_path, flow=flow, decoder=DecoderSettings(**SHAPE).model_dump())
    step = build_step(settings)
    model: Any = step.bare_reconstructor.autoencoder
    torch.nn.init.normal_(model.decoder.conv_out.weight, std=0.1)
    batch = next(micro_batches(0, settings))
    done = step.forward_backward(batch, 0)
    normal, noise = batch.draws["flow_matching"]
    times = torch.sigmoid(flow.get("time_mean", 0.0) + flow.get("time_std", 1.0) * normal)
    copied = copy.deepcopy(model)
    copied.zero_grad()
    with torch.no_grad():
        latents = model.encode(batch.images).latent_dist
        latents = latents.mean + latents.std * batch.noise
        base = model.base(latents)
    t, clean = times.view(-1, 1, 1, 1), (batch.target - base) / 0.15
    there = (1 - t) * noise + t * clean
    found = copied._clean(there, times, base, latents)
    if flow.get("time_mean") == 4.0:
        assert times.max() > 0.96  # for one image at least 1 - t is bounded
        loss = ((found - clean) / (1 - t).clamp(min=0.05)).square().mean()
    else:
        assert times.max() < 0.95
        loss = ((found - there) / (1 - t) - (clean - noise)).square().mean()
    torch.testing.assert_close(done.logs["flow_matching"], loss.detach())
    loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not name.startswith("decoder.")), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_the_teachers_images_of_the_same_noise_are_the_targets(tmp_path: Any) -> None:
    """And the decoder takes one step; the teacher does not move with it."""
    teacher = made(moved=True, sampling_steps=3)
    teacher.save_pretrained(tmp_path)
    settings = of_run(tmp_path, flow={"teacher_steps": 3})
    step = build_step(settings)
    model: Any = step.bare_reconstructor.autoencoder
    assert model.config.sampling_steps == 1
    before = weights(step.objectives["flow_matching"].teacher)
    for number in range(2):
        batch = next(micro_batches(0, settings))
        with torch.no_grad():
            latents = model.encode(batch.images).latent_dist
            latents = latents.mean + latents.std * batch.noise
            noise = batch.draws["flow_matching"][1]
            wanted, got = teacher.carried(latents, noise, 3), model.carried(latents, noise, 1)
        logs = step(number, iter([batch]))
        torch.testing.assert_close(
            logs["distance_to_teacher"], ((got - wanted) / 0.15).square().mean(), rtol=1e-4, atol=1e-6
        )
    assert all(
        torch.equal(before[name], now) for name, now in weights(step.objectives["flow_matching"].teacher).items()
    )
    facts = step.objectives["flow_matching"].facts()
    with pytest.raises(UserError, match="^flow.teacher_steps: the run learned from weights with sha256 other"):
        step.objectives["flow_matching"].refuse_another({**facts, "flow_teacher_sha256": "other"})


def test_all_losses_see_the_teachers_images(tmp_path: Any) -> None:
    """A step of distillation with pixel and perceptual losses: their values and gradient, by hand."""
    teacher = made(moved=True, sampling_steps=3)
    teacher.save_pretrained(tmp_path)
    loss = {"pixel": "l2", "pixel_weight": 0.5, "perceptual": 2.0}
    settings = of_run(tmp_path, loss=loss, flow={"teacher_steps": 3, "weight": 0.25})
    distance = Distance()
    step = build_step(settings, perceptual=distance)
    model: Any = step.bare_reconstructor.autoencoder
    batch = next(micro_batches(0, settings))
    logs = step.forward_backward(batch, 0).logs
    copied = copy.deepcopy(model)
    copied.zero_grad()
    with torch.no_grad():
        latents = model.encode(batch.images).latent_dist
        latents = latents.mean + latents.std * batch.noise
        noise = batch.draws["flow_matching"][1]
        wanted = teacher.carried(latents, noise, 3)
    got = copied.carried(latents, noise, 1)
    pixels, seen = (got - wanted).square().mean(), distance(got, wanted).mean()
    torch.testing.assert_close(logs["l2"], pixels.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logs["lpips"], seen.detach(), rtol=1e-4, atol=1e-6)
    (0.5 * pixels + 2.0 * seen + 0.25 * pixels / 0.15**2).backward()
    for ours, theirs in zip(model.decoder.parameters(), copied.decoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("flow.teacher_steps=4", "flow.teacher_steps: is for a FlowMatchingVAE, and not for this AutoencoderKL"),
        ("flow.teacher_steps=1", "flow.teacher_steps: 1 teaches what the decoder does already"),
        ("flow.weight=0", "flow.weight: 0 leaves the decoder"),
        (
            "init_from=x model={} decoder.kind=FlowMatchingVAE flow.teacher_steps=4",
            "flow.teacher_steps: the decoder of init_from",
        ),
        (
            'decoder.kind=FlowMatchingVAE decoder.config="{sampling_steps: 2.5}"',
            "decoder.config.sampling_steps: 2.5 is no",
        ),
        (
            'decoder.kind=FlowMatchingVAE decoder.config="{residual: maybe}"',
            "decoder.config.residual: maybe is neither",
        ),
        (
            'decoder.kind=FlowMatchingVAE decoder.config="{noise_scale: .nan}"',
            "decoder.config.noise_scale: nan is no pos",
        ),
        ("flow.teacher_steps=4 flow.time_mean=1", "flow.time_mean: is for flow matching"),
        ('decoder.config="{patch_size: 2}"', "decoder.config: is for decoder.kind FlowMatchingVAE"),
        ('decoder.kind=FlowMatchingVAE decoder.config="{steps: 2}"', "decoder.config.steps: is no key of this decoder"),
    ],
)
def test_settings_that_contradict_each_other(words: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainSettings.load("quickstart", *shlex.split(words))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"block_out_channels": (8, 16, 16)}, "3 levels end at 8 px, which does not divide the factor 2"),
        ({"layers_per_block": (1, 2)}, ".layers_per_block: all levels of a FlowMatchingVAE"),
    ],
)
def test_shapes_that_cannot_be(wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^decoder.*{said}"):
        with_new_decoder(original(), DecoderSettings(**{**SHAPE, **wanted}))
    with pytest.raises(UserError, match="decoder.kind: a FlowMatchingVAE is made from an AutoencoderKL"):
        with_new_decoder(made(), DecoderSettings(**SHAPE))
