"""Trainings and evaluations that a benchmark makes through the command line, and what their folders tell.

Each has a folder in the benchmark's scratch folder and is not made again where it has ended there.
"""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = "processor_seconds.json"


def latent_ae(*words: str) -> float:
    """Runs a command; returns its processor seconds. Raises CalledProcessError when it fails."""
    print("latent-ae", *words, file=sys.stderr)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "latent_ae", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def train(folder: Path, recipe: str, *settings: str) -> None:
    """A run into `folder`. One that was killed begins anew, so that its seconds are those of a whole run."""
    if not (folder / SECONDS).exists():
        shutil.rmtree(folder, ignore_errors=True)
        seconds = latent_ae("train", recipe, f"output_dir={folder}", *settings)
        (folder / SECONDS).write_text(json.dumps(seconds))


def evaluate(out: Path, kind: str, model: Path, data: Path, *settings: str) -> dict[str, Any]:
    """The result of `latent-ae eval KIND MODEL DATA SETTINGS --out OUT`."""
    if not (out / "result.json").exists():
        latent_ae("eval", kind, str(model), str(data), *settings, "--out", str(out))
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def seconds_of(folder: Path) -> float:
    """Processor seconds of a training."""
    return float(json.loads((folder / SECONDS).read_text()))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind of a training's log: train, validate, ..."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def cifar10(folder: Path) -> list[str]:
    """Settings: a folder with train.parquet, to train on, and test.parquet, held out."""
    return [f"data.source={folder / 'train.parquet'}", f"data.eval_source={folder / 'test.parquet'}"]


def folder_name(name: str) -> str:
    """Of a contestant."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())
