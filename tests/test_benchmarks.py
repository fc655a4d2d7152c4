"""What benchmarks add to the results that were measured before, perhaps on another machine."""

import json
from pathlib import Path

import pytest

from benchmarks import machine, semi_supervised


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
