"""The quick ways of the loader against the slow ones: simplejpeg against Pillow, scaled decoding, shared memory."""

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data as photographs

from latent_ae.data import fast_jpeg, images
from latent_ae.data.check import check
from latent_ae.data.held_out import held_out_images
from latent_ae.data.images import ImageError, decode, decode_scaled
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.rng import crop_rng
from latent_ae.data.settings import DataSettings
from latent_ae.data.shared_pixels import SharedPixels
from latent_ae.data.transforms import random_crop, resize_shorter
from tests.data.test_images import swapped_rgb_profile
from tests.encoded_pictures import encode

ORDINARY = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restart": {"restart_marker_rows": 1},
    "stored as RGB": {"subsampling": 0, "keep_rgb": True},
    "gray": {},
}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    # odd sides, so that the last blocks are incomplete
    return Image.fromarray(photographs.coffee()[100:241, 200:393])


def outcome(content: bytes | Path, channels: int = 3, **options: Any) -> tuple[np.ndarray | None, str]:
    try:
        return decode_scaled(content, channels=channels, **options).pixels, ""
    except ImageError as error:
        return None, str(error)


def both(monkeypatch: pytest.MonkeyPatch, content: bytes | Path, channels: int = 3, **options: Any) -> tuple[Any, ...]:
    """The outcome with simplejpeg, whether it decoded the file, and the outcome without it."""
    decoded = list[np.ndarray | None]()

    def recorded(*arguments: Any) -> np.ndarray | None:
        decoded.append(decode_jpeg(*arguments))
        return decoded[-1]

    decode_jpeg = fast_jpeg.decode_jpeg
    with monkeypatch.context() as patch:
        patch.setattr(fast_jpeg, "decode_jpeg", recorded)
        found = outcome(content, channels, **options)
    with monkeypatch.context() as patch:
        patch.setattr(fast_jpeg, "simplejpeg", None)
        expected = outcome(content, channels, **options)
    return found, any(one is not None for one in decoded), expected


