"""Control of the rate: what each setting does to the KL term, on formulas and on tiny real networks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.models.posterior import kl_per_dimension
from latent_ae.objectives.kl import free_bits_loss, kl_loss, kl_terms, weight_at
from latent_ae_train.settings import LossSettings, TrainSettings
from latent_ae_train.step import TrainStep
from tests.runs import words
from tests.tiny import GAN, build_step, micro_batches, moved, settings_for, weights


def trained(count: int, num_batches: int = 1000, **changes: Any) -> tuple[TrainStep, list[dict[str, float]]]:
    """A step after so many updates on batches that come around again, and its logs."""
    step = build_step(settings_for(**changes))
    logs = []
    for number in range(count):
        means = step(number, micro_batches(number % num_batches, step.settings))
        logs.append({name: float(value) for name, value in means.items()})
    return step, logs


def test_the_warm_up_is_linear_or_half_a_cosine() -> None:
    loss = LossSettings(kl=0.3, kl_warmup=4)
    assert [weight_at(step, loss, 100) for step in range(7)] == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3, 0.3, 0.3])
    assert weight_at(0, LossSettings(kl=0.3), 100) == 0.3
    curved = LossSettings(kl=0.3, kl_warmup=5, kl_warmup_shape="cosine")
    # (1 - cos) / 2 of 30, 60, ... degrees
    parts = [(2 - 3**0.5) / 4, 0.25, 0.5, 0.75, (2 + 3**0.5) / 4, 1.0, 1.0]
    assert [weight_at(step, curved, 100) for step in range(7)] == pytest.approx([0.3 * part for part in parts])


def test_the_cycles_are_those_of_the_paper() -> None:
    """Fu et al. 2019, eq. 6 and 7, written down again: tau = mod(t - 1, ceil(T/M)) / (T/M), t from 1."""
    for steps, cycles in ((100, 4), (103, 4), (7, 1), (50, 7)):
        loss = LossSettings(kl=2.0, kl_cycles=cycles)
        for t in range(1, steps + 1):
            tau = ((t - 1) % -(-steps // cycles)) / (steps / cycles)
            beta = tau / 0.5 if tau <= 0.5 else 1.0
            assert weight_at(t - 1, loss, steps) == pytest.approx(2.0 * beta), (steps, cycles, t)


def test_the_schedules_are_felt_and_logged() -> None:
    """The encoder's only gradient here is the KL term's: in a step whose weight is 0 it stays."""
    step = build_step(settings_for(steps=8, loss={"pixel_weight": 0.0, "kl": 0.5, "kl_cycles": 2}))
    logged, changed = [], []
    for number in range(8):
        before = weights(step.bare_reconstructor)
        logged.append(float(step(number, micro_batches(number, step.settings))["kl_weight"]))
        changed.append("autoencoder.encoder.conv_in.weight" in moved(before, weights(step.bare_reconstructor)))
        step.optimizers.autoencoder.state.clear()  # or the first moment would go on moving it
    assert logged == pytest.approx([0.0, 0.25, 0.5, 0.5] * 2)
    assert changed == [False, True, True, True] * 2
    warm, always = (trained(1, loss={"kl": 1e-2, "kl_warmup": w}, optim={"lr": 1e-30})[1][0] for w in (9, 0))
    assert warm["kl_weight"] == pytest.approx(1e-3) and always["kl_weight"] == pytest.approx(1e-2)
    assert warm["grad_norm"] != always["grad_norm"]


def test_free_bits_are_a_floor_for_each_channel_of_each_sample() -> None:
    """Against the sum written out, and against torch's own KL divergence."""
    generator = torch.Generator().manual_seed(0)
    mean, logvar = (torch.randn(3, 4, 5, 5, generator=generator).mul(s).requires_grad_() for s in (1.0, 0.3))
    floor, elements = 0.6, 3 * 10 * 10
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    channels = [[divergence[n, c].mean() for c in range(4)] for n in range(3)]
    expected = sum(torch.clamp_min(value, floor) * 25 for row in channels for value in row) / (3 * elements)
    loss, free = free_bits_loss([kl_per_dimension(mean, logvar)], elements, floor)
    torch.testing.assert_close(loss, expected)
    below = torch.tensor([[bool(value < floor) for value in row] for row in channels])
    assert 0 < int(below.sum()) < 12, "some channels are below the floor and some are not"
    assert float(free) == pytest.approx(below.float().mean().item())
    slopes = torch.autograd.grad(loss, (mean, logvar))
    for slope, whole in zip(
        slopes, torch.autograd.grad(kl_loss([kl_per_dimension(mean, logvar)], elements), (mean, logvar)), strict=True
    ):
        assert bool((slope[below] == 0).all()) and torch.allclose(slope[~below], whole[~below])


