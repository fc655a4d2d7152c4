"""The training step's properties, on tiny real networks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latent_ae.config import UserError
from latent_ae.models.posterior import kl_per_dimension
from latent_ae.objectives.adversarial_losses import generator_loss
from latent_ae.objectives.diffaug import NUMBERS, augment
from latent_ae.objectives.kl import kl_loss
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.checkpoint import refuse_bad_numbers
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep
from tests.runs import SHAPES
from tests.tiny import (
    GAN,
    LATENT,
    SIDE,
    adversary_of,
    build_step,
    global_batch,
    micro_batches,
    moved,
    settings_for,
    weights,
)
from tests.tiny_vision import save_vision_model


def run(step: TrainStep, count: int = 1) -> dict[str, torch.Tensor]:
    means: dict[str, torch.Tensor] = {}
    for number in range(count):
        means = step(number, micro_batches(number, step.settings))
    return means


def networks(step: TrainStep) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return weights(step.bare_reconstructor), weights(adversary_of(step))


def part(names: set[str], word: str) -> set[str]:
    return {name for name in names if word in name}


@pytest.mark.parametrize("pixel", ["l1", "l2", "charbonnier"])
def test_the_pixel_term_alone_moves_encoder_and_decoder(pixel: str) -> None:
    step = build_step(settings_for(loss={"pixel": pixel}))
    before, _ = networks(step)
    run(step)
    changed = moved(before, networks(step)[0])
    assert "autoencoder.encoder.conv_in.weight" in changed
    assert "autoencoder.decoder.conv_out.weight" in changed


def test_the_perceptual_term_alone_moves_encoder_and_decoder(lpips_vgg: LPIPS) -> None:
    step = build_step(settings_for(loss={"pixel_weight": 0.0, "perceptual": 1.0}), lpips_vgg)
    before, _ = networks(step)
    frozen = {name: tensor.clone() for name, tensor in lpips_vgg.state_dict().items()}
    run(step)
    changed = moved(before, networks(step)[0])
    assert "autoencoder.encoder.conv_in.weight" in changed
    assert "autoencoder.decoder.conv_out.weight" in changed
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in lpips_vgg.state_dict().items())


def test_the_kl_term_alone_moves_the_encoder_only() -> None:
    step = build_step(settings_for(loss={"pixel_weight": 0.0, "kl": 1.0}))
    before, _ = networks(step)
    run(step)
    changed = moved(before, networks(step)[0])
    assert part(changed, "encoder.") and part(changed, ".quant_conv")
    assert not part(changed, "decoder.") and not part(changed, "post_quant_conv")


def test_the_adversarial_term_alone_moves_both_networks() -> None:
    step = build_step(settings_for(loss={"pixel_weight": 0.0}, gan={**GAN, "adaptive": False}))
    before = networks(step)
    run(step)
    after = networks(step)
    assert "autoencoder.decoder.conv_out.weight" in moved(before[0], after[0])
    assert moved(before[1], after[1]) == set(before[1])


def test_the_discriminator_sends_no_gradient_into_the_autoencoder() -> None:
    """While the discriminator trains alone, the autoencoder's update is bit for bit that of a run without one."""
    alone = build_step(settings_for())
    judged = build_step(settings_for(gan={**GAN, "discriminator_warmup": 10}))
    before = weights(judged.objectives["gan"].adversary)
    run(alone, 3), run(judged, 3)
    assert not moved(networks(alone)[0], networks(judged)[0])
    assert moved(before, weights(judged.objectives["gan"].adversary)) == set(before)


