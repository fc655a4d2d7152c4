"""The inputs that a run must survive, in the order of docs/data.md's list: each is read as training and evaluation read
it, and the last tests put all of them through the commands.

Three entries have their tests elsewhere: a read-only or full disk (test_disk.py), kill -9 during a save
(train/test_reliability.py, kill_saves.py), and a changed number of processes at resume (train/test_resume.py).
"""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageCms

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data import images
from latent_ae.data.check import check
from latent_ae.data.held_out import held_out_images
from latent_ae.data.loader import Batch, open_images, training_batches
from latent_ae.data.rng import epoch_order
from latent_ae.data.settings import DataSettings
from latent_ae.models.loading import first_stage
from tests.distributed.launch import DISTRIBUTED, ROOT, launch
from tests.encoded_pictures import UPRIGHT, big_endian_tiff, colours, encode, over, png
from tests.runs import words
from tests.tiny_models import tiny_autoencoder

SIDE = 16


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "export"
    tiny_autoencoder().save_pretrained(folder)
    return folder


def smooth(side: int = SIDE, seed: int = 0) -> np.ndarray:
    """HWC uint8 that compresses as photographs do."""
    small = Image.fromarray(colours(4, 4, seed=seed))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def settings_for(folder: Path, **values: Any) -> DataSettings:
    return DataSettings.model_validate(
        {"source": str(folder), "resolution": SIDE, "num_workers": 0, "flip": False} | values
    )


def epoch(folder: Path, channels: int = 3, **values: Any) -> tuple[dict[str, torch.Tensor], Batch]:
    """Training's first epoch as one batch: (the crop of each file, or of what stands in for it), and the batch."""
    settings = settings_for(folder, **values)
    source: Any = open_images(settings, "all")
    size = len(source)
    batches = training_batches(source, settings, channels=channels, seed=0, batch_size=size, micro_batch_size=size)
    batch = next(batches)
    batches.close()
    return {source.name(int(i)): image for i, image in zip(epoch_order(0, 0, size), batch.images, strict=True)}, batch


