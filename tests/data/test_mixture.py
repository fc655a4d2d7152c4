"""Several sources as one: shares, order, splits, resume, framing, held-out images, the log and messages."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError, validated
from latent_ae.data.held_out import held_out_images
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.mixture import WEIGHTED_EPOCH, Mixture, samples_per_epoch
from latent_ae.data.settings import MixedSource, TrainingData
from tests.runs import differing_tensors, words


def filled(folder: Path, count: int, first: int, side: int = 12) -> Path:
    """Images of one value each: first, first + 1, ..."""
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.full((side, side, 3), first + number, dtype=np.uint8)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[dict]:
    return [{"source": str(filled(tmp_path / "a", 10, 0))}, {"source": str(filled(tmp_path / "b", 5, 100))}]


def mixed(parts: list[dict], **values) -> TrainingData:
    shared = {"resolution": 8, "num_workers": 0, "eval_fraction": 0.2, "flip": False}
    settings = TrainingData.model_validate({**shared, **values, "mixture": parts})
    assert list(settings.problems()) == []
    return settings


def values_of(settings: TrainingData, count: int, rank: int = 0, world_size: int = 1, first: int = 0, micro: int = 4):
    """{sample number: value of its image} of some batches of 8."""
    source = open_images(settings, "train")
    sizes = {"batch_size": 8, "micro_batch_size": micro, "rank": rank, "world_size": world_size}
    batches = training_batches(source, settings, channels=3, seed=3, first_batch=first, **sizes)
    found: dict[int, int] = {}
    while len(found) < count:
        batch = next(batches)
        pixels = [round(float(image[0, 0, 0]) * 127.5 + 127.5) for image in batch.images]
        found |= dict(zip(batch.numbers, pixels, strict=True))
    batches.close()
    return found


def test_an_epoch_takes_each_image_as_often_as_it_is_repeated(two: list[dict]) -> None:
    settings = mixed([two[0], {**two[1], "repeats": 3}])
    source = open_images(settings, "train")
    assert isinstance(source, Mixture) and source.counts == (8, 12)  # a fifth of each is held out
    seen = values_of(settings, 40)
    for epoch in range(2):
        counts = Counter(seen[number] for number in range(20 * epoch, 20 * epoch + 20))
        assert sorted(counts.values()) == [1] * 8 + [3] * 4
        assert all((count == 3) == (value >= 100) for value, count in counts.items())
    # mixed, and in another order in each epoch
    kinds = [[seen[number] >= 100 for number in range(20 * epoch, 20 * epoch + 20)] for epoch in range(2)]
    assert kinds[0] != kinds[1] and sum(a != b for a, b in zip(kinds[0], kinds[0][1:], strict=False)) > 4


def test_weights_are_shares_of_the_samples() -> None:
    parts = [MixedSource(source="photos", weight=weight) for weight in (1.0, 2.0, 4.0)]
    counts = samples_per_epoch(parts, [10, 10, 10])
    assert sum(counts) == WEIGHTED_EPOCH
    assert all(abs(count - WEIGHTED_EPOCH * w / 7) < 1 for count, w in zip(counts, (1, 2, 4), strict=True))
    assert min(samples_per_epoch([*parts, MixedSource(source="photos", weight=1e-9)], [1] * 4)) == 1


def test_samples_do_not_depend_on_workers_processes_accumulation_or_start(two: list[dict]) -> None:
    parts = [{**two[0], "weight": 1}, {**two[1], "weight": 2.5}]
    whole = values_of(mixed(parts), 64)
    assert values_of(mixed(parts, num_workers=2), 64) == whole
    assert values_of(mixed(parts), 64, micro=2) == whole
    halves = [values_of(mixed(parts), 32, rank, 2) for rank in (0, 1)]
    assert halves[0] | halves[1] == whole
    later = values_of(mixed(parts), 24, first=5)
    assert later == {number: whole[number] for number in range(40, 64)}


def test_what_was_taken_is_counted(two: list[dict]) -> None:
    settings = mixed([two[0], {**two[1], "repeats": 3}])
    source, seen = open_images(settings, "train"), values_of(settings, 64)
    for number in (0, 1, 19, 20, 21, 57):
        expected = sum(seen[other] >= 100 for other in range(number))
        assert source.samples_before(3, number) == [number - expected, expected]


def test_each_source_has_its_own_column_split_and_framing(tmp_path: Path) -> None:
    folder = filled(tmp_path / "large", 4, 10, side=40)
    pixels = np.zeros((40, 20, 3), dtype=np.uint8)
    pixels[20:] = 255
    rows = datasets.Dataset.from_dict({"photo": [Image.fromarray(pixels)] * 6}).to_parquet
    (tmp_path / "tables").mkdir()
    for split in ("train", "test"):
        rows(tmp_path / f"tables/{split}-00000.parquet")
    table = {"source": str(tmp_path / "tables"), "image_column": "photo", "resize_px": 8}
    settings = mixed([{"source": str(folder)}, table])
    training, held_out = open_images(settings, "train"), open_images(settings, "held_out")
    assert [len(source) for source in training.sources] == [3, 6]
    assert [len(source) for source in held_out.sources] == [1, 6]
    crops = {}
    for index, name, image in held_out_images(held_out, settings, channels=3, crop_px=8):
        crops[index] = (name, image)
    assert crops[0][0].startswith(str(folder)) and crops[6][0].startswith(str(tmp_path / "tables"))
    # 20 x 40 px became 8 x 16 px: the middle 8 px show both halves; a crop of the whole size would show 8 of 40
    assert crops[6][1].shape == (3, 8, 8) and len(set(crops[6][1][0, :, 0].tolist())) >= 2
    assert float(crops[6][1].mean()) == pytest.approx(0, abs=0.15)


def test_held_out_images_of_the_section_are_taken_once(two: list[dict], tmp_path: Path) -> None:
    held_out = filled(tmp_path / "held-out", 3, 200)
    settings = mixed(two, eval_source=str(held_out))
    assert len(open_images(settings, "held_out")) == 3 and len(open_images(settings, "train")) == 15
    own = mixed([two[0], {**two[1], "eval_source": two[0]["source"]}], eval_source=str(held_out))
    assert [len(one) for one in open_images(own, "held_out").sources] == [3, 10]


def test_an_unreadable_image_is_replaced_by_one_of_its_source(two: list[dict]) -> None:
    settings = mixed(two)
    before = values_of(settings, 24)
    (torn,) = {value for value in before.values() if value >= 100 and list(before.values()).count(value) > 1} & {101}
    (Path(two[1]["source"]) / "01.png").write_bytes(b"\x89PNG torn")
    after = values_of(settings, 24)
    changed = [number for number in before if before[number] != after[number]]
    assert changed and all(before[number] == torn and after[number] >= 100 for number in changed)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mixture": [{"source": "photos", "weight": 1}, {"source": "photos"}]}, "mixture[1].weight: photos has none"),
        ({"mixture": [{"source": "photos", "weight": 1, "repeats": 2}]}, "mixture[0].repeats: photos has a weight"),
        ({"mixture": [{"source": "photos"}], "source": "other/name"}, "source: other/name: data.mixture names"),
        ({"mixture": [{"source": "photos"}], "streaming": True}, "streaming: a stream has no number"),
        ({"mixture": [{"source": "./nowhere/at/all"}]}, "mixture[0].source: no such file or folder"),
        ({"mixture": [{"source": "photos", "resize_px": 5}]}, "mixture[0].resize_px: 5 is smaller"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict, expected: str) -> None:
    lines = [f"{key}: {text}" for key, text in TrainingData.model_validate(values).problems()]
    assert len(lines) == 1 and lines[0].startswith(expected)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"weight": 1}, "mixture[1].source: is missing: give it"),
        ({"source": "photos", "weight": 0}, "mixture[1].weight: input should be greater than 0 (given: 0)"),
        ({"source": "photos", "wieght": 1}, "mixture[1].wieght: no such setting; did you mean weight?"),
        ("photos", "mixture[1]: a section of keys and values is expected, as in {key: value} (given: 'photos')"),
    ],
)
def test_a_mistake_in_a_source_is_named_by_its_place(part: object, expected: str) -> None:
    found, problems = validated(TrainingData, {"mixture": [{"source": "photos"}, part]})
    assert [f"{key}: {text}" for key, text in problems] == [expected]
    assert found == TrainingData()


def test_a_source_that_cannot_be_opened_is_named_by_its_place(two: list[dict], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = mixed([two[0], {"source": str(tmp_path / "empty")}])
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.source: .* holds no images"):
        open_images(settings, "train")


@pytest.mark.usefixtures("no_finish")
def test_a_run_on_a_mixture_resumes_bit_for_bit_and_logs_its_sources(two: list[dict], tmp_path: Path, capsys) -> None:
    parts = [{**two[0], "weight": 1}, {**two[1], "weight": 3}]
    run, other = tmp_path / "run", tmp_path / "other"

    def command(folder: Path, *more: str) -> list[str]:
        kept = [word for word in words(two[0]["source"], folder) if not word.startswith("data.source=")]
        return [*kept, f"data.mixture={json.dumps(parts)}", "optim.schedule=constant", *more]

    assert main(command(run)) == 0
    assert main(command(other, "steps=2")) == 0
    assert main(command(other)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(run / last, other / last) == []
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["event"] == "train" and line["step"] == 6)
    taken = [line[f"samples/{part['source']}"] for part in parts]
    assert sum(taken) == 24 and taken[1] > taken[0]
    parts.append(two[0])
    parts[-1]["weight"] = 1
    capsys.readouterr()
    assert main(command(run)) == 2
    assert "data.mixture" in capsys.readouterr().err
    assert main([*command(run), "--dry-run"]) == 0
    assert f"{two[1]['source']} (weight 3)" in capsys.readouterr().out
