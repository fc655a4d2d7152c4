"""Mutual information against scipy and counting by hand; codes whose gap is known; a table of shapes, end to end."""

import itertools
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scipy.stats import entropy as scipy_entropy

from benchmarks.disentangle import BATCH, COMMON, OWN, RUNS
from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.data.synthetic import BLOB_FACTORS, FACTORS, draw_blob, draw_shape, write_shapes
from latent_ae.models.build import build_autoencoder
from latent_ae.models.settings import ModelSettings
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.factors.information import binned, gaussian_total_correlation, measured, mutual_information
from latent_ae_eval.factors.measure import factors
from latent_ae_eval.factors.scores import concentration, factor_vae_score
from latent_ae_eval.factors.settings import FactorsSettings
from latent_ae_train.settings import TrainSettings

COUNTS = (3, 2, 2, 3, 4)
ALL = np.array(list(itertools.product(*map(range, COUNTS))))
NAMES = list(FACTORS)


def test_a_contingency_table_counted_by_hand() -> None:
    """Three of a=0 with b=0, one with b=1, and the other way round: ln 2 + (3 ln 3 - 4 ln 4) / 4 nats."""
    a, b = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1, 1, 0])
    expected = math.log(2) + (3 * math.log(3) - 4 * math.log(4)) / 4
    assert mutual_information(a[:, None], b[:, None]) == pytest.approx(np.array([[expected]]))


def test_mutual_information_is_that_of_scipys_divergence() -> None:
    """KL(p(a, b) || p(a) p(b)) of the table of frequencies."""
    rng = np.random.default_rng(0)
    b = rng.integers(0, 5, (400, 2))
    a = np.stack([(b[:, 0] + rng.integers(0, 2, 400)) % 7, b[:, 1] * (rng.random(400) < 0.5)], 1)
    found = mutual_information(a, b)
    for d, k in itertools.product(range(2), range(2)):
        table = np.zeros((7, 5))
        np.add.at(table, (a[:, d], b[:, k]), 1 / 400)
        product = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
        assert found[d, k] == pytest.approx(scipy_entropy(table.ravel(), product.ravel()), abs=1e-12)


def test_bins_are_of_equal_width() -> None:
    codes = np.array([[0.0, 3.0], [0.24, 3.0], [0.26, 3.0], [0.99, 3.0], [1.0, 3.0]])
    assert binned(codes, 4).tolist() == [[0, 0], [0, 0], [1, 0], [3, 0], [3, 0]]
    spread = binned(np.linspace(-7, 5, 2000)[:, None])
    assert np.bincount(spread[:, 0]).tolist() == [100] * 20
    edges = np.histogram_bin_edges([0.0, 1.0], 20)
    normal = np.random.default_rng(0).random(500)
    normal[:2] = 0, 1
    assert binned(normal[:, None])[:, 0].tolist() == np.minimum(np.digitize(normal, edges) - 1, 19).tolist()


def test_the_gap_of_codes_that_are_known() -> None:
    rng = np.random.default_rng(0)
    codes = -2.5 * ALL[:, [3, 0, 4, 1, 2]].astype(float)
    own = measured(codes, ALL, NAMES)
    assert own["mig"] == pytest.approx(1.0) and own["gaps"] == pytest.approx(dict.fromkeys(NAMES, 1.0))
    assert own["dimensions"] == {"x": 0, "shape": 1, "y": 2, "scale": 3, "orientation": 4}
    twice = measured(np.concatenate([codes, 3 - codes[:, ::-1]], 1), ALL, NAMES)
    assert twice["mig"] == pytest.approx(0.0, abs=1e-12)
    many = ALL[rng.integers(0, len(ALL), 20_000)]
    noise = measured(rng.normal(size=(20_000, 5)), many, NAMES)
    assert 0 <= noise["mig"] < 0.005
    # half of the time another dimension holds the value, too: the gap is what is left of the entropy
    mixed = np.stack([many[:, 4], np.where(rng.random(20_000) < 0.5, many[:, 4], 9)], 1).astype(float)
    assert measured(mixed, many[:, 4:], ["y"])["mig"] == pytest.approx(0.5, abs=0.01)
    # two factors in one dimension: each has its gap all the same
    assert measured((3 * many[:, [0]] + many[:, [3]]).astype(float), many[:, [0, 3]], ["shape", "x"])[
        "mig"
    ] == pytest.approx(1)


def test_a_dimension_that_stands_still_tells_nothing() -> None:
    still = measured(np.full((len(ALL), 2), 0.3), ALL, NAMES)
    assert still["mig"] == 0.0 and not np.any(still["mutual_information"])