def survives(folder: Path, data: bytes, suffix: str = ".png", channels: int = 3, **values: Any) -> np.ndarray:
    """The pixels of a file (16 x 16 px, HWC) in training's range, the same in evaluation; nothing is skipped."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / f"file{suffix}").write_bytes(data)
    crops, batch = epoch(folder, channels, **values)
    assert not batch.skipped
    (crop,) = crops.values()
    settings = settings_for(folder, **values)
    ((_, _, held_out),) = held_out_images(open_images(settings, "all"), settings, channels=channels, crop_px=SIDE)
    assert torch.equal(crop, held_out)
    assert crop.min() >= -1 and crop.max() <= 1
    return crop.permute(1, 2, 0).numpy()


def levels(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float64) + 1) * 127.5


def skipped_everywhere(folder: Path, channels: int = 3, **values: Any) -> dict[str, str]:
    """{file: reason} of training, which is that of `data check` and of evaluation."""
    settings = settings_for(folder, **values)
    lines = sorted(set(epoch(folder, channels, **values)[1].skipped))
    assert check(str(folder), settings, channels=channels)["skipped"] == lines
    held_out = held_out_images(open_images(settings, "all"), settings, channels=channels, crop_px=SIDE)
    list(held_out)
    assert sorted(held_out.skipped) == lines
    return dict(line.split(": ", 1) for line in lines)


def good(folder: Path, count: int = 1, side: int = SIDE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(smooth(side, seed=i)).save(folder / f"good{i:02}.png")
    return folder


# truncated or unreadable image


def unreadable_files(folder: Path) -> dict[str, str]:
    """Makes them; {name: a part of the reason}."""
    picture, reasons = Image.fromarray(colours(16, 16)).resize((200, 150), Image.Resampling.BICUBIC), {}
    for suffix, kind in {
        "jpg": "JPEG",
        "png": "PNG",
        "webp": "WEBP",
        "gif": "GIF",
        "tif": "TIFF",
        "jp2": "JPEG2000",
    }.items():
        whole = encode(picture, kind)
        (folder / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        reasons[f"cut.{suffix}"] = "unreadable: "
        if suffix != "tif":  # without compression zeros are black pixels
            # what a machine that lost power leaves: the size is right, the end is zeros
            (folder / f"zeros.{suffix}").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
            reasons[f"zeros.{suffix}"] = "unreadable: "
    flipped = bytearray(encode(picture, "PNG"))
    flipped[len(flipped) // 2] ^= 1
    (folder / "flipped.PNG").write_bytes(flipped)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "line\nbreak.png").write_bytes(b"")
    return reasons | {
        "flipped.PNG": "unreadable: ",
        "empty.png": "not a known image format",
        "text.jpg": "not a known image format",
        "dangling.png": "No such file or directory",
        "loop.png": "Too many levels of symbolic links",
        "pipe.png": "not a file",
        "device.png": "not a file",
        "line\\nbreak.png": "not a known image format",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_or_unreadable_image(tmp_path: Path, workers: int) -> None:
    expected = unreadable_files(good(tmp_path, 3))
    skipped = skipped_everywhere(tmp_path, num_workers=workers)
    assert skipped.keys() == expected.keys()
    assert all(expected[name] in reason and str(tmp_path) not in reason for name, reason in skipped.items())


def test_a_jpeg_with_junk_behind_it_and_other_names_are_no_trouble(tmp_path: Path) -> None:
    folder = good(tmp_path / "a")
    (folder / "picture.png").mkdir()
    jpeg = encode(Image.fromarray(smooth()), "JPEG", quality=95)
    (folder / "picture.png/junk.JPG").write_bytes(jpeg + b"\xff\xda" + b"trailer" * 40)
    (folder / "picture.png/padded.JPG").write_bytes(jpeg + bytes(4096))
    for name in ("._good.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (folder / name).write_bytes(b"\0\5\x16\7 not a picture")
    crops, batch = epoch(folder)
    assert crops.keys() == {"good00.png", "picture.png/junk.JPG", "picture.png/padded.JPG"} and not batch.skipped
    found = check(str(folder), settings_for(folder))
    assert found["num_images"] == 3 and found["other_files"] == {".db": 1, ".txt": 1}


def test_a_file_that_vanishes_after_the_listing(tmp_path: Path) -> None:
    settings = settings_for(good(tmp_path, 4))
    source: Any = open_images(settings, "all")
    (tmp_path / "good02.png").unlink()
    batch = next(training_batches(source, settings, channels=3, seed=0, batch_size=4, micro_batch_size=4))
    assert batch.skipped == ["good02.png: No such file or directory"] and batch.num_replaced == 1


def test_a_folder_that_cannot_be_listed_is_not_left_out_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good(tmp_path / "a")
    good(tmp_path / "locked")
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match="data.source: cannot list .*locked: Permission denied"):
        open_images(settings_for(tmp_path), "all")


def test_tables_with_empty_rows_and_tables_that_are_cut_off(tmp_path: Path) -> None:
    data = encode(Image.fromarray(smooth()), "PNG")
    rows = [{"bytes": data, "path": None}, None, {"bytes": None, "path": None}, {"bytes": data[:90], "path": None}]
    table = tmp_path / "table/a.parquet"
    table.parent.mkdir()
    pa.parquet.write_table(pa.table({"image": rows}), table)
    skipped = skipped_everywhere(table)
    assert [name.rsplit(" ", 1)[1] for name in skipped] == ["1", "2", "3"]
    assert [reason.split(":")[0] for reason in skipped.values()] == 2 * ["the row holds no image"] + ["unreadable"]
    table.write_bytes(table.read_bytes()[:-50])
    with pytest.raises(UserError, match="data.source: .*a.parquet cannot be read as parquet"):
        open_images(settings_for(table), "all")
    shard = tmp_path / "shards/a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        for i in range(6):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    shard.write_bytes(shard.read_bytes()[:5000])
    for streaming in (False, True):
        with pytest.raises(UserError, match="a.tar is cut off"):
            open_images(settings_for(shard, image_column="png", streaming=streaming), "all")
    for number in range(2):
        pa.parquet.write_table(pa.table({"image": [data] * 2}), tmp_path / f"stream{number}.parquet")
    second = tmp_path / "stream1.parquet"
    second.write_bytes(second.read_bytes()[:-50])
    stream = settings_for(tmp_path, streaming=True)
    for path in (table, shard):
        path.unlink()
    batches = training_batches(open_images(stream, "all"), stream, channels=3, seed=0, batch_size=1, micro_batch_size=1)
    with pytest.raises(UserError, match="cannot be read to its end"):
        for _ in range(5):
            next(batches)


# grayscale, CMYK, palette, RGBA


def test_grayscale_cmyk_palette_and_rgba(tmp_path: Path) -> None:
    folder, gray, rgba = tmp_path / "a", colours(SIDE, SIDE, 1)[..., 0], colours(SIDE, SIDE, 4)
    assert np.allclose(levels(survives(folder, encode(Image.fromarray(gray), "PNG"))), gray[..., None], atol=1e-3)
    bits = gray > 127
    assert np.allclose(levels(survives(folder, encode(Image.fromarray(bits), "PNG"))), 255 * bits[..., None], atol=1e-3)
    # Adobe's JPEG stores inks inverted: red must not become cyan
    red = encode(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(levels(survives(folder, red, ".jpg")) - [255, 0, 0]).max() <= 3
    palette = Image.fromarray(gray % 4, "P")
    table = colours(4, 1)[:, 0]
    palette.putpalette(table.tobytes())
    assert np.allclose(levels(survives(folder, encode(palette, "GIF"), ".gif")), table[gray % 4], atol=1e-3)
    rgba[:4, :, 3] = 0  # hidden colours
    file = encode(Image.fromarray(rgba), "PNG")
    for background in ((255, 255, 255), (10, 200, 90)):
        seen = levels(survives(folder, file, background=background))
        assert np.abs(seen - over(rgba, background)).max() <= 1
        assert np.allclose(seen[:4], background, atol=1e-3)
    assert np.allclose(levels(survives(folder, file, channels=4)), rgba, atol=1e-3)
    la = rgba[..., [0, 3]]
    expected = over(rgba[..., [0, 0, 0, 3]], (255, 255, 255))
    assert np.abs(levels(survives(folder, encode(Image.fromarray(la, "LA"), "PNG"))) - expected).max() <= 1


# EXIF rotation


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif"), ("JPEG", ".jpg")])
def test_exif_rotation(tmp_path: Path, kind: str, suffix: str) -> None:
    rgb = smooth()
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[274] = orientation
        options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
        seen = survives(tmp_path / "a", encode(Image.fromarray(rgb), kind, exif=exif, **options), suffix)
        assert np.abs(levels(seen) - upright(rgb)).max() <= (6 if kind == "JPEG" else 1e-3)


@pytest.mark.parametrize("tags", [b"garbage", b"MM\0*\0\0\0\x08\xff\xff" + b"\1" * 30, b"II*\0\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("error")
def test_damaged_exif_turns_nothing_and_loses_no_image(tmp_path: Path, tags: bytes) -> None:
    for kind, suffix in (("PNG", ".png"), ("WEBP", ".webp")):
        options = {"lossless": True} if kind == "WEBP" else {}
        file = encode(Image.fromarray(smooth()), kind, exif=b"Exif\0\0" + tags, **options)
        assert np.allclose(levels(survives(tmp_path / "a", file, suffix)), smooth(), atol=1e-3)


# 16-bit PNG and TIFF


def test_16_bit_png_and_tiff(tmp_path: Path) -> None:
    folder, deep = tmp_path / "a", (np.arange(256, dtype=np.uint16) + 30000).reshape(SIDE, SIDE)
    assert len(np.unique(deep // 257)) == 2  # eight bits would leave two levels of 256
    little = encode(Image.fromarray(deep), "TIFF")
    # a scanner's way: 0 is white
    white_is_zero = encode(Image.fromarray(65535 - deep), "TIFF")
    photometric = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert white_is_zero.count(photometric) == 1
    white_is_zero = white_is_zero.replace(photometric, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    files = {".png": png(deep, 16, 0), ".tif": little, ".tiff": big_endian_tiff(deep), ".TIF": white_is_zero}
    for suffix, file in files.items():
        for channels in (1, 3):
            seen = (survives(folder, file, suffix, channels).astype(np.float64) + 1) * 32767.5
            assert np.abs(seen - deep[..., None]).max() < 0.01
    # 12 bits, two numbers in three bytes
    twelve = (deep - 30000) * 16
    first, second = twelve[:, ::2], twelve[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    fields = {256: SIDE, 257: SIDE, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: SIDE, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in fields.items())
    directory = struct.pack("<H", len(fields)) + entries + bytes(4)
    file = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory
    seen = (survives(folder, file, ".tif", 1)[..., 0].astype(np.float64) + 1) / 2 * 4095
    assert np.abs(seen - twelve).max() < 0.1
    # a transparent level of a 16-bit grayscale PNG is background
    clear = png(deep, 16, 0)
    chunk = b"tRNS" + struct.pack(">H", 30007)
    at = clear.index(b"IDAT") - 4
    clear = clear[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + clear[at:]
    seen = levels(survives(folder, clear, background=(255, 0, 9)))
    assert np.allclose(seen[0, 7], (255, 0, 9), atol=1e-3) and np.allclose(seen[0, 8], 30008 / 257, atol=1e-3)
    # colour of 16 bits is read with 8, also under alpha
    rgba = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 4)).astype(np.uint16)
    assert np.abs(levels(survives(folder, png(rgba[..., :3], 16, 2))) - rgba[..., :3] / 257).max() <= 1
    expected = over(rgba / 257, (255, 255, 255))
    assert np.abs(levels(survives(folder, png(rgba, 16, 6))) - expected).max() <= 2


# ICC profiles


def profile_of(primaries: dict[bytes, tuple[float, float, float]], gamma: float) -> bytes:
    """A gamma profile, ICC.1:2001: of gray, or for colours given in XYZ of D50."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"sRGB 2\0" + bytes(78)  # a name that means nothing
    tags = {b"desc": text, b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)}
    tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in primaries.items()}
    channels = list(primaries) or [b"k"]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags |= {name + b"TRC": curve for name in channels}
    offset, directory, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        directory += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s", offset + len(body), bytes(4), 0x02400000, b"mntr", b"RGB " if primaries else b"GRAY", b"XYZ "
    )
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249) + bytes(48)
    return header + directory + body


