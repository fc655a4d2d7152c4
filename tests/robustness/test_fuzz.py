"""Settings, pictures, checkpoints and weight files with random damage: a clear error or a right answer, never anything
else.

The same examples every time. `LATENT_AE_FUZZ=5000 pytest tests/robustness/test_fuzz.py` tries so many new ones for
each test.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from latent_ae.config import UserError, all_keys, load_settings, to_yaml
from latent_ae.data.images import ImageError, decode, kind_of
from latent_ae.latents.cache import open_latents
from latent_ae.latents.encode import encode_images
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.run_checkpoint import MANIFEST
from latent_ae.pretrained.weight_files import Trunk, Unusable, read_any, read_checked, read_ckpt, read_pth, store
from latent_ae_train.build import place_of_weights
from latent_ae_train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from latent_ae_train.run import changes_since
from latent_ae_train.settings import TrainSettings
from tests.tiny import GAN, STATE, build_step, micro_batches, reseal, settings_for
from tests.tiny_models import tiny

EXAMPLES = int(os.environ.get("LATENT_AE_FUZZ", "0"))
TOO_LONG = timedelta(seconds=20)
"""Of one example: it hangs."""


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=TOO_LONG,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damages(draw: Any) -> Any:
    """A function that damages bytes: flips, cuts, repeats, puts in; near the start more often, where headers are."""
    place = st.one_of(st.floats(0, 1), st.floats(0, 0.02))
    kinds = st.sampled_from(["set", "set", "set", "flip", "cut", "drop", "repeat", "insert", "big"])
    steps = draw(st.lists(st.tuples(kinds, place, st.integers(0, 255)), min_size=1, max_size=6))

    def damage(content: bytes) -> bytes:
        for kind, where, value in steps:
            at = min(int(where * len(content)), max(0, len(content) - 1))
            head, tail = content[:at], content[at:]
            if kind == "set":
                content = head + bytes([value]) + tail[1:]
            elif kind == "flip" and tail:
                content = head + bytes([tail[0] ^ (1 << value % 8)]) + tail[1:]
            elif kind == "cut":
                content = head
            elif kind == "drop":
                content = head + tail[value:]
            elif kind == "repeat":
                content = head + tail[:value] + tail
            elif kind == "insert":
                content = head + bytes([value]) * 4 + tail
            else:
                content = head + b"\xff\xff\xff\x7f" + tail[4:]
        return content

    return damage


# Settings

KEYS = list(all_keys(TrainSettings))
values = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.text(max_size=30),
    st.sampled_from(
        [
            "null",
            "true",
            "on",
            "~",
            "~x/y",
            "///",
            "[]",
            "{}",
            "[1,2]",
            "{a:",
            "1}",
            "{1:",
            "2}",
            "&a",
            "[*a]",
            "*a",
            "!!int",
            "x",
            "!!float",
            "x",
            "!!binary",
            "x",
            "!!set",
            "{a}",
            "2020-99-99",
            "0x",
            "1:99",
            "!!timestamp",
            "x",
            "1e400",
            ".nan",
            ".inf",
            "-.inf",
            "<<:",
            "0b",
            "!!python/name:os.system",
            "photos",
            "./x",
            "<<<<<",
            "\x00",
            "�",
            "'",
            '"',
            "|",
            ">",
        ]
    ),
    st.integers(4000, 6000).map(lambda length: "9" * length),
)
lines = st.tuples(st.sampled_from(KEYS), values).map("=".join)
words = st.one_of(lines, st.text(max_size=20), st.tuples(st.text(max_size=10), values).map("=".join))


@st.composite
def yamls(draw: Any) -> str:
    text = ""
    for key, value in draw(st.lists(st.tuples(st.sampled_from(KEYS), values), max_size=6)):
        section, dot, name = key.partition(".")
        text += f"{section}:\n  {name}: {value}\n" if dot else f"{key}: {value}\n"
    return draw(st.one_of(st.just(text), st.text(max_size=60)))


@fuzz(100)
@given(text=yamls(), overrides=st.lists(words, max_size=4))
def test_settings(tmp_path_factory: pytest.TempPathFactory, text: str, overrides: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = load_settings(TrainSettings, str(path), overrides)
    except UserError as error:
        assert str(error)
        return
    path.write_text(to_yaml(found), encoding="utf-8")
    assert load_settings(TrainSettings, str(path)) == found


# Pictures


def _pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((40, 30))
    found = {}
    for name, picture, more in (
        ("PNG", rgb, {}),
        ("PNG palette", rgb.quantize(16), {"transparency": 3}),
        ("PNG deep", Image.fromarray(rng.integers(0, 65536, (9, 7), dtype=np.uint16)), {}),
        ("JPEG", rgb, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
        ("JPEG progressive", rgb.convert("CMYK"), {"progressive": True}),
        ("TIFF", rgb, {"compression": "tiff_lzw"}),
        ("TIFF deflate", rgb.convert("L"), {"compression": "tiff_adobe_deflate"}),
        ("WEBP", rgb, {}),
        ("WEBP lossless", rgb.convert("RGBA"), {"lossless": True}),
        ("GIF", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("BMP", rgb, {}),
        ("PPM", rgb, {}),
        ("JPEG2000", rgb, {}),
    ):
        stream = io.BytesIO()
        picture.save(stream, name.split()[0], **more)
        found[name] = stream.getvalue()
    for dtype in ("u1", "<u2", "<f4"):
        stream = io.BytesIO()
        np.save(stream, np.zeros((20, 10, 3), dtype))
        found[f"npy {dtype}"] = stream.getvalue()
    return found


PICTURES = _pictures()
MAX_PIXELS = 5000


@fuzz(600)
@given(name=st.sampled_from(list(PICTURES)), damage=damages(), channels=st.sampled_from([1, 3, 4]), file=st.booleans())
def test_pictures(tmp_path_factory: pytest.TempPathFactory, name: str, damage: Any, channels: int, file: bool) -> None:
    content: Any = damage(PICTURES[name])
    if file:
        path = tmp_path_factory.getbasetemp() / "fuzz"
        path.write_bytes(content)
        content = path
    try:
        array = decode(content, channels=channels, max_pixels=MAX_PIXELS)
    except ImageError as error:
        assert str(error)
    else:
        assert array.ndim == 3 and array.shape[2] == channels and 0 < array.shape[0] * array.shape[1] <= MAX_PIXELS
        assert array.dtype in (np.uint8, np.uint16, np.float32)
    try:
        assert kind_of(content)
    except ImageError as error:
        assert str(error)


def test_the_pictures_are_good_before_they_are_damaged() -> None:
    for name, content in PICTURES.items():
        assert decode(content, channels=3).shape[2] == 3, name


# Checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    step = build_step(settings_for(gan={**GAN, "lecam": 0.01}, ema={"decay": 0.9}, batch_size=2))
    step(0, micro_batches(0, step.settings))
    folder, settings = tmp_path_factory.mktemp("saved"), step.settings.model_dump(mode="json", by_alias=True)
    return step, save_checkpoint(folder, step, {**STATE, "settings": settings, "step": 2, "num_images_seen": 4}).folder


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("../../x"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def replaced(draw: Any, document: Any) -> Any:
    """The document with one of its parts replaced or left out."""
    if isinstance(document, dict) and document and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(document)))
        if draw(st.integers(0, 3)):
            return document | {key: replaced(draw, document[key])}
        return {name: value for name, value in document.items() if name != key}
    return draw(json_values)


@fuzz(100)
@given(data=st.data(), damage=damages(), sealed=st.booleans(), structural=st.booleans())
def test_checkpoints(
    saved: Any, tmp_path_factory: pytest.TempPathFactory, data: Any, damage: Any, sealed: bool, structural: bool
) -> None:
    step, folder = saved
    run = tmp_path_factory.getbasetemp() / "fuzz-run"
    shutil.rmtree(run, ignore_errors=True)
    copy = run / "checkpoints/step-00000002"
    shutil.copytree(folder, copy)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = (folder / name).read_bytes()
    if structural and name.endswith(".json"):
        worse = json.dumps(replaced(data.draw, json.loads(content))).encode()
    else:
        worse = damage(content)
    (copy / name).write_bytes(worse)
    if sealed and name != MANIFEST:
        reseal(copy)
    try:
        checkpoint = newest_checkpoint(run)
        assert checkpoint is not None
        place_of_weights(str(run))
        state = checkpoint.state()
        changes_since(checkpoint, step.settings)
        load_checkpoint(checkpoint, step)
    except UserError as error:
        assert str(run) in str(error)
    else:
        assert state["step"] == 2
        assert sealed or name == MANIFEST or worse == content, "damage that went unseen"


WRONG: list[dict[str, Any]] = [
    *({"settings": {}}, {"num_processes": 0}, {"num_processes": "x"}, {"stream_states": []}, {"stream_states": [5]}),
    *({"stream_states": [{}]}, {"stream_states": [{"workers": [{}]}]}, {"step": "2"}, {"step": None}),
    *({"settings.micro_batch_size": "x"}, {"settings.micro_batch_size": [1]}, {"settings.gan": {"weight": 1}}),
    *({"settings.gan": {"weight": 1, "start": "x"}}, {"versions": []}),
]


@pytest.mark.parametrize("wrong", [*WRONG, [], "\xff", "[" * 5000])
def test_a_foreign_state(wrong: Any, saved: Any, tmp_path: Path) -> None:
    step, folder = saved
    copy = shutil.copytree(folder, tmp_path / "checkpoints/step-00000002")
    state: Any = json.loads((copy / "state.json").read_text())
    for key, value in wrong.items() if isinstance(wrong, dict) else ():
        section, _, name = key.partition(".")
        state |= {section: state[section] | {name: value} if name else value}
    content = json.dumps(state if isinstance(wrong, dict) else wrong).encode()
    (copy / "state.json").write_bytes(wrong.encode("latin-1") if isinstance(wrong, str) else content)
    reseal(copy)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    with pytest.raises(UserError, match="state.json"):
        changes_since(checkpoint, step.settings)
    if not isinstance(wrong, dict) or "step" in wrong:
        with pytest.raises(UserError, match="state.json"):
            place_of_weights(str(tmp_path))


# Latent caches


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, pictures = tmp_path_factory.mktemp("latents"), tmp_path_factory.mktemp("pictures")
    (pictures / "a").mkdir()
    (pictures / "a/0.png").write_bytes(PICTURES["PNG"])
    tiny("AutoencoderKL").save_pretrained(folder / "model")
    encode_images(folder / "model", pictures, folder / "cache", EncodeSettings(resolution=16, num_workers=0))
    return folder / "cache"


@fuzz(60)
@given(data=st.data(), damage=damages(), structural=st.booleans())
def test_latent_caches(latents: Path, tmp_path_factory: Any, data: Any, damage: Any, structural: bool) -> None:
    copy = tmp_path_factory.getbasetemp() / "fuzz-latents"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(latents, copy)
    content = (copy / "manifest.json").read_bytes()
    worse = json.dumps(replaced(data.draw, json.loads(content))).encode() if structural else damage(content)
    (copy / "manifest.json").write_bytes(worse)
    try:
        cache = open_latents(copy)
    except UserError as error:
        assert str(copy) in str(error)
    else:
        assert cache.scaled(cache.batch([0])).shape == (1, *cache.shape) and cache.num_classes >= 0


# Weight files

CONVS = ((0, 4, 3, 3), (3, 5, 4, 2))
GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    name: torch.rand(shape, generator=GENERATOR) for name, shape in Trunk("tiny-00000000.pth", CONVS).shapes().items()
}


def _weight_files(folder: Path) -> dict[str, bytes]:
    store(TENSORS, folder / "good.safetensors", "test")
    stream, old = io.BytesIO(), io.BytesIO()
    torch.save(TENSORS, stream)
    torch.save(TENSORS, old, _use_new_zipfile_serialization=False)
    convs = {
        f"Conv_{number}": {
            "kernel": TENSORS[f"features.{index}.weight"].permute(2, 3, 1, 0).numpy(),
            "bias": TENSORS[f"features.{index}.bias"].numpy(),
        }
        for number, (index, *_) in enumerate(CONVS)
    }
    return {
        "checked.safetensors": (folder / "good.safetensors").read_bytes(),
        "any.safetensors": save(TENSORS),
        "any.pth": stream.getvalue(),
        "old.pth": old.getvalue(),
        "published.pth": stream.getvalue(),
        "tiny.ckpt": pickle.dumps({"Tiny_0": convs}),
    }


@fuzz(250)
@given(kind=st.integers(0, 5), damage=damages())
def test_weight_files(tmp_path_factory: pytest.TempPathFactory, kind: int, damage: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    name, content = list(_weight_files(folder).items())[kind]
    content = damage(content)
    path = folder / name
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    # as if it had the checksum that is expected, so that the reader alone stands in the way
    trunk = Trunk(f"tiny-{digest[:8]}.pth", CONVS, "tiny.ckpt", digest, "Tiny_0")
    try:
        if name.startswith("checked"):
            found = read_checked(path, trunk)
            assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS), "damage that went unseen"
        elif name.startswith("published"):
            found = read_pth(path, trunk)
        elif name.endswith("ckpt"):
            found = read_ckpt(content, trunk)
        else:
            found = read_any(path)
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
            return
        assert {key: tuple(tensor.shape) for key, tensor in found.items()} == trunk.shapes()
    except Unusable as error:
        assert str(error)