def test_free_bits_stop_the_rate_from_falling() -> None:
    """After 60 steps without pressure, a weight under which the posterior collapses, with a floor and without."""
    last: dict[float, dict[str, float]] = {}
    before, _ = trained(60, batch_size=4, optim={"lr": 3e-3})
    for floor in (0.0, 0.3):
        step = build_step(settings_for(batch_size=4, loss={"kl": 1.0, "free_bits": floor}))
        step.bare_reconstructor.load_state_dict(before.bare_reconstructor.state_dict())
        for number in range(60, 120):
            means = step(number, micro_batches(number, step.settings))
            last[floor] = {name: float(value) for name, value in means.items()}
            assert number > 60 or last[floor]["kl_per_dimension"] > 1.0, "it starts far above the floor"
    assert last[0.0]["kl_per_dimension"] < 0.12 and "kl_free" not in last[0.0]
    assert 0.22 < last[0.3]["kl_per_dimension"] < 0.4 and last[0.3]["kl_free"] > 0.5


def test_the_controller_holds_the_target() -> None:
    """Mean rate of the last 60 steps; the same run without it ends far off."""
    changes = {"batch_size": 4, "optim": {"lr": 3e-3}}
    _, logs = trained(200, loss={"kl": 0.05, "kl_target": 1.0}, **changes)
    _, fixed = trained(60, loss={"kl": 0.05}, **changes)
    assert sum(log["kl_per_dimension"] for log in logs[-60:]) / 60 == pytest.approx(1.0, rel=0.05)
    assert all(log["kl_per_dimension"] < 0.8 for log in fixed)
    assert logs[0]["kl_weight"] == pytest.approx(0.05) and logs[-1]["kl_weight"] < 0.03


def test_the_controller_against_its_recursion() -> None:
    """log w += 2 (e - e') + 0.02 e from the step before's rate, in float64; nothing moves in a step passed over."""
    step = build_step(settings_for(loss={"kl": 1e-2, "kl_target": 0.3}, gan=GAN, batch_size=4))
    log_weight, before = math.log(1e-2), 0.0
    for number in range(5):
        (batch,) = micro_batches(number, step.settings)
        if number == 3:
            batch.images[0, 0, 0, 0] = torch.nan
        means = step(number, iter([batch]))
        assert float(means["kl_weight"]) == pytest.approx(math.exp(log_weight), rel=1e-5)
        if number != 3:
            error = max(-1.0, min(1.0, math.log(float(means["kl_per_dimension"]) / 0.3)))
            log_weight, before = log_weight + 2.0 * (error - before) + 0.02 * error, error
    assert step.skipped_steps()[0] == [3]
    # a KL that is finite in a step that is not: the discriminator's gradient overflowed
    control = step.objectives["kl"].control.clone()
    step.objectives["gan"].adversary.register_forward_hook(lambda module, args, logits: logits * float("inf"))
    assert math.isfinite(step(5, micro_batches(5, step.settings))["kl_per_dimension"])
    assert torch.equal(step.objectives["kl"].control, control)


def test_levels_are_balanced_by_the_step_before() -> None:
    """The gradient is that of NVAE's balanced KL while it warms up, and of the plain KL afterwards.

    Levels of 4 and twice 8 px: NVAE's sizes are the squares of the scales' factors over the groups of a scale.
    """
    shape = {"width": 8, "level_sides": [4, 8, 8], "level_channels": [3, 2, 1], "norm_num_groups": 2}
    settings = settings_for(
        model={"kind": "HierarchicalVAE", "config": shape},
        loss={"pixel_weight": 0.0, "kl": 0.5, "kl_warmup": 2, "kl_balance": True},
        batch_size=4,
        micro_batch_size=2,
        optim={"lr": 1e-30},
    )
    step = build_step(settings)
    network = step.bare_reconstructor.autoencoder
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
    )
    latent = (3 * 16 + 2 * 64 + 64, 1, 1)

    def levels(number: int) -> torch.Tensor:
        batches = list(micro_batches(number, settings, 0, latent))
        images, noise = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "noise"))
        return torch.stack([rate.sum((1, 2, 3)).mean() for rate in network.draw(images, noise).rates])

    sizes = torch.tensor([1.0, 4.0 / 2, 4.0 / 2])
    before = torch.zeros(3)
    for number in range(3):
        step(number, micro_batches(number, settings, 0, latent))
        weights = (before.abs() + 0.01) / sizes
        weights = weights / weights.mean() if number < 2 else torch.ones(3)
        now = levels(number)
        (0.5 * min(1.0, (number + 1) / 3) * (weights * now).sum() / (3 * 16 * 16)).backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
                parameter.grad = None
        before = now.detach()
    assert float(before.max() / before.min()) > 1.5, "the weights differ"