# Adobe RGB (1998), adapted to D50; sRGB with a straight tone curve
WIDE = profile_of(
    {b"r": (0.60974, 0.31111, 0.01947), b"g": (0.20528, 0.62567, 0.06087), b"b": (0.14919, 0.06322, 0.74457)}, 2.2
)
LINEAR = profile_of(
    {b"r": (0.43607, 0.22249, 0.01392), b"g": (0.38515, 0.71687, 0.09708), b"b": (0.14307, 0.06061, 0.71410)}, 1
)


@pytest.mark.parametrize("profile", [WIDE, LINEAR], ids=["wide gamut", "linear sRGB"])
def test_icc_profiles(tmp_path: Path, profile: bytes) -> None:
    picture = Image.fromarray(colours(SIDE, SIDE))
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    theirs = np.asarray(ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))
    assert np.abs(theirs.astype(int) - np.asarray(picture)).max() > 20
    seen = levels(survives(tmp_path / "a", encode(picture, "PNG", icc_profile=profile)))
    assert np.allclose(seen, theirs, atol=1e-3)
    transparent = picture.copy()
    transparent.putalpha(Image.fromarray(colours(SIDE, SIDE, 1)[..., 0]))
    seen = levels(survives(tmp_path / "a", encode(transparent, "PNG", icc_profile=profile), channels=4))
    assert np.allclose(seen[..., :3], theirs, atol=1e-3)


