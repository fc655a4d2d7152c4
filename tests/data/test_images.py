"""Pixels against answers computed without the code under test."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision.transforms import v2

from latent_ae.config import UserError
from latent_ae.data import images
from latent_ae.data import transforms as crops
from latent_ae.data.images import ImageError, decode
from latent_ae.report.pictures import picture_grid
from tests.encoded_pictures import UPRIGHT, big_endian_tiff, colours, encode, over, png


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601."""
    return rgb @ np.array([0.299, 0.587, 0.114])


def close(actual: np.ndarray, expected: np.ndarray, levels: float = 1.0) -> bool:
    return actual.shape == expected.shape and bool(np.abs(actual.astype(float) - expected).max() <= levels)


def test_rgb_is_exact_from_bytes_and_path(tmp_path: Path) -> None:
    rgb = colours()
    path = tmp_path / "ünï cödé.png"
    path.write_bytes(encode(Image.fromarray(rgb), "PNG"))
    for source in (path, str(path), path.read_bytes()):
        decoded = decode(source, channels=3)
        assert decoded.dtype == np.uint8
        assert (decoded == rgb).all()


def test_channel_counts_of_a_picture() -> None:
    rgb, gray = colours(), colours(channels=1)
    rgb_file = encode(Image.fromarray(rgb), "PNG")
    gray_file = encode(Image.fromarray(gray[..., 0]), "PNG")
    assert close(decode(rgb_file, channels=1)[..., 0], luma(rgb))
    assert (decode(rgb_file, channels=4) == np.dstack([rgb, np.full(rgb.shape[:2], 255)])).all()
    assert (decode(gray_file, channels=1) == gray).all()
    assert (decode(gray_file, channels=3) == np.repeat(gray, 3, axis=2)).all()
    for channels in (2, 5):
        with pytest.raises(ImageError, match=f"{channels} need .npy"):
            decode(rgb_file, channels=channels)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_transparency_is_laid_on_the_background(background: tuple[int, int, int]) -> None:
    rgba = colours(channels=4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    file = encode(Image.fromarray(rgba), "PNG")
    assert close(decode(file, channels=3, background=background), over(rgba, background))
    assert close(decode(file, channels=1, background=background)[..., 0], luma(over(rgba, background)), 2)
    assert (decode(file, channels=4, background=background) == rgba).all()
    la = rgba[..., [0, 3]]
    expected = over(rgba[..., [0, 0, 0, 3]], background)
    assert close(decode(encode(Image.fromarray(la, "LA"), "PNG"), channels=3, background=background), expected)


def test_palette_with_and_without_transparency() -> None:
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4
    table = np.array([[255, 0, 0], [0, 255, 0], [7, 8, 9], [200, 100, 50]])
    picture = Image.fromarray(indices, "P")
    picture.putpalette(table.astype(np.uint8).tobytes())
    for file_format in ("PNG", "GIF", "BMP"):
        assert (decode(encode(picture, file_format), channels=3) == table[indices]).all()
    clear = table.copy()
    clear[1] = (1, 2, 3)
    file = encode(picture, "PNG", transparency=1)
    assert (decode(file, channels=3, background=(1, 2, 3)) == clear[indices]).all()
    alphas = bytes([255, 128, 0, 64])
    rgba = np.dstack([table[indices], np.frombuffer(alphas, np.uint8)[indices]])
    assert close(decode(encode(picture, "PNG", transparency=alphas), channels=3), over(rgba, (255, 255, 255)))


def test_a_transparent_colour_of_gray_and_rgb_files() -> None:
    gray = np.array([[0, 50, 100, 50]], np.uint8)
    file = encode(Image.fromarray(gray), "PNG", transparency=50)
    assert decode(file, channels=1, background=(9, 9, 9))[..., 0].tolist() == [[0, 9, 100, 9]]
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    file = encode(Image.fromarray(rgb), "PNG", transparency=(4, 5, 6))
    assert decode(file, channels=3).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_one_bit() -> None:
    bits = np.array([[True, False, True]])
    file = encode(Image.fromarray(bits), "PNG")
    assert decode(file, channels=1)[..., 0].tolist() == [[255, 0, 255]]
    assert decode(file, channels=3)[0, :, 2].tolist() == [255, 0, 255]


def test_cmyk_tiff_and_adobe_jpeg() -> None:
    cmyk = colours(channels=4)
    expected = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    assert close(decode(encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), channels=3), expected)
    # flat, so that JPEG hardly changes it; Adobe's inversion would turn red into cyan
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for options in ({}, {"keep_rgb": False, "subsampling": 0}):
        decoded = decode(encode(flat, "JPEG", quality=95, **options), channels=3)
        assert close(decoded, np.broadcast_to([255.0, 0, 0], decoded.shape), 3)