def assert_same_pixels(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Within two levels, because two copies of a library decode; a test that finds less than equality says so."""
    assert all(one.shape == other.shape for one, other in pairs)
    largest = max(int(np.abs(one.astype(int) - other).max()) for one, other in pairs)
    assert largest <= 2
    if largest:
        pytest.skip(f"pixels differ by {largest} level(s): Pillow and simplejpeg hold different libjpeg-turbo")


def test_ordinary_files_have_pillows_pixels(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    pairs = []
    for name, options in ORDINARY.items():
        file = encode(picture.convert("L") if name == "gray" else picture, "JPEG", quality=90, **options)
        for channels, shorter_px in itertools.product((1, 3) if name == "gray" else (3,), (None, 70, 35, 17)):
            (found, _), fast, (expected, _) = both(monkeypatch, file, channels, shorter_px=shorter_px)
            assert fast, (name, channels, shorter_px)
            pairs.append((found, expected))
    assert {pixels.shape[0] for pixels, _ in pairs} == {141, 71, 36, 18}
    assert_same_pixels(pairs)


@pytest.mark.skipif("LATENT_AE_TEST_DATA" not in os.environ, reason="set LATENT_AE_TEST_DATA to a folder with bsds500/")
def test_photographs_have_pillows_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    files = sorted((Path(os.environ["LATENT_AE_TEST_DATA"]) / "bsds500" / "train").glob("*.jpg"))
    results = [both(monkeypatch, file) for file in files]
    assert len(files) == 200 and all(fast for _, fast, _ in results)
    assert_same_pixels([(found[0], expected[0]) for found, _, expected in results])


def test_other_files_are_left_to_pillow(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    exif = Image.Exif()
    exif[274] = 6
    whole = encode(picture, "JPEG")
    height, width = whole.index(b"\xff\xc0") + 5, whole.index(b"\xff\xc0") + 7
    files = {
        "turned": encode(picture, "JPEG", exif=exif),
        "profile": encode(picture, "JPEG", icc_profile=swapped_rgb_profile()),
        "CMYK": encode(picture.convert("CMYK"), "JPEG"),
        "cut off": whole[: len(whole) // 2],
        "without its last byte": whole[:-1],
        "never written to its end": whole[:-300] + bytes(300),
        "zeros behind junk": whole + b"x" + bytes(300),
        "too large": whole[:height] + b"\xff\xff" + b"\xff\xff" + whole[width + 2 :],
        "higher than it was": whole[:height] + b"\x7f\xff" + whole[height + 2 :],
        "PNG": encode(picture, "PNG"),
    }
    for name, file in files.items():
        (found, reason), fast, (expected, same) = both(monkeypatch, file)
        assert not fast and reason == same, name
        assert found is None or (found == expected).all(), name
        assert (found is None) == (name in list(files)[3:8]), name
    assert "more than the limit" in outcome(files["too large"])[1]
    # luma is not a JPEG's Y after Pillow's rounding, and alpha is not in it
    assert not any(both(monkeypatch, whole, channels)[1] for channels in (1, 4))
    # another size than Pillow found, against which the limit was checked, is not even decoded
    monkeypatch.setattr(fast_jpeg.simplejpeg, "decode_jpeg", None)
    assert fast_jpeg.decode_jpeg(whole, "RGB", (9, 9), 3) is None


def test_damage_gives_the_same_pixels_or_reason(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode(picture.resize((64, 48)), "JPEG"), np.uint8)
    fast_ones = 0
    for _ in range(100):
        damaged = whole.copy()
        damaged[rng.integers(0, len(damaged), 2)] = rng.integers(0, 256, 2)
        (found, reason), fast, (expected, same) = both(monkeypatch, damaged.tobytes(), max_pixels=10**6)
        assert reason == same and np.array_equal(found, expected)
        fast_ones += fast
    assert 10 < fast_ones < 90


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


@pytest.mark.parametrize("sides", [(384, 512), (1024, 600), (193, 141), (141, 193)])
@pytest.mark.parametrize("simple", [True, False])
def test_scaled_decoding_keeps_the_size_and_nearly_the_pixels(
    sides: tuple[int, int], simple: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not simple:
        monkeypatch.setattr(fast_jpeg, "simplejpeg", None)
    photograph = Image.fromarray(photographs.astronaut()).resize(sides, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    turned = encode(photograph, "JPEG", exif=exif)
    assert decode_scaled(turned, channels=3, shorter_px=32).pixels.shape[:2] == sides
    for shorter_px in (64, 48, 33, 16):
        # blurred, so that a shift by a fraction of a pixel costs more than the choice of a filter
        blurred = photograph.filter(ImageFilter.GaussianBlur(2 * min(sides) / shorter_px))
        file = encode(blurred, "JPEG", quality=90)
        exact, scaled = decode(file, channels=3), decode_scaled(file, channels=3, shorter_px=shorter_px)
        assert scaled.size == exact.shape[:2] and scaled.pixels.shape[0] <= (exact.shape[0] + 1) // 2
        assert shorter_px <= min(scaled.pixels.shape[:2])
        expected = resize_shorter(exact, shorter_px)
        resized = resize_shorter(scaled.pixels, shorter_px, image_size=scaled.size)
        assert resized.shape == expected.shape
        assert psnr(resized, expected) > 40, (sides, shorter_px)
        crops = [
            random_crop(pixels, (8, 8), shorter_px, True, crop_rng(0, 5), image_size=size)
            for pixels, size in ((exact, None), (scaled.pixels, scaled.size))
        ]
        assert psnr(*crops) > 30, "another part of the image, or mirrored"


def test_scaled_decoding_is_of_training_crops_alone(tmp_path: Path) -> None:
    for number in range(3):
        photograph = Image.fromarray(photographs.astronaut()[40 * number : 40 * number + 200, 100:340])
        photograph.save(tmp_path / f"{number}.jpg", quality=90)
    exact = DataSettings(source=str(tmp_path), resolution=32, resize_px=40, num_workers=0)
    scaled = exact.model_copy(update={"scaled_decoding": True})
    taken, held_out = [], []
    for settings in (exact, scaled):
        source = open_images(settings, "all")
        stream = training_batches(source, settings, channels=3, seed=0, batch_size=3, micro_batch_size=3)
        taken.append(next(stream))
        stream.close()
        held_out.append(torch.stack([image for *_, image in held_out_images(source, settings, channels=3, crop_px=32)]))
    assert taken[0].indices == taken[1].indices and not torch.equal(taken[0].images, taken[1].images)
    assert (taken[0].images - taken[1].images).square().mean() < 4e-4  # 40 dB
    assert torch.equal(*held_out)
    assert check(str(tmp_path), scaled)["shorter_side_px"]["min"] == 200


def test_shared_pixels_stay_while_they_are_read() -> None:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(12)]
    shared = SharedPixels(workers=2, items=3, images=1, size=60)
    sent = [shared.put(number % 2, number // 2, 0, pixels[:, ::-1]) for number, pixels in enumerate(made)]
    assert len(pickle.dumps(sent[0])) < 200
    # each worker's three newest items
    assert all((shared.get([sent[i]])[0] == made[i][:, ::-1]).all() for i in range(6, 12))
    large = np.ones((4, 5, 3), np.float32)
    for place in (shared, pickle.loads(pickle.dumps(shared))):
        assert np.array_equal(shared.get([place.put(0, 0, 0, large)])[0], large)
    assert isinstance(pickle.loads(pickle.dumps(shared)).put(0, 0, 0, made[0]), np.ndarray)


def test_batches_are_converted_exactly() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    batch = images.to_batch([levels, levels[:, ::-1]])
    expected = torch.from_numpy(levels[..., 0]).float() / 127.5 - 1
    assert torch.equal(batch[0, 0], expected) and torch.equal(batch[1, 0], expected.flip(1))
    assert torch.equal(batch[0], images.to_tensor(levels))