def test_a_gray_icc_profile(tmp_path: Path) -> None:
    profile, gray = profile_of({}, 1), Image.fromarray(colours(SIDE, SIDE, 1)[..., 0])
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    theirs = np.asarray(ImageCms.profileToProfile(gray, source, ImageCms.createProfile("sRGB"), outputMode="RGB"))
    assert np.abs(theirs[..., 0].astype(int) - np.asarray(gray)).max() > 50
    transparent = gray.convert("LA")
    transparent.putalpha(Image.fromarray(np.full((SIDE, SIDE), 255, np.uint8)))
    for picture in (gray, transparent):
        seen = levels(survives(tmp_path / "a", encode(picture, "PNG", icc_profile=profile)))
        assert np.allclose(seen, theirs, atol=1e-3)


def test_a_broken_icc_profile_loses_no_image(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"not a profile", WIDE[:200], srgb):
        file = encode(Image.fromarray(smooth()), "PNG", icc_profile=profile)
        assert np.allclose(levels(survives(tmp_path / "a", file)), smooth(), atol=1e-3)


# animated files


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", ".gif"), ("WEBP", ".webp"), ("PNG", ".png"), ("TIFF", ".tif")])
def test_animated_files(tmp_path: Path, kind: str, suffix: str) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.allclose(survives(tmp_path / "a", file, suffix), [1, -1, -1])
    assert "animated" in next(iter(check(str(tmp_path / "a"), settings_for(tmp_path / "a"))["kinds"]))


# below crop size


