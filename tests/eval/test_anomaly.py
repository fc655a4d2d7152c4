"""Scores against diffusers, torch.distributions and scipy; a first stage whose errors are known beforehand."""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.distributions import Normal, kl_divergence

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data.rng import posterior_noise, spread
from latent_ae_eval.anomaly.defects import paste_defect
from latent_ae_eval.anomaly.measure import FIT, find_anomalies
from latent_ae_eval.anomaly.roc import auroc_interval
from latent_ae_eval.anomaly.scores import blurred
from latent_ae_eval.anomaly.settings import AnomalySettings
from tests.report.html_reader import pictures
from tests.tiny_models import tiny_autoencoder

QUICK = AnomalySettings(lpips=None, num_workers=0, false_positive_rate=0.2)


def nothing(images: torch.Tensor) -> torch.Tensor:
    """A first stage that knows mid-grey only: the squared error is the squared pixel."""
    return torch.zeros_like(images)


def save(folder: Path, levels: list[int]) -> None:
    folder.mkdir(parents=True)
    for number, level in enumerate(levels):
        Image.fromarray(np.full((16, 20, 3), level, dtype=np.uint8)).save(folder / f"{number:02d}.png")


@pytest.fixture(scope="module")
def grays(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grays")
    save(folder / "test/good", [130, 140, 160, 220])  # 160 is the threshold, and not above it
    save(folder / "test/bad", [200, 240, 145])
    save(folder / "normal", [125 + 5 * number for number in range(9)])
    return folder


def read(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture) / 127.5 - 1).float().permute(2, 0, 1)


def test_scores_thresholds_and_rates_of_a_known_first_stage(grays, tmp_path):
    settings = QUICK.model_copy(update={"normal": str(grays / "normal"), "normal_class": "good"})
    result = find_anomalies(nothing, grays / "test", settings, out=tmp_path)
    squares = {level: (level / 127.5 - 1) ** 2 for level in range(256)}
    table = {Path(row["name"]).as_posix(): row for row in pq.read_table(tmp_path / "images.parquet").to_pylist()}
    for name, level in (("good/03.png", 220), ("bad/02.png", 145)):
        assert table[name]["pixel_mean"] == pytest.approx(squares[level], rel=1e-5)
        assert table[name]["pixel_max"] == pytest.approx(squares[level], rel=1e-5)
        assert table[name]["abnormal"] is name.startswith("bad")
    # of 9 normal scores the ceil(10 * 0.8) = 8th: that of 125 + 35
    assert result["thresholds"]["pixel_mean"] == pytest.approx(squares[160], rel=1e-5)
    found = result["scores"]["pixel_mean"]
    assert found["flagged"] == 3 and found["false_positive_rate"] == 1 / 4 and found["detection_rate"] == 2 / 3
    # of 3 x 4 pairs: 200 beats three of four, 240 all, 145 two
    assert found["auroc"] == pytest.approx((3 + 4 + 2) / 12)
    assert set(result["scores"]) == {"pixel_mean", "pixel_max"}
    assert any("no posterior that is one Gaussian" in note for note in result["notes"])
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    page = (tmp_path / "report.html").read_text()
    assert "0.750" in page and len(pictures(page)) == 3 * 7 and (tmp_path / "pictures.png").is_file()


def test_normal_images_are_those_of_the_normal_class(grays):
    settings = QUICK.model_copy(update={"normal": str(grays / "test"), "normal_class": 1})  # good
    result = find_anomalies(nothing, grays / "test", settings)
    assert any(note.startswith("4 of the images are among the normal ones") for note in result["notes"])
    assert result["normal"]["thresholds_from"] == 4
    assert result["thresholds"]["pixel_mean"] == pytest.approx((220 / 127.5 - 1) ** 2, rel=1e-5)


def test_the_number_of_a_class_is_that_of_the_data(grays, tmp_path):
    """Folders of another source may be numbered otherwise."""
    save(tmp_path / "normal/good", [150, 150, 150, 150, 150])
    save(tmp_path / "normal/spare", [250] * 5)
    settings = QUICK.model_copy(update={"normal": str(tmp_path / "normal"), "normal_class": 1})  # bad, good
    result = find_anomalies(nothing, grays / "test", settings)
    assert result["normal"]["thresholds_from"] == 5
    assert result["thresholds"]["pixel_mean"] == pytest.approx((150 / 127.5 - 1) ** 2, rel=1e-5)