def test_ycck_jpeg() -> None:
    # Pillow writes 255 - CMYK; here that is Y, Cb, Cr = 76, 85, 255 (red after JFIF's formula) and no black
    file = encode(Image.new("CMYK", (16, 16), (255 - 76, 255 - 85, 0, 0)), "JPEG", quality=100)
    # Adobe's transform flag 2 says that YCCK is what was stored
    marker = file.index(b"Adobe") + 11
    assert file[marker] == 0
    decoded = decode(file[:marker] + b"\2" + file[marker + 1 :], channels=3)
    # after libjpeg's jdcolor.c the stored C is 255 - red, and Adobe stores inverted inks: full cyan, nothing else
    assert close(decoded, np.broadcast_to([0.0, 255, 255], decoded.shape), 3)


def test_sixteen_bits_survive() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    little = encode(Image.fromarray(levels), "TIFF")
    assert Image.open(io.BytesIO(little)).mode == "I;16"
    for file in (png(levels, 16, 0), little, big_endian_tiff(levels)):
        decoded = decode(file, channels=1)
        assert decoded.dtype == np.uint16
        assert (decoded[..., 0] == levels).all()
    three = decode(little, channels=3)
    assert three.dtype == np.uint16 and (three == levels[..., None]).all()
    four = decode(little, channels=4)
    assert (four[..., 3] == 65535).all() and (four[..., 1] == levels).all()