def test_the_total_correlation_is_that_of_gaussians() -> None:
    """Three variables that share a part of variance r: (1 - r)^2 (1 + 2 r) is the determinant."""
    rng = np.random.default_rng(0)
    shared, r = rng.normal(size=(40_000, 1)), 0.5
    codes = math.sqrt(r) * shared + math.sqrt(1 - r) * rng.normal(size=(40_000, 3))
    codes = np.concatenate([codes * [1, 20, 0.01] + 3, np.ones((40_000, 1))], 1)  # one that never varies
    expected = -0.5 * math.log((1 - r) ** 2 * (1 + 2 * r))
    assert gaussian_total_correlation(codes) == pytest.approx(expected, abs=0.01)
    assert gaussian_total_correlation(codes[:, :1]) == 0.0
    assert 10 < gaussian_total_correlation(codes[:, [0, 1, 1]]) < math.inf


def test_shapes_are_where_their_factors_say() -> None:
    sides = [draw_shape((0, scale, 0, 0, 0)).astype(bool) for scale in range(4)]
    widths = [np.flatnonzero(image.any(0)) for image in sides]
    # half a width of 0.7 times an eighth to a quarter of 32 px, around a quarter of 32 px
    assert [(columns[0], columns[-1]) for columns in widths] == [(5, 10), (4, 11), (3, 12), (2, 13)]
    grid = np.arange(32) + 0.5
    for x, y, shape in itertools.product((0, 3, 7), (0, 7), (0, 1)):
        image = draw_shape((shape, 3, 5, x, y)) / 255
        mass = image.sum()
        centre = (image.sum(0) @ grid / mass, image.sum(1) @ grid / mass)
        assert centre == pytest.approx((8 + 16 * x / 7, 8 + 16 * y / 7), abs=0.05)
    areas = [(draw_shape((shape, 3, turn, 4, 4)) / 255).sum() for shape in (0, 1) for turn in range(8)]
    assert areas[:8] == pytest.approx([11.2**2] * 8, rel=0.015)
    assert areas[8:] == pytest.approx([math.pi * 8 * 4] * 8, rel=0.015)
    ellipse = [draw_shape((1, 3, turn, 4, 4)) / 255 for turn in range(8)]
    for turn, image in enumerate(ellipse):  # the direction of the largest moment
        across, down = np.meshgrid(grid, grid)
        moments = np.cov(across.ravel(), down.ravel(), aweights=image.ravel())
        angle = 0.5 * np.arctan2(2 * moments[0, 1], moments[0, 0] - moments[1, 1])
        assert angle == pytest.approx(turn * math.pi / 16, abs=0.02)
    heart = draw_shape((2, 3, 0, 4, 4)) > 127
    rows = heart.sum(1)[heart.any(1)]
    assert (heart == heart.any(0)[None] * heart).all() and rows[-1] < rows[len(rows) // 2] > 10  # point downwards


def test_blobs_are_where_their_factors_say() -> None:
    grid = np.arange(16) + 0.5
    small = itertools.product((0, 1), (0, 4, 11), (0, 7))
    for scale, x, y in [*small, (2, 4, 8), (5, 5, 5), (5, 6, 6)]:  # larger ones near the middle: little is cut off
        image = draw_blob((scale, x, y)) / 255
        mass, side = image.sum(), 16 * (0.1 + 0.1 * scale / 5)
        centre = image.sum(0) @ grid / mass, image.sum(1) @ grid / mass
        assert centre == pytest.approx((16 * (0.3 + 0.4 * x / 11), 16 * (0.3 + 0.4 * y / 11)), abs=0.05)
        assert mass == pytest.approx(2 * math.pi * side**2, rel=0.03)
        assert image.max() == pytest.approx(1, abs=0.1)


def test_the_table_of_blobs(tmp_path: Path) -> None:
    path = write_shapes(tmp_path / "blobs.parquet", kind="blobs")
    table = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path))["train"]
    expected = list(itertools.product(*map(range, BLOB_FACTORS.values())))
    assert [tuple(row.values()) for row in table.remove_columns("image")] == expected
    images = [np.asarray(image) for image in table["image"]]
    assert len({image.tobytes() for image in images}) == len(expected) == 864
    assert np.array_equal(images[500], draw_blob(expected[500]))


