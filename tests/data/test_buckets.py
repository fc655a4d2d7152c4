"""Training crops of several sizes and scales: which size a step has, what a crop shows, and what is refused."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from latent_ae.data.check import check
from latent_ae.data.images import to_uint8
from latent_ae.data.loader import Batch, crop_size_at, open_images, training_batches
from latent_ae.data.rng import buckets_at, epoch_order
from latent_ae.data.settings import Bucket, TrainingData
from latent_ae.data.transforms import random_crop

SIZES = {(8, 8), (8, 16), (20, 12)}
BUCKETS: list[Any] = [8, [16, 8], {"width": 12, "height": 20, "weight": 2}]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images in which every crop looks different; some are smaller than the largest crop."""
    folder = tmp_path_factory.mktemp("noise")
    for number in range(11):
        pixels = np.random.default_rng(number).integers(0, 256, (14 + 2 * number, 31 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def settings_for(source: Path, **values: Any) -> TrainingData:
    settings = TrainingData.model_validate({"source": str(source), "buckets": BUCKETS, "num_workers": 0} | values)
    assert list(settings.problems()) == []
    return settings


def taken(settings: TrainingData, count: int, micro: int = 4, rank: int = 0, processes: int = 1, **more: Any):
    """Some micro-batches of global batches of 4."""
    source = open_images(settings, "train")
    sizes = {"batch_size": 4, "micro_batch_size": micro, "rank": rank, "world_size": processes}
    batches = training_batches(source, settings, channels=3, seed=7, **sizes, **more)
    found: list[Batch] = [next(batches) for _ in range(count)]
    batches.close()
    return found


def by_number(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {number: image for one in batches for number, image in zip(one.numbers, one.images, strict=True)}


def test_each_bucket_has_its_share_of_the_steps_at_any_time() -> None:
    weights = np.array([1.0, 2.5, 4.0, 0.5])
    for seed in (0, 1, 2**63 - 1):
        which = buckets_at(seed, np.arange(20_000), weights)
        counts = np.cumsum(which[:, None] == np.arange(4), axis=0)
        expected = np.arange(1, 20_001)[:, None] * weights / weights.sum()
        assert np.abs(counts - expected).max() < 4  # random numbers would be 60 off
        # also of every 16th step, at which something else may be due
        sixteenth = np.bincount(which[::16], minlength=4) / 1250
        assert np.abs(sixteenth - weights / weights.sum()).max() < 0.01
        # of which one alone is a function of seed and step
        assert [int(buckets_at(seed, [step], weights)[0]) for step in range(50)] == which[:50].tolist()
    assert buckets_at(0, np.arange(50), weights).tolist() != buckets_at(2, np.arange(50), weights).tolist()
    assert set(buckets_at(0, np.arange(50), [1.0])) == {0}


def test_a_step_has_one_size_and_the_same_samples_however_it_is_split(noise: Path) -> None:
    settings = settings_for(noise)
    whole = taken(settings, 8)
    shapes = [tuple(batch.images.shape[2:]) for batch in whole]
    assert shapes == [crop_size_at(settings, 7, step) for step in range(8)] and set(shapes) == SIZES
    reference = by_number(whole)
    splits = [
        by_number(taken(settings_for(noise, num_workers=2), 8)),
        by_number(taken(settings, 32, micro=1)),
        by_number(taken(settings, 16, micro=1, rank=0, processes=2))
        | by_number(taken(settings, 16, micro=1, rank=1, processes=2)),
        {number: reference[number] for number in range(12)} | by_number(taken(settings, 5, first_batch=3)),
    ]
    for found in splits:
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[number], image) for number, image in reference.items())


def test_every_image_is_seen_once_in_each_epoch(noise: Path) -> None:
    settings = settings_for(noise, eval_source=str(noise))
    indices = [index for batch in taken(settings, 11) for index in batch.indices]
    epochs = [indices[start : start + 11] for start in range(0, 44, 11)]
    assert epochs == [epoch_order(7, epoch, 11).tolist() for epoch in range(4)]


def test_without_buckets_and_scale_crops_are_the_windows_that_they_always_were(noise: Path) -> None:
    image = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for seed in range(20):
        crop = random_crop(image, (8, 8), None, False, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        top, left = int(rng.integers(33)), int(rng.integers(43))
        assert np.array_equal(crop, image[top : top + 8, left : left + 8])


def test_a_crop_is_a_window_and_a_small_image_is_enlarged_until_it_covers_it() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(image, (20, 12), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    places = set()
    for seed in range(200):
        crop = random_crop(image, (20, 12), None, False, np.random.default_rng(seed))
        ((top, left),) = np.argwhere((windows == crop).all(axis=(2, 3, 4)))
        places |= {("top", top), ("left", left)}
    assert len(places) == 11 + 29
    # 6 x 9 px must become 40 px wide, and is then 27 px high, of which a crop shows 20
    ramps = np.stack(np.meshgrid(np.arange(9), np.arange(6)), axis=2).astype(np.float32) / 16
    crop = random_crop(ramps, (20, 40), None, False, np.random.default_rng(1))
    assert crop.shape == (20, 40, 2)
    columns, rows = (np.ptp(crop[..., channel]) * 16 for channel in (0, 1))
    assert columns == pytest.approx(8, abs=0.3) and rows == pytest.approx(19 * 6 / 27, abs=0.3)


def sides_of(size: tuple[int, int], shape: tuple[int, int], scale: tuple[float, float], count: int) -> np.ndarray:
    """The height and width in the image of some crops, from the slopes of two ramps: (count, 2)."""
    height, width = shape
    ramps = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=2).astype(np.float32) / 2048
    found = []
    for seed in range(count):
        crop = random_crop(ramps, size, None, False, np.random.default_rng(seed), scale) * 2048
        assert crop.shape[:2] == size
        inner = crop[2:-2, 2:-2]
        steps = np.diff(inner[..., 1], axis=0).mean(), np.diff(inner[..., 0], axis=1).mean()
        found.append((steps[0] * size[0], steps[1] * size[1]))
    return np.array(found)


def test_a_scale_draws_the_side_in_the_image() -> None:
    sides = sides_of((16, 24), (200, 240), (0.25, 1.0), 100)
    relative = sides[:, 0] / 160  # the largest crop of 2 : 3 in 200 x 240 px is of 160 x 240
    assert np.abs(sides[:, 1] / sides[:, 0] - 1.5).max() < 0.05  # nothing is stretched
    assert relative.min() > 0.24 and relative.max() < 1.03
    assert np.histogram(relative, 3, (0.25, 1.0))[0].min() > 22  # uniform: 33 each
    whole = sides_of((16, 24), (200, 240), (1.0, 1.0), 5)
    assert np.allclose(whole, [160, 240], rtol=0.02)


def test_a_scale_enlarges_nothing_but_images_that_are_too_small() -> None:
    # a quarter of 40 px would be 10, for a crop of 16
    sides = sides_of((16, 16), (40, 40), (0.25, 1.0), 60)
    assert sides.min() > 15.9 and (sides < 16.1).sum() > 5
    small = random_crop(np.full((6, 9, 3), 77, np.uint8), (16, 16), None, True, np.random.default_rng(0), (0.5, 1.0))
    assert small.shape == (16, 16, 3) and (small == 77).all()


def test_a_scaled_crop_is_antialiased() -> None:
    checks = np.indices((128, 128)).sum(0)[..., None].repeat(3, 2).astype(np.uint8) % 2 * 255
    crop = random_crop(checks, (32, 32), None, False, np.random.default_rng(0), (1.0, 1.0))
    assert np.abs(crop.astype(int) - 128).max() <= 2


def test_a_scale_is_a_function_of_seed_and_number(noise: Path) -> None:
    settings = settings_for(noise, scale=[0.3, 0.9])
    whole, later = by_number(taken(settings, 6)), by_number(taken(settings, 12, micro=1, first_batch=3))
    assert all(torch.equal(image, whole[number]) for number, image in later.items() if number < 24)
    plain = by_number(taken(settings_for(noise), 6))
    assert sum(not torch.equal(plain[number], whole[number]) for number in plain) > 12


def test_a_stream_has_buckets_and_resumes(tmp_path: Path) -> None:
    values = [Image.fromarray(np.full((24, 24, 3), value, dtype=np.uint8)) for value in range(24)]
    for part in ("train", "test"):
        datasets.Dataset.from_dict({"image": values}).to_parquet(tmp_path / f"{part}.parquet")
    settings = settings_for(tmp_path, streaming=True, shuffle_buffer=8)
    whole = taken(settings, 8)
    assert {tuple(batch.images.shape[2:]) for batch in whole} == SIZES
    rest = taken(settings, 5, first_batch=3, stream_state=whole[2].stream_state)
    for batch, other in zip(rest, whole[3:], strict=True):
        assert torch.equal(batch.images, other.images)


def test_sources_of_a_mixture_share_the_buckets(noise: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40, 3), 7, dtype=np.uint8)).save(tmp_path / "flat.png")
    parts = [{"source": str(noise)}, {"source": str(tmp_path), "repeats": 5, "resize_px": 30}]
    values = {"mixture": parts, "buckets": BUCKETS, "num_workers": 0, "resolution": 8, "eval_source": str(noise)}
    settings = TrainingData.model_validate(values)
    assert list(settings.problems()) == []
    batches = taken(settings, 8)
    shapes = [tuple(batch.images.shape[2:]) for batch in batches]
    assert shapes == [crop_size_at(settings, 7, step) for step in range(8)]
    flat = [bool((to_uint8(image[None]) == 7).all()) for image in by_number(batches).values()]
    assert sum(flat) == 10  # five in each of the first two epochs of 16


