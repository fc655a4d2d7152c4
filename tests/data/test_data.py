"""Sources, and the order of samples: the same whatever the number of workers, processes and interruptions."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, Literal

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from latent_ae.config import UserError
from latent_ae.data import datasets as locations
from latent_ae.data import images
from latent_ae.data.held_out import Framing, HeldOutImages, held_out_images
from latent_ae.data.loader import (
    Batch,
    open_images,
    posterior_noise,
    stop_if_too_many_bad,
    training_batches,
)
from latent_ae.data.rng import block_order, crop_rng, epoch_order
from latent_ae.data.settings import DataSettings
from latent_ae.data.sources import FolderSource, StreamSource, TableSource
from latent_ae.data.transforms import center_crop, random_crop, resize_shorter


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(value: int, size: tuple[int, int] = (12, 14)) -> bytes:
    """A flat image whose gray level says which it is."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


def write_folder(folder: Path, count: int = 20, prefix: str = "") -> Path:
    for i in range(count):
        path = folder / f"{prefix}{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return folder


def settings_for(folder: Path | str, **values: Any) -> DataSettings:
    return DataSettings.model_validate({"source": str(folder), "resolution": 8, "num_workers": 0} | values)


def opened(settings: DataSettings, part: Literal["train", "held_out", "all"]) -> Any:
    """A source of either kind, which a test knows."""
    return open_images(settings, part)


def values_of(batch: Batch) -> list[int]:
    """The gray levels, hence the numbers, of a batch of flat images."""
    return images.to_uint8(batch.images)[:, 0, 0, 0].tolist()


def take(
    source: Any, settings: DataSettings, count: int, *, rank: int = 0, world_size: int = 1, **sizes: Any
) -> list[Batch]:
    sizes = {"channels": 3, "seed": 5, "batch_size": 8, "micro_batch_size": 8} | sizes
    batches = training_batches(source, settings, rank=rank, world_size=world_size, **sizes)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


# the order