def test_the_generator_term_sends_no_gradient_into_the_discriminator() -> None:
    """The discriminator's update does not depend on the autoencoder's adversarial term being on."""
    off = build_step(settings_for(gan={**GAN, "discriminator_warmup": 10}))
    on = build_step(settings_for(gan={**GAN, "adaptive": False}))
    before = networks(on)
    run(off), run(on)
    assert moved(before[0], networks(on)[0])
    assert moved(networks(off)[0], networks(on)[0]), "the adversarial term is not felt: the test shows nothing"
    assert not moved(networks(off)[1], networks(on)[1])
    assert all(p.grad is None for p in on.objectives["gan"].adversary.parameters())


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_pass_of_each_network_per_micro_batch(accumulation: int, lpips_vgg: LPIPS) -> None:
    settings = settings_for(loss={"perceptual": 1.0, "kl": 1e-6}, gan=GAN, micro_batch_size=8 // accumulation)
    step = build_step(settings, lpips_vgg)
    autoencoder = step.bare_reconstructor.autoencoder
    watched = [autoencoder.encoder, autoencoder.decoder, step.objectives["gan"].adversary, lpips_vgg]
    counts = [count_calls(module) for module in watched]
    run(step, 2)
    assert [len(calls) for calls in counts] == [2 * accumulation] * 4


def test_nothing_is_computed_for_a_zero_weight(monkeypatch: pytest.MonkeyPatch, lpips_vgg: LPIPS) -> None:
    from latent_ae.objectives import balance, gan, kl, reconstruction

    used: list[str] = []
    terms = {
        **dict.fromkeys(("kl_loss", "free_bits_loss"), kl),
        "pixel_loss": reconstruction,
        **dict.fromkeys(("generator_loss", "discriminator_loss", "lecam_loss", "r1_penalty", "augment"), gan),
        "adaptive_ratio": balance,
    }
    for name, module in terms.items():
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _f=original, **k: (used.append(_n), _f(*a, **k))[1])
    lpips_calls = count_calls(lpips_vgg)
    run(build_step(settings_for(loss={"pixel_weight": 1.0}), lpips_vgg))
    assert used == ["pixel_loss"] and not lpips_calls
    used.clear()
    run(build_step(settings_for(gan={**GAN, "start": 5})))
    assert used == ["pixel_loss"], "before its start the discriminator costs nothing"
    used.clear()
    run(build_step(settings_for(gan={**GAN, "discriminator_warmup": 5, "lecam": 0.0})))
    assert used == ["pixel_loss", "discriminator_loss"], "while it trains alone, no adversarial gradient is formed"


def test_the_combined_gradient_is_the_textbook_one(lpips_vgg: LPIPS) -> None:
    """Two autograd.grad calls on the last layer, one summed loss, one full backward (Esser et al. 2021, eq. 7)."""
    settings = settings_for(
        loss={"perceptual": 1.0, "kl": 1e-2, "perceptual_every": 2},
        gan={**GAN, "adaptive_smoothing": 0.0},
        optim={"lr": 1e-30},
        batch_size=4,
    )
    step = build_step(settings, lpips_vgg)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    images, noise = global_batch(0, settings)
    # the weight lags by one step: the first call measures, the second applies it to the same batch
    step(0, micro_batches(0, settings))
    step(1, micro_batches(0, settings))

    reference = build_step(settings, lpips_vgg)
    model, judge = reference.bare_reconstructor, reference.objectives["gan"].adversary
    result = model(images, noise)
    reconstruction = (images - result.image).abs().mean() + lpips_vgg(result.image[::2], images[::2]).mean()
    adversarial = generator_loss("hinge", judge(result.image))
    (nll_layer,) = torch.autograd.grad(reconstruction, model.last_layer, retain_graph=True)
    (gan_layer,) = torch.autograd.grad(adversarial, model.last_layer, retain_graph=True)
    weight = nll_layer.norm() / (gan_layer.norm() + 1e-4)
    total = (
        reconstruction
        + 0.5 * weight * adversarial
        + 1e-2 * kl_loss([kl_per_dimension(result.mean, result.logvar)], 3 * 16 * 16)
    )
    total.backward()
    torch.testing.assert_close(step.objectives["gan"].balance.weight, weight, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-4, atol=2e-7, msg=name)


def test_master_weights_and_optimizer_stay_fp32_under_bf16() -> None:
    step = build_step(settings_for(precision="bf16", gan=GAN, ema={"decay": 0.9}, batch_size=2))
    seen: list[torch.dtype] = []
    inner = step.bare_reconstructor.autoencoder.decoder.mid_block.resnets[0].conv1  # next to the latent it is fp32
    inner.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    means = run(step)
    assert seen == [torch.bfloat16]
    tensors = [*step.bare_reconstructor.parameters(), *step.objectives["gan"].adversary.parameters()]
    tensors += list(step.ema.module.parameters())
    for optimizer in (step.optimizers.autoencoder, step.optimizers.adversaries["gan"]):
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert {value.dtype for value in means.values()} == {torch.float32}