def test_below_crop_size(tmp_path: Path) -> None:
    for height, width in ((1, 1), (1, 40), (40, 1), (5, 9)):
        Image.new("RGB", (width, height), (60, 120, 180)).save(tmp_path / f"{height}x{width}.png")
    for height, width in ((1, 5000), (5000, 1)):
        Image.new("RGB", (width, height)).save(tmp_path / f"{height}x{width}.png")
    crops, _ = epoch(tmp_path)
    for name in ("1x1.png", "1x40.png", "40x1.png", "5x9.png"):
        assert np.allclose(levels(crops[name].permute(1, 2, 0).numpy()), (60, 120, 180), atol=1e-3)
    skipped = skipped_everywhere(tmp_path)
    assert skipped.keys() == {"1x5000.png", "5000x1.png"} and all("elongated" in why for why in skipped.values())
    assert check(str(tmp_path), settings_for(tmp_path))["smaller_than_resolution"] == 4


# huge images


def test_huge_images(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(good(tmp_path) / "huge.png")
    np.save(tmp_path / "huge.npy", np.zeros((30, 40, 3), np.uint8))
    skipped = skipped_everywhere(tmp_path, max_pixels=1000)
    assert skipped == {name: "40 x 30 px is more than the limit of 1000 px" for name in ("huge.png", "huge.npy")}


# sides not divisible by the factor


def test_sides_not_divisible_by_the_factor(model: Path) -> None:
    stage = first_stage(tiny_autoencoder())
    image = torch.rand(1, 3, 18, 25, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        made = stage.reconstruct(image)
        # the model sees the last row and column repeated
        rows = [*range(18), 17, 17]
        columns = [*range(25), 24, 24, 24]
        whole = stage.reconstruct(image[:, :, rows][..., columns])
    assert made.shape == image.shape and torch.equal(made, whole[..., :18, :25])


def test_whole_images_are_measured_in_sides_that_divide(model: Path, tmp_path: Path) -> None:
    Image.fromarray(colours(18, 25)).save(tmp_path / "a.png")
    result = evaluated(model, tmp_path, "crop_px=null")
    assert result["metrics"]["mode"]["n"] == 1 and np.isfinite(result["metrics"]["mode"]["psnr"])


# empty folder or wrong extension


@pytest.mark.parametrize(("files", "found"), [([], "nothing"), (["a.heic", "b.txt", "c"], ".heic, .txt, no extension")])
def test_empty_folder_or_wrong_extension(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], found: str
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"")
    for command in (words(folder, tmp_path / "run"), ["data", "check", str(folder)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert f"{folder} holds no images (it holds: {found})" in error and ".png" in error and ".parquet" in error


# NaN, infinity or unscaled arrays


def test_nan_inf_or_unscaled_arrays(tmp_path: Path) -> None:
    array = smooth().astype(np.float32) / 255
    bad = {"nan": array.copy(), "inf": array.copy(), "unscaled": array * 255, "centred": array * 2 - 1}
    bad["nan"][3, 3, 0], bad["inf"][0, 0, 2] = np.nan, np.inf
    for name, values in bad.items():
        np.save(tmp_path / f"{name}.npy", values)
    np.save(tmp_path / "right.npy", array)
    skipped = skipped_everywhere(tmp_path)
    assert skipped.keys() == {f"{name}.npy" for name in bad}
    assert all("must lie in [0, 1], without NaN" in reason for reason in skipped.values())
    crops, _ = epoch(tmp_path)
    assert all(np.allclose(crop.permute(1, 2, 0), array * 2 - 1, atol=1e-6) for crop in crops.values())


# constant images; batch of 1


def last_losses(run: Path) -> dict[str, Any]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return next(event for event in reversed(events) if event["event"] == "train")


@pytest.mark.usefixtures("no_finish")
def test_constant_images_and_a_batch_of_1(model: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "flat", tmp_path / "run"
    folder.mkdir()
    for level in (0, 0, 255, 128):
        Image.new("RGB", (SIDE, SIDE), (level, level, level)).save(folder / f"{len(list(folder.iterdir()))}.png")
    assert main(words(folder, run, "batch_size=1", "steps=3", "gan.adaptive_cap=100")) == 0
    events = (run / "log.jsonl").read_text()
    assert '"skipped"' not in events and "NaN" not in events and np.isfinite(last_losses(run)["l1"])
    result = evaluated(model, folder, "crop_px=16", "batch_size=1")
    assert all(np.isfinite(result["metrics"]["mode"][name]) for name in ("psnr", "ssim"))


# the last partial batch


def test_the_last_partial_batch(model: Path, tmp_path: Path) -> None:
    folder = good(tmp_path / "a", 5)
    result = evaluated(model, folder, "crop_px=16", "batch_size=2")
    assert result["metrics"]["mode"]["n"] == 5
    alone = evaluated(model, folder, "crop_px=16", "batch_size=1")
    assert result["metrics"]["mode"]["psnr"] == pytest.approx(alone["metrics"]["mode"]["psnr"], rel=1e-6)


def evaluated(model: Path, folder: Path, *more: str) -> dict[str, Any]:
    """`latent-ae eval recon` by its command: the JSON on stdout."""
    fixed = ("resize_px=null", "lpips=[]", "frechet=[]", "num_workers=0", "baseline=false")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["eval", "recon", str(model), str(folder), *fixed, *more, "--out", str(folder) + ".result"]) == 0
    shutil.rmtree(str(folder) + ".result")
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


# odd N over ranks: test_two_processes_agree_on_unreadable_files, at the end


# shards fewer than workers


def test_shards_fewer_than_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = encode(Image.fromarray(smooth()), "PNG")
    for number in range(2):
        pa.parquet.write_table(pa.table({"image": [data] * 3}), tmp_path / f"{number}.parquet")
    held_out = good(tmp_path / "held-out", 2)
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in tmp_path.glob("*.parquet"):
        path.rename(shards / path.name)
    stream = ("data.streaming=true", "data.num_workers=3", f"data.eval_source={held_out}")
    assert main(words(shards, tmp_path / "run", *stream)) == 2
    error = capsys.readouterr().err
    assert "data.num_workers" in error and "2 file(s)" in error and "Traceback" not in error


# duplicate names; unicode paths


@pytest.mark.usefixtures("no_finish")
def test_duplicate_names_and_unicode_paths(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "Bilder ñ 写真 \u3000 [1]*"
    names = [
        b"a/x.png",
        b"b/x.png",
        b"b/X.PNG",
        "ü/写真.png".encode(),
        "u\u0308/写真.png".encode(),
        b"latin \xfc.png",
        b"line\nbreak.png",
    ]
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(encode(Image.new("RGB", (SIDE, SIDE), (number, 0, 0)), "PNG"))
    crops, batch = epoch(folder, num_workers=2)
    reds = {name: round(float(levels(crop.permute(1, 2, 0).numpy())[0, 0, 0])) for name, crop in crops.items()}
    assert sorted(reds.values()) == list(range(7)) and not batch.skipped
    assert reds["a/x.png"] == 0 and reds["latin \\udcfc.png"] == 5 and reds["line\\nbreak.png"] == 6
    assert main(words(folder, tmp_path / "run", "steps=1")) == 0
    assert evaluated(model, folder, "crop_px=16")["metrics"]["mode"]["n"] == 7
    capfd.readouterr()
    assert main(["data", "check", str(folder), "num_workers=0", "resolution=16"]) == 0
    assert json.loads(capfd.readouterr().out)["num_readable"] == 7


# read-only or full disk, kill -9 during a save, changed number of processes at resume: see the top


# small /dev/shm


def test_small_dev_shm(tmp_path: Path) -> None:
    """In mount namespaces of their own: one page is enough; none gives one message."""
    folder = good(tmp_path / "a", 6, side=200)
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here: run the tests as root outside a container")
    check_it = f"{sys.executable} -m latent_ae data check {folder} num_workers=2 resolution=16"
    for fill, code in (("true", 0), ("dd if=/dev/zero of=/dev/shm/full bs=4k 2>/dev/null", 2)):
        shell = f"mount -t tmpfs -o size=64k none /dev/shm && ({fill}; {check_it})"
        done = subprocess.run(["unshare", "-m", "sh", "-c", shell], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        if code:
            assert "num_workers: 2 reading processes cannot be started: No space left on device" in done.stderr
            assert "--shm-size" in done.stderr
        else:
            assert json.loads(done.stdout)["num_readable"] == 6


# no network


@pytest.mark.usefixtures("no_finish")
def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LATENT_AE_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("LATENT_AE_WEIGHTS", raising=False)
    folder, run = good(tmp_path / "a", 4), tmp_path / "run"
    assert main(words(folder, run, "loss.perceptual=1")) == 2
    error = capsys.readouterr().err
    assert "vgg16" in error and "Traceback" not in error
    assert not list(run.glob("checkpoints/*"))
    assert main(words(folder, run, "steps=1")) == 0  # nothing else needs one


# a truncated or wrong weight file


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "wrong shapes"])
def test_a_truncated_or_wrong_weight_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder, broken = good(tmp_path / "a", 4), tmp_path / "broken"
    shutil.copytree(model, broken)
    (file,) = broken.glob("*.safetensors")
    whole = file.read_bytes()
    if damage == "wrong shapes":
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 8, 12]}))
    else:
        file.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"version https://git-lfs"}[damage])
    out = str(tmp_path / "out")
    small = ("crop_px=16", "resize_px=null", "lpips=[]", "frechet=[]", "num_workers=0", "--out", out)
    start = f"""output_dir: {tmp_path / "run"}
init_from: {broken}
steps: 1
batch_size: 2
data: {{source: {folder}, resolution: 16, num_workers: 0, eval_fraction: 0.25}}
loss: {{perceptual: 0}}
gan: {{weight: 0}}
"""
    (tmp_path / "start.yaml").write_text(start)
    for command in (["eval", "recon", str(broken), str(folder), *small], ["train", str(tmp_path / "start.yaml")]):
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert str(broken) in error and "Traceback" not in error


