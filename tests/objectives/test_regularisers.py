"""Regularisers of the latents: each against its formula, in the step, and in what it does to a tiny real network."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from latent_ae.config import UserError, load_settings
from latent_ae.models.posterior import kl_per_dimension
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives import channel_masking, equivariance, kl, latent_noise
from latent_ae.objectives.channel_masking import first_channels
from latent_ae.objectives.equivariance import Change, change_at, scaled_and_turned
from latent_ae.objectives.kl import kl_loss
from latent_ae.objectives.latent_noise import noised, with_noise_added
from latent_ae_train.preflight import dearest_step
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep
from tests.tiny import GAN, LATENT, SIDE, build_step, drawing, global_batch, micro_batches, settings_for

FACTOR = SIDE // LATENT[1]


def drawn_at(step: int, settings: TrainSettings, side_px: int = LATENT[1], factor: int = FACTOR) -> Change | None:
    """What is scaled and turned in a step."""
    return change_at(step, settings.latents, settings.facts(), side_px, factor)


def draws(settings: TrainSettings, numbers: Sequence[int]) -> list[torch.Tensor]:
    """Levels and noise of latents.noise, and channels of latents.min_channels, for the samples `numbers`."""
    return [tensor for one in drawing(settings) for tensor in one.draw(numbers, LATENT)]


def inputs_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """What the module is called with, from now on."""
    seen: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return seen


def test_changes_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(3, 4, 8, 8, generator=generator), 3 * torch.randn(3, 4, 8, 8, generator=generator)
    level, kept = torch.tensor([0.0, 0.25, 0.9]), torch.tensor([4, 1, 2])
    out = scaled_and_turned(first_channels(noised(latent, level, noise), kept), 5, 3)
    for n in range(3):
        mixed = (1 - level[n]) * latent[n] + level[n] * noise[n]
        mixed[int(kept[n]) :] = 0.0
        # the two calls of EQ-VAE's code
        small = F.interpolate(mixed[None], scale_factor=5 / 8, mode="bilinear", align_corners=False)
        torch.testing.assert_close(out[n : n + 1], torch.rot90(small, k=3, dims=[-1, -2]))


def test_added_noise_is_raes() -> None:
    """What is decoded against `x + tau * rand * randn` of RAE's code, with numbers that are each sample's own; noise
    that is mixed in has the same numbers."""
    settings = settings_for(latents={"noise": 0.8, "noise_form": "added"}, batch_size=4)
    level, noise = draws(settings, range(4))
    mixed = draws(settings_for(latents={"noise": 0.8}, batch_size=4), range(4))
    assert torch.equal(level, mixed[0]) and torch.equal(noise, mixed[1])
    many, normal = draws(settings, range(400))
    assert float(many.max()) == pytest.approx(1.0, rel=0.02) and float(many.mean()) == pytest.approx(0.5, abs=0.05)
    assert float((normal / 0.8).std()) == pytest.approx(1.0, rel=0.02)
    step = build_step(settings)
    model = step.bare_reconstructor
    decoded = inputs_of(model.autoencoder.decoder)
    with torch.no_grad():
        latent = model(*global_batch(0, settings)).latent
        # RAE's sigma is tau times a uniform number; the noise here is tau times a normal one
        noisy = torch.stack([latent[n] + 0.8 * float(level[n]) * (noise[n] / 0.8) for n in range(4)])
        expected = model.autoencoder.post_quant_conv(noisy)
    decoded.clear()
    logs = step(0, micro_batches(0, settings))
    torch.testing.assert_close(decoded[0], expected)
    assert float(logs["noise_level"]) == pytest.approx(float(level.mean()))
    small = with_noise_added(latent[..., :4, :3], level, noise)  # after latents.equivariance
    torch.testing.assert_close(small, latent[..., :4, :3] + level.view(4, 1, 1, 1) * noise[..., :4, :3])


@pytest.mark.parametrize("to", ["scaling", "rotation"])
def test_scaling_and_rotation_work_alone(to: str) -> None:
    """The same steps as with both are chosen; scaling keeps sides and low resolutions, rotation the turns."""
    latents = {"equivariance": 0.5}
    both = settings_for(data={"resolution": 256}, latents=latents)
    alone = settings_for(data={"resolution": 256}, latents={**latents, "equivariance_to": to})
    for step in range(400):
        one, expected = drawn_at(step, alone, 32, 8), drawn_at(step, both, 32, 8)
        if to == "scaling":
            assert one == (expected and expected._replace(quarter_turns=0))
        else:
            assert one == (expected._replace(side_px=32) if expected and expected.of_latent else None)
    assert alone.facts().one_size == (to == "rotation") and not both.facts().one_size
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(scaled_and_turned(image, 16, 1), torch.rot90(image, 1, (-1, -2)))


def test_sizes_and_turns_are_those_of_eq_vae() -> None:
    """A 32 px latent: factors 8/32 ... 31/32, turns 1 to 3, p = 0.5, a quarter of the rest at low resolution."""
    settings = settings_for(data={"resolution": 256}, latents={"equivariance": 0.5}, gan={**GAN, "layers": 3})
    drawn = [drawn_at(step, settings, 32, 8) for step in range(4000)]
    kinds = Counter(None if one is None else one.of_latent for one in drawn)
    assert kinds[True] / 4000 == pytest.approx(0.5, abs=0.03) and kinds[False] / 4000 == pytest.approx(0.125, abs=0.02)
    sides = Counter(one.side_px for one in drawn if one is not None)
    assert set(sides) == set(range(8, 32)) and max(sides.values()) < 2 * min(sides.values())
    turns = Counter(one.quarter_turns for one in drawn if one is not None and one.of_latent)
    assert set(turns) == {1, 2, 3} and max(turns.values()) < 1.2 * min(turns.values())
    assert {one.quarter_turns for one in drawn if one is not None and not one.of_latent} == {0}
    assert drawn == [drawn_at(step, settings, 32, 8) for step in range(4000)]
    other = settings.model_copy(update={"seed": 1})
    assert drawn != [drawn_at(step, other, 32, 8) for step in range(4000)]


def test_no_image_is_smaller_than_the_losses_can_look_at() -> None:
    settings = settings_for(data={"resolution": 64}, latents={"equivariance": 1.0}, gan={**GAN, "layers": 3})
    sides = {drawn_at(step, settings, 16, 4).side_px for step in range(400)}
    assert sides == set(range(6, 16))  # 3 * 2^3 px


def test_samples_draw_for_themselves() -> None:
    """The same sample has the same noise and channels in any batch; levels and counts are uniform."""
    settings = settings_for(latents={"noise": 2.0, "min_channels": 2})
    whole, part = draws(settings, range(300)), draws(settings, [7, 250])
    for ours, theirs in zip(whole, part, strict=True):
        assert torch.equal(ours[[7, 250]], theirs)
    level, noise, kept = whole
    assert float(level.mean()) == pytest.approx(0.5, abs=0.05) and float(level.max()) > 0.95
    assert float(noise.std()) == pytest.approx(2.0, rel=0.02)
    counts = Counter(kept.tolist())
    assert set(counts) == {2, 3, 4} and min(counts.values()) > 70


@pytest.mark.parametrize("of_latent", [True, False])
def test_every_loss_sees_the_matching_image(of_latent: bool) -> None:
    """Decoder and encoder get what was drawn, and the discriminator the transformed photograph as the real one."""
    settings = settings_for(latents={"equivariance": 0.5}, gan=GAN, loss={"kl": 1e-3}, batch_size=4)
    number = next(
        step for step in range(100) if (one := drawn_at(step, settings)) is not None and one.of_latent == of_latent
    )
    drawn = drawn_at(number, settings)
    step = build_step(settings)
    model = step.bare_reconstructor
    encoded, decoded = inputs_of(model.autoencoder.encoder), inputs_of(model.autoencoder.decoder)
    judged = inputs_of(step.objectives["gan"].adversary)
    images, noise = global_batch(number, settings)
    size = drawn.side_px * FACTOR
    small = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    target = torch.rot90(small, drawn.quarter_turns, (-1, -2))
    with torch.no_grad():
        if of_latent:
            latent = model(images, noise).latent
            latent = F.interpolate(latent, size=(drawn.side_px,) * 2, mode="bilinear", align_corners=False)
            latent = torch.rot90(latent, drawn.quarter_turns, (-1, -2))
        else:
            latent = model(target, noise[..., : drawn.side_px, : drawn.side_px]).latent
        latent = model.autoencoder.post_quant_conv(latent)
    encoded.clear(), decoded.clear()
    means = step(number, micro_batches(number, settings))
    assert torch.equal(encoded[0], images if of_latent else target)
    torch.testing.assert_close(decoded[0], latent)
    assert torch.equal(judged[0][:4], target) and judged[0].shape[0] == 8
    assert float(means["scale"]) == drawn.side_px / LATENT[1]


@pytest.mark.parametrize("kind", ["latent", "image", "none"])
@pytest.mark.parametrize("clamp", [1e4, 2.0])
def test_a_scaled_step_counts_as_much_as_in_eq_vaes_sums(kind: str, clamp: float) -> None:
    """One step of each kind against the loss of EQ-VAE's code: sums over the image that is reconstructed and over the
    posterior's latent, and the adaptive weight of the sums' gradient under a clamp that does not bind or does."""
    wanted = {"latent": True, "image": False, "none": None}[kind]
    elements = 3 * SIDE * SIDE
    settings = settings_for(
        loss={"kl": 1e-3},
        latents={"equivariance": 0.5},
        gan={**GAN, "adaptive_cap": clamp / elements},
        optim={"lr": 1e-30},
        batch_size=4,
        micro_batch_size=2,
    )
    kinds = {step: drawn_at(step, settings) for step in range(100)}
    number = next(step for step, one in kinds.items() if (one and one.of_latent) == wanted)
    drawn = kinds[number]
    step = build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    discriminator = build_step(settings).objectives["gan"].adversary
    for _ in range(2):  # the first measures the adaptive weight, which lags by one step
        step(number, micro_batches(number, settings))
    reference, (images, noise) = build_step(settings).bare_reconstructor.autoencoder, global_batch(number, settings)
    side, turns = (drawn.side_px, drawn.quarter_turns) if drawn else (LATENT[1], 0)

    def transformed(x: torch.Tensor, factor: int) -> torch.Tensor:
        small = F.interpolate(x, size=(side * factor,) * 2, mode="bilinear", align_corners=False)
        return torch.rot90(small, turns, (-1, -2))

    target = transformed(images, FACTOR)
    posterior = reference.encode(images if kind == "latent" else target).latent_dist
    latent = posterior.mean + posterior.std * noise[..., : posterior.mean.shape[-1], : posterior.mean.shape[-1]]
    image = reference.decode(transformed(latent, 1) if kind == "latent" else latent).sample
    nll = (image - target).abs().sum() / 4
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / 4
    adversarial = -discriminator(image).mean()
    last = reference.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, adversarial)]
    ratio = norms[0] / (norms[1] + 1e-4)
    assert (ratio > clamp) == (clamp < 10)  # binds, does not
    (nll + 1e-3 * kl + 0.5 * ratio.clamp(max=clamp).detach() * adversarial).backward()
    for name, parameter in reference.named_parameters():
        expected = parameter.grad / elements
        error = (gradients[f"autoencoder.{name}"] - expected).norm()
        assert float(error) <= 5e-3 * float(expected.norm()) + 1e-9, name


def test_the_whole_gradient_is_the_textbook_one() -> None:
    """All changes at once, against one autograd pass over the loss written out."""
    settings = settings_for(
        loss={"kl": 1e-2, "free_bits": 0.1},
        latents={"equivariance": 1.0, "noise": 3.0, "min_channels": 1},
        optim={"lr": 1e-30},
        batch_size=4,
        micro_batch_size=2,
    )
    step = build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    means = step(3, micro_batches(3, settings))
    reference, (images, noise) = build_step(settings).bare_reconstructor.autoencoder, global_batch(3, settings)
    drawn = drawn_at(3, settings)
    numbers = range(3 * 4, 3 * 4 + 4)
    levels, latent_noise, kept = draws(settings, numbers)
    posterior = reference.encode(images).latent_dist
    latent = posterior.mean + posterior.std * noise
    level = levels.view(4, 1, 1, 1)
    latent = (1 - level) * latent + level * latent_noise
    latent = latent * (torch.arange(4)[None] < kept[:, None]).view(4, 4, 1, 1)
    size = (drawn.side_px,) * 2
    latent, target = (
        torch.rot90(
            F.interpolate(x, scale_factor=drawn.side_px / LATENT[1], mode="bilinear", align_corners=False),
            drawn.quarter_turns,
            (-1, -2),
        )
        for x in (latent, images)
    )
    assert latent.shape[-2:] == size
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar)
    floored = kl.mean((2, 3)).clamp(min=0.1).sum(1).mean() * LATENT[1] * LATENT[2] / (3 * SIDE * SIDE)
    reconstruction = (reference.decode(latent).sample - target).abs().sum() / images.numel()
    (reconstruction + 1e-2 * floored).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[f"autoencoder.{name}"], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    rates = [kl_per_dimension(posterior.mean, posterior.logvar)]
    assert float(means["kl"]) == pytest.approx(kl_loss(rates, 3 * SIDE * SIDE).item())
    assert float(means["kept_channels"]) == kept.float().mean()
    assert float(means["noise_level"]) == pytest.approx(float(levels.mean()))


def test_off_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    places = {
        **{"scaled_and_turned": equivariance, "change_at": equivariance, "latent_noise": latent_noise},
        **{"noised": latent_noise, "kept_channels": channel_masking, "first_channels": channel_masking},
        "free_bits_loss": kl,
    }
    for name, module in places.items():
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _f=original, **k: (used.append(_n), _f(*a, **k))[1])
    settings = settings_for(loss={"kl": 1e-3}, gan=GAN)
    assert not any(next(micro_batches(0, settings)).draws.values())
    means = build_step(settings)(0, micro_batches(0, settings))
    assert used == [] and not {"scale", "noise_level", "kept_channels", "kl_free"} & set(means)


LINEAR = {"init": "linear", "block_out_channels": [16, 16], "norm_num_groups": 4}
"""A start that reconstructs, so that a short run shows what is learned."""


def trained(step: TrainStep, count: int) -> Reconstructor:
    for number in range(count):
        step(number, micro_batches(number, step.settings))
    return step.bare_reconstructor


def error(
    model: Reconstructor, transform: Callable[[torch.Tensor, int], torch.Tensor], of_image: bool = False
) -> float:
    """Mean absolute error on images that were not trained on, from latents that were transformed; and their images.

    `transform` takes a tensor and how many of its px are one of the latent.
    """
    images, _ = global_batch(10_000, settings_for(batch_size=32))
    with torch.no_grad():
        image = model(images, None, (lambda latent: transform(latent, 1),)).image
    return float((image - (transform(images, FACTOR) if of_image else images)).abs().mean())


def test_equivariance_training_makes_latents_equivariant() -> None:
    """Decoding the scaled and turned latent, against the scaled and turned image, at sizes and turns together."""
    errors = []
    for share in (0.0, 0.5):
        step = build_step(settings_for(batch_size=4, optim={"lr": 3e-3}, latents={"equivariance": share}))
        model = trained(step, 110)
        sizes = ((4, 1), (6, 2), (5, 3))
        turned = (lambda x, px, s=s, q=q: scaled_and_turned(x, s * px, q) for s, q in sizes)
        errors.append(sum(error(model, transform, of_image=True) for transform in turned))
    assert errors[1] < 0.8 * errors[0]


def test_masking_brings_what_matters_to_the_front() -> None:
    """From a start whose detail lies in the first channels and whose colours lie in the last."""
    errors: list[list[float]] = []
    for latents in ({}, {"min_channels": 1}):
        step = build_step(settings_for(batch_size=4, optim={"lr": 3e-3}, model=LINEAR, latents=latents))
        model = step.bare_reconstructor.autoencoder
        with torch.no_grad():
            for moments in (model.quant_conv.weight, model.quant_conv.bias):
                moments.copy_(torch.cat([half.flip(0) for half in moments.chunk(2)]))
            model.post_quant_conv.weight.copy_(model.post_quant_conv.weight.flip(1))
        trained(step, 60)
        kept = [torch.full((32,), number) for number in (1, 2, 3)]
        masks = (lambda latent, _, k=k: first_channels(latent, k) for k in kept)
        errors.append([error(step.bare_reconstructor, mask) for mask in masks])
    plain, masked = errors
    assert all(ours < 0.9 * theirs for ours, theirs in zip(masked, plain, strict=True))
    assert masked[0] > 1.3 * masked[1] > 1.3 * masked[2]


def test_noise_makes_a_decoder_that_bears_noise() -> None:
    errors = []
    noise = 3 * global_batch(10_000, settings_for(batch_size=32))[1]
    for gamma in (0.0, 3.0):
        step = build_step(settings_for(batch_size=4, optim={"lr": 1e-3}, model=LINEAR, latents={"noise": gamma}))
        errors.append(error(trained(step, 60), lambda latent, _: noised(latent, torch.full((32,), 0.2), noise)))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["latents.noise_form=added"], "latents.noise_form: added, and latents.noise is 0"),
        (["latents.equivariance_to=scaling"], "latents.equivariance_to: scaling, and latents.equivariance is 0"),
        (["latents.min_channels=4"], "latents.min_channels: 4 of 4 latent channels masks none"),
        (["latents.equivariance=0.5", "compile=true"], "latents.equivariance: changes the images' size"),
        (
            ["latents.equivariance=0.5", "data.resolution=24", "validate.crop_px=24"],
            "latents.equivariance: scales images down, and the losses need 24 px of 24",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_settings(TrainSettings, None, words)


def test_a_trial_of_the_memory_takes_a_step_on_whole_images() -> None:
    settings = settings_for(data={"resolution": 64}, latents={"equivariance": 0.5}, steps=40)
    assert drawn_at(dearest_step(build_step(settings)), settings, 32, 2) is None