@pytest.fixture(scope="module")
def noise_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in which every crop and flip looks different."""
    folder = tmp_path_factory.mktemp("noise")
    for i in range(11):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 31 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 4), (2, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("first_batch", [0, 2])
def test_samples_do_not_depend_on_workers_ranks_accumulation_or_start(
    noise_folder: Path, workers: int, world_size: int, micro_batch_size: int, first_batch: int
) -> None:
    source = opened(settings_for(noise_folder), "all")
    reference = take(source, settings_for(noise_folder), 4)
    settings = settings_for(noise_folder, num_workers=workers)
    micro_steps = 8 // (micro_batch_size * world_size)
    found: dict[int, torch.Tensor] = {}
    for rank in range(world_size):
        sizes = {"micro_batch_size": micro_batch_size, "first_batch": first_batch}
        taken = take(source, settings, 2 * micro_steps, rank=rank, world_size=world_size, **sizes)
        for step, batch in enumerate(taken):
            b, m = first_batch + step // micro_steps, step % micro_steps
            start = b * 8 + (m * world_size + rank) * micro_batch_size
            assert batch.numbers == list(range(start, start + micro_batch_size))
            assert batch.images.dtype == torch.float32 and batch.images.is_contiguous()
            found.update(zip(batch.numbers, batch.images, strict=True))
    assert sorted(found) == list(range(first_batch * 8, first_batch * 8 + 16))
    for number, image in found.items():
        assert torch.equal(image, reference[number // 8].images[number % 8])


def test_every_image_once_per_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    source = opened(settings_for(write_folder(tmp_path)), "all")
    seen = [value for batch in take(source, settings_for(tmp_path), 15) for value in values_of(batch)]
    epochs = [seen[start : start + 20] for start in range(0, 120, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    other = [value for batch in take(source, settings_for(tmp_path), 3, seed=6) for value in values_of(batch)]
    assert other != seen[:24]


def test_the_order_stays_as_it_is_for_ever() -> None:
    # a change here would silently break runs that go on from a checkpoint
    assert epoch_order(0, 0, 10).tolist() == [6, 7, 9, 5, 1, 4, 8, 3, 0, 2]
    assert epoch_order(1, 0, 10).tolist() == [5, 8, 4, 6, 0, 7, 2, 3, 9, 1]
    places = itertools.product((0, 1), repeat=4)
    blocks = {tuple(block_order(seed, epoch, reader, block, 20)) for seed, epoch, reader, block in places}
    assert len(blocks) == 16 and all(sorted(block) == list(range(20)) for block in blocks)
    order = epoch_order(7, 3, 100_000)
    assert (np.sort(order) == np.arange(100_000)).all()
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_crops_and_flips_vary_between_epochs_and_respect_settings(noise_folder: Path) -> None:
    source = opened(settings_for(noise_folder), "all")
    assert isinstance(source, FolderSource)
    one = source.subset(np.array([3]))
    crops = torch.cat([batch.images for batch in take(one, settings_for(noise_folder), 4)])
    assert len({crop.numpy().tobytes() for crop in crops}) > 20
    pixels = images.decode(one.read(0), channels=3)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (8, 8), axis=(0, 1))

    def is_window(crop: torch.Tensor) -> bool:
        return bool((windows == images.to_uint8(crop).numpy()).all(axis=(2, 3, 4)).any())

    straight = sum(map(is_window, crops))
    assert 4 < straight < 28  # the others are mirrored
    unflipped = torch.cat([batch.images for batch in take(one, settings_for(noise_folder, flip=False), 4)])
    assert all(map(is_window, unflipped))
    resized = torch.cat([b.images for b in take(one, settings_for(noise_folder, resize_px=8, flip=False), 4)])
    expected = resize_shorter(pixels, 8)
    windows = np.lib.stride_tricks.sliding_window_view(expected, (8, 8), axis=(0, 1))
    assert all(map(is_window, resized))


def test_pixels_that_are_kept_are_the_pixels_of_the_file(noise_folder: Path) -> None:
    source = opened(settings_for(noise_folder), "all")
    kept = take(source, settings_for(noise_folder), 6)
    for batch in kept:
        for number, image in zip(batch.numbers, batch.images, strict=True):
            i = int(epoch_order(5, number // 11, 11)[number % 11])
            pixels = images.decode(source.read(i), channels=3)
            expected = random_crop(pixels, (8, 8), None, True, crop_rng(5, number))
            assert torch.equal(image, images.to_tensor(expected))


def test_a_small_source_is_decoded_once(tmp_path: Path) -> None:
    settings = settings_for(write_folder(tmp_path, 4))
    batches = training_batches(opened(settings, "all"), settings, channels=3, seed=0, batch_size=4, micro_batch_size=4)
    next(batches)
    for path in tmp_path.iterdir():
        path.unlink()
    assert sorted(values_of(next(batches))) == [0, 1, 2, 3]


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    source = opened(settings_for(write_folder(tmp_path)), "all")
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 2):
        take(source, settings_for(tmp_path, num_workers=workers), 2)
        held_out = held_out_images(source, settings_for(tmp_path, num_workers=workers), channels=3, crop_px=8)
        assert len(list(held_out)) == 20
    posterior_noise(0, [0], (4, 2, 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_posterior_noise_is_a_function_of_seed_and_number() -> None:
    noise = posterior_noise(3, [10, 11, 12], (4, 8, 8))
    assert noise.shape == (3, 4, 8, 8) and noise.dtype == torch.float32
    assert torch.equal(noise[1:], posterior_noise(3, [11, 12], (4, 8, 8)))
    assert not torch.equal(noise, posterior_noise(4, [10, 11, 12], (4, 8, 8)))
    many = posterior_noise(0, range(200), (4, 16, 16)).double()
    assert abs(many.mean()) < 5 / many.numel() ** 0.5 and abs(many.std() - 1) < 0.01
    flat = many.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(200)).abs().max() < 0.2


def test_workers_stop_when_the_iterator_is_closed(tmp_path: Path) -> None:
    source = opened(settings_for(write_folder(tmp_path)), "all")
    batches = training_batches(
        source, settings_for(tmp_path, num_workers=2), channels=3, seed=0, batch_size=4, micro_batch_size=4
    )
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_program_ends_although_it_holds_an_iterator_with_workers(tmp_path: Path) -> None:
    write_folder(tmp_path)
    script = """
import sys
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.settings import TrainingData
settings = TrainingData(source=sys.argv[1], resolution=32, num_workers=1)
held = training_batches(open_images(settings, "all"), settings, channels=3, seed=0, batch_size=4, micro_batch_size=4)
next(held)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


@pytest.mark.parametrize("kind", ["folder", "table", "stream"])
def test_sources_can_be_sent_to_spawned_workers(tmp_path: Path, kind: str) -> None:
    where = write_folder(tmp_path) if kind == "folder" else write_parquet(tmp_path / "a.parquet", range(20))
    settings = settings_for(where, streaming=kind == "stream")
    source = opened(settings, "all")
    expected = values_of(take(source, settings, 1)[0])
    assert values_of(take(pickle.loads(pickle.dumps(source)), settings, 1)[0]) == expected


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    source = opened(settings_for(write_folder(tmp_path)), "all")
    with pytest.raises(UserError, match="10 is not a multiple of micro_batch_size 4 x 2"):
        take(source, settings_for(tmp_path), 1, batch_size=10, micro_batch_size=4, world_size=2)


