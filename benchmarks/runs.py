"""Trainings and evaluations that a benchmark makes through the command line, and what their folders tell.

Each has a folder in the benchmark's scratch folder and is not made again where it has ended there.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image, JpegImagePlugin

SECONDS, PEAK_GB, WORDS = "processor_seconds.json", "peak_gb.json", "words.json"


class Spent(NamedTuple):
    """What a command cost."""

    processor_seconds: float
    """With the processes that it has waited for."""
    peak_gb: float
    """Largest resident size of one of its processes."""


def latent_ae(*words: str) -> Spent:
    """Runs a command; returns what it cost. Raises CalledProcessError when it fails."""
    print("latent-ae", *words, file=sys.stderr)
    command = [sys.executable, "-m", "latent_ae", *words]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, command)
    return Spent(round(usage.ru_utime + usage.ru_stime, 1), round(usage.ru_maxrss / 1e6, 2))


def train(folder: Path, recipe: str, *settings: str) -> None:
    """A run into `folder`. One that was killed begins anew, so that its seconds are those of a whole run."""
    refuse_others(folder, recipe, *settings)
    if not (folder / SECONDS).exists():
        shutil.rmtree(folder, ignore_errors=True)
        spent = latent_ae("train", recipe, f"output_dir={folder}", *settings)
        (folder / WORDS).write_text(json.dumps([recipe, *settings]))
        (folder / PEAK_GB).write_text(json.dumps(spent.peak_gb))
        (folder / SECONDS).write_text(json.dumps(spent.processor_seconds))


def evaluate(out: Path, kind: str, model: Path, data: Path | None, *settings: str) -> dict[str, Any]:
    """The result of `latent-ae eval KIND MODEL [DATA] SETTINGS --out OUT`."""
    words = [kind, str(model), *([str(data)] if data else []), *settings]
    refuse_others(out, *words)
    if not (out / "result.json").exists():
        latent_ae("eval", *words, "--out", str(out))
        (out / WORDS).write_text(json.dumps(words))
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def refuse_others(folder: Path, *words: str) -> None:
    """Raises ValueError if the folder holds what another command made, which would be taken for this one's."""
    known = [whole(word) for word in json.loads((folder / WORDS).read_text())] if (folder / WORDS).exists() else None
    now = [whole(word) for word in words]
    if known is not None and known != now:
        changed = sorted(set(known) ^ set(now))
        raise ValueError(f"{folder} was made by another command ({', '.join(changed)}): give another scratch folder")


def whole(word: str) -> str:
    """A word with its path made absolute, if it has one."""
    key, equals, value = word.rpartition("=")
    return f"{key}{equals}{Path(value).resolve()}" if os.path.exists(value) else word


def seconds_of(folder: Path) -> float:
    """Processor seconds of a training."""
    return float(json.loads((folder / SECONDS).read_text()))


def peak_gb_of(folder: Path) -> float:
    """Largest resident size of a training, GB."""
    return float(json.loads((folder / PEAK_GB).read_text()))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind of a training's log: train, validate, ..."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def cifar10(folder: Path) -> list[str]:
    """Settings: a folder with train.parquet, to train on, and test.parquet, held out."""
    return [f"data.source={folder / 'train.parquet'}", f"data.eval_source={folder / 'test.parquet'}"]


def cifar10_facts(folder: Path, more: str = "") -> dict[str, Any]:
    """What a result says of the images that `cifar10` gives: `data` in words, and `stored`, their bits in the files.

    Bits are per dimension of the held-out images, mean over them: `file` of the whole file, `scan` of what comes after
    the headers and tables of a JPEG.

    Args:
        folder: The folder with train.parquet and test.parquet.
        more: What follows in words, such as "20,000 images to train on".
    """
    files = [row["bytes"] for row in pq.read_table(folder / "test.parquet")["image"].to_pylist()]
    pictures = [Image.open(io.BytesIO(one)) for one in files]
    kinds = {kind_of_file(picture) for picture in pictures}
    values = [picture.width * picture.height * len(picture.getbands()) for picture in pictures]
    stored = {"format": " and ".join(sorted(kinds)), "images": len(files), "file": mean_bits(files, values)}
    if all(picture.format == "JPEG" for picture in pictures):
        stored["scan"] = mean_bits([scan_of(one) for one in files], values)
    return {"data": f"CIFAR-10 stored as {stored['format']}{more and ', '}{more}", "stored": stored}


def kind_of_file(picture: Image.Image) -> str:
    """Format in words, with quality and chroma subsampling of a JPEG that Pillow or libjpeg wrote."""
    if not isinstance(picture, JpegImagePlugin.JpegImageFile):
        return str(picture.format)
    subsampling = ("4:4:4", "4:2:2", "4:2:0")[JpegImagePlugin.get_sampling(picture)]
    for quality in range(1, 101):
        encoded = io.BytesIO()
        Image.new("RGB", (8, 8)).save(encoded, "JPEG", quality=quality)
        written = Image.open(encoded)
        assert isinstance(written, JpegImagePlugin.JpegImageFile)
        if written.quantization == picture.quantization:
            return f"JPEG (quality {quality}, {subsampling})"
    return f"JPEG ({subsampling})"


def scan_of(jpeg: bytes) -> bytes:
    """The entropy-coded part of a JPEG of one scan, with the marker of its end."""
    start = jpeg.index(b"\xff\xda") + 2
    return jpeg[start + int.from_bytes(jpeg[start : start + 2], "big") :]


def mean_bits(parts: list[bytes], values: list[int]) -> float:
    """Mean over images of the bits of a part of their files per value."""
    return round(sum(8 * len(part) / count for part, count in zip(parts, values, strict=True)) / len(parts), 4)


def folder_name(name: str) -> str:
    """Of a contestant."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())