def test_the_big_endian_tiff_opens_as_such() -> None:
    file = big_endian_tiff(np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert Image.open(io.BytesIO(file)).mode == "I;16B"


def test_sixteen_bit_colour_is_read_with_eight() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    decoded = decode(png(deep, 16, 2), channels=3)
    assert decoded.dtype == np.uint8 and close(decoded, deep / 257, 1)


def test_float_and_32_bit_tiff() -> None:
    floats = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    decoded = decode(encode(Image.fromarray(floats), "TIFF"), channels=1)
    assert decoded.dtype == np.float32 and (decoded[..., 0] == floats).all()
    with pytest.raises(ImageError, match=r"\[0, 1\]"):
        decode(encode(Image.fromarray(floats * 255), "TIFF"), channels=1)
    with pytest.raises(ImageError, match="no known range"):
        decode(encode(Image.fromarray(np.arange(4, dtype=np.int32).reshape(2, 2)), "TIFF"), channels=1)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_exif_orientation(orientation: int, file_format: str) -> None:
    rgb = colours()
    exif = Image.Exif()
    exif[274] = orientation
    file = encode(Image.fromarray(rgb), file_format, exif=exif)
    assert (decode(file, channels=3) == UPRIGHT[orientation](rgb)).all()


def swapped_rgb_profile() -> bytes:
    """sRGB with the primaries of red and blue exchanged: red pixels mean blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ"))
    profile = bytearray(bytes(profile).replace(b"tmp!", b"bXYZ"))
    return bytes(profile).replace(b"s\0R\0G\0B", b"x\0R\0G\0B").replace(b"sRGB b", b"xRGB b")


def test_an_embedded_profile_is_followed() -> None:
    profile = swapped_rgb_profile()
    rgb = colours()
    decoded = decode(encode(Image.fromarray(rgb), "PNG", icc_profile=profile), channels=3)
    assert close(decoded, rgb[..., ::-1], 2)
    rgba = np.dstack([rgb, colours(channels=1, seed=1)])
    decoded = decode(encode(Image.fromarray(rgba), "PNG", icc_profile=profile), channels=4)
    assert close(decoded, rgba[..., [2, 1, 0, 3]], 2)


def test_a_useless_profile_is_harmless() -> None:
    gray, rgb = colours(channels=1)[..., 0], colours()
    for profile in (b"not a profile", swapped_rgb_profile()[:200]):
        assert (decode(encode(Image.fromarray(rgb), "PNG", icc_profile=profile), channels=3) == rgb).all()
    # a profile for colour in a grayscale file
    file = encode(Image.fromarray(gray), "PNG", icc_profile=swapped_rgb_profile())
    assert (decode(file, channels=1)[..., 0] == gray).all()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (decode(encode(Image.fromarray(rgb), "PNG", icc_profile=srgb), channels=3) == rgb).all()


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if file_format == "WEBP" else {}
    file = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert (decode(file, channels=3) == (255, 0, 0)).all()


def test_damaged_files_give_a_reason(tmp_path: Path) -> None:
    big = Image.fromarray(colours(64, 64))
    for file_format in ("JPEG", "PNG", "TIFF", "GIF", "WEBP"):
        file = encode(big, file_format)
        with pytest.raises(ImageError) as caught:
            decode(file[: len(file) // 2], channels=3)
        assert str(caught.value)
    for junk in (b"", b"<html>404</html>", bytes(1000)):
        with pytest.raises(ImageError, match="not a known image format"):
            decode(junk, channels=3)
    with pytest.raises(ImageError, match="No such file"):
        decode(tmp_path / "gone.png", channels=3)
    with pytest.raises(ImageError, match="directory"):
        decode(tmp_path, channels=3)


def test_flipped_bytes_give_pixels_or_image_error() -> None:
    rng = np.random.default_rng(0)
    for file_format in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"):
        whole = np.frombuffer(encode(Image.fromarray(colours(16, 16)), file_format), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, len(damaged), 4)] = rng.integers(0, 256, 4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert decode(damaged.tobytes(), channels=3, max_pixels=10**6).shape[2] == 3
                except ImageError as error:
                    assert str(error)


def test_size_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a PNG that claims 100,000 x 100,000 px and holds none: decoding it would fail differently
    bomb = bytearray(png(colours(1, 1), 8, 2))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(ImageError, match="100000 x 100000 px is more than the limit of 1000 px"):
        decode(bytes(bomb), channels=3, max_pixels=1000)
    path = tmp_path / "huge.npy"
    with path.open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 1_000_000)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + 1_000_000 * 1_000_000)  # sparse, and more than any memory
    with pytest.raises(ImageError, match="more than the limit"):
        decode(path, channels=1)
    # ours, not Pillow's lower one, decides; and Pillow's is left as it was
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    rgb = colours()
    assert (decode(encode(Image.fromarray(rgb), "PNG"), channels=3) == rgb).all()
    assert Image.MAX_IMAGE_PIXELS == 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.float32, np.float16, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_arrays_of_any_channel_count(tmp_path: Path, dtype: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    kind = np.dtype(dtype)
    array = rng.random((5, 6, channels)) if kind.kind == "f" else rng.integers(0, np.iinfo(kind).max, (5, 6, channels))
    array = array.astype(kind)
    path = tmp_path / "a.npy"
    np.save(path, array)
    for source in (path, path.read_bytes()):
        decoded = decode(source, channels=channels)
        assert (decoded == array).all() if kind != np.float64 else np.allclose(decoded, array)
        assert decoded.dtype == (np.float32 if kind.kind == "f" else kind.newbyteorder("="))
    if channels == 1:
        assert (decode(npy(array[..., 0]), channels=1) == decode(path, channels=1)).all()
        assert decode(path, channels=3).shape == (5, 6, 3)


@pytest.mark.parametrize(
    ("array", "channels", "reason"),
    [
        (np.full((4, 4, 3), np.nan, np.float32), 3, "NaN"),
        (np.full((4, 4, 3), np.inf, np.float32), 3, "inf"),
        (np.full((4, 4, 3), 255.0, np.float32), 3, r"from 255 to 255"),
        (np.full((4, 4, 3), -0.1, np.float32), 3, "from -0.1"),
        (np.zeros((4, 4, 3), np.int64), 3, "int64"),
        (np.zeros((3, 8, 8), np.uint8), 3, "transpose"),
        (np.zeros((8, 8, 5), np.uint8), 3, "3 channels are expected"),
        (np.zeros((2, 8, 8, 3), np.uint8), 3, "HW or HWC"),
        (np.zeros((0, 8, 3), np.uint8), 3, "HW or HWC"),
        (np.array([[{}]], object), 1, "allow_pickle"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, channels: int, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(npy(array), channels=channels)


def test_truncated_array(tmp_path: Path) -> None:
    file = npy(np.zeros((50, 50, 3), np.uint8))[:-100]
    path = tmp_path / "cut.npy"
    path.write_bytes(file)
    for source in (path, file):
        with pytest.raises(ImageError, match="unreadable array"):
            decode(source, channels=3)


def test_all_256_levels_make_the_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    tensor = images.to_tensor(levels)
    assert tensor.dtype == torch.float32 and tensor.shape == (1, 16, 16) and tensor.is_contiguous()
    assert tensor.min() == -1 and tensor.max() == 1
    assert (images.to_uint8(tensor)[0].numpy() == levels[..., 0]).all()
    assert images.to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_to_tensor_of_deep_types() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    tensor = images.to_tensor(levels)
    assert len(tensor.unique()) == 65536 and tensor.min() == -1 and tensor.max() == 1
    assert ((tensor[0].double().numpy() + 1) * 32767.5).round().astype(int).ravel().tolist() == list(range(65536))
    assert images.to_tensor(np.array([[[0.0], [0.25], [1.0]]], np.float32)).tolist() == [[[-1.0, -0.5, 1.0]]]
    hwc = colours()
    assert torch.equal(images.to_tensor(hwc)[2, 4, 7], torch.tensor(hwc[4, 7, 2] / np.float32(127.5) - np.float32(1)))
    with pytest.raises(ValueError, match="int64"):
        images.to_tensor(np.zeros((2, 2, 1), np.int64))


def guided_diffusion_center_crop(picture: Image.Image, size: int) -> np.ndarray:
    """`center_crop_arr` of openai/guided-diffusion, guided_diffusion/image_datasets.py, MIT."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(40, 61), (64, 200), (33, 32), (20, 30), (130, 129)])
def test_resize_and_crop_equal_guided_diffusion(size: tuple[int, int]) -> None:
    rgb = colours(*size)
    ours = crops.center_crop(crops.resize_shorter(rgb, 32), 32)
    assert (ours == guided_diffusion_center_crop(Image.fromarray(rgb), 32)).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_resizing_keeps_depth_and_separates_channels(channels: int) -> None:
    # far from black and white, where Pillow clips 8 bits between its two passes
    deep = np.random.default_rng(0).integers(22000, 43000, (40, 50, channels)).astype(np.uint16)
    shallow = (deep // 257).astype(np.uint8)
    for target in (13, 64):
        resized = crops.resize_shorter(deep, target)
        assert resized.dtype == np.uint16 and resized.shape == (target, round(target * 50 / 40), channels)
        assert close(resized / 257, crops.resize_shorter(shallow, target).astype(float), 2)
        floats = crops.resize_shorter((deep / 65535).astype(np.float32), target)
        assert floats.dtype == np.float32 and close(floats * 65535, resized.astype(float), 1)
        alone = crops.resize_shorter(shallow[..., -1:], target)
        assert (crops.resize_shorter(shallow, target)[..., -1:] == alone).all()
    assert len(np.unique(crops.resize_shorter(deep, 38))) > 256
    extreme = (np.indices((9, 9)).sum(axis=0) % 2)[..., None].repeat(channels, axis=2)  # bicubic overshoots here
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1)):
        resized = crops.resize_shorter((extreme * top).astype(dtype), 30)
        assert resized.min() == 0 and resized.max() == top
        assert resized[0, 0, 0] < 0.05 * top and resized[0, -1, 0] < 0.05 * top


