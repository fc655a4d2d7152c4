"""Classifiers against scipy and brute force, and a probe of images whose classes are known to be easy or impossible."""

import io
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scipy.optimize import minimize
from scipy.special import logsumexp

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data.labels import PROBE_SEED, few_labels
from latent_ae_eval.job import evaluate
from latent_ae_eval.probe.classifiers import logistic_regression, nearest
from latent_ae_eval.probe.features import add_components
from latent_ae_eval.probe.measure import _draws, probe
from latent_ae_eval.probe.settings import ProbeSettings
from latent_ae_eval.storage import FeatureFile
from tests.tiny_models import tiny_autoencoder

L2 = 0.03


def gaussians(n: int, d: int, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return torch.from_numpy(rng.normal(size=(n, d)) + y[:, None]), torch.from_numpy(y)


def objective(flat: np.ndarray, x: np.ndarray, y: np.ndarray, classes: int) -> float:
    weights = flat.reshape(-1, classes)
    logits = x @ weights[:-1] + weights[-1]
    likelihood = (logits[np.arange(len(y)), y] - logsumexp(logits, axis=1)).mean()
    return float(L2 / 2 * np.square(weights[:-1]).sum() - likelihood)


@pytest.mark.parametrize("n, d", [(40, 5), (12, 30)])
def test_logistic_regression_reaches_scipys_optimum(n, d):
    x, y = gaussians(n, d)
    ours = logistic_regression(x.float(), y, 3, L2)
    assert ours.shape == (d + 1, 3) and ours.dtype == torch.float64
    arguments = (x.float().double().numpy(), y.numpy(), 3)
    theirs = minimize(objective, np.zeros(3 * (d + 1)), arguments, method="BFGS", options={"gtol": 1e-7})
    assert objective(ours.numpy().ravel(), *arguments) == pytest.approx(theirs.fun, abs=1e-9)
    np.testing.assert_allclose(ours[:-1].numpy(), theirs.x.reshape(-1, 3)[:-1], atol=1e-4)
    warm = logistic_regression(x.float(), y, 3, L2, start=torch.ones_like(ours))
    torch.testing.assert_close(warm[:-1], ours[:-1], atol=1e-4, rtol=0)


def test_nearest_neighbours_equal_brute_force():
    x, y = gaussians(50, 4)
    queries, _ = gaussians(30, 4, seed=1)
    found = nearest(x.float(), y, 3, queries.float(), (1, 4, 99))
    for number, query in enumerate(queries):
        order = (x - query).norm(dim=1).argsort()
        for k, guesses in found.items():
            near = y[order[:k]].tolist()
            counts = Counter(near)
            tied = {label for label, count in counts.items() if count == max(counts.values())}
            assert int(guesses[number]) == next(label for label in near if label in tied)


def test_draws_are_balanced_nested_and_of_their_seed():
    labels = np.random.default_rng(0).integers(3, size=200)
    settings = ProbeSettings(labels_per_class=(20, 4), draws=3)
    drawn = _draws(labels, "abc", settings)
    for small, large in drawn:
        for rows, size in ((small, 4), (large, 20)):
            assert len(set(rows.tolist())) == 3 * size
            assert labels[rows].tolist() == [0] * size + [1] * size + [2] * size
        assert set(small) <= set(large)
    assert set(drawn[0][0]) != set(drawn[1][0])
    again = _draws(labels, "abc", settings)
    assert all(np.array_equal(a, b) for x, y in zip(drawn, again, strict=True) for a, b in zip(x, y, strict=True))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, count: int, seed: int, *, side: int = 8) -> None:
    """Noise whose brightness is its class, `shade`; `coin` has nothing to do with it."""
    rng = np.random.default_rng(seed)
    shade = [number % 2 for number in range(count)]
    images = [(rng.integers(0, 40, (side, side, 3)) + 150 * one).astype(np.uint8) for one in shade]
    coin = rng.integers(2, size=count).tolist()
    columns = {"image": [{"bytes": png(image), "path": None} for image in images], "shade": shade, "coin": coin}
    features = {"image": datasets.Image(), "shade": datasets.ClassLabel(names=["dark", "light"]), "coin": "int64"}
    features = {key: datasets.Value(value) if isinstance(value, str) else value for key, value in features.items()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tables")
    table(folder / "train.parquet", 120, 0)
    table(folder / "test.parquet", 80, 1)
    return str(folder)


QUICK = {"labels_per_class": (5, 15), "draws": 2, "num_workers": 0, "l2": (1e-3, 1e-1)}


def test_brightness_is_read_from_pixels(model, tables, tmp_path):
    result = probe(model, tables, ProbeSettings(label_column="shade", **QUICK), out=tmp_path)
    dimensions = {"latent": 16, "latent_pooled": 4, "pixels": 192, "pixels_pca": 16}
    assert {kind: found["dimensions"] for kind, found in result["features"].items()} == dimensions
    for feature in ("pixels", "pixels_pca"):
        for kind in ("logistic", "nearest"):
            assert all(one["mean"] == 1 and one["sd"] == 0 for one in result["features"][feature][kind].values())
    assert result["data"]["classes"] == ["dark", "light"] and result["data"]["test_images"] == 80
    assert result["chance"] == 0.5
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert "100.0" in (tmp_path / "report.html").read_text()


def test_neighbours_of_latents_are_those_of_a_direct_computation(model, tables, tmp_path):
    settings = ProbeSettings(label_column="coin", **QUICK | {"neighbours": (1, 3)})
    found = probe(model, tables, settings)["features"]
    autoencoder, parts = tiny_autoencoder().eval(), {}
    for name in ("train", "test"):
        rows = datasets.Dataset.from_parquet(f"{tables}/{name}.parquet", cache_dir=str(tmp_path))
        images = np.stack([np.asarray(image) for image in rows["image"]]).transpose(0, 3, 1, 2)
        with torch.no_grad():
            latents = autoencoder.encode(torch.from_numpy(images / 127.5 - 1).float()).latent_dist.mean
        parts[name] = latents.double(), np.array(rows["coin"])
    (x, y), (queries, truth) = parts["train"], parts["test"]
    for draw, chosen in enumerate(_draws(y, ["0", "1"], settings)):
        for size, rows in zip(("5", "15"), chosen, strict=True):
            for kind, pooled in (("latent", False), ("latent_pooled", True)):
                a, b = ((t.mean((2, 3)) if pooled else t.flatten(1)) for t in (x[rows], queries))
                order = torch.cdist(b, a).argsort(1).numpy()
                near = found[kind]["nearest"][size]
                votes = y[rows][order[:, : near["k"][draw]]].mean(1)
                assert near["draws"][draw] == pytest.approx(((votes > 0.5) == truth).mean(), abs=0.03)


def test_l2_is_chosen_on_a_part_of_the_labels_and_all_are_fitted(model, tables):
    settings = ProbeSettings(label_column="coin", **QUICK | {"l2": (1e-4, 1e-2, 1.0)})
    found = probe(model, tables, settings)["features"]["pixels"]["logistic"]
    parts = {}
    for name in ("train", "test"):
        rows = pq.read_table(f"{tables}/{name}.parquet").to_pylist()
        images = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
        parts[name] = images.reshape(len(rows), -1) / 127.5 - 1, np.array([row["coin"] for row in rows])
    drawn = _draws(parts["train"][1], ["0", "1"], settings)
    pool = parts["train"][0][np.unique(np.concatenate([rows for draw in drawn for rows in draw]))]
    centre, scale = pool.mean(0), np.sqrt(np.square(pool - pool.mean(0)).sum(1).mean())

    def fitted(rows: np.ndarray, l2: float, queries: np.ndarray) -> np.ndarray:
        x, y = torch.from_numpy((parts["train"][0][rows] - centre) / scale), torch.from_numpy(parts["train"][1][rows])
        weights = logistic_regression(x, y, 2, l2)
        return (torch.from_numpy((queries - centre) / scale) @ weights[:-1] + weights[-1]).argmax(1).numpy()

    for draw, chosen in enumerate(drawn):
        for size, rows in zip((5, 15), chosen, strict=True):
            held = np.arange(2 * size) % size < size // 5
            accuracies = {
                l2: (fitted(rows[~held], l2, parts["train"][0][rows[held]]) == parts["train"][1][rows[held]]).mean()
                for l2 in settings.l2
            }
            best = max(settings.l2, key=lambda l2: (accuracies[l2], l2))
            assert found[str(size)]["l2"][draw] == best
            right = (fitted(rows, best, parts["test"][0]) == parts["test"][1]).mean()
            assert found[str(size)]["draws"][draw] == pytest.approx(right, abs=0.02)


@pytest.mark.parametrize("count, size", [(40, 12), (12, 40)])
def test_components_are_those_of_numpys_svd(tmp_path, count, size):
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, size)) * np.arange(1, size + 1) + 5).astype(np.float32) for n in (count, 9)]
    files = [{name: FeatureFile(tmp_path / f"{n}{name}") for name in ("pixels", "latent")} for n in (0, 1)]
    for part, file in zip(parts, files, strict=True):
        file["pixels"].append(part)
        file["latent"].append(part[:, :4])
    add_components(tmp_path, files)
    mean = parts[0].mean(0, dtype=np.float64)
    directions = np.linalg.svd(parts[0] - mean)[2][:4]
    for part, file in zip(parts, files, strict=True):
        made = file["pixels_pca"].rows(np.arange(len(part)))[:, ::-1]
        np.testing.assert_allclose(np.abs(made), np.abs((part - mean) @ directions.T), rtol=1e-4, atol=1e-3)