# unreadable files


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next_of_the_epoch(tmp_path: Path, workers: int) -> None:
    settings = settings_for(write_folder(tmp_path), num_workers=workers)
    source = opened(settings, "all")
    whole = [value for batch in take(source, settings, 5) for value in values_of(batch)]
    bad = whole[3], whole[4], whole[25]
    for value in bad:
        (tmp_path / f"{value:03d}.png").write_bytes(png(value)[:40])
    batches = take(source, settings, 5)
    replaced = [value for batch in batches for value in values_of(batch)]
    epochs = [whole[:20], whole[20:]]
    for position, (before, after) in enumerate(zip(whole, replaced, strict=True)):
        epoch, place = epochs[position // 20], position % 20
        follows = [epoch[(place + k) % 20] for k in range(20)]
        assert after == next(value for value in follows if value not in bad)
        assert after == before or before in bad
    skipped = [line for batch in batches for line in batch.skipped]
    assert {line.split(":")[0] for line in skipped} == {f"{value:03d}.png" for value in bad}
    assert all(": " in line and len(line.split(": ", 1)[1]) > 5 for line in skipped)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error_and_no_endless_loop(tmp_path: Path, workers: int) -> None:
    for i in range(150):
        (tmp_path / f"{i}.jpg").write_text("<html>not found</html>")
    settings = settings_for(tmp_path, num_workers=workers)
    with pytest.raises(UserError) as caught:
        take(opened(settings, "all"), settings, 1)
    message = str(caught.value)
    assert "100 images in a row" in message and ".jpg: not a known image format" in message
    assert "Traceback" not in message


def test_too_many_bad_files_stop_the_run() -> None:
    def check(num_bad: int, num_read: int, num_images: int | None = 10_000, limit: float = 0.01) -> None:
        stop_if_too_many_bad(
            num_bad, num_read, ["a.png: cut", "b.png: cut"], num_images=num_images, max_bad_fraction=limit
        )

    check(0, 1000)
    check(10, 1000)  # exactly the limit
    check(50, 99)  # too early to judge
    check(5, 10, limit=1.0)
    with pytest.raises(UserError, match=r"(?s)11 of the first 1000.*max_bad_fraction|max_bad_fraction.*a.png: cut"):
        check(11, 1000)
    with pytest.raises(UserError):
        check(2, 100, num_images=None)
    check(1, 5, num_images=6)
    with pytest.raises(UserError):
        check(1, 6, num_images=6)  # the whole of a small source was seen
    with pytest.raises(UserError):
        check(1, 100, limit=0.0)


# held-out images


def test_held_out_images_are_the_same_pixels_every_time_on_any_number_of_ranks(noise_folder: Path) -> None:
    for workers in (0, 2):
        settings = settings_for(noise_folder, num_workers=workers, resize_px=16)
        source = opened(settings, "all")
        assert isinstance(source, FolderSource)
        source = FolderSource(source.root, np.tile(source.names, 10))
        whole = list(held_out_images(source, settings, channels=3, crop_px=8))
        assert [index for index, _, _ in whole] == list(range(110))
        for index, name, image in whole:
            assert name == source.name(index)
            expected = center_crop(resize_shorter(images.decode(source.read(index), channels=3), 16), 8)
            assert (images.to_uint8(image).permute(1, 2, 0).numpy() == expected).all()
        shared = [
            item
            for rank in range(3)
            for item in held_out_images(source, settings, channels=3, crop_px=8, rank=rank, world_size=3)
        ]
        assert sorted(index for index, _, _ in shared) == list(range(110))
        for index, _, image in shared:
            assert torch.equal(image, whole[index][2])
    settings = settings_for(noise_folder)
    uncropped = held_out_images(source, settings, channels=1, crop_px=None, multiple_of=4)
    shapes = {tuple(image.shape) for _, _, image in uncropped}
    assert shapes == {(1, (20 + i) // 4 * 4, (31 - i) // 4 * 4) for i in range(11)}
    # of a model of another factor they are other images, unless both take the whole sides
    digests = [
        {item.index: (item.digest, item.image.shape) for item in whole.items() if item.image is not None}
        for whole in (uncropped, held_out_images(source, settings, channels=1, crop_px=None, multiple_of=2))
    ]
    for index, (digest, shape) in digests[0].items():
        assert (digest == digests[1][index][0]) == (shape == digests[1][index][1]), index
    cropped = held_out_images(source, settings, channels=1, crop_px=4, multiple_of=4).items()
    assert {item.digest for item in cropped} == {digest.partition("-")[0] for digest, _ in digests[0].values()}
    with pytest.raises(UserError, match="multiple of 3"):
        HeldOutImages(source, settings, 3, Framing(crop_px=8), 3)


def test_unreadable_held_out_images_are_skipped_and_named(tmp_path: Path) -> None:
    settings = settings_for(write_folder(tmp_path, 5))
    (tmp_path / "001.png").write_bytes(b"")
    held_out = held_out_images(opened(settings, "all"), settings, channels=3, crop_px=8)
    for _ in range(2):
        assert [index for index, _, _ in held_out] == [0, 2, 3, 4]
        (line,) = held_out.skipped
        assert line.startswith("001.png: not a known image")
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 5 held-out images"):
        list(held_out)
    assert not list(held_out_images(held_out.source, settings, channels=3, crop_px=8, rank=1, world_size=2))


def names(source: Any) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_a_fraction_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    settings = settings_for(write_folder(tmp_path, 40), eval_fraction=0.1)
    parts = {part: names(opened(settings, part)) for part in ("train", "held_out", "all")}
    assert len(parts["held_out"]) == 4
    assert sorted(parts["train"] + parts["held_out"]) == parts["all"] == sorted(parts["all"])
    assert names(opened(settings, "held_out")) == parts["held_out"]
    assert len(opened(settings_for(tmp_path, eval_fraction=0.001), "held_out")) == 1
    # images that come later, and sort before all others, do not bring images trained on into the held-out ones
    write_folder(tmp_path, 5, prefix="!")
    again = set(names(opened(settings_for(tmp_path, eval_fraction=4 / 45), "held_out")))
    assert len(again) == 4 and again & set(parts["held_out"]) and not again & set(parts["train"])


def test_a_folder_called_train_alone_is_no_split(tmp_path: Path) -> None:
    for vehicle in ("car", "train"):
        write_folder(tmp_path / vehicle, 10)
    settings = settings_for(tmp_path)
    assert len(opened(settings, "train")) == 19 and len(opened(settings, "held_out")) == 1


def test_a_source_too_small_to_split_is_refused(tmp_path: Path) -> None:
    settings = settings_for(write_folder(tmp_path, 1))
    for part in ("train", "held_out"):
        with pytest.raises(UserError, match="holds 1 image.*too few.*eval_source"):
            opened(settings, part)
    assert len(opened(settings, "all")) == 1


def test_eval_source_and_eval_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "set/train/cats", 6)
    write_folder(tmp_path / "set/val", 2)
    write_folder(tmp_path / "set/test", 3)
    write_folder(tmp_path / "other", 4)
    settings = settings_for(tmp_path / "set")
    assert names(opened(settings, "train")) == [f"train/cats/{i:03d}.png" for i in range(6)]
    assert names(opened(settings, "held_out")) == [f"val/{i:03d}.png" for i in range(2)]
    for wanted, count in (("test", 3), ("validation", 2), ("valid", 2), ("val", 2)):
        assert len(opened(settings_for(tmp_path / "set", eval_split=wanted), "held_out")) == count
    assert len(opened(settings_for(tmp_path / "set", split="test"), "all")) == 3
    elsewhere = settings_for(tmp_path / "other", eval_source=str(tmp_path / "set"))
    assert len(opened(elsewhere, "train")) == 4  # nothing needs to be held out
    assert len(opened(elsewhere, "held_out")) == 2
    whole = settings_for(tmp_path / "set", eval_source=str(tmp_path / "other"))
    assert len(opened(whole, "train")) == 6 and len(opened(whole, "held_out")) == 4
    assert len(opened(settings_for(tmp_path / "other", eval_source="photos"), "held_out")) == 3
    with pytest.raises(UserError, match="data.eval_split: train has images of data.split train"):
        opened(settings_for(tmp_path / "set", eval_split="train"), "held_out")
    with pytest.raises(UserError, match="data.split.*no split 'extra'; it has: .*train"):
        opened(settings_for(tmp_path / "set", split="extra"), "train")
    with pytest.raises(UserError, match="data.eval_split.*no split 'val'; it has none"):
        opened(settings_for(tmp_path / "other", eval_split="val"), "train")


# where images come from


def test_photos_are_split_by_scene() -> None:
    settings = DataSettings()
    train, held_out = opened(settings, "train"), opened(settings, "held_out")
    assert len(train) == 6 and len(held_out) == 3 and len(opened(settings, "all")) == 9
    assert {"motorcycle_left.png", "motorcycle_right.png"} <= set(names(train))
    assert not set(names(train)) & set(names(held_out))
    for source in (train, held_out):
        for i in range(len(source)):
            pixels = images.decode(source.read(i), channels=3)
            assert min(pixels.shape[:2]) >= 256 and pixels.dtype == np.uint8
            assert (pixels[..., 0] != pixels[..., 2]).any()  # colour


def test_photos_without_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(locations.PHOTOS, "train", ("astronaut.png", "gone.png"))
    with pytest.raises(UserError, match="lacks gone.png"):
        opened(DataSettings(), "train")


def test_a_folder_with_everything(tmp_path: Path) -> None:
    root = tmp_path / "Bilder ñ 写真 [1]*"
    for path in ("b/x.png", "a/x.png", "a/deep/er/ü ö.PNG", "Z.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(7))
    np.save(root / "array.npy", np.full((9, 9, 3), 7, np.uint8))
    for ignored in (".hidden.png", ".cache/x.png", "notes.txt", "metadata.parquet"):
        (root / ignored).parent.mkdir(exist_ok=True)
        (root / ignored).write_bytes(png(9))
    (root / "b/loop").symlink_to(root)
    outside = write_folder(tmp_path / "outside", 1)
    (root / "linked").symlink_to(outside)
    source = opened(settings_for(root), "all")
    expected = ["Z.jpg", "a/deep/er/ü ö.PNG", "a/x.png", "array.npy", "b/x.png", "linked/000.png"]
    assert names(source) == expected
    settings = settings_for(root, num_workers=2)
    batches = take(source, settings, 3, batch_size=2, micro_batch_size=2)
    assert sorted(value for batch in batches for value in values_of(batch)) == [0, 7, 7, 7, 7, 7]
    assert not any(batch.skipped for batch in batches)


def test_what_is_left_out_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("train/a.png", "train/b.png", "val/c.png", "more/d.png", "train/e.heic", "train/f", "train/notes.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(png(1))
    for part in ("train", "held_out"):
        assert len(opened(settings_for(tmp_path), part)) == {"train": 2, "held_out": 1}[part]
    said = f"{tmp_path}: these files are left out: 1 .heic, 1 without an extension, 1 outside of train and validation\n"
    assert capsys.readouterr().err == said


def test_pictures_that_runs_and_evaluations_wrote_are_no_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, 3)
    for folder, files in (("runs/x", ("config.yaml", "log.jsonl")), ("recon-x", ("result.json", "diffusion.html"))):
        write_folder(tmp_path / folder / "previews", 2)
        write_folder(tmp_path / folder, 1)
        for name in files:
            (tmp_path / folder / name).write_text("{}")
    assert len(opened(settings_for(tmp_path), "all")) == 3
    assert capsys.readouterr().err.count("left out, because latent-ae wrote this folder") == 2
    assert len(opened(settings_for(tmp_path / "runs/x"), "all")) == 3  # given by its own name it is read


def test_a_folder_called_photos_is_pointed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("photos"), 2)
    assert len(opened(settings_for("photos"), "all")) == 9
    assert "write ./photos" in capsys.readouterr().err
    assert len(opened(settings_for("./photos"), "all")) == 2


def test_what_datasets_keeps_beside_a_saved_dataset_is_no_part_of_it(tmp_path: Path) -> None:
    rows = [{"bytes": png(value), "path": None} for value in range(5)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.map(lambda row: row, load_from_cache_file=True)
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 1
    assert len(opened(settings_for(tmp_path / "saved"), "all")) == 5


def test_mixed_depths_in_one_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((9, 9), 65535, np.uint16))
    np.save(tmp_path / "b.npy", np.full((9, 9, 1), 0.5, np.float32))
    Image.new("RGB", (9, 9)).save(tmp_path / "c.png")
    settings = settings_for(tmp_path)
    (batch,) = take(opened(settings, "all"), settings, 1, channels=1, batch_size=3, micro_batch_size=3)
    assert sorted(batch.images[:, 0, 0, 0].tolist()) == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("content", [{}, {"a.txt": b"x", "b.mp4": b"y"}])
def test_a_folder_without_images_names_path_and_extensions(tmp_path: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        opened(settings_for(tmp_path), "train")
    message = str(caught.value)
    assert "data.source" in message and str(tmp_path) in message and ".png" in message and ".parquet" in message
    assert all(Path(name).suffix in message for name in content) and (content or "nothing" in message)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.source: no such file or folder: /nowhere/at/all"):
        opened(settings_for("/nowhere/at/all"), "train")
    with pytest.raises(UserError, match="data.eval_source: no such file"):
        opened(settings_for(write_folder(tmp_path / "a"), eval_source="./nowhere"), "held_out")
    picture = tmp_path / "one.png"
    picture.write_bytes(png(1))
    with pytest.raises(UserError, match="is a single image"):
        opened(settings_for(picture), "train")


def test_a_hub_id_out_of_reach() -> None:
    for location in ("someone/some-images", "no_such_folder"):
        with pytest.raises(UserError, match=f"data.source: {location} is neither a file or folder here nor a hub"):
            opened(settings_for(location), "train")


def test_a_hub_repository(tmp_path: Path) -> None:
    """datasets reads a local clone as it reads the hub."""
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", range(5))
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", range(5, 8))
    settings = settings_for("user/name")
    hub: Any = locations._Hub("source", str(tmp_path), settings)
    assert set(hub.splits) == {"train", "test"} and hub.held_out_split() == "test"
    assert len(hub.open(hub.find_split("train", "split"))) == 5
    assert len(hub.open(hub.find_split("train[:2]", "split"))) == 2
    assert len(hub.open("test")) == 3
    # without a card, names of files tell the splits; datasets gives these as objects of its own
    assert all(type(split) is str for split in hub.splits)


@pytest.mark.parametrize("known", [True, False], ids=["rows counted", "rows unknown"])
def test_splits_of_the_hub_that_share_images(known: bool, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", range(10))
    hub: Any = locations._Hub("source", str(tmp_path), settings_for("user/name"))
    hub.sizes = dict.fromkeys(hub.splits, 10) if known else {}
    assert hub.find_split("training+val", "split") == "train+validation"
    assert hub.find_split("train[:80%]+val[2:]", "split") == "train[:80%]+validation[2:]"
    # what training reads is not held out by itself
    assert hub.held_out_split("train") == "validation"
    assert hub.held_out_split("train+validation") == "test" and hub.held_out_split("validation[:50%]") == "test"
    assert hub.held_out_split("train+test+validation[:1]") is None
    for one, other, shared in (
        ("train", "validation", False),
        ("train[:80%]", "train[80%:]", False),
        ("train[:80%]", "train[50%:]", True),
        ("train[:-3]", "train[-3:]", False),
        ("train[:3]", "train[3:]", False),
        ("train[:8]", "train[-3:]", True),
        ("train[:4]+validation", "validation[:10%]", True),
        ("train[:4]+validation", "train[4:6]+test", False),
    ):
        assert hub.overlap(one, other) is hub.overlap(other, one) is shared, (one, other)
    with pytest.raises(UserError, match=r"data.split: .* has no split 'train\+extra'"):
        hub.find_split("train+extra", "split")


# tables


def write_parquet(path: Path, values: Any, column: str = "image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(value), "path": f"{value}.png"} for value in values]
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({column: rows, "label": list(values)}, features=features)
    table.to_parquet(path)
    return path


def all_values(source: Any, settings: DataSettings) -> list[int]:
    held_out = held_out_images(source, settings, channels=3, crop_px=8)
    return [int(images.to_uint8(image)[0, 0, 0]) for _, _, image in held_out]


def test_parquet_with_images(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a [1].parquet", range(30))
    for where in (path, tmp_path):
        settings = settings_for(where, num_workers=2)
        source = opened(settings, "all")
        assert isinstance(source, TableSource) and source.read(4) == png(4)
        assert all_values(source, settings) == list(range(30))
        train, held_out = opened(settings, "train"), opened(settings, "held_out")
        assert len(train) == 28 and len(held_out) == 2
        assert (source.subset(np.array([3, 5])).keys() == source.keys()[[3, 5]]).all()
        assert sorted(all_values(train, settings) + all_values(held_out, settings)) == list(range(30))
        assert all(int(name.rsplit(" ", 1)[1]) < 30 for name in names(held_out))
        seen = [
            value
            for batch in take(source, settings, 15, batch_size=4, micro_batch_size=4)
            for value in values_of(batch)
        ]
        assert sorted(seen[:30]) == sorted(seen[30:]) == list(range(30))


def test_tables_with_splits_in_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", range(3))
    write_parquet(tmp_path / "train-00001-of-00002.parquet", range(3, 6))
    write_parquet(tmp_path / "test.parquet", range(6, 8))
    settings = settings_for(tmp_path)
    assert all_values(opened(settings, "train"), settings) == list(range(6))
    assert all_values(opened(settings, "held_out"), settings) == [6, 7]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file", "saved", "struct"])
def test_columns_of_raw_bytes(tmp_path: Path, kind: str) -> None:
    encoded = [png(i) for i in range(4)]
    table = pa.table({"image": encoded, "id": list(range(4))})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    elif kind == "struct":
        pq.write_table(pa.table({"image": [{"bytes": data, "path": None} for data in encoded]}), tmp_path / "a.parquet")
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(tmp_path)
    else:
        make = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with make(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    settings = settings_for(tmp_path)
    assert all_values(opened(settings, "all"), settings) == [0, 1, 2, 3]


def write_tar(path: Path, values: Any) -> Path:
    with tarfile.open(path, "w") as archive:
        for value in values:
            member = tarfile.TarInfo(f"{value:03d}.png")
            member.size = len(png(value))
            archive.addfile(member, io.BytesIO(png(value)))
    return path


def test_webdataset_tar(tmp_path: Path) -> None:
    settings = settings_for(write_tar(tmp_path / "a.tar", range(4)), image_column="png")
    assert all_values(opened(settings, "all"), settings) == [0, 1, 2, 3]


def test_a_wrong_column_names_the_right_one(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(3), column="img")
    with pytest.raises(UserError, match="no column 'jpg'; it has: img, label; set data.image_column=img"):
        opened(settings_for(path, image_column="jpg"), "train")
    with pytest.raises(UserError, match="'label' of .* holds Value.*not images"):
        opened(settings_for(path, image_column="label"), "train")
    assert len(opened(settings_for(path, image_column="img"), "all")) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_the_only_column_of_images_is_found(tmp_path: Path, streaming: bool) -> None:
    """By its type, or where bytes have lost that by what they are; not where two could be meant."""
    values = [1, 2, 3]
    sound, text = [{"bytes": b"RIFF....WAVE", "path": "a.wav"}] * 3, [b"not a picture"] * 3
    columns = {
        "struct": {"a": [{"bytes": png(value), "path": None} for value in values], "sound": sound},
        "bytes": {"text": text, "a": [png(value) for value in values], "n": values},
        "late": {"a": [None, *(png(value) for value in values)], "text": [b"x"] * 4},
        "two": {"a": [png(value) for value in values], "b": [png(value) for value in values]},
        "none": {"text": text, "n": values},
    }
    for name, table in columns.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    write_parquet(tmp_path / "typed.parquet", values, column="a")
    write_tar(tmp_path / "shard.tar", values)
    for file in ("struct.parquet", "bytes.parquet", "late.parquet", "typed.parquet", "shard.tar"):
        settings = settings_for(tmp_path / file, streaming=streaming, num_workers=0)
        assert all_values(opened(settings, "all"), settings) == values, file
    with pytest.raises(UserError, match="it has: a, b; set data.image_column=a or data.image_column=b"):
        opened(settings_for(tmp_path / "two.parquet", streaming=streaming), "all")
    with pytest.raises(UserError, match="no column 'image'; it has: text, n$"):
        opened(settings_for(tmp_path / "none.parquet", streaming=streaming), "all")


def test_rows_without_an_image_and_broken_tables(tmp_path: Path) -> None:
    rows = [{"bytes": png(0), "path": None}, None, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    settings = settings_for(tmp_path)
    held_out = held_out_images(opened(settings, "all"), settings, channels=3, crop_px=8)
    assert len(list(held_out)) == 1
    assert [line.split(" row ", 1)[1] for line in held_out.skipped] == [
        "1: the row holds no image",
        "2: the row holds no image",
    ]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        opened(settings, "all")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(UserError, match="mixes parquet and webdataset"):
        opened(settings, "all")


# streams


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of eight images."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(6):
        write_parquet(folder / f"part-{i}.parquet", range(i * 8, i * 8 + 8))
    return folder


def stream_settings(folder: Path, **values: Any) -> DataSettings:
    return settings_for(folder, **{"streaming": True, "shuffle_buffer": 8, "eval_source": "photos"} | values)


def streamed(
    folder: Path,
    count: int,
    *,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    shuffle_buffer: int = 8,
    **sizes: Any,
) -> list[Batch]:
    settings = stream_settings(folder, num_workers=workers, shuffle_buffer=shuffle_buffer)
    source = opened(settings, "train")
    assert isinstance(source, StreamSource)
    sizes = {"batch_size": 2 * world_size, "micro_batch_size": 2} | sizes
    return take(source, settings, count, rank=rank, world_size=world_size, **sizes)


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 2), (2, 2), (1, 4)])
def test_a_stream_gives_every_image_once_per_epoch(shards: Path, workers: int, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        # six files over four ranks: the first two ranks get two each
        own_files = len(range(rank, 6, world_size))
        batches = streamed(shards, own_files * 4, workers=workers, rank=rank, world_size=world_size)
        for step, batch in enumerate(batches):
            first = (step * world_size + rank) * 2
            assert batch.numbers == [first, first + 1]
        seen += [value for batch in batches for value in values_of(batch)]
    if workers == 2 and world_size == 2:
        assert set(seen) <= set(range(48))  # three files over two workers: one starts its second epoch sooner
    else:
        assert sorted(seen) == list(range(48))


def test_a_stream_is_shuffled_anew_each_epoch_and_repeats_with_its_seed(shards: Path) -> None:
    seen = [value for batch in streamed(shards, 48, workers=0) for value in values_of(batch)]
    first, second = seen[:48], seen[48:]
    assert sorted(first) == sorted(second) == list(range(48))
    assert first != second and first != list(range(48))
    assert seen == [value for batch in streamed(shards, 48, workers=0) for value in values_of(batch)]
    assert seen != [value for batch in streamed(shards, 48, workers=0, seed=1) for value in values_of(batch)]


def test_crops_of_a_stream_are_functions_of_the_sample_number(shards: Path, tmp_path: Path) -> None:
    """One image over and over: only crop and flip can differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    features = datasets.Features({"image": datasets.Image()})
    rows = [{"bytes": stream.getvalue(), "path": None}] * 4
    for i in range(2):
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / f"{i}.parquet")
    reference = torch.cat([batch.images for batch in streamed(tmp_path, 4, workers=0)])
    assert not torch.equal(reference[0], reference[1])
    assert torch.equal(torch.cat([batch.images for batch in streamed(tmp_path, 4, workers=2)]), reference)
    for rank in range(2):
        for step, batch in enumerate(streamed(tmp_path, 2, workers=0, rank=rank, world_size=2)):
            first = (step * 2 + rank) * 2
            assert torch.equal(batch.images, reference[first : first + 2])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer", [1, 8, 100])
def test_a_stream_goes_on_as_if_it_had_never_stopped(shards: Path, workers: int, shuffle_buffer: int) -> None:
    whole = streamed(shards, 60, workers=workers, shuffle_buffer=shuffle_buffer)
    for taken in (2, 3, 4, 22, 23, 24, 26, 50):
        state = json.loads(json.dumps(whole[taken - 1].stream_state))
        after = streamed(
            shards, 10, workers=workers, shuffle_buffer=shuffle_buffer, first_batch=taken, stream_state=state
        )
        for one, other in zip(after, whole[taken:], strict=False):
            assert one.numbers == other.numbers and torch.equal(one.images, other.images)
            assert one.stream_state == other.stream_state


def test_a_stream_is_not_elastic(shards: Path) -> None:
    state = streamed(shards, 2, workers=2)[-1].stream_state
    for workers, world_size in ((1, 1), (0, 1), (2, 2)):
        with pytest.raises(UserError, match="data.streaming: .*1 process.es. of 2 worker.s."):
            streamed(shards, 1, workers=workers, world_size=world_size, first_batch=2, stream_state=state)


def test_too_few_files_for_the_readers_of_a_stream(shards: Path) -> None:
    with pytest.raises(UserError, match=r"streams from 6 file.s., but 4 process.es. with 2 worker.s.*8; lower"):
        streamed(shards, 1, workers=2, world_size=4)


def test_a_stream_skips_what_it_cannot_read(tmp_path: Path) -> None:
    for i in range(2):
        rows = [
            {"bytes": png(value)[: 30 if value == 3 else None], "path": f"{value}.png"}
            for value in range(i * 4, i * 4 + 4)
        ]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / f"{i}.parquet")
    batches = streamed(tmp_path, 7, workers=0)
    assert sorted(value for batch in batches for value in values_of(batch))[::2] == [0, 1, 2, 4, 5, 6, 7]
    skipped = [line for batch in batches for line in batch.skipped]
    assert len(skipped) == 2 and all(line.startswith("3.png: ") for line in skipped)


def test_held_out_images_of_a_stream(shards: Path) -> None:
    settings = stream_settings(shards, num_workers=2)
    source = opened(settings, "all")
    assert all_values(source, settings) == list(range(48))
    shared = [
        (index, int(images.to_uint8(image)[0, 0, 0]))
        for rank in range(3)
        for index, _, image in held_out_images(source, settings, channels=3, crop_px=8, rank=rank, world_size=3)
    ]
    assert sorted(shared) == [(i, i) for i in range(48)]


def test_a_stream_that_cannot_be_split_or_need_not_be_one(shards: Path, tmp_path: Path) -> None:
    for part in ("train", "held_out"):
        with pytest.raises(UserError, match="no images can be held out.*eval_source"):
            opened(stream_settings(shards, eval_source=None), part)
    for source in ("photos", str(write_folder(tmp_path))):
        with pytest.raises(UserError, match="data.streaming.*set data.streaming=false"):
            opened(DataSettings(source=source, streaming=True), "train")


def test_streamed_tar_files(tmp_path: Path) -> None:
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", range(i * 4, i * 4 + 4))
    settings = stream_settings(tmp_path, image_column="png")
    batches = take(opened(settings, "train"), settings, 4, batch_size=2, micro_batch_size=2)
    assert sorted(value for batch in batches for value in values_of(batch)) == list(range(8))


# the real thing, where it is at hand

real_data = pytest.mark.skipif(
    "LATENT_AE_TEST_DATA" not in os.environ,
    reason="set LATENT_AE_TEST_DATA to a folder that holds bsds500/ with train/, val/ and test/",
)


@real_data
def test_cifar_and_bsds() -> None:
    root = Path(os.environ["LATENT_AE_TEST_DATA"])
    settings = settings_for(root / "bsds500")
    train, held_out = opened(settings, "train"), opened(settings, "held_out")
    assert len(train) == 200 and len(held_out) == 100
    (batch,) = take(train, settings, 1)
    assert batch.images.shape == (8, 3, 8, 8) and not batch.skipped
