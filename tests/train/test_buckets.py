"""Runs on crops of several sizes: log, resume, trial, phases, validation at several sides, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.data.loader import open_images
from latent_ae.data.rng import buckets_at
from latent_ae.objectives.base import Batch
from latent_ae_train import loop
from latent_ae_train.log import samples_per_bucket
from latent_ae_train.phases import phases_of
from latent_ae_train.report import held_out_distances, result_rows, write_report
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep
from latent_ae_train.validate import Validator
from tests.runs import SHAPES, differing_tensors, words

BUCKETS = "data.buckets=[8, [24, 16], {width: 12, height: 20, weight: 2}]"


@pytest.mark.usefixtures("no_finish")
def test_a_run_on_buckets_resumes_bit_for_bit_and_says_what_it_does(
    pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, ...]] = []

    def try_passes(step: TrainStep, batch: Batch) -> None:
        tried.append((*batch.images.shape[2:], *batch.noise.shape[2:]))
        original(step, batch)

    original = loop.try_passes
    monkeypatch.setattr(loop, "try_passes", try_passes)
    more = (BUCKETS, "data.scale=[0.5, 1.0]", "validate.also_px=[8, 24]", "validate.every=4")
    more += ("micro_batch_size=2", "steps=4", "optim.schedule=constant")
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(words(pictures, run, *more)) == 0
    assert tried == [(16, 24, 8, 12)], "the largest of the buckets was not tried"
    assert main(words(pictures, other, *more, "steps=2")) == 0
    assert main(words(pictures, other, *more)) == 0
    capsys.readouterr()
    assert differing_tensors(run / "checkpoints/step-00000004", other / "checkpoints/step-00000004") == []
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "train" and line["step"] == 4)
    taken = {key.removeprefix("samples/"): value for key, value in line.items() if key.startswith("samples/")}
    which = np.bincount(buckets_at(0, np.arange(4), [1, 1, 2]), minlength=3) * 4
    assert taken == dict(zip(("8 x 8 px", "24 x 16 px", "12 x 20 px"), which.tolist(), strict=True))
    measured = [line for line in lines if line["event"] in ("baseline", "validate")]
    assert len(measured) == 3
    assert all(line.keys() >= {"psnr", "psnr_8px", "psnr_24px", "ssim_24px"} for line in measured)
    assert main(words(pictures, run, *more, "data.buckets=[8, 16]")) == 2
    assert "data.buckets" in capsys.readouterr().err
    assert main([*words(pictures, run, *more), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "8 x 8 px (weight 1), 24 x 16 px (weight 1), 12 x 20 px (weight 2)" in plan
    assert "crop scale:    0.5 to 1 of the largest crop that fits" in plan


def settings_of(**values: Any) -> TrainSettings:
    model = {"block_out_channels": [32, 64, 64], "norm_num_groups": 8}
    values = {"loss": {"perceptual": 0.0}, "gan": {"weight": 0.0}, "model": model, **values}
    values["data"] = {"resolution": 64, "buckets": [64, [96, 48]], **values.get("data", {})}
    return TrainSettings.model_validate(values)


def test_phases_have_buckets_of_their_own() -> None:
    settings = settings_of(phases=[{"steps": 10}, {"data": {"buckets": [32, 128], "scale": [0.5, 1.0]}}])
    assert list(settings.problems()) == []
    first, second = (phase.settings.data for phase in phases_of(settings))
    assert first.crop_sizes == ((64, 64), (48, 96)) and second.crop_sizes == ((32, 32), (128, 128))
    assert first.scale is None and second.scale == (0.5, 1.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"data": {"buckets": [[50, 64], 30, 64]}},
            "data.buckets: 50 x 64 px, 30 x 30 px: sides must be multiples of the model's factor 4, such as [48, 64]",
        ),
        (
            {
                "model": {"kind": "HierarchicalVAE", "config": SHAPES["HierarchicalVAE"] | {"sample_size": 64}},
                "loss": {"perceptual": 0.0, "kl": 1.0},
            },
            "data.buckets: this HierarchicalVAE takes images of 64 px only",
        ),
        (
            {
                "loss": {"perceptual": 0.0, "total_correlation": 1.0},
                "model": {"block_out_channels": [32] * 5, "norm_num_groups": 8, "latent_channels": 2},
            },
            "data.buckets: give latents of several sizes",
        ),
        ({"loss": {"perceptual": 0.0, "kl": 1.0, "kl_capacity": 9.0}}, "loss.kl_capacity: is in nats per image"),
        ({"latents": {"equivariance": 0.5}}, "latents.equivariance: turns images and needs squares"),
        ({"gan": {"layers": 5}}, "gan.layers: 5 need crops of at least 96 px; the shortest side of data.buckets is 48"),
        ({"validate": {"also_px": [62]}}, "validate.also_px: 62 is not a multiple"),
        ({"validate": {"also_px": [128, 128]}}, "validate.also_px: 128 is given twice: give it once"),
        (
            {"validate": {"also_px": [64], "crop_px": 64}},
            "validate.also_px: 64 is given twice (validate.crop_px is measured, too): give it once",
        ),
    ],
)
def test_what_does_not_go_with_buckets_ends_in_one_message(values: dict[str, Any], expected: str) -> None:
    lines = [f"{key}: {text}" for key, text in settings_of(**values).problems()]
    assert len(lines) == 1 and lines[0].startswith(expected), lines


def test_stored_latents_have_no_buckets_and_no_scale(tmp_path: Path) -> None:
    values = {"init_from": str(tmp_path), "decoder": {"latents": "latents"}, "model": {}}
    data = {"scale": [0.5, 1], "scaled_decoding": True, "resize_px": 512}
    lines = [f"{key}: {text}" for key, text in settings_of(**values, data=data).problems()]
    # the last one: there are no such latents
    expected = ["data.buckets", "data.scale", "data.scaled_decoding", "decoder.latents"]
    assert [line.partition(":")[0] for line in lines] == expected, lines


def test_compiling_for_several_sizes_is_announced() -> None:
    (warning,) = settings_of(compile=True).warnings()
    assert warning.startswith("compile with data.buckets")
    assert list(settings_of(compile=True, data={"buckets": [64]}).warnings()) == []


def test_a_warm_up_that_outlasts_the_run_is_pointed_out() -> None:
    assert list(settings_of(steps=100, optim={"warmup": 99}).warnings()) == []
    (warning,) = settings_of(steps=100, optim={"warmup": 100}).warnings()
    assert warning == "optim.warmup is 100 steps and the run has 100: the learning rate never reaches its full value"
    (warning,) = settings_of(steps=50, optim={"warmup": 9}, loss={"kl_warmup": 60}).warnings()
    assert "loss.kl_warmup is 60 steps" in warning


def test_samples_are_counted_from_the_step_alone() -> None:
    settings = settings_of(batch_size=3)
    for steps in (0, 1, 7, 100):
        counts = samples_per_bucket(settings, steps)
        assert list(counts) == ["samples/64 x 64 px", "samples/96 x 48 px"] and sum(counts.values()) == 3 * steps
    assert samples_per_bucket(settings_of(data={"buckets": []}), 7) == {}


def test_validation_measures_the_same_images_at_each_side(tmp_path: Path) -> None:
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    source = {"source": str(tmp_path), "eval_source": str(tmp_path), "num_workers": 0}

    def measured(**validate: Any) -> dict[str, Any]:
        settings = settings_of(data=source, validate=validate)
        held_out = open_images(settings.data, "held_out")
        validator = Validator(settings, Accelerator(cpu=True), held_out, 3, 4, None)
        return validator.measure(lambda images, _: (images * 0.9).roll(1, -1))

    together, first = measured(crop_px=12, also_px=[16, 8]), measured(crop_px=12)
    assert {key: value for key, value in together.items() if not key.endswith("px")} == first
    for side in (16, 8):
        alone = measured(crop_px=side)
        assert together[f"psnr_{side}px"] == alone["psnr"] != first["psnr"] and together[f"n_{side}px"] == 5


def test_the_report_shows_each_side_and_the_first_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(validate={"also_px": [512]})
    events = [
        {"event": "validate", "step": 0, "psnr": 20.0, "psnr_512px": 21.0, "lpips_vgg": 0.2, "lpips_vgg_512px": 0.1},
        {"event": "validate", "step": 9, "psnr": 22.0, "psnr_512px": 24.0, "lpips_vgg": 0.1, "lpips_vgg_512px": 0.3},
    ]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    assert held_out_distances(tmp_path) == {0: 0.2, 9: 0.1}
    rows = result_rows({"before": events[0], "after": events[1]}, [512])
    assert [row[""] for row in rows] == ["before", "after", "before, 512 px", "after, 512 px"]
    assert [row["PSNR (dB)"] for row in rows] == ["20.00", "22.00", "21.00", "24.00"]
    charts: dict[str, Any] = {}
    monkeypatch.setattr(
        "latent_ae.report.page.line_chart", lambda series, title, **_: charts.update({title: series}) or ""
    )
    write_report(tmp_path, settings, rows)
    assert charts["Held-out PSNR (dB)"] == {"psnr": [(0, 20.0), (9, 22.0)], "psnr_512px": [(0, 21.0), (9, 24.0)]}
    page = (tmp_path / "report.html").read_text()
    assert "after, 512 px" in page and "64 x 64 px and 96 x 48 px" in page
    assert "square of 64 and of 512 px" in page


def test_squares_go_with_equivariance() -> None:
    settings = settings_of(data={"buckets": [32, 64]}, latents={"equivariance": 0.5})
    assert list(settings.problems()) == [] and settings.facts().resolution == 32