def test_what_is_off_keeps_no_state() -> None:
    assert not build_step(settings_for()).state.state_dict()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["loss.kl=0", "loss.kl_warmup=5"], "loss.kl: 0 takes the KL term away, which kl_warmup would shape"),
        (["loss.kl_warmup=5", "loss.kl_cycles=2"], "loss.kl_cycles: kl_warmup and kl_cycles all set the weight"),
        (["loss.kl_target=1", "loss.kl_cycles=2"], "loss.kl_target: kl_cycles and kl_target all set the weight"),
        (["loss.kl_target=1", "loss.free_bits=1"], "loss.free_bits: 1 nats are kept free of the KL term"),
        (["train=decoder", "loss.free_bits=1"], "loss.free_bits: shapes the posterior, which train leaves"),
        (["loss.kl_cycles=99", "steps=50"], "loss.kl_cycles: 99 cycles in 50 steps"),
        (["loss.kl_warmup_shape=cosine"], "loss.kl_warmup_shape: is the shape of kl_warmup, which is 0"),
        (["loss.kl_balance=true"], "loss.kl_balance: lasts as long as kl_warmup, which is 0"),
        (["loss.kl_balance=true", "loss.kl_warmup=5"], "loss.kl_balance: is for the levels of a HierarchicalVAE"),
        (["loss.kl_balance=true", "loss.free_bits=1"], "loss.free_bits: changes the KL that kl_balance weights"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_settings(TrainSettings, None, words)


def test_the_plan_tells_how_the_rate_is_shaped(capsys: pytest.CaptureFixture[str]) -> None:
    from latent_ae.__main__ import main

    assert main(["train", "quickstart", "steps=240", "loss.kl_cycles=4", "loss.free_bits=0.5", "--dry-run"]) == 0
    assert "KL:            weight 1e-06, rising 4 times, every 60 steps, 0.5 nats per dimension free" in (
        capsys.readouterr().out
    )


def test_silent_channels_and_levels_are_counted() -> None:
    """Channel means of 0.5, 0.009, 0.02 and of 0.02, 0.0 nats; the levels' KL add up to the whole."""
    first = torch.tensor([[1.0, 0.018, 0.0], [0.0, 0.0, 0.04]])[:, :, None, None]
    second = torch.tensor([0.02, 0.0]).view(1, 2, 1, 1).expand(2, 2, 4, 4)
    _, one = kl_terms(LossSettings(kl=1.0), (first,), image_elements=30)
    assert float(one["active_channels"]) == pytest.approx(2 / 3) and "active_level_1" not in one
    assert float(one["kl_per_image"]) == pytest.approx((1.018 + 0.04) / 2)
    _, both = kl_terms(LossSettings(kl=1.0), (first, second), image_elements=30)
    assert float(both["active_channels"]) == pytest.approx(3 / 5)
    assert [float(both[f"active_level_{n}"]) for n in (1, 2)] == pytest.approx([2 / 3, 1 / 2])
    assert float(both["kl_level_1"] + both["kl_level_2"]) == pytest.approx(float(both["kl"]))
    assert float(both["kl_level_2"]) == pytest.approx(2 * 16 * 0.02 / (2 * 30))
    assert float(both["kl_per_dimension"]) == pytest.approx((1.058 / 2 + 0.32) / (3 + 32))


@pytest.mark.usefixtures("no_finish")
def test_a_collapse_is_named_while_it_trains(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, more = tmp_path / "run", ("gan.weight=0", "optim.lr=1e-2", "steps=100", "log.every=10")
    assert main(words(pictures, run, *more, "loss.kl=10", "validate.every=100", "checkpoint.every=100")) == 0
    assert "posterior collapse: the latents say almost nothing of the image" in capsys.readouterr().err
    trained_lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if '"train"' in line]
    assert trained_lines[-1]["verdict"].endswith("; reconstruction losses only (gan.weight is 0)")
    assert trained_lines[-1]["verdict"].startswith("posterior collapse:") and trained_lines[-1]["active_channels"] == 0
    assert trained_lines[0]["active_channels"] > 0


def test_the_controller_bears_a_negative_estimate() -> None:
    kl = build_step(settings_for(loss={"kl": 1e-2, "kl_target": 0.3})).objectives["kl"]
    kl.remember({"kl/per_dimension": torch.tensor(-0.1)}, {})
    log_weight, error = kl.control.tolist()
    assert error == -1.0 and log_weight == pytest.approx(math.log(1e-2) - 2.02)
