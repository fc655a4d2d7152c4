"""What benchmarks add to the results that were measured before, and what they say of their images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import machine, semi_supervised
from benchmarks.runs import cifar10_facts


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
