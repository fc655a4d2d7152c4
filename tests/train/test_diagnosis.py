"""The plain line in the log says what the numbers say."""

import json
from typing import Any

import pytest

from benchmarks.machine import RESULTS
from latent_ae_train.log import diagnosis
from latent_ae_train.report import decline, result_rows
from latent_ae_train.settings import TrainSettings

SETTINGS = TrainSettings.model_validate(
    {"steps": 5000, "gan": {"start": 100, "discriminator_warmup": 50, "warmup": 100}}
)
HEALTHY = {"accuracy": 0.8, "adaptive_weight": 1.0, "gradient_ratio": 0.5}
HEALTHY |= {"kl_per_dimension": 2.0, "kl_per_image": 128.0}


def lines(first: int = 2000, count: int = 12, **changes: Any) -> list[dict[str, Any]]:
    return [{"step": first + 10 * index} | HEALTHY | changes for index in range(count)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lines(), "balanced: it tells 80%"),
        (lines(accuracy=0.99), "discriminator wins: it tells 99%"),
        (lines(accuracy=0.5), "discriminator blind"),
        (lines(first=300, accuracy=0.5), "the discriminator is still young: it tells 50%"),
        (lines(first=300, accuracy=0.99), "discriminator wins"),
        (lines(adaptive_weight=0.0509), "balanced: it tells 80%"),
        (lines(adaptive_weight=0.0509, gradient_ratio=0.001), "the adversarial gradient is 0.001x"),
        (lines(gradient_ratio=3.0), "the adversarial gradient is 3.0x"),
        (lines(kl_per_image=0.064), "posterior collapse: the latents say almost nothing of the image (0.064 nats per"),
        (lines(kl_per_image=4.9), "posterior collapse: the latents"),
        (lines(kl_per_image=4.9, kl_capacity=6.0), "balanced"),
        (lines(kl_per_image=1.0, kl_capacity=6.0), "posterior collapse: the latents"),
        (lines(active_channels=0.75), "posterior collapse in part: 25% of the latent's channels"),
        (lines(active_channels=0.0), "posterior collapse in part: 100% of the latent's channels say almost nothing"),
        (lines(active_channels=0.9, active_level_1=0.0, active_level_2=1.0), "posterior collapse in part: level 1 of"),
        (lines(active_channels=1.0), "balanced"),
        (lines(first=20, count=5), "reconstruction losses only; the discriminator starts at step 100"),
        (lines(first=101, count=3), "the discriminator learns alone until step 150"),
    ],
)
def test_each_state_has_its_line(given: list[dict[str, Any]], expected: str) -> None:
    assert diagnosis(given, SETTINGS).startswith(expected)


@pytest.mark.parametrize(
    ("run", "inactive", "said"),
    [
        ("random start", 0.36, "posterior collapse: the latents say almost nothing of the image (3 nats per image)"),
        ("and warm-up", 0.40, "posterior collapse: the latents say almost nothing of the image (1.8 nats per image)"),
        ("linear start", 0.58, "posterior collapse in part: 58% of the latent's channels"),
    ],
)
def test_measured_collapses_are_told_from_a_cure(run: str, inactive: float, said: str) -> None:
    """Three runs of benchmarks/pitfalls.py: fewer channels were inactive where all had collapsed."""
    row = json.loads((RESULTS / "pitfall-collapse.json").read_text())["rows"][run]
    text = diagnosis(lines(kl_per_image=row["rate_nats"]["mean"], active_channels=1 - inactive), SETTINGS)
    assert text.startswith(said) and ("harmless" in text) == (run == "linear start")
    assert str(row["verdict"][-1][1]).startswith(said.split(":")[0])


@pytest.mark.parametrize(("rate", "harmless"), [(19.0, False), (21.0, True)])
def test_inactive_channels_are_harmless_only_beside_a_substantial_rate(rate: float, harmless: bool) -> None:
    text = diagnosis(lines(kl_per_image=rate, active_channels=0.3), SETTINGS)
    assert text.startswith(
        "posterior collapse in part: 70% of the latent's channels say almost nothing of the image, all"
    )
    assert f"all together {rate:.0f} nats per image" in text and ("harmless" in text) == harmless


def test_a_rising_kl_is_explained() -> None:
    rising = [line | {"kl_per_dimension": 1.0 + 0.2 * index} for index, line in enumerate(lines())]
    text = diagnosis(rising, SETTINGS)
    assert text.startswith("KL rising (2.2x since step 2,000): expected while") and "balanced" in text
    assert "KL" not in diagnosis(rising[:4], SETTINGS), "four lines are too few to speak of a trend"


def test_one_step_does_not_decide() -> None:
    given = lines()
    given[-1] = given[-1] | {"accuracy": 1.0}
    assert diagnosis(given, SETTINGS).startswith("balanced")


def test_without_a_discriminator() -> None:
    settings = TrainSettings.model_validate({"gan": {"weight": 0}})
    plain = [{"step": 10, "l1": 0.1}]
    assert diagnosis(plain, settings) == "reconstruction losses only (gan.weight is 0)"


@pytest.mark.parametrize(("rate", "said"), [(0.5, True), (1.05, False), (1.3, True)])
def test_a_rate_off_its_target_is_told(rate: float, said: bool) -> None:
    settings = SETTINGS.model_copy(update={"loss": SETTINGS.loss.model_copy(update={"kl_target": 1.0})})
    text = diagnosis(lines(kl_per_dimension=rate, kl_weight=3e-4), settings)
    assert text.startswith(f"the rate is not at loss.kl_target: {rate} nats per dimension, on the way to 1 ") == said


def test_a_run_that_ends_below_its_start_says_in_what() -> None:
    before = {"n": 3, "psnr": 29.73, "ssim": 0.875, "lpips_vgg": 0.189, "frechet_vgg16": 40.0}
    bicubic = {"psnr": 60.0, "ssim": 1.0, "lpips_vgg": 0.0}

    def told(**after: float) -> str | None:
        return decline(result_rows({"bicubic /4": bicubic, "before": before, "after": before | after}))

    assert told() is None and told(psnr=30.4, ssim=0.89, lpips_vgg=0.151, frechet_vgg16=20.0) is None
    assert told(psnr=29.731, lpips_vgg=0.1892) is None  # what the table does not show
    start = "The run ended below its start on the held-out images: "
    assert told(psnr=26.91, lpips_vgg=0.151) == f"{start}PSNR (dB) 26.91 (before: 29.73)."
    assert told(lpips_vgg=0.2) == f"{start}LPIPS (VGG) 0.200 (before: 0.189)."
    assert told(frechet_vgg16=41.0) == f"{start}Fréchet (VGG16) 41.000 (before: 40.000)."
    assert decline(result_rows({"bicubic /4": bicubic, "before": {}, "after": before})) is None  # it was not measured