def test_truncated_metric_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "vgg16-397923af.pth").write_bytes(b"PK\3\4" + bytes(1000))
    assert main(words(good(tmp_path / "a", 4), tmp_path / "run", "loss.perceptual=1", f"weights_dir={weights}")) == 2
    error = capsys.readouterr().err
    assert "vgg16-397923af.pth" in error and "Traceback" not in error


# a config with a typo, a wrong type, a bool for a number


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("optim.lrr=1", "did you mean optim.lr"),
        ("datta.source=x", "datta"),
        ("steps=many", "steps: "),
        ("batch_size=[4]", "batch_size: "),
        ("steps=true", "steps: "),
        ("loss.kl=false", "loss.kl: "),
        ("data.flip=3", "data.flip: "),
    ],
)
def test_a_config_with_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str, message: str
) -> None:
    run = tmp_path / "run"
    assert main(words(tmp_path, run, mistake)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not run.exists()
    key, _, value = mistake.partition("=")
    section, _, name = key.rpartition(".")
    text = f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert main(["train", str(tmp_path / "a.yaml")]) == 2
    assert message in capsys.readouterr().err


# skip, count, name in the log; stop above a set fraction; never silently


@pytest.mark.usefixtures("no_finish")
def test_train_eval_and_data_check_agree_on_a_folder_of_odd_files(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, run = good(tmp_path / "a", 6), tmp_path / "run"
    bad = unreadable_files(folder)
    np.save(folder / "nan.npy", np.full((SIDE, SIDE, 3), np.nan))
    Image.new("RGB", (5000, 1)).save(folder / "thin.png")
    assert main(["data", "check", str(folder), "num_workers=2", "resolution=16"]) == 2
    out, error = capfd.readouterr()
    found = json.loads(out)
    assert len(found["skipped"]) == len(bad) + 2 and found["num_readable"] == 6
    assert "training would stop" in error and all(f"  {line}\n" in error for line in found["skipped"][:20])
    allowed = "data.max_bad_fraction=0.8"
    whole_epoch = ("batch_size=27", "steps=1", f"data.eval_source={good(tmp_path / 'held-out')}", allowed)
    assert len(found["skipped"]) == 21
    assert main(words(folder, run, *whole_epoch)) == 0
    error = capfd.readouterr().err
    assert all(f"skipped {line}\n" in error for line in found["skipped"])
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (named,) = (event for event in events if event["event"] == "unreadable")
    assert sorted(named["files"]) == found["skipped"] and named["samples_so_far"] == len(found["skipped"])
    result = evaluated(model, folder, "crop_px=16", "max_bad_fraction=0.8")
    assert sorted(result["data"]["skipped"]) == found["skipped"] and result["metrics"]["mode"]["n"] == 6
    # one more than the fraction allows: 21 of 27
    assert main(words(folder, tmp_path / "run2", *whole_epoch, "data.max_bad_fraction=0.75")) == 2
    error = capfd.readouterr().err
    assert "data.max_bad_fraction: 21 of the first 27 images were unreadable" in error and "Traceback" not in error
    assert main(words(folder, tmp_path / "run3", *whole_epoch, "data.max_bad_fraction=0.78")) == 0


@pytest.mark.usefixtures("no_finish")
def test_all_that_is_bad_may_be_allowed(tmp_path: Path) -> None:
    """With max_bad_fraction=1 a run goes on however often it has to look for a good file."""
    folder = good(tmp_path / "a", 1)
    for index in range(30):
        (folder / f"{index}.png").write_bytes(b"")
    held_out = f"data.eval_source={good(tmp_path / 'held-out')}"
    assert main(words(folder, tmp_path / "run", "steps=10", "data.max_bad_fraction=1", held_out)) == 0


def test_two_processes_agree_on_unreadable_files(model: Path, tmp_path: Path) -> None:
    """Only rank 1 meets them. Both end with the same message, in training and in evaluation."""
    folder, held_out = good(tmp_path / "a", 12), good(tmp_path / "held-out", 3)
    order = epoch_order(0, 0, 12)
    for number in (2, 3):  # samples of the second process; the first has 0, 1, 4, 5, 8, 9
        (folder / f"good{order[number]:02}.png").write_bytes(b"")
    spoilt = good(tmp_path / "spoilt", 4)
    (spoilt / "good01.png").write_bytes(b"cut")
    many = good(tmp_path / "many", 19)  # odd; blocks of 16 go to the processes in turn
    (many / "good17.png").write_bytes(b"cut")
    two = ("micro_batch_size=2", "validate.every=100", f"data.eval_source={held_out}")
    fixed = ("crop_px=16", "resize_px=null", "lpips=[]", "frechet=[]", "num_workers=0", "baseline=false")
    commands = {
        "train": words(folder, tmp_path / "run", *two),
        "reader": words(many, tmp_path / "run2", *two, "data.max_bad_fraction=1", "checkpoint.every=1"),
        "held out": words(held_out, tmp_path / "run3", *two[:2], f"data.eval_source={spoilt}"),
        "eval": ["eval", "recon", str(model), str(many), *fixed, "--out", str(tmp_path / "out")],
        "odd": ["eval", "recon", str(model), str(many), *fixed, "max_bad_fraction=0.1", "--out", str(tmp_path / "out")],
    }
    script = DISTRIBUTED / "bad_files_on_processes.py"
    done = launch(2, script, str(tmp_path / "said"), json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"said.rank{rank}.json").read_text()) for rank in (0, 1)]
    expected = {
        "train": "data.max_bad_fraction: 2 of the first 12 images were unreadable",
        "reader": "data.source: this reader can read no further",
        "held out": "data.max_bad_fraction: 1 of the first 4 images were unreadable",
        "eval": "max_bad_fraction: 1 of the first 19 images were unreadable",
    }
    for name, message in expected.items():
        for said in ranks:
            code, error = said[name]
            assert code == 2 and error.count(message) == 1 and "Traceback" not in error, (name, error)
    # named by the main process, whoever met them
    for number in (2, 3):
        assert f"skipped good{order[number]:02}.png: not a known image format" in ranks[0]["train"][1]
    assert "held-out image left out: good01.png" in ranks[0]["held out"][1]
    # the step that had gray images in it is not kept
    assert [path.name for path in (tmp_path / "run2/checkpoints").iterdir()] == ["step-00000001"]
    assert [said["odd"][0] for said in ranks] == [0, 0]
    assert json.loads((tmp_path / "out/result.json").read_text())["metrics"]["mode"]["n"] == 18


