"""The interpolated Fréchet distance, against plain NumPy, a first stage whose neighbours are known, and other runs."""

import json
import math

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.data.rng import neighbour_numbers
from latent_ae.models.loading import Encoded, FirstStage
from latent_ae.pretrained.inception import InceptionFeatures
from latent_ae_eval.ifid import neighbours
from latent_ae_eval.ifid.measure import interpolated_distance
from latent_ae_eval.ifid.passes import Passes
from latent_ae_eval.ifid.settings import IfidSettings
from latent_ae_eval.storage import FeatureFile
from tests.distributed.launch import launch_command
from tests.eval.small import write_photos
from tests.tiny_models import tiny

QUICK = {"neighbours": 3, "frechet": ("vgg16",), "num_workers": 0}


@pytest.mark.parametrize("inside", [True, False])
def test_neighbours_draws_and_midpoints_are_those_of_plain_numpy(tmp_path, monkeypatch, inside):
    random = np.random.default_rng(0)
    others = random.normal(size=(23, 12)).astype(np.float32) * random.uniform(0.2, 3, (23, 1)).astype(np.float32)
    own = np.array([4, 0, 22, 9])
    latents = others[own] if inside else random.normal(size=(4, 12)).astype(np.float32)
    file = FeatureFile(tmp_path / "latents.f32")
    file.append(others[:10])
    file.append(others[10:])
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4 * 12 * 5)  # five at a time
    uniform = neighbour_numbers(3, range(4))
    x = torch.from_numpy(latents)
    rows, cosines = neighbours.nearest(x, file, 6, torch.from_numpy(own) if inside else None)
    drawn = neighbours.draw(x, neighbours.rows_of(file, rows), uniform)
    picked = rows[torch.arange(4), drawn.position]
    middles = neighbours.midpoints(x.view(4, 3, 2, 2), neighbours.rows_of(file, picked).view(4, 3, 2, 2))
    for i, a in enumerate(latents.astype(np.float64)):
        known = [
            (float(a @ b / math.sqrt((a @ a) * (b @ b))), j)
            for j, b in enumerate(others.astype(np.float64))
            if not (inside and j == own[i])
        ]
        best = sorted(known, reverse=True)[:6]
        assert rows[i].tolist() == [j for _, j in best]
        np.testing.assert_allclose(cosines[i], [cosine for cosine, _ in best], atol=1e-6)
        weights = [math.exp(-np.mean((a - others[j]) ** 2)) for _, j in best]
        np.testing.assert_allclose(drawn.probabilities[i], np.array(weights) / sum(weights), rtol=1e-5)
        below, chosen = 0.0, 0
        while below + weights[chosen] / sum(weights) <= float(uniform[i]):
            below += weights[chosen] / sum(weights)
            chosen += 1
        assert int(picked[i]) == best[chosen][1]
        b, omega = others[best[chosen][1]], math.acos(best[chosen][0])
        expected = (math.sin(omega / 2) * a + math.sin(omega / 2) * b) / math.sin(omega)
        np.testing.assert_allclose(middles[i].flatten(), expected, atol=1e-5)
    assert len(set(drawn.position.tolist())) > 1, "every draw took the same one"


@pytest.mark.parametrize("published", [True, False])
def test_only_published_weights_make_it_an_ifid(tmp_path, monkeypatch, inception, published):
    def network():
        found = InceptionFeatures(weights=inception)
        found.is_published = published
        return found

    monkeypatch.setattr("latent_ae_eval.features.InceptionFeatures", network)
    photos = write_photos(tmp_path / "photos", 5)
    result = interpolated_distance(tiny("AutoencoderKL"), photos, IfidSettings(**QUICK | {"frechet": ("inception",)}))
    midpoints, reconstructions = result["metrics"]["midpoints"], result["metrics"]["reconstructions"]
    (note,) = (note for note in result["notes"] if "fewer than the features" in note)
    if published:
        assert midpoints["ifid"] > 0 and reconstructions["fid"] > 0 and "fid" not in midpoints
        assert "ifid" not in reconstructions and note.startswith("ifid, fid: 5 images")
    else:
        (name,) = midpoints.keys() - {"n"}
        assert name.startswith("frechet_inception_") and name in reconstructions and note.startswith(name)