def test_a_larger_side_is_the_same_picture(tmp_path: Path) -> None:
    """Where its edges and its centre are, relative to the side, does not depend on the side."""
    for values in ((0, 3, 0, 2, 7), (0, 0, 0, 0, 0), (1, 2, 5, 4, 4)):
        for axis in (0, 1):
            found = []
            for side in (32, 64, 128):
                image = draw_shape(values, side_px=side) / 255
                grid, mass = (np.arange(side) + 0.5) / side, image.sum(axis)
                centre = float(mass @ grid / mass.sum())
                spread = math.sqrt(mass @ (grid - centre) ** 2 / mass.sum())
                found.append((centre, spread, image.mean()))
            assert found[1] == pytest.approx(found[0], abs=5e-3) and found[2] == pytest.approx(found[1], abs=3e-3)
    assert draw_blob((5, 5, 5), side_px=32).reshape(16, 2, 16, 2).mean((1, 3)) == pytest.approx(
        draw_blob((5, 5, 5)), abs=2
    )
    path = write_shapes(tmp_path / "large.parquet", COUNTS, side_px=64)
    table = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path))["train"]
    assert np.array_equal(np.asarray(table[77]["image"]), draw_shape(ALL[77], COUNTS, side_px=64))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shapes.parquet", COUNTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vector of four latents, whose means vary."""
    settings = ModelSettings(
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4, 4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    folder = tmp_path_factory.mktemp("model") / "vae"
    vae = build_autoencoder(settings, sample_size=32)
    vae.quant_conv.weight.data[:4] *= 100
    vae.save_pretrained(folder)
    return str(folder)


def test_the_table_is_every_combination_once(shapes: Path) -> None:
    table = datasets.load_dataset("parquet", data_files=str(shapes), cache_dir=str(shapes.parent))["train"]
    assert table.column_names == ["image", *FACTORS]
    assert np.array_equal(np.stack([table[name] for name in FACTORS], 1), ALL)
    images = [np.asarray(image) for image in table["image"]]
    assert images[0].shape == (32, 32) and images[0].dtype == np.uint8 and len({im.tobytes() for im in images}) == 144
    assert np.array_equal(images[77], draw_shape(ALL[77], COUNTS))


def test_whole(model: str, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    more = ["num_workers=0", "batch_size=50", "factors=[shape,y]", "traversed=17", "steps=3"]
    assert main(["eval", "factors", model, str(shapes), *more, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["latent"] == [4, 1, 1] and result["data"]["factors"] == {"shape": 3, "y": 4}
    matrix = np.array(result["mean"]["mutual_information"])
    assert matrix.shape == (4, 2) and (matrix <= [math.log(3) + 1e-9, math.log(4) + 1e-9]).all()
    best = np.sort(matrix, 0)
    assert result["mean"]["gaps"]["y"] == pytest.approx((best[-1, 1] - best[-2, 1]) / math.log(4))
    assert result["mean"]["mig"] == pytest.approx(np.mean(list(result["mean"]["gaps"].values())))
    assert result["sample"]["mutual_information"] != result["mean"]["mutual_information"]
    assert "144 images are few" in result["notes"][0]
    active = result["active_dimensions"]
    assert active and active == [d for d, v in enumerate(result["variances"]) if v > 0.01]
    assert result["traversed"]["image"] == 17 and sorted(result["traversed"]["dimensions"]) == active
    shown = result["traversed"]["dimensions"]
    assert shown == sorted(active, key=lambda d: -result["variances"][d])
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(model).eval()
        image = torch.from_numpy(draw_shape(ALL[17], COUNTS) / 127.5 - 1).float()[None, None]
        everything = torch.from_numpy(np.stack([draw_shape(values, COUNTS) for values in ALL]) / 127.5 - 1).float()
        means = vae.encode(everything[:, None]).latent_dist.mean.flatten(1).numpy()
        assert result["variances"] == pytest.approx(means.var(0), rel=1e-3)
        latent, rows = vae.encode(image).latent_dist.mean.repeat(3, 1, 1, 1), []
        for d in shown:
            moved = latent.clone()
            moved[:, d, 0, 0] = torch.tensor([-2.0, 0.0, 2.0])
            rows.append(list(vae.decode(moved).sample.clamp(-1, 1)))
    names = [", ".join(n for n, best in result["mean"]["dimensions"].items() if best == d) for d in shown]
    labels = [f"{d}: {name}" if name else str(d) for d, name in zip(shown, names, strict=True)]
    expected = picture_grid(rows, ["-2.0", "+0.0", "+2.0"], row_labels=labels, largest_px=128)
    assert np.abs(np.asarray(Image.open(out / "traversals.png"), int) - np.asarray(expected, int)).max() <= 1
    page = (out / "report.html").read_text()
    assert "MIG of the mean" in page and page.count("<svg") == 3 and "dimension" in page
    found = result["mean"]
    # rounding, which depends on the batch, may decide a few votes and splits
    assert found["factor_vae_score"] == pytest.approx(factor_vae_score(means, ALL[:, [0, 4]], active, 0), abs=0.01)
    importance = np.array(found["dci"]["importance"])
    assert importance.shape == (len(active), 2) and importance.sum(0) == pytest.approx([1, 1])
    assert found["dci"]["disentanglement"] == concentration(importance) and "disentanglement (DCI)" in page
    # the means alone do not depend on the seed, nor either on the batch
    again = factors(model, shapes, FactorsSettings(num_workers=0, batch_size=7, factors=("shape", "y"), seed=1))
    assert np.allclose(again["mean"]["mutual_information"], matrix)
    assert again["sample"]["mutual_information"] != result["sample"]["mutual_information"]
    same = factors(model, shapes, FactorsSettings(num_workers=0, batch_size=144))
    assert list(same["data"]["factors"]) == NAMES
    assert same["sample"]["gaps"]["y"] == pytest.approx(result["sample"]["gaps"]["y"])


def test_dci_that_cannot_be_measured_takes_nothing_else_with_it(
    model: str, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_value(*given: object) -> None:
        raise UserError("dci: the 96 images for its trees have one value of x: give more images")

    monkeypatch.setattr("latent_ae_eval.factors.measure.dci", one_value)
    found = factors(model, shapes, FactorsSettings(num_workers=0))
    assert "dci" not in found["mean"] and found["mean"]["factor_vae_score"] > 0
    assert "DCI is left out: the 96 images for its trees have one value of x: give more images" in found["notes"]
    with pytest.raises(UserError, match="dci: the 96 images"):
        factors(model, shapes, FactorsSettings(num_workers=0, dci=True))


def test_an_unreadable_image_takes_its_labels_with_it(model: str, shapes: Path, tmp_path: Path) -> None:
    table = pq.read_table(shapes)
    rows = table.to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[:3] + rows[4:], table.schema), tmp_path / "without.parquet")
    rows[3]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "damaged.parquet")
    settings = FactorsSettings(num_workers=0, max_bad_fraction=0.1)
    found, known = (factors(model, tmp_path / f"{name}.parquet", settings) for name in ("damaged", "without"))
    assert len(found["data"]["skipped"]) == 1 and found["data"]["num_images"] == 143
    assert found["mean"]["mutual_information"] == known["mean"]["mutual_information"]


def test_what_has_no_factors_is_refused(model: str, shapes: Path, tmp_path: Path) -> None:
    def refused(data: Path, message: str, **changes: object) -> None:
        with pytest.raises(UserError, match=message):
            factors(model, data, FactorsSettings.model_validate({"num_workers": 0} | changes))

    refused(shapes, "factors: colour is no column of integers or classes", factors=["colour"])
    refused(shapes, "traversed: there is no image 144", traversed=144)
    refused(shapes, r"factors: x has 1 value\(s\)", factors=["x"], limit=1)
    Image.fromarray(draw_shape((0, 0, 0, 0, 0))).save(tmp_path / "one.png")
    refused(tmp_path, "is not a table")
    images = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": Image.fromarray(draw_shape((0, 0, 0, 0, 0))), "text": "a"}]
    datasets.Dataset.from_list(rows, features=images).to_parquet(tmp_path / "text.parquet")
    refused(tmp_path / "text.parquet", r"no column of integers or classes besides images \(text\)")
    large = build_autoencoder(ModelSettings(block_out_channels=(32,), latent_channels=2), sample_size=32)
    with pytest.raises(UserError, match="2 x 32 x 32 = 2,048 dimensions"):
        factors(large, shapes, FactorsSettings(num_workers=0))
    config = {"encoder_block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8]}
    config |= {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1]}
    tiny = build_autoencoder(ModelSettings(kind="AutoencoderTiny", config=config), sample_size=32)
    with pytest.raises(UserError, match="a posterior that is one Gaussian, and AutoencoderTiny has none"):
        factors(tiny, shapes, FactorsSettings(num_workers=0))


def test_the_recipe_beta_vae_is_the_row_that_was_measured() -> None:
    """Beta 64 on blobs, in all that the trained weights depend on."""
    shape = [f"batch_size={BATCH['blobs']}", "data.resolution=16"]
    row = load_settings(TrainSettings, "quickstart", [*COMMON, *OWN["blobs"], *RUNS["blobs"]["beta 64"], *shape])
    recipe = load_settings(TrainSettings, "beta-vae", [])
    # without LPIPS and a GAN their settings say nothing
    ours, theirs = (
        x.model_dump(exclude={"output_dir", "gan", "checkpoint", "validation", "log"}) for x in (recipe, row)
    )
    for values in (ours, theirs):
        del values["loss"]["perceptual_every"]
    assert ours == theirs and recipe.gan.weight == row.gan.weight == 0