def test_the_gradient_of_the_learned_log_variance_stays_within_one() -> None:
    reconstruction = build_step(settings_for(loss={"learned_logvar": True})).objectives["reconstruction"]
    for gradient, expected in ((0.3, 0.3), (1.5, 1.0), (-1.5, -1.0)):
        reconstruction.remember({"reconstruction/logvar": torch.tensor(gradient)}, {})
        assert float(reconstruction.logvar.grad) == pytest.approx(expected)


def test_the_learned_log_variance_is_that_of_the_textbook() -> None:
    """loss / exp(s) + s as in latent diffusion: both gradients, and where s goes."""
    settings = settings_for(loss={"learned_logvar": True}, optim={"lr": 1e-2})
    step = build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update(
            {
                n: p.grad.clone()
                for n, p in [
                    *step.bare_reconstructor.named_parameters(),
                    ("s", step.objectives["reconstruction"].logvar),
                ]
            }
        )
    )
    with torch.no_grad():
        step.objectives["reconstruction"].logvar.fill_(-0.7)
    images, noise = global_batch(0, settings)
    reference, s = build_step(settings).bare_reconstructor, torch.tensor(-0.7, requires_grad=True)
    loss = (reference(images, noise).image - images).abs().mean() / torch.exp(s) + s
    loss.backward()
    step(0, micro_batches(0, settings))
    torch.testing.assert_close(gradients["s"], s.grad)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    # it settles at the logarithm of the loss, where loss / exp(s) + s is least
    fixed = build_step(settings_for(loss={"learned_logvar": True}, optim={"lr": 1e-2}))
    for group in fixed.optimizers.autoencoder.param_groups[:1]:
        group["lr_scale"] = 0.0
    for number in range(80):
        means = fixed(number, micro_batches(0, settings))
    assert fixed.objectives["reconstruction"].logvar.item() == pytest.approx(math.log(float(means["l1"])), abs=0.02)