def test_without_labels_there_are_scores_only(grays):
    result = find_anomalies(nothing, grays / "test", QUICK)
    assert result["scores"] == {"pixel_mean": {"flagged": None}, "pixel_max": {"flagged": None}}
    assert result["thresholds"] == {} and any("normal=DATA" in note for note in result["notes"])


def test_the_pictures_are_those_of_the_scores(tmp_path):
    save(tmp_path / "data", [110, 130, 140, 250, 100])
    settings = QUICK.model_copy(update={"num_pictures": 1})
    find_anomalies(nothing, tmp_path / "data", settings, out=tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    inputs = [picture.convert("RGB").getpixel((5, 5))[0] for picture in pictures(page)[::3]]
    assert inputs == [250, 130] and page.index("03.png") < page.index("01.png")
    # the brightest of a heat map is the 95th percentile of the largest errors, 110 and 250 between 0.07 and 0.92
    errors = [(level / 127.5 - 1) ** 2 for level in (110, 130, 140, 250, 100)]
    assert f"the brightest is squared error {np.quantile(errors, 0.95):.3g} or more" in page


def test_of_labelled_images_both_mistakes_are_shown(grays, tmp_path):
    settings = QUICK.model_copy(update={"num_pictures": 1, "normal_class": "good"})
    find_anomalies(nothing, grays / "test", settings, out=tmp_path)
    page = (tmp_path / "report.html").read_text()
    inputs = [picture.convert("RGB").getpixel((5, 5))[0] for picture in pictures(page)[::3]]
    assert inputs == [240, 145, 220]  # most and least abnormal, and what is taken for abnormal


def test_maps_are_smoothed_by_blur_px(tmp_path):
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "data/0.png")
    squares = read(tmp_path / "data/0.png").square().mean(0).numpy()
    for sigma, blur in ((None, 1.0), (2.5, 2.5)):
        settings = QUICK.model_copy(update={"blur_px": sigma})
        find_anomalies(nothing, tmp_path / "data", settings, out=tmp_path / "out")
        (row,) = pq.read_table(tmp_path / "out/images.parquet").to_pylist()
        expected = gaussian_filter(squares, blur, mode="nearest", truncate=3.0).max()
        assert row["pixel_max"] == pytest.approx(float(expected), rel=1e-4)


def test_normal_images_have_their_own_split_and_no_limit(grays, tmp_path):
    for split, levels in (("train", range(130, 140)), ("validation", range(140, 146))):
        save(tmp_path / "normal" / split, list(levels))
    settings = {"normal": str(tmp_path / "normal"), "limit": 3, "false_positive_rate": 0.2}
    for split, count in ((None, 6), ("train", 10)):
        chosen = QUICK.model_copy(update=settings | {"normal_split": split})
        result = find_anomalies(nothing, grays / "test/bad", chosen)
        assert result["normal"]["thresholds_from"] == count and result["data"]["num_images"] == 3


def test_unreadable_images_are_skipped_up_to_a_fraction(grays, tmp_path):
    save(tmp_path / "data", [10, 20, 30])
    (tmp_path / "data/damaged.png").write_bytes(b"no image")
    result = find_anomalies(nothing, tmp_path / "data", QUICK.model_copy(update={"max_bad_fraction": 0.25}))
    assert result["data"]["num_images"] == 3 and result["data"]["skipped"][0].startswith("damaged.png: ")
    with pytest.raises(UserError, match="max_bad_fraction"):
        find_anomalies(nothing, tmp_path / "data", QUICK)


def test_normal_images_are_the_same_whether_some_of_them_fit_an_elbo_or_not(grays, tmp_path):
    """So that models with and without a posterior can be compared, and one damaged image of ten is one in ten."""
    normal = shutil.copytree(grays / "normal", tmp_path / "normal")
    (normal / "damaged.png").write_bytes(b"no image")
    settings = QUICK.model_copy(update={"normal": str(normal), "max_bad_fraction": 0.1, "crop_px": 16})
    results = [find_anomalies(model, grays / "test", settings) for model in (nothing, tiny_autoencoder().eval())]
    assert [result["normal"]["variance_from"] > 0 for result in results] == [False, True]
    assert results[0]["normal"]["fingerprint"] == results[1]["normal"]["fingerprint"]


