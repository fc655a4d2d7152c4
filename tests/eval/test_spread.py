"""A choice of part of the data is spread over all of it: over class folders, one after another in path order."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data.loader import open_images
from latent_ae.data.rng import spread
from latent_ae.data.settings import DataSettings
from latent_ae.text import choice_in_words
from latent_ae_eval.anomaly.measure import find_anomalies
from latent_ae_eval.anomaly.settings import AnomalySettings
from latent_ae_eval.compare.measure import compare
from latent_ae_eval.interpolate.measure import interpolate
from latent_ae_eval.interpolate.settings import InterpolateSettings
from latent_ae_eval.latents.measure import evaluate_latents
from latent_ae_eval.latents.settings import LatentsSettings
from latent_ae_eval.likelihood.measure import measure_likelihood
from latent_ae_eval.likelihood.settings import LikelihoodSettings
from latent_ae_eval.probe.measure import probe
from latent_ae_eval.probe.settings import ProbeSettings
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.settings import ReconSettings
from latent_ae_train.report import remarks_on
from latent_ae_train.settings import TrainSettings
from latent_ae_train.validate import Validator

CLASSES, EACH, SIDE = 5, 40, 8
EVEN = {f"class{number}": 10 for number in range(CLASSES)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five folders of forty images, each of a brightness of its own."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for number in range(CLASSES):
        (root / f"class{number}").mkdir()
        for place in range(EACH):
            pixels = rng.integers(40 * number, 40 * number + 30, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{number}/{place:02}.png")
    return root


def by_class(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(name.split("/")[0] for name in names))


# the choice itself


@pytest.mark.parametrize("size, number", [(200, 50), (31, 7), (1_281_167, 500)])
def test_one_image_is_drawn_from_each_of_equal_stretches(size: int, number: int) -> None:
    chosen = spread(3, size, number)
    assert len(chosen) == number and chosen.dtype == np.int64
    for k, index in enumerate(chosen.tolist()):
        assert k * size // number <= index < (k + 1) * size // number
    assert chosen.tolist() == spread(3, size, number).tolist() != spread(4, size, number).tolist()


def test_the_choice_does_not_change_from_version_to_version() -> None:
    """Otherwise results of two versions would be of other images."""
    assert spread(0, 200, 8).tolist() == [24, 46, 59, 95, 117, 130, 162, 191]


def test_more_than_half_leave_one_out_of_each_stretch_and_all_are_all() -> None:
    left_out = sorted(set(range(100)) - set(spread(0, 100, 75).tolist()))
    assert [index // 4 for index in left_out] == list(range(25))
    assert spread(0, 5, 5).tolist() == spread(0, 5, 9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size, number", [(30, 14), (30, 16), (40, 24), (40, 39), (20, 2)])
def test_no_image_is_half_again_as_likely_as_another(size: int, number: int) -> None:
    counts = np.zeros(size)
    for seed in range(4000):
        counts[spread(seed, size, number)] += 1
    assert counts.sum() == 4000 * number
    noise = 5 * np.sqrt(counts.max())  # standard deviations of a count
    assert counts.max() - noise < 1.5 * (counts.min() + noise)


@pytest.mark.parametrize("period", [2, 10, 20])
def test_classes_in_a_regular_order_are_all_met(period: int) -> None:
    counts = np.bincount(spread(0, 20_000, 1000) % period, minlength=period)
    assert counts.min() > 0.6 * 1000 / period


def test_what_is_held_out_by_fraction_is_spread_too(folders: Path) -> None:
    """By a hash of the name: 60 of 200 hold of each class 12, with a standard deviation of 2.6."""
    settings = DataSettings(source=str(folders), eval_fraction=0.3)
    source = open_images(settings, "held_out")
    counts = by_class(source.name(index) for index in range(len(source)))
    assert len(source) == 60 and len(counts) == CLASSES and all(5 <= count <= 19 for count in counts.values())


# training


def validator_of(folder: Path, **validate: int) -> Validator:
    values = {"source": str(folder), "eval_source": str(folder), "resolution": SIDE, "num_workers": 0}
    settings = TrainSettings.model_validate(
        {"data": values, "validate": validate, "loss": {"perceptual": 0.0}, "gan": {"weight": 0.0}}
    )
    return Validator(settings, Accelerator(cpu=True), open_images(settings.data, "held_out"), 3, 4, None)


def test_validation_meets_all_classes_and_its_previews_too(folders: Path, tmp_path: Path) -> None:
    validator = validator_of(folders, images=50, preview_images=5)
    names = {index: name for index, name, _ in validator.crops()}
    assert by_class(names.values()) == EVEN
    parts = [list(validator.crops(rank, 2)) for rank in (0, 1)]
    assert sorted((index, name) for part in parts for index, name, _ in part) == sorted(names.items())

    def brighter(images: torch.Tensor, _: object) -> torch.Tensor:
        return (images + 0.1).clamp(-1, 1)

    summaries = [validator.measure(brighter, tmp_path / f"{number}.png") for number in range(2)]
    assert summaries[0] == summaries[1] and summaries[0]["n"] == 50
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    facts = summaries[0]["choice"]
    assert (facts["method"], facts["number"], facts["of"], facts["seed"]) == ("spread", 50, 200, 0)
    assert choice_in_words(facts) == "50 of 200 images, spread over all of them (seed 0)"
    # one picture of each class, known by its brightness: five rows in the order of the folders
    with Image.open(tmp_path / "0.png") as preview:
        cells = np.asarray(preview)
    middles = [cells[-round((CLASSES - row - 0.5) * 134), 64].mean() for row in range(CLASSES)]
    assert [int(middle // 40) for middle in middles] == list(range(CLASSES))


def test_an_export_is_checked_on_images_of_all_classes(folders: Path, tmp_path: Path) -> None:
    levels = validator_of(folders).some(CLASSES).mean(dim=(1, 2, 3)) * 127.5 + 127.5
    assert (levels // 40).tolist() == [0, 1, 2, 3, 4]
    shutil.copytree(folders, tmp_path / "damaged")
    names = sorted((tmp_path / "damaged").glob("*/*"))
    for index in spread(0, len(names), CLASSES):
        names[index].write_bytes(b"no image")
    assert len(validator_of(tmp_path / "damaged").some(CLASSES)) == CLASSES  # others stand in


def test_a_table_of_other_images_says_so() -> None:
    spread_over = {"method": "spread", "number": 50, "of": 200, "seed": 0, "fingerprint": "f" * 64}
    other = spread_over | {"of": 210, "fingerprint": "e" * 64}
    alike = {"before": {"psnr": 20.0, "choice": spread_over}, "after": {"psnr": 21.0, "choice": spread_over}}
    assert remarks_on(alike) == ["The table measures 50 of 200 images, spread over all of them (seed 0)."]
    for before, words in ((other, "50 of 210 images"), (None, "a choice that is not recorded")):
        (_, remark) = remarks_on(alike | {"before": {"psnr": 20.0, "choice": before}})
        assert remark.startswith(f"The rows measure different images: {words}")


# evaluation

PLAIN = {"crop_px": SIDE, "resize_px": None, "num_workers": 0}
RECON = ReconSettings(**PLAIN, limit=50, lpips=(), frechet=(), latents=("mode",), baseline=False)


def test_a_limit_of_eval_recon_takes_the_images_of_validation(model: str, folders: Path) -> None:
    result = evaluate_reconstruction(model, folders, RECON)
    names = [row["name"] for row in result["images"]]
    assert by_class(names) == EVEN
    assert names == [name for _, name, _ in validator_of(folders, images=50).crops()]
    assert result["data"]["choice"] == validator_of(folders, images=50).chosen[1]
    again = evaluate_reconstruction(model, folders, RECON.model_copy(update={"seed": 1}))
    assert by_class(row["name"] for row in again["images"]) == EVEN
    assert result["data"]["choice"]["fingerprint"] != again["data"]["choice"]["fingerprint"]


def test_a_limit_of_eval_latents_measures_what_a_folder_of_these_images_gives(
    model: str, folders: Path, tmp_path: Path
) -> None:
    names = sorted(folders.glob("*/*"))
    for index in spread(0, len(names), 10):
        shutil.copy(names[index], tmp_path / f"{names[index].parent.name}-{names[index].name}")
    settings = LatentsSettings(**PLAIN, lpips=None, noise=(0.1,), num_decoded=4)
    limited = evaluate_latents(model, folders, settings.model_copy(update={"limit": 10}))
    whole = evaluate_latents(model, tmp_path, settings)
    assert len(list(tmp_path.iterdir())) == limited["data"]["num_images"] == 10
    assert limited["latents"] == whole["latents"] and limited["health"] == whole["health"]
    assert limited["data"]["choice"]["of"] == 200 and whole["data"]["choice"]["method"] == "all"


def test_a_probe_is_tested_on_every_class(model: str, folders: Path, tmp_path: Path) -> None:
    for part, places in (("train", range(20)), ("test", range(20, EACH))):
        for number in range(CLASSES):
            (tmp_path / part / f"class{number}").mkdir(parents=True)
            for place in places:
                shutil.copy(folders / f"class{number}/{place:02}.png", tmp_path / part / f"class{number}")
    settings = ProbeSettings(**PLAIN, limit=40, labels_per_class=(5,), draws=2, l2=(1e-3,), neighbours=(1,))
    result = probe(model, str(tmp_path), settings)
    assert result["chance"] == 0.2 and result["data"]["test_images"] == 40
    assert result["data"]["training_images_drawn"] > 5 * CLASSES and len(result["data"]["classes"]) == CLASSES
    assert result["data"]["choice"]["method"] == "spread over classes" and result["data"]["choice"]["of"] == 100


def test_a_probe_takes_each_class_its_share_of_a_table_in_any_order(model: str, tmp_path: Path) -> None:
    """By position alone a class would get more or less than its share."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 25)
    for name in ("train", "test"):
        rows = [{"image": {"bytes": png(rng), "path": None}, "label": int(label)} for label in rng.permutation(labels)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    settings = ProbeSettings(**PLAIN, limit=20, labels_per_class=(5,), draws=2, l2=(1e-3,), neighbours=(1,))
    assert probe(model, str(tmp_path), settings)["chance"] == 0.25


def png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_limits_of_the_jobs_meet_all_classes(model: str, folders: Path, tmp_path: Path) -> None:
    find_anomalies(model, folders, AnomalySettings(**PLAIN, limit=10, lpips=None), out=tmp_path / "anomaly")
    measured = LikelihoodSettings(**PLAIN, limit=15, samples=1, scale="fit", num_pictures=0)
    result = measure_likelihood(model, folders, measured, out=tmp_path / "likelihood")
    assert result["data"]["num_images"] == 12  # three of the fifteen fit the scale
    for job, most in (("anomaly", 2), ("likelihood", 3)):
        names = pyarrow.parquet.read_table(tmp_path / job / "images.parquet")["name"].to_pylist()
        counts = by_class(dict.fromkeys(names))
        assert len(counts) == CLASSES and max(counts.values()) == most
        choice = json.loads((tmp_path / job / "result.json").read_text())["data"]["choice"]
        assert choice["method"] == "spread" and choice["of"] == 200
    path = InterpolateSettings(**PLAIN, num_images=CLASSES, steps=3, lpips=None)
    assert by_class(interpolate(model, folders, path)["data"]["images"]) == {name: 1 for name in EVEN}


def test_numbers_of_images_are_those_of_the_whole_data(
    model: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = InterpolateSettings(**PLAIN, images=(0, 199), steps=3, lpips=None)
    result = interpolate(model, folders, settings)["data"]
    assert result["images"] == ["class0/00.png", "class4/39.png"] and result["choice"]["method"] == "named"
    assert main(["eval", "interpolate", model, str(folders), "limit=3"]) == 2
    assert "limit: a path visits num_images images" in capsys.readouterr().err


def test_a_stream_gives_its_first_images_and_says_so(model: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [{"image": {"bytes": png(rng), "path": None}} for _ in range(12)]
    datasets.Dataset.from_list(rows, features=datasets.Features(image=datasets.Image())).to_parquet(
        tmp_path / "data.parquet"
    )
    settings = RECON.model_copy(update={"limit": 4, "streaming": True})
    result = evaluate_reconstruction(model, tmp_path, settings)
    assert [row["index"] for row in result["images"]] == [0, 1, 2, 3]
    assert result["data"]["choice"] == {"method": "first", "number": 4, "of": None}
    assert any("its first 4 images, not spread over all of it" in note for note in result["notes"])
    latents = LatentsSettings(**PLAIN, limit=4, streaming=True, lpips=None, noise=(), num_decoded=2)
    assert any("its first 4 images" in note for note in evaluate_latents(model, tmp_path, latents)["notes"])
    whole = evaluate_reconstruction(model, tmp_path, settings.model_copy(update={"limit": None}))
    assert not any("not spread over" in note for note in whole["notes"])


def test_results_of_different_choices_are_not_compared(model: str, folders: Path, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"seed": 1}), ("c", {"limit": None}), ("same", {})):
        evaluate_reconstruction(model, folders, RECON.model_copy(update=changes), out=tmp_path / name)
    compare([tmp_path / "a", tmp_path / "same"])
    for other, words in (
        ("b", r"A 50 of 200 images, spread over all of them \(seed 0\), B 50 of 200 .*\(seed 1\)"),
        ("c", r"A 50 of 200 images, spread over all of them \(seed 0\), B all 200 images"),
    ):
        with pytest.raises(UserError, match=f"images chosen from the data: {words}.*the same limit and seed"):
            compare([tmp_path / "a", tmp_path / other])
    # a result of an older version does not say: its images decide
    written = json.loads((tmp_path / "same/result.json").read_text())
    del written["data"]["choice"]
    (tmp_path / "same/result.json").write_text(json.dumps(written))
    compare([tmp_path / "a", tmp_path / "same"])
    with pytest.raises(UserError, match="images chosen from the data: A not recorded, B 50 of 200 images"):
        compare([tmp_path / "same", tmp_path / "b"])
