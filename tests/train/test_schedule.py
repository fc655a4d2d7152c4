"""Learning rates and loss weights as functions of the step, against their definitions."""

import math

import pytest

from latent_ae.objectives.gan import GanSettings, phase_at
from latent_ae_train.optim import ema_decay_at, lr_scale_at
from latent_ae_train.run_config import OptimSettings


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    optim = OptimSettings(warmup=10, schedule="cosine", final_lr=0.1)
    scales = [lr_scale_at(step, 110, optim) for step in range(110)]
    assert scales[0] == pytest.approx(1 / 11)
    assert scales[10] == pytest.approx(1.0) == max(scales)
    assert scales[60] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99))
    assert scales[109] == pytest.approx(expected)
    assert lr_scale_at(200, 110, optim) == pytest.approx(0.1)
    constant = OptimSettings(warmup=0, schedule="constant")
    assert {lr_scale_at(step, 5, constant) for step in range(50)} == {1.0}


def test_the_gan_starts_alone_then_ramps() -> None:
    gan = GanSettings(weight=0.5, start=100, discriminator_warmup=20, warmup=9, r1=2.0, r1_every=4)
    phases = [phase_at(step, gan) for step in range(160)]
    assert not any(phase.discriminator or phase.generator or phase.r1 for phase in phases[:100])
    assert all(phase.discriminator for phase in phases[100:])
    assert not any(phase.generator for phase in phases[:120])
    assert [phase.generator for phase in phases[120:130]] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert all(phase.generator == 0.5 for phase in phases[130:])
    # every fourth step, four times the weight: the same penalty on average
    assert [phase.r1 for phase in phases[100:108]] == [8.0, 0, 0, 0, 8.0, 0, 0, 0]
    assert not any(any(phase_at(step, GanSettings(weight=0.0, start=0))) for step in range(5))


def test_the_average_forgets_the_start() -> None:
    decays = [ema_decay_at(step, 0.999) for step in (0, 10, 100_000)]
    assert decays == pytest.approx([0.1, 11 / 20, 0.999])