def test_r1_in_the_step_is_the_textbook_one() -> None:
    """Against one autograd pass over the discriminator's whole loss; computed on every second step only."""
    settings = settings_for(gan={**GAN, "r1": 0.5, "r1_every": 2, "discriminator_warmup": 9}, optim={"lr": 1e-30})
    step = build_step(settings)
    gradients: list[dict[str, torch.Tensor]] = []
    step.optimizers.adversaries["gan"].register_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in step.objectives["gan"].adversary.named_parameters()})
    )
    images, noise = global_batch(0, settings)
    logs = [step(number, micro_batches(0, settings)) for number in (0, 1)]
    assert ["r1" in log for log in logs] == [True, False]
    model, judge = step.bare_reconstructor, step.objectives["gan"].adversary
    for number, weight in enumerate((0.5 * 2, 0.0)):
        real = images.clone().requires_grad_()
        logits = judge(real)
        loss = 0.5 * (torch.relu(1 - logits).mean() + torch.relu(1 + judge(model(images, noise).image.detach())).mean())
        (slope,) = torch.autograd.grad(logits.mean(dim=(1, 2, 3)).sum(), real, create_graph=True)
        loss = loss + weight * 0.5 * slope.square().sum(dim=(1, 2, 3)).mean()
        expected = torch.autograd.grad(loss, list(judge.parameters()), allow_unused=True)
        for (name, _), gradient in zip(judge.named_parameters(), expected, strict=True):
            torch.testing.assert_close(gradients[number][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_r1_is_computed_in_fp32_under_bf16() -> None:
    """In bf16 its second derivative is off by a quarter with group norm."""
    gan = {**GAN, "r1": 0.5, "r1_every": 1, "discriminator_warmup": 9}
    logs = [run(build_step(settings_for(gan=gan, precision=name, batch_size=2))) for name in ("fp32", "bf16")]
    assert torch.equal(logs[0]["r1"], logs[1]["r1"])


def test_augmented_images_are_what_the_discriminator_sees() -> None:
    settings = settings_for(gan={**GAN, "diffaug": ["color", "translation", "cutout"], "adaptive": False})
    step = build_step(settings)
    seen: list[torch.Tensor] = []
    step.objectives["gan"].adversary.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    (batch,) = micro_batches(0, settings)
    before = networks(step)
    step(0, iter([batch]))
    assert torch.equal(seen[0][:8], augment(batch.images, batch.draws["gan"][0][:, :NUMBERS], settings.gan.diffaug))
    assert not torch.allclose(seen[0][:8], batch.images)
    assert moved(before[0], networks(step)[0])


@pytest.mark.parametrize("norm", ["none", "group", "spectral", "batch"])
@pytest.mark.parametrize("loss", ["hinge", "vanilla", "non_saturating"])
def test_every_discriminator_trains_and_is_felt(norm: str, loss: str) -> None:
    step = build_step(settings_for(gan={**GAN, "norm": norm, "loss": loss, "blur": True, "layers": 2}))
    before = networks(step)
    run(step, 2)
    after = networks(step)
    # the hinge loss is blind to the last bias until a logit leaves the margin
    assert moved(before[1], after[1]) >= {name for name in before[1] if ".bias" not in name}
    assert float(step.objectives["gan"].balance.weight) > 0


def test_decoder_only_keeps_the_latents_bit_for_bit() -> None:
    settings = settings_for(train="decoder", loss={"kl": 1.0}, gan=GAN, ema={"decay": 0.5}, optim={"weight_decay": 0.1})
    step = build_step(settings)
    images, _ = global_batch(0, settings)
    before = networks(step)[0]
    with torch.no_grad():
        latents = [model.encode(images).latent_dist for model in (step.bare_reconstructor.autoencoder, step.ema.module)]
    means = run(step, 3)
    changed = moved(before, networks(step)[0])
    assert changed == {name for name in before if ".decoder." in name or ".post_quant_conv." in name}
    assert "kl" not in means, "there is nothing that the KL term could move"
    for model, old in zip((step.bare_reconstructor.autoencoder, step.ema.module), latents, strict=True):
        with torch.no_grad():
            new = model.encode(images).latent_dist
        assert torch.equal(new.mean, old.mean) and torch.equal(new.logvar, old.logvar)


def test_encoder_only_keeps_the_decoder() -> None:
    step = build_step(settings_for(train="encoder", loss={"kl": 1e-3}, gan={**GAN, "adaptive": False}))
    before = networks(step)[0]
    run(step, 3)
    changed = moved(before, networks(step)[0])
    assert changed == {name for name in before if ".encoder." in name or ".quant_conv." in name}


def gradients_of(step: TrainStep, settings: TrainSettings, latent: Sequence[int] = LATENT) -> dict[str, torch.Tensor]:
    """Of both networks, on one step with the adversarial term felt."""
    found: dict[str, torch.Tensor] = {}
    for optimizer, network in (
        (step.optimizers.autoencoder, step.bare_reconstructor),
        (step.optimizers.adversaries["gan"], step.objectives["gan"].adversary),
    ):
        optimizer.register_step_pre_hook(
            lambda *_, network=network: found.update({n: p.grad.clone() for n, p in network.named_parameters()})
        )
    with torch.no_grad():
        step.objectives["gan"].balance.weight.fill_(0.3)
    step(0, micro_batches(0, settings, latent=latent))
    return found


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "compile"])
def test_saving_memory_or_time_gives_the_same_step(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the compiler's cache takes no account of ATEN_CPU_CAPABILITY, and would give code for another processor
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    # one level of blocks, so that the compiler has few of them
    shape, latent = ({"block_out_channels": [8]}, (4, SIDE, SIDE)) if setting == "compile" else ({}, LATENT)
    plain, other = (settings_for(gan=GAN, loss={"kl": 1e-3}, model=shape, **{setting: on}) for on in (False, True))
    expected, step = gradients_of(build_step(plain), plain, latent), build_step(other)
    block = step.bare_reconstructor.autoencoder.decoder.up_blocks[0].resnets[0]
    passes = count_calls(block.conv1) if setting == "gradient_checkpointing" else []
    actual = gradients_of(step, other, latent)
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    if setting == "gradient_checkpointing":
        assert len(passes) == 2, "the block runs again in the backward pass"
    else:
        compiled = (block, step.objectives["gan"].adversary)
        assert all(module._compiled_call_impl is not None for module in compiled)
        assert dict(torch._dynamo.utils.counters["stats"])["unique_graphs"] >= 2, "something was compiled"
    assert set(step.bare_reconstructor.state_dict()) == set(build_step(plain).bare_reconstructor.state_dict())


class Casts(TorchDispatchMode):
    """Counts the casts to bf16 of each of some tensors, by its name."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        casts = operation is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16
        if casts and (name := self.names.get(args[0].data_ptr())) is not None:
            self.counts[name] = self.counts.get(name, 0) + 1
        return operation(*args, **kwargs or {})


def test_weights_are_cast_once_in_a_step_and_frozen_ones_once(
    lpips_vgg: LPIPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many passes share them; and the gradients are those of a cast in each pass."""
    settings = settings_for(precision="bf16", loss={"perceptual": 1.0, "kl": 1e-3}, gan=GAN, micro_batch_size=4)
    step, other = build_step(settings, lpips_vgg), build_step(settings, lpips_vgg)
    trained = dict(step.bare_reconstructor.named_parameters()) | dict(adversary_of(step).named_parameters())
    frozen = {name: tensor for name, tensor in lpips_vgg.named_buffers() if name.startswith("conv")}
    with Casts(trained | frozen) as casts:
        shared = gradients_of(step, settings)
    assert set(casts.counts.values()) == {1}
    posterior = {"autoencoder.encoder.conv_out.weight", "autoencoder.decoder.conv_in.weight"}  # computes in float32
    convolutions = {name for name, tensor in trained.items() if tensor.ndim == 4 and "quant_conv" not in name}
    assert convolutions - casts.counts.keys() == posterior
    forward_backward = TrainStep.forward_backward

    def forgetting(self: TrainStep, *words: Any) -> Any:
        torch.clear_autocast_cache()
        return forward_backward(self, *words)

    monkeypatch.setattr(TrainStep, "forward_backward", forgetting)
    with Casts(dict(other.bare_reconstructor.named_parameters()) | frozen) as casts:
        expected = gradients_of(other, settings)
    assert casts.counts and set(casts.counts.values()) == {2}, "in each pass, and not of what is frozen"
    assert all(torch.equal(shared[name], gradient) for name, gradient in expected.items())


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a value on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_no_host_read_in_a_step(lpips_vgg: LPIPS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kl = {"kl": 1e-6, "kl_target": 0.5, "free_bits": 0.1}
    settings = settings_for(
        loss={"perceptual": 1.0, "perceptual_every": 2, "learned_logvar": True, **kl},
        latents={"noise": 1.0, "min_channels": 2},
        alignment={"model": str(save_vision_model(tmp_path / "vision"))},
        gan={**GAN, "lecam": 0.1, "r1": 0.1, "r1_every": 1, "diffaug": ["color", "translation", "cutout"]},
        ema={"decay": 0.9},
        optim={"clip": 1.0, "kind": "muon"},
        micro_batch_size=4,
    )
    step = build_step(settings, lpips_vgg)
    step(0, micro_batches(0, settings))
    batches = list(micro_batches(1, settings))
    with HostReads() as reads:
        # on a CPU these copy nothing, so no operator shows them
        for name in ("cpu", "tolist", "numpy"):
            original = getattr(torch.Tensor, name)
            read = lambda *a, _n=name, _f=original, **k: (reads.names.append(_n), _f(*a, **k))[1]  # noqa: E731
            monkeypatch.setattr(torch.Tensor, name, read)
        means = step(1, iter(batches))
        assert not reads.names
        assert not any(value.requires_grad for value in means.values())  # logs hold no graph in memory
        float(means["l1"]), means["l1"].cpu()  # both kinds of read are seen
    assert {"cpu", "_local_scalar_dense.default"} <= set(reads.names)


def test_the_adaptive_weight_is_capped_and_passes_over_what_is_not_finite() -> None:
    step = build_step(settings_for(gan={**GAN, "adaptive_cap": 1e-3}))
    run(step)
    assert float(step.objectives["gan"].balance.weight) == pytest.approx(1e-3)
    bad = torch.full((3, 8, 3, 3), float("nan"))
    measured = {"gan/reconstruction": bad, "gan/term": torch.ones_like(bad)}
    step.objectives["gan"].remember(measured, {})
    assert float(step.objectives["gan"].balance.weight) == pytest.approx(1e-3)


def test_the_adaptive_weight_is_smoothed_and_lecam_averages_the_logits() -> None:
    """Both against their recursions, from what the step itself measures."""
    smooth, plain = (
        build_step(settings_for(gan={**GAN, "adaptive_smoothing": s, "lecam": 0.1}, optim={"lr": 1e-30}))
        for s in (0.75, 0.0)
    )
    expected, averages = 0.0, torch.zeros(2)
    for number in range(4):
        batch = lambda: micro_batches(number, smooth.settings)  # noqa: E731, B023
        plain(number, batch())
        ratio = float(plain.objectives["gan"].balance.weight)
        expected = 0.75 * expected + 0.25 * ratio if number else ratio
        means = smooth(number, batch())
        assert float(smooth.objectives["gan"].balance.weight) == pytest.approx(expected, rel=1e-4)
        averages = 0.99 * averages + 0.01 * torch.stack([means["logits_real"], means["logits_fake"]])
        torch.testing.assert_close(smooth.objectives["gan"].lecam_averages, averages)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("what", ["image", "discriminator"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(what: str, kind: str) -> None:
    gan = {**GAN, "lecam": 1.0}
    loss, optim = {"learned_logvar": True}, {"kind": kind, "weight_decay": 0.1}
    settings = settings_for(gan=gan, loss=loss, optim=optim, ema={"decay": 0.9}, batch_size=4)
    step = build_step(settings)
    for number in range(2):
        step(number, micro_batches(number, settings))
    state = everything(step)
    (batch,) = micro_batches(2, settings)
    if what == "image":
        batch.images[1, 0, 3, 3] = torch.nan
        step(2, iter([batch]))
    else:  # a loss that overflows in the discriminator's gradient alone
        handle = step.objectives["gan"].adversary.register_forward_hook(
            lambda module, args, logits: logits * float("inf")
        )
        step(2, iter([batch]))
        handle.remove()
    after = everything(step)
    assert {key for key in state if not torch.equal(state[key], after[key])} == set()
    assert all(parameter.isfinite().all() for parameter in step.ema.module.parameters())
    assert step.skipped_steps() == ([2], [], 1)
    step(3, micro_batches(3, settings))
    assert step.skipped_steps() == ([], [], 0)
    assert any(not torch.equal(state[key], now) for key, now in everything(step).items())


def test_running_statistics_are_averaged_weights_too_and_stay_in_a_skipped_step() -> None:
    """AutoencoderDC has batch normalisations, whose statistics are buffers and no weights."""
    config = {**SHAPES["AutoencoderDC"], "decoder_norm_types": ["batch_norm", "rms_norm"]}
    settings = settings_for(model={"kind": "AutoencoderDC", "config": config}, ema={"decay": 0.5})
    step = build_step(settings)
    latent = (4, SIDE // 2, SIDE // 2)

    def statistics(network: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in network.named_buffers() if "running" in name}

    fresh = statistics(step.ema.module)
    assert fresh
    for number in range(2):
        step(number, micro_batches(number, settings, latent=latent))
    trained = statistics(step.bare_reconstructor.autoencoder)
    for name, value in statistics(step.ema.module).items():
        assert torch.equal(value, trained[name]) and not torch.equal(value, fresh[name])
    batches = [batch._replace(images=batch.images * torch.nan) for batch in micro_batches(2, settings, latent=latent)]
    step(2, iter(batches))
    assert step.skipped_steps() == ([2], [], 1)
    for network in (step.bare_reconstructor.autoencoder, step.ema.module):
        assert all(torch.equal(value, trained[name]) for name, value in statistics(network).items())
    refuse_bad_numbers(step, 2)
    next(step.bare_reconstructor.buffers()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"running_mean is not finite: training has diverged"):
        refuse_bad_numbers(step, 2)


def test_a_fixed_normalisation_computes_with_its_stored_statistics() -> None:
    config = {**SHAPES["AutoencoderDC"], "decoder_norm_types": ["batch_norm", "rms_norm"]}
    settings = settings_for(model={"kind": "AutoencoderDC", "config": config}, train="encoder")
    step = build_step(settings)
    step.bare_reconstructor.train()  # as a validation leaves it
    decoder = step.bare_reconstructor.autoencoder.decoder
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    assert any("running" in name for name in before)
    logs = step(0, micro_batches(0, settings, latent=(4, SIDE // 2, SIDE // 2)))
    assert logs["grad_norm"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


@pytest.mark.parametrize("micro", [4, 2])
def test_a_step_above_the_limit_changes_nothing_and_is_counted(micro: int) -> None:
    """The limit is on the norm over the global batch before clipping, however the batch is split."""
    parts: dict[str, Any] = {"gan": GAN, "batch_size": 4, "ema": {"decay": 0.9}}
    norm = float(build_step(settings_for(**parts))(0, micro_batches(0, settings_for(**parts)))["grad_norm"])
    for limit, above in ((0.99 * norm, True), (1.01 * norm, False)):
        settings = settings_for(**parts, micro_batch_size=micro, optim={"skip_above": limit, "clip": 1e-3 * norm})
        step = build_step(settings)
        state = everything(step)
        step(0, micro_batches(0, settings))
        same = {key for key, before in everything(step).items() if key in state and torch.equal(state[key], before)}
        assert (same == set(state)) == above
        assert step.skipped_steps() == (([], [0], 1) if above else ([], [], 0))


def everything(step: TrainStep) -> dict[str, torch.Tensor]:
    """Copies of both networks, both optimizers' moments and counters, and what the step remembers."""
    found = {f"state.{name}": tensor for name, tensor in step.state.state_dict().items()}
    for name, network in (
        ("autoencoder", step.bare_reconstructor),
        ("discriminator", step.objectives["gan"].adversary),
    ):
        found |= {f"{name}.{key}": tensor for key, tensor in network.state_dict().items()}
    optimizers = {
        "first": step.optimizers.autoencoder,
        "muon": step.optimizers.muon,
        "second": step.optimizers.adversaries["gan"],
    }
    for name, optimizer in ((name, one) for name, one in optimizers.items() if one is not None):
        for number, values in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{number}.{key}": value for key, value in values.items()}
    return {key: tensor.detach().clone() for key, tensor in found.items()}


def test_spectral_norm_takes_one_power_iteration_a_step() -> None:
    """However the batch is split; the weights stay as they are."""
    vectors = []
    for micro in (8, 2):
        gan = {**GAN, "norm": "spectral"}
        step = build_step(settings_for(gan=gan, micro_batch_size=micro, optim={"lr": 1e-30}))
        before = step.objectives["gan"].adversary.layers[2].parametrizations.weight[0]._u.clone()
        run(step, 2)
        vectors.append(step.objectives["gan"].adversary.layers[2].parametrizations.weight[0]._u)
        assert not torch.allclose(before, vectors[-1])
    torch.testing.assert_close(vectors[0], vectors[1])


def test_skipped_steps_in_a_row_are_counted_across_readings() -> None:
    """For both reasons together: a run that learns nothing must stop, whatever the reason of each step."""
    settings = settings_for(loss={"pixel": "l2"}, optim={"skip_above": 1e3})
    step = build_step(settings)
    counts = []
    for number in range(7):
        (batch,) = micro_batches(number, settings)
        if number not in (0, 4):
            batch.images[:] = batch.images * 1e6 if number == 2 else torch.nan
        step(number, iter([batch]))
        if number in (2, 3, 6):
            counts.append(step.skipped_steps())
    assert counts == [([1], [2], 2), ([3], [], 3), ([5, 6], [], 2)]


def test_new_networks_do_not_depend_on_the_global_random_state() -> None:
    settings = settings_for(gan=GAN, loss={"total_correlation": 1.0, "total_correlation_width": 8})
    torch.manual_seed(1)
    one = build_step(settings)
    torch.manual_seed(2)
    for network, other in zip(one.networks, build_step(settings).networks, strict=True):
        assert not moved(weights(network), weights(other))