def test_a_coin_cannot_be_read_and_the_same_seed_gives_the_same_figures(model, tables):
    settings = ProbeSettings(label_column="coin", **QUICK)
    first, second = probe(model, tables, settings), probe(model, tables, settings)
    assert first["features"] == second["features"]
    for found in first["features"].values():
        for kind in ("logistic", "nearest"):
            assert all(0.3 < one["mean"] < 0.7 for one in found[kind].values())
    assert len({tuple(found["nearest"]["15"]["draws"]) for found in first["features"].values()}) > 1


def test_folders_are_classes_and_part_of_them_is_tested_on(model, tmp_path):
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (tmp_path / name).mkdir()
        for number in range(12):
            pixels = (rng.integers(0, 40, (8, 8, 3)) + low).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    (tmp_path / "light" / "damaged.png").write_bytes(b"no image")
    settings = ProbeSettings(**QUICK | {"labels_per_class": (4,), "test_fraction": 0.4, "max_bad_fraction": 0.2})
    few = probe(model, str(tmp_path), settings.model_copy(update={"limit": 3}))
    assert few["data"]["test_images"] + len(few["data"]["skipped"]) == 3
    result = probe(model, str(tmp_path), settings)
    assert result["data"]["labels_from"] == "names of folders" and result["data"]["classes"] == ["dark", "light"]
    assert result["data"]["test_images"] == 9 and len(result["data"]["skipped"]) == 1
    with pytest.raises(UserError, match="max_bad_fraction"):
        probe(model, str(tmp_path), settings.model_copy(update={"max_bad_fraction": 0.05}))
    assert result["features"]["pixels"]["logistic"]["4"]["mean"] == 1


