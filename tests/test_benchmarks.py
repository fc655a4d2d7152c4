"""What benchmarks add to the results that were measured before, and what they say of their images and contestants."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks import machine, semi_supervised
from benchmarks.runs import cifar10_facts
from latent_ae.config import load_settings
from latent_ae.data.loader import open_images
from latent_ae.data.sources import FolderSource
from latent_ae.objectives import SemiSupervised
from latent_ae_train.data import labelled_images
from latent_ae_train.settings import TrainSettings


def test_figures_are_added_only_to_those_of_the_same_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    facts = {"steps": 120, "sides": (8, 16)}
    assert machine.earlier("bench", facts) == {}
    machine.save("bench", {**facts, "rows": {"a": 1}})
    assert machine.earlier("bench", facts) == {"a": 1}
    machine.save("bench", {**facts, "rows": {"a": 1, "b": 2}}, added=True)
    assert "before" not in json.loads((tmp_path / "bench.json").read_text())  # the same call
    monkeypatch.setattr("sys.argv", ["bench", "--seeds", "1"])
    machine.save("bench", {**facts, "rows": {"a": 1, "b": 2}}, added=True)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert len(result["before"]) == 1 and machine.where(result).endswith("--seeds 1` and 1 more")
    with pytest.raises(SystemExit, match=r"bench\.json holds figures of other steps: move it"):
        machine.earlier("bench", {**facts, "steps": 121})


def test_a_choice_of_labels_is_added_once_and_the_rows_are_in_order() -> None:
    rows = {"100": {"draws": [{"draw": 0, "accuracy": {"joint": 0.9}}], "mean": {"joint": 0.9}}}
    for draw, accuracy in ((1, 0.5), (0, 0.1), (0, 0.3)):
        semi_supervised.add(rows, "30", {"draw": draw, "accuracy": {"joint": accuracy}})
    assert list(rows) == ["30", "100"]
    assert [one["draw"] for one in rows["30"]["draws"]] == [0, 1]
    assert rows["30"]["mean"] == {"joint": 0.4}
    assert rows["100"]["mean"] == {"joint": 0.9}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "JPEG", "quality": 60, "subsampling": 2}, "JPEG (quality 60, 4:2:0)"),
        ({"format": "JPEG", "quality": 92, "subsampling": 0}, "JPEG (quality 92, 4:4:4)"),
        ({"format": "PNG"}, "PNG"),
    ],
)
def test_a_result_says_how_its_images_were_stored(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    files = []
    for seed in range(3):
        levels = np.random.default_rng(seed).integers(0, 256, (16, 8, 3), dtype=np.uint8)
        Image.fromarray(levels).save(stream := io.BytesIO(), **options)
        files.append(stream.getvalue())
    rows = [{"image": {"bytes": one, "path": None}} for one in files]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    facts = cifar10_facts(tmp_path, "20 images")
    assert facts["data"] == f"CIFAR-10 stored as {words}, 20 images"
    bits = 8 * sum(map(len, files)) / (3 * 16 * 8 * 3)
    assert facts["stored"]["file"] == pytest.approx(bits, abs=1e-4)
    # a scan's header of three colours has 14 bytes with its marker (ITU-T T.81, B.2.3)
    scans = [len(one) - one.rindex(b"\xff\xda") - 14 for one in files if options["format"] == "JPEG"]
    expected = pytest.approx(8 * sum(scans) / (3 * 16 * 8 * 3), abs=1e-4) if scans else None
    assert facts["stored"].get("scan") == expected


def test_the_supervised_contestant_sees_the_labelled_samples_of_the_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(120):
        place = tmp_path / ("dark", "light")[number % 2]
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8))
        pixels[0, 0] = 2 * number  # tells which image it is
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:03d}.png")
    words = [f"data.source={tmp_path}", "semi_supervised.classes=2", "semi_supervised.labels_per_class=15"]
    settings = load_settings(TrainSettings, "semi-supervised", [*semi_supervised.SHAPES["digits"], *words])
    train_images, held_out = open_images(settings.data, "train"), open_images(settings.data, "held_out")
    _, shown = labelled_images(settings, train_images, held_out)
    assert isinstance(train_images, FolderSource)
    labelled = {train_images.name(row) for row in np.flatnonzero(shown.of_images[: len(train_images)] >= 0)}
    steps = list(itertools.islice(semi_supervised.labelled_samples(settings), 50))
    seen = [round((float(image[0, 0, 0]) + 1) * 127.5 / 2) for images, _ in steps for image in images]
    assert torch.cat([labels for _, labels in steps]).tolist() == [number % 2 for number in seen]
    assert {f"{number:03d}.png" for number in seen} == {Path(name).name for name in labelled} and len(labelled) == 30
    # a quarter of the samples is from the labelled images alone, and the others are from all
    expected = 64 * (0.25 + 0.75 * 30 / len(train_images))
    assert expected > 30 and len(seen) / 50 == pytest.approx(expected, rel=0.04)


def test_the_run_of_m1_has_no_label_model() -> None:
    settings = load_settings(TrainSettings, "semi-supervised", semi_supervised.UNLABELLED)
    assert SemiSupervised not in settings.objectives
    assert SemiSupervised in load_settings(TrainSettings, "semi-supervised", []).objectives