# a reader that dies


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that crashes on one file, in a worker."""
    original, test = images._open_picture, os.getpid()

    def crashes(stream: Any) -> Image.Image:
        if "deadly" in str(getattr(stream, "name", "")) and os.getpid() != test:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(stream)

    monkeypatch.setattr(images, "_open_picture", crashes)


@pytest.mark.usefixtures("deadly")
def test_data_check_names_the_image_that_kills_its_reader(tmp_path: Path) -> None:
    folder = good(tmp_path, 9)
    (folder / "deadly.png").write_bytes((folder / "good00.png").read_bytes())
    (folder / "empty.png").write_bytes(b"")
    found = check(str(folder), settings_for(folder, num_workers=2))
    assert found["num_images"] == 11 and found["num_readable"] == 9
    assert [line.split(": ")[0] for line in found["skipped"]] == ["deadly.png", "empty.png"]
    assert "kills the process that reads it" in found["skipped"][0]


@pytest.mark.usefixtures("deadly")
def test_training_says_which_setting_to_change_when_a_reader_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, held_out = good(tmp_path / "a", 3), good(tmp_path / "held-out", 2)
    (folder / "deadly.png").write_bytes((folder / "good00.png").read_bytes())
    assert main(words(folder, tmp_path / "run", "data.num_workers=1", f"data.eval_source={held_out}")) == 2
    error = capsys.readouterr().err
    assert "data.num_workers: a process that reads images died" in error and "latent-ae data check" in error
    assert "Traceback" not in error