def test_too_few_normal_images_give_no_threshold(grays):
    settings = QUICK.model_copy(update={"normal": str(grays / "normal"), "false_positive_rate": 0.05})
    result = find_anomalies(nothing, grays / "test", settings)
    assert result["thresholds"] == {"pixel_mean": None, "pixel_max": None}
    assert any("needs 19 normal images, and there are 9" in note for note in result["notes"])


def test_scores_and_elbo_equal_a_direct_computation(model, tmp_path):
    folders = tmp_path / "normal", tmp_path / "data"
    astronaut = skimage.data.astronaut()
    for number, folder in enumerate(folders):
        folder.mkdir()
        for i in range(6):
            Image.fromarray(astronaut[40 * i : 40 * i + 24, 100 * number : 100 * number + 32]).save(folder / f"{i}.png")
    settings = QUICK.model_copy(update={"normal": str(folders[0]), "seed": 3, "batch_size": 2})
    result = find_anomalies(model, folders[1], settings, out=tmp_path / "out")
    autoencoder = tiny_autoencoder().eval()

    def parts(path: Path, number: int) -> tuple[float, float, Normal, torch.Tensor]:
        x = read(path)[None]
        with torch.no_grad():
            posterior = autoencoder.encode(x).latent_dist
            noise = posterior_noise(3, [number], posterior.mean.shape[1:])
            made = autoencoder.decode(posterior.mean + posterior.std * noise).sample
            plain = autoencoder.decode(posterior.mean).sample
        kl = kl_divergence(Normal(posterior.mean.double(), posterior.std.double()), Normal(0.0, 1.0)).sum()
        return float((x - plain).square().mean()), float(kl), made.double(), x.double()

    fitted = [parts(folders[0] / f"{i}.png", i) for i in spread(3, 6, -(-6 // FIT)).tolist()]
    variance = float(torch.cat([(made - x).square().flatten() for _, _, made, x in fitted]).mean())
    assert result["normal"]["variance"] == pytest.approx(variance, rel=1e-4)
    assert (result["normal"]["variance_from"], result["normal"]["thresholds_from"]) == (2, 4)
    for row in pq.read_table(tmp_path / "out/images.parquet").to_pylist():
        error, kl, made, x = parts(folders[1] / row["name"], row["index"])
        likelihood = Normal(made, math.sqrt(variance)).log_prob(x).sum()
        assert row["pixel_mean"] == pytest.approx(error, rel=1e-4)
        assert row["negative_elbo"] == pytest.approx(float(kl - likelihood) / x.numel(), rel=1e-4)


@pytest.mark.parametrize("sigma", [None, 2.5])
def test_maps_are_smoothed_as_scipy_does(sigma):
    maps = torch.rand(2, 70, 90, generator=torch.Generator().manual_seed(0))
    expected = [gaussian_filter(one.numpy(), sigma or 70 / 64, mode="nearest", truncate=3.0) for one in maps]
    np.testing.assert_allclose(blurred(maps, sigma).numpy(), expected, atol=1e-6)
    assert torch.allclose(blurred(torch.ones(1, 2, 3), 4.0), torch.ones(1, 2, 3))  # wider than the image


def test_pasted_defects_are_found_where_they_are(tmp_path):
    save(tmp_path / "flat", [128] * 12)  # which `nothing` reconstructs to half a level

    settings = QUICK.model_copy(update={"defects": True, "maps": True, "seed": 5})
    result = find_anomalies(nothing, tmp_path / "flat", settings, out=tmp_path / "out")
    assert result["scores"]["pixel_mean"]["auroc"] == 1 and result["scores"]["pixel_mean"]["interval"] is None
    rows = pq.read_table(tmp_path / "out/images.parquet").to_pylist()
    assert [row["index"] for row in rows] == [i // 2 for i in range(24)]
    gray = torch.full((3, 16, 20), 128 / 127.5 - 1)
    for row in rows[1::2]:
        image, _, kind = paste_defect(gray, 5, row["index"])
        assert row["defect"] == kind and row["pixel_mean"] == pytest.approx(float(image.square().mean()), rel=1e-5)
    assert set(result["scores"]["pixel_mean"]["auroc_by_defect"]) == {row["defect"] for row in rows[1::2]}
    assert result["pixel_auroc"]["pixel_error"] > 0.9
    maps = sorted(path.name for path in (tmp_path / "out/maps").iterdir())
    assert len(maps) == 24 and maps[:2] == ["000000-defect-pixel_error.png", "000000-pixel_error.png"]
    with Image.open(tmp_path / "out/maps/000000-pixel_error.png") as picture:
        assert picture.size == (20, 16)


def test_intervals_of_pasted_defects_are_of_pairs(grays, tmp_path):
    result = find_anomalies(nothing, grays, QUICK.model_copy(update={"defects": True}), out=tmp_path)
    rows = pq.read_table(tmp_path / "images.parquet").to_pylist()
    without, with_defect = (
        np.array([row["pixel_mean"] for row in rows if row["abnormal"] == kind]) for kind in (False, True)
    )
    paired, apart = (auroc_interval(without, with_defect, paired=paired) for paired in (True, False))
    assert result["scores"]["pixel_mean"]["interval"] == pytest.approx(paired) != pytest.approx(apart)


def test_lpips_is_scored_where_it_is_at_hand(grays, lpips_vgg, tmp_path):
    settings = QUICK.model_copy(update={"lpips": "vgg", "defects": True})
    result = find_anomalies(nothing, grays / "normal", settings, out=tmp_path)
    assert set(result["scores"]) == {"pixel_mean", "pixel_max", "lpips_mean", "lpips_max"}
    assert set(result["pixel_auroc"]) == {"pixel_error", "lpips"}
    row = pq.read_table(tmp_path / "images.parquet").to_pylist()[-1]
    image = paste_defect(read(grays / "normal" / row["name"]), 0, row["index"]).image[None]
    assert row["lpips_mean"] == pytest.approx(float(lpips_vgg(image, torch.zeros_like(image))), rel=1e-4)
    assert row["lpips_max"] > row["lpips_mean"]


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["normal_class=ugly"], "data has no class ugly; it has: bad, good"),
        (["normal_class=good", "defects=true"], "give one of them"),
        (["normal_split=train"], "there is no normal to split"),
        (["normal=nowhere/at/all"], "normal: DATA: no such file or folder: nowhere/at/all"),
        (["lpips=alex"], "needs sides of 31 px and bad/00.png has 20 x 16; set resize_px, lpips=vgg, or lpips=null"),
        (["lpips=null", "rank_by=lpips_max"], "lpips_max will not be measured; there are pixel_mean, pixel_max"),
        (["lpips=null", "rank_by=negative_elbo"], "pixel_max; an ELBO needs normal=DATA and one Gaussian posterior"),
        (["false_positive_rate=0"], "false_positive_rate"),
    ],
)
def test_mistakes_are_named(model, grays, tmp_path, capsys, words, complaint):
    assert main(["eval", "anomaly", model, str(grays / "test"), "--out", str(tmp_path), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_several_processes_are_refused(model, grays, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "anomaly", model, str(grays), "--out", str(tmp_path)]) == 2
    assert "runs on one process, and 2 were launched" in capsys.readouterr().err


def test_images_without_a_label_are_neither_normal_nor_abnormal(tmp_path):
    rows = [(level, label) for level, label in zip((130, 140, 240, 250, 10), (0, 0, 1, 1, None), strict=True)]
    pictures = [Image.fromarray(np.full((16, 20, 3), level, dtype=np.uint8)) for level, _ in rows]
    table = datasets.Dataset.from_dict(
        {"image": pictures, "label": [label for _, label in rows]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    table.to_parquet(tmp_path / "data.parquet")
    result = find_anomalies(nothing, tmp_path / "data.parquet", QUICK.model_copy(update={"normal_class": 0}))
    assert result["data"]["num_images"] == 4 and result["data"]["choice"]["without_label"] == 1
    assert result["scores"]["pixel_mean"]["auroc"] == 1.0