@pytest.mark.parametrize(
    "words, complaint",
    [
        ([], "has no labels, and a probe needs them"),
        (["label_column=size"], "size of"),
        (["label_column=shade", "labels_per_class=[70]"], "class dark has 60 training images, fewer than 70"),
        (["label_column=shade", "labels_per_class=[5]", "crop_px=6"], "not a multiple of the model's factor 4; use 4"),
        (["label_column=shade", "train_split=trian"], "train_split"),
    ],
)
def test_mistakes_are_named(model, tables, tmp_path, capsys, words, complaint):
    assert main(["eval", "probe", model, tables, "--out", str(tmp_path), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_latents_that_are_not_finite_are_refused(model, tables, photos):
    """Of this job and the others that compute with latents."""
    broken = AutoencoderKL.from_pretrained(model)
    broken.quant_conv.bias.data.fill_(torch.nan)
    framing = {"crop_px": 8, "resize_px": None, "num_workers": 0}
    labelled = {"label_column": "shade", "labels_per_class": (5,), "draws": 2}
    for job, data, more in (("probe", tables, labelled), ("factors", tables, {}), ("interpolate", photos, {})):
        with pytest.raises(UserError, match="AutoencoderKL encodes .* to numbers that are not finite"):
            evaluate(job, broken, data, **framing, **more)


@pytest.mark.parametrize("train, test", [((8,), (12,)), ((8,), (8, 12))])
def test_images_of_several_sizes_are_refused(model, tmp_path, capsys, train, test):
    for name, sides in (("train", train), ("test", test)):
        for side in sides:
            table(tmp_path / f"{name}-{20 - side:02d}.parquet", 20, side, side=side)  # larger ones first
    words = ["label_column=shade", "labels_per_class=[4]", "--out", str(tmp_path / "out")]
    assert main(["eval", "probe", model, str(tmp_path), *words]) == 2
    assert "a probe needs one size; set crop_px" in capsys.readouterr().err


def test_several_processes_are_refused(model, tables, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "probe", model, tables, "--out", str(tmp_path)]) == 2
    assert "runs on one process, and 2 were launched" in capsys.readouterr().err


def test_draws_of_the_probe_are_those_of_training() -> None:
    labels = np.random.default_rng(0).integers(3, size=200)
    drawn = _draws(labels, "abc", ProbeSettings(labels_per_class=(5, 10), draws=3))
    for number in range(3):
        assert np.array_equal(few_labels(labels, "abc", [5], PROBE_SEED, number)[0], drawn[number][0])