def test_an_identity_blends_each_image_with_the_only_one_like_it(tmp_path, monkeypatch, lpips_vgg):
    """Images in pairs of one pattern in two contrasts: their latents are parallel, and all others are far."""
    monkeypatch.setattr(FirstStage, "encode", lambda self, images: Encoded(images, None))
    monkeypatch.setattr(FirstStage, "decode", lambda self, latents, generators: latents)
    random, images = np.random.default_rng(1), []
    for place in ("data", "others"):
        (tmp_path / place).mkdir()
    for pattern in range(4):
        signs = random.choice([-1, 1], (16, 16, 3))
        for contrast, place in ((25.5, "data"), (102.0, "others")):
            levels = np.uint8(127.5 + contrast * signs)
            Image.fromarray(levels).save(tmp_path / place / f"{pattern}.png")
            images.append(torch.from_numpy(levels).permute(2, 0, 1) / 127.5 - 1)
    settings = IfidSettings(**QUICK | {"neighbours": 1, "neighbours_from": str(tmp_path / "others")})
    result = interpolated_distance(tiny("AutoencoderTiny"), tmp_path / "data", settings, out=tmp_path / "out")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert [row["neighbour_name"] for row in rows] == [f"{pattern}.png" for pattern in range(4)]
    assert all(row["cosine"] > 0.999 for row in rows)
    originals, middles = images[::2], [(a + b) / 2 for a, b in zip(images[::2], images[1::2], strict=True)]
    made = [(lpips_vgg.compare(torch.stack(some), [])[1][0]).double() for some in (originals, middles)]
    centred = [x - x.mean(0) for x in made]
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (made[0].mean(0) - made[1].mean(0)).square().sum() + (
        centred[0].square().sum() + centred[1].square().sum() - 2 * shared
    ) / 3
    # the midpoints are rounded to 8 bits
    assert result["metrics"]["midpoints"]["frechet_vgg16"] == pytest.approx(float(expected), rel=0.02)
    assert result["metrics"]["reconstructions"]["frechet_vgg16"] == pytest.approx(0, abs=1e-3)
    assert "ifid" not in result["metrics"]["midpoints"]


def test_processes_and_kills_change_nothing(tmp_path, monkeypatch, capsys, lpips_vgg):
    photos, model = write_photos(tmp_path / "photos", 52, side=16), tmp_path / "model"
    tiny("AutoencoderKL").save_pretrained(model)
    settings = IfidSettings(**QUICK)
    whole = interpolated_distance(model, photos, settings, out=tmp_path / "whole")
    words = ["neighbours=3", "frechet=[vgg16]", "num_workers=0"]
    done = launch_command(2, "eval", "ifid", str(model), str(photos), "--out", str(tmp_path / "two"), *words)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["processes"] == 2

    spherical, calls = neighbours.spherical, []

    def interrupted(*words):
        calls.append(words)
        return _interrupt() if len(calls) == 20 else spherical(*words)

    monkeypatch.setattr(neighbours, "spherical", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interpolated_distance(model, photos, settings, out=tmp_path / "killed")
    monkeypatch.setattr(Passes, "_latents", _interrupt)  # all images were encoded before the kill
    killed = interpolated_distance(model, photos, settings, out=tmp_path / "killed")
    assert "resuming from 1 finished parts" in capsys.readouterr().err
    assert len(calls) == 20 + 36 + 6, "16 of 52 midpoints were there, and 6 are shown"
    tables = [pyarrow.parquet.read_table(tmp_path / name / "pairs.parquet") for name in ("whole", "two", "killed")]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    assert all(row["neighbour_index"] != row["index"] for row in tables[0].to_pylist())
    for other in (two, killed):
        for key in ("metrics", "intervals", "neighbours", "data"):
            assert other[key] == whole[key], key
    assert whole["intervals"]["midpoints"]["frechet_vgg16"] and not (tmp_path / "killed" / "unfinished").exists()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "kind, words, complaint",
    [
        ("VQModel", [], "those of this VQModel are codes"),
        ("AutoencoderVidTok FSQ", [], "are codes"),
        ("AutoencoderKL", ["neighbours=9"], "each image needs 9 others, and"),
        ("AutoencoderKL", ["crop_px=null", "neighbours=2"], "images of several sizes (40 x 32 and"),
        ("AutoencoderKL", ["neighbours_split=train", "frechet=[]"], "set neighbours_from"),
        ("AutoencoderKL", ["neighbours_from=/nowhere"], "neighbours_from: "),
    ],
)
def test_mistakes_are_named(photos, tmp_path, capsys, kind, words, complaint):
    tiny(kind).save_pretrained(tmp_path / "model")
    code = main(["eval", "ifid", str(tmp_path / "model"), photos, "--out", str(tmp_path / "out"), "crop_px=32", *words])
    error = capsys.readouterr().err
    assert code == 2 and complaint in error, error