def test_rounding_as_others_do_it_leaves_every_level_as_it_is() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    tensor = images.to_tensor(levels)
    for rounding in ("up", "even", "cut"):
        assert (images.to_uint8(tensor, rounding)[0].numpy() == levels[..., 0]).all()
        assert (images.to_uint8(tensor.double(), rounding)[0].numpy() == levels[..., 0]).all()
    between = torch.tensor([0.3, 0.5, 0.7, 1.5, 2.5]) / 127.5 - 1
    assert images.to_uint8(between, "cut").tolist() == [0, 0, 0, 1, 2]
    assert images.to_uint8(between, "up").tolist() == [0, 1, 1, 2, 3]
    assert images.to_uint8(between, "even").tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(("height", "width"), [(75, 101), (101, 75), (41, 60), (30, 35)])
def test_resizing_as_torchvision_does_it(height: int, width: int) -> None:
    rgb = colours(height, width)
    picture = Image.fromarray(rgb)
    bicubic = v2.Resize(41, interpolation=v2.InterpolationMode.BICUBIC)(picture)
    assert (crops.resize_shorter(rgb, 41, "bicubic") == np.asarray(bicubic)).all()
    tensor = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255
    resized = v2.Resize(41, antialias=True)(tensor)
    ours = crops.resize_shorter(rgb, 41, "tensor")
    if min(height, width) == 41:
        assert ours is rgb
    else:
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, resized.permute(1, 2, 0).numpy(), atol=1e-6)
    cropped = v2.CenterCrop(26)(torch.from_numpy(rgb).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert (crops.center_crop(rgb, 26, nearest=True) == cropped).all()


def test_linear_resizing_takes_no_average() -> None:
    """OpenCV's INTER_LINEAR at half the size and half a pixel's offset: the mean of 2 x 2 px, whatever the filter."""
    rgb = colours(60, 80)
    expected = rgb.reshape(30, 2, 40, 2, 3).astype(float).mean((1, 3))
    assert np.abs(crops.resize_shorter(rgb, 30, "linear") - expected).max() <= 0.5
    # a quarter: the four px around the centre alone, where antialiasing would see sixteen
    expected = rgb.reshape(15, 4, 20, 4, 3)[:, 1:3, :, 1:3].astype(float).mean((1, 3))
    assert np.abs(crops.resize_shorter(rgb, 15, "linear") - expected).max() <= 0.5
    assert crops.resize_shorter(rgb, 15, "linear").dtype == np.uint8


def test_random_crop_is_a_window_of_the_image() -> None:
    rgb = colours(20, 30)
    windows = np.lib.stride_tricks.sliding_window_view(rgb, (8, 8), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    both = np.stack([windows, windows[:, :, :, ::-1]])
    seen = set()
    for seed in range(300):
        crop = crops.random_crop(rgb, (8, 8), None, True, np.random.default_rng(seed))
        (where,) = np.argwhere((both == crop).all(axis=(3, 4, 5)))
        seen.add(tuple(where))
    flips, tops, lefts = (set(values) for values in zip(*seen, strict=True))
    assert flips == {0, 1} and tops == set(range(13)) and lefts == set(range(23))
    # without flips: the same windows, none mirrored
    mirrored = 0
    for seed in range(20):
        plain = crops.random_crop(rgb, (8, 8), None, False, np.random.default_rng(seed))
        maybe = crops.random_crop(rgb, (8, 8), None, True, np.random.default_rng(seed))
        assert (windows == plain).all(axis=(2, 3, 4)).any()
        assert (maybe == plain).all() or (maybe == plain[:, ::-1]).all()
        mirrored += not (maybe == plain).all()
    assert 0 < mirrored < 20


def test_random_crop_resizes_first_and_enlarges_small_images() -> None:
    rgb = colours(20, 30)
    rng = np.random.default_rng(0)
    assert crops.random_crop(rgb, (8, 8), 8, False, rng).shape == (8, 8, 3)
    small = crops.random_crop(colours(3, 8), (16, 16), None, False, rng)
    assert small.shape == (16, 16, 3)
    with pytest.raises(ImageError, match="too elongated"):
        crops.random_crop(colours(1, 5000), (16, 16), None, False, rng)
    flat = crops.random_crop(np.full((5, 5, 1), 77, np.uint8), (16, 16), None, False, rng)
    assert (flat == 77).all()


def test_center_crop() -> None:
    rgb = colours(21, 34)
    assert (crops.center_crop(rgb, 8) == rgb[6:14, 13:21]).all()
    assert (crops.center_crop(rgb, None, 8) == rgb[2:18, 1:33]).all()
    assert (crops.center_crop(rgb, None) == rgb).all()
    assert crops.center_crop(rgb, None, 32).shape == (32, 32, 3)
    assert crops.center_crop(rgb, 64, 8).shape == (64, 64, 3)
    with pytest.raises(UserError, match="multiple of 8"):
        crops.center_crop(rgb, 20, 8)


def test_bicubic_down_up() -> None:
    flat = torch.full((1, 3, 21, 34), 0.25)
    assert torch.allclose(images.bicubic_down_up(flat, 8), flat, atol=1e-6)
    # a smooth wave survives, a checkerboard goes to gray
    x = torch.linspace(0, 2 * torch.pi, 64)
    wave = (0.9 * torch.sin(x)[None, None, None] * torch.ones(1, 1, 64, 1)).contiguous()
    assert (images.bicubic_down_up(wave, 4) - wave)[..., 8:-8].abs().max() < 0.02
    checks = torch.ones(1, 1, 64, 64)
    checks[..., ::2, ::2] = checks[..., 1::2, 1::2] = -1
    assert images.bicubic_down_up(checks, 4).abs().max() < 0.05
    # the same as Pillow's bicubic on floats
    noise = torch.rand(1, 1, 32, 48) - 0.5
    small = Image.fromarray(noise[0, 0].numpy()).resize((12, 8), Image.Resampling.BICUBIC)
    expected = np.asarray(small.resize((48, 32), Image.Resampling.BICUBIC))
    assert np.abs(images.bicubic_down_up(noise, 4)[0, 0].numpy() - expected).max() < 1e-5
    assert images.bicubic_down_up(torch.rand(1, 1, 3, 3), 8).shape == (1, 1, 3, 3)


def test_picture_grid_places_images_and_labels() -> None:
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 128, 128)
    gray = torch.zeros(1, 64, 64)
    grid = picture_grid([[red, gray], [gray, red]], labels=["input", "a label that is far too long for it"])
    assert grid.mode == "RGB" and grid.size == (2 * 128 + 3 * 6, 26 + 2 * (128 + 6))
    pixels = np.asarray(grid)
    assert (pixels[26:154, 6:134] == (255, 0, 0)).all()
    assert (pixels[160:288, 6:134] == 128).all()
    assert (pixels[26:154, 140:268] == 128).all()
    assert (pixels[:, :6] == 255).all() and (pixels[154:160] == 255).all()
    for left in (6, 140):
        assert (pixels[:26, left : left + 128] < 128).any()
    assert (pixels[:26, 134:140] == 255).all()
    # the cell of a small image is enlarged in whole steps; a huge one is bounded
    assert picture_grid([[torch.zeros(3, 32, 32)]]).size == (128 + 12, 128 + 12)
    in_three_lines = picture_grid([[torch.zeros(3, 32, 32)]], ["reconstruction, 22.98 dB, LPIPS 0.277"])
    assert in_three_lines.size == (128 + 12, 26 + 2 * 16 + 128 + 6), "it would be cut in one"
    assert picture_grid([[torch.zeros(2, 2000, 1000)]]).size == (256 + 12, 512 + 12)
    half = torch.tensor([1.0, -1.0, -1.0, 0.0])[:, None, None].expand(4, 128, 128)
    seen = np.asarray(picture_grid([[half]]))[6:-6, 6:-6]
    assert np.abs(seen[0, 0].astype(int) - (255, 127, 127)).max() <= 1  # half of red over white, and over gray
    assert np.abs(seen[0, 8].astype(int) - (229, 102, 102)).max() <= 1 and (seen[8, 8] == seen[0, 0]).all()


def test_a_resized_picture_shows_no_invisible_colour_and_an_array_is_resized_by_channel() -> None:
    """Visible red beside invisible green: the edge is red that fades out."""
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[:, :31], rgba[:, 31:, 1] = (255, 0, 0, 255), 255
    picture = decode(encode(Image.fromarray(rgba), "PNG"), channels=4)
    small = crops.resize_shorter(picture[::-1], 20)
    edge = (small[..., 3] > 0) & (small[..., 3] < 255)
    assert edge.any() and (small[edge][:, :2] == (255, 0)).all()
    apart = crops.resize_shorter(rgba[::-1], 20)
    assert (apart[edge][:, 1] > 0).all() and (apart[..., 3] == small[..., 3]).all()