def test_ways_to_write_a_bucket() -> None:
    expected = [Bucket(width=8, height=8), Bucket(width=16, height=8), Bucket(width=12, height=20, weight=2)]
    settings = TrainingData.model_validate({"buckets": BUCKETS})
    assert list(settings.buckets) == expected and [one.title for one in expected][1] == "16 x 8 px"
    assert TrainingData.model_validate(settings.model_dump(mode="json")) == settings
    for wrong in ("256", [1, 2, 3], True, 0, [8, -8], {"width": 8}, {"width": 8, "height": 8, "weight": 0}):
        with pytest.raises(ValidationError):
            TrainingData.model_validate({"buckets": [wrong]})
    for wrong_scale in ([0, 1], [0.5], [0.5, 1.5], 0.5):
        with pytest.raises(ValidationError):
            TrainingData.model_validate({"scale": wrong_scale})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"buckets": [64, [64, 64]]}, "buckets: 64 x 64 px is given twice"),
        ({"buckets": [64, [300, 64]], "resize_px": 256}, "resize_px: 256 is smaller than 300, the longest side"),
        (
            {"buckets": [512], "mixture": [{"source": "photos", "resize_px": 300}]},
            "mixture[0].resize_px: 300 is",
        ),
        ({"scale": [0.9, 0.5], "mixture": [{"source": "photos"}]}, "scale: begins above its end: use [0.5, 0.9]"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], expected: str) -> None:
    lines = [f"{key}: {text}" for key, text in TrainingData.model_validate(values).problems()]
    assert len(lines) == 1 and lines[0].startswith(expected)


def test_data_check_counts_images_that_would_be_enlarged(noise: Path) -> None:
    found = check(str(noise), settings_for(noise))
    sizes = [(14 + 2 * number, 31 - number) for number in range(11)]
    assert found["smaller_than_resolution"] == sum(height < 20 for height, _ in sizes) == 3
    assert found["buckets"] == ["8 x 8 px", "16 x 8 px", "12 x 20 px"]
