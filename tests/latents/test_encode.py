"""latent-ae encode and open_latents against stock diffusers on the same pixels, by Pillow alone."""

import hashlib
import json
import os
import pickle
import shutil
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import skimage
import torch
from diffusers import AutoencoderKL
from filelock import FileLock
from PIL import Image

from benchmarks.plain_evaluation import center_crop_arr
from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.latents.cache import LatentCache, open_latents
from latent_ae.latents.encode import encode_images
from latent_ae.latents.parquet import LOCK
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.registry import FAMILIES
from tests.distributed import children
from tests.distributed.launch import ROOT, launch_command
from tests.tiny_models import TRAINED, tiny

SETTINGS = EncodeSettings(resolution=16, num_workers=0, shard_size=2, batch_size=2)
WORDS = ["resolution=16", "num_workers=0", "shard_size=2", "batch_size=2"]
HALF = 2.0**-11
"""Largest relative error of rounding to half precision."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Seven pictures of different sizes in folders that name their class."""
    folder, astronaut = tmp_path_factory.mktemp("photos"), skimage.data.astronaut()
    for number in range(7):
        path = folder / ("größe", "chat")[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        height, width = 20 + 3 * number, 48 - 4 * number
        Image.fromarray(astronaut[40 * number :][:height, 50 * number :][:, :width]).save(path)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vae = tiny("AutoencoderKL")
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(model, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "latents"
    encode_images(model, photos, out, SETTINGS)
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "data").iterdir()} | {
        "manifest": (folder / "manifest.json").read_bytes()
    }


def direct(model: Path, path: Path) -> dict[str, torch.Tensor]:
    """Moments of a file and of its mirror image."""
    vae, pixels = AutoencoderKL.from_pretrained(model), center_crop_arr(Image.open(path), 16)
    found = {}
    for suffix, array in (("", pixels), ("_flip", pixels[:, ::-1].copy())):
        with torch.no_grad():
            x = torch.from_numpy(array / 127.5 - 1).float().permute(2, 0, 1)[None]
            posterior = vae.encode(x).latent_dist
        found |= {f"mean{suffix}": posterior.mean[0], f"logvar{suffix}": posterior.logvar[0]}
    return found


@pytest.mark.parametrize(("stored", "relative"), [("fp16", HALF), ("fp32", 0)])
def test_moments_are_those_of_stock_diffusers(model, photos, tmp_path, stored, relative):
    out = tmp_path / "out"
    encode_images(model, photos, out, SETTINGS.model_copy(update={"stored": stored}))
    table = datasets.load_dataset(str(out), split="train").with_format("torch")
    files = sorted(photos.rglob("*.png"))
    assert [row["id"] for row in table] == [str(file.relative_to(photos)) for file in files]
    for row, file in zip(table, files, strict=True):
        assert row["digest"] == hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        assert table.features["label"].int2str(int(row["label"])) == file.parent.name
        for name, expected in direct(model, file).items():
            assert row[name].shape == (4, 8, 8)
            assert ((row[name] - expected).abs() <= relative * expected.abs() + 2e-6).all()


def test_datasets_loads_it_and_the_metadata_says_what_it_is(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["complete"] and manifest["files"] == 4 and manifest["data"]["num_images"] == 7
    assert manifest["latent"] == {
        "kind": "moments of the posterior",
        "shape": [4, 8, 8],
        "stored": "fp16",
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "mean": None,
        "std": None,
    }
    by_folder = datasets.load_dataset(str(cache))
    by_files = datasets.load_dataset("parquet", data_files=sorted(str(path) for path in (cache / "data").iterdir()))
    assert list(by_folder) == ["train"]
    for table in (by_folder["train"], by_files["train"]):
        assert table.features["mean"] == datasets.Array3D((4, 8, 8), "float16")
        assert table.features["label"].names == ["chat", "größe"]
        assert table.with_format("torch")[:3]["logvar_flip"].shape == (3, 4, 8, 8)
    for path in (cache / "data").iterdir():
        notes = json.loads(pyarrow.parquet.read_schema(path).metadata[b"latent_ae"])
        assert notes["manifest"]["model"] == manifest["model"] and not notes["skipped"]


def test_batches_are_means_samples_and_flips_as_asked(cache):
    latents = open_latents(cache)
    stored = {name: np.array(latents.dataset[name]) for name in ("mean", "logvar", "mean_flip", "logvar_flip")}
    assert (len(latents), latents.shape, latents.num_classes) == (7, (4, 8, 8), 2)
    assert latents.labels.tolist() == latents.dataset["label"][:] and latents.class_names == ["chat", "größe"]
    numbers, flips = [6, 0, 3, 0], [True, False, True, True]
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for given, given_flips in ((numbers, flips), (torch.tensor(numbers), torch.tensor(flips))):
        for row, (number, flip) in enumerate(zip(numbers, flips, strict=True)):
            suffix = "_flip" * flip
            mean, std = stored[f"mean{suffix}"][number], np.exp(0.5 * stored[f"logvar{suffix}"][number])
            np.testing.assert_array_equal(latents.batch(given, given_flips)[row], mean.astype(np.float32))
            sample = latents.batch(given, given_flips, noise)[row]
            np.testing.assert_allclose(sample, mean + std * noise[row].numpy(), rtol=1e-5, atol=1e-6)
    plain = latents.batch(range(7))
    assert plain.dtype == torch.float32 and torch.equal(pickle.loads(pickle.dumps(latents)).batch(range(7)), plain)
    torch.testing.assert_close(latents.scaled(plain), (plain - 0.25) * 0.5)
    torch.testing.assert_close(latents.unscaled(latents.scaled(plain)), plain)
    # as SDXL's pipelines do with latents_mean and latents_std
    latents.manifest["latent"] |= {"mean": [0.0, 1.0, 2.0, 3.0], "std": [1.0, 2.0, 4.0, 8.0]}
    again = LatentCache(latents.folder, latents.manifest, latents.dataset)
    expected = torch.stack([(plain[:, c] - c) * 0.5 / 2**c for c in range(4)], dim=1)
    torch.testing.assert_close(again.scaled(plain), expected)
    torch.testing.assert_close(again.unscaled(again.scaled(plain)), plain)
    for mistake in ({"numbers": [7]}, {"numbers": [-1]}, {"numbers": [0, 1], "flips": [True]}):
        with pytest.raises(ValueError):
            latents.batch(**mistake)


def test_two_processes_write_the_bytes_of_one(model, photos, cache, tmp_path):
    done = launch_command(2, "encode", str(model), str(photos), str(tmp_path / "out"), *WORDS)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(cache)
    assert json.loads(done.stdout)["processes"] == 2


def test_a_killed_encoding_goes_on_and_ends_like_one_that_was_not(model, photos, cache, tmp_path, capsys):
    out = tmp_path / "out"
    process = children.start_command(["encode", str(model), str(photos), str(out), *WORDS], tmp_path / "said")
    deadline = time.monotonic() + 120
    while not list((out / "unfinished").glob("train-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    shards = sorted((out / "unfinished").glob("train-*"))
    assert shards, "it was killed too late"
    with pytest.raises(UserError, match="unfinished; run the same"):
        open_latents(out)
    times = shards[0].stat().st_mtime_ns
    (out / "unfinished" / "train-00003-of-00004.parquet").write_bytes(b"of a machine that lost power")
    encode_images(model, photos, out, SETTINGS)
    assert f"resuming from {len(shards)} of 4 finished files" in capsys.readouterr().err
    assert (out / "data" / shards[0].name).stat().st_mtime_ns == times
    assert files_of(out) == files_of(cache)


def test_the_last_two_steps_can_be_interrupted(model, photos, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("latent_ae.latents.parquet.write_manifest", interrupted_when_complete)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_images(model, photos, out, SETTINGS)
    assert (out / "data").is_dir()
    monkeypatch.undo()
    encode_images(model, photos, out, SETTINGS)
    assert files_of(out) == files_of(cache)


def interrupted_when_complete(folder: Path, manifest: dict) -> None:
    if manifest["complete"]:
        raise KeyboardInterrupt
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_finished_folder_is_left_as_it_is_and_of_another_refused(model, photos, cache, tmp_path, capsys):
    before = files_of(cache)
    again = encode_images(model, photos, cache, SETTINGS.model_copy(update={"batch_size": 1}))
    assert "complete already" in capsys.readouterr().err and again["data"]["num_images"] == 7
    other, more = tmp_path / "other", tmp_path / "more"
    tiny("AutoencoderKL", seed=1).save_pretrained(other)
    for file in photos.rglob("*.png"):
        copy = more / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for arguments, message in (
        ((other, photos, cache, SETTINGS), "another model"),
        ((model, more, cache, SETTINGS), "other images"),
        ((model, photos, cache, SETTINGS.model_copy(update={"flips": False})), "flips=True, not False"),
    ):
        with pytest.raises(UserError, match=f"latents of {message}.*Give another folder"):
            encode_images(*arguments)
    assert files_of(cache) == before
    with pytest.raises(UserError, match="holds other files"):
        encode_images(model, photos, photos, SETTINGS)
    with (
        FileLock(cache / LOCK),
        pytest.raises(UserError, match="another process is encoding"),
    ):
        encode_images(model, photos, cache, SETTINGS)


def test_unreadable_images_are_left_out_named_and_bounded(model, photos, tmp_path, capsys):
    some, out = tmp_path / "some", tmp_path / "out"
    some.mkdir()
    for number, file in enumerate(sorted(photos.rglob("*.png"))[:3]):
        (some / f"{4 * number}.png").write_bytes(file.read_bytes())
    for name in ("1.png", "2.png", "3.png", "9.png"):  # a whole file of the cache each: 2 and 3, 9
        (some / name).write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"^max_bad_fraction: 4 of the first 7 images were unreadable(.|\n)*1.png: not"):
        encode_images(model, some, out, SETTINGS)
    assert len(list((out / "unfinished").iterdir())) == 4
    written = {path: path.stat().st_mtime_ns for path in (out / "unfinished").iterdir()}
    manifest = encode_images(model, some, out, SETTINGS.model_copy(update={"max_bad_fraction": 0.6}))
    kept = {out / "unfinished" / path.name: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
    assert len(kept) == 2 and kept.items() < written.items()  # nothing done twice; none without rows
    assert "skipped 4 of 7 images:\n  1.png: " in capsys.readouterr().err
    assert [line.split(":")[0] for line in manifest["data"]["skipped"]] == ["1.png", "2.png", "3.png", "9.png"]
    latents = open_latents(out)
    assert latents.dataset["id"][:] == ["0.png", "4.png", "8.png"] and latents.labels is None
    for row, number in enumerate((0, 4, 8)):
        expected = direct(model, some / f"{number}.png")["mean"]
        torch.testing.assert_close(latents.batch([row])[0], expected, rtol=HALF, atol=2e-6)
    assert datasets.load_dataset(str(out), split="train").num_rows == 3
    (none := tmp_path / "none").mkdir()
    (none / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images is readable; a.png"):
        encode_images(model, none, tmp_path / "nothing", SETTINGS)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "AutoencoderKL"])
def test_every_class_of_first_stage_is_encoded(name, photos, tmp_path, capsys):
    vae = tiny(name).eval()
    manifest = encode_images(vae, photos, tmp_path / "out", SETTINGS.model_copy(update={"resolution": 32}))
    assert ("by the statistics in its batch norm" in capsys.readouterr().err) == (name == "AutoencoderKLFlux2")
    latents, has_posterior = open_latents(tmp_path / "out"), FAMILIES[name].latent == "posterior"
    assert latents.has_posterior == has_posterior == ("logvar_flip" in latents.dataset.column_names)
    assert ("before quantisation" in manifest["latent"]["kind"]) == (name == "VQModel")
    pixels = center_crop_arr(Image.open(sorted(photos.rglob("*.png"))[6]), 32)
    with torch.no_grad():
        encoded = vae.encode(torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None])
    expected = encoded.latent_dist.mean if has_posterior else encoded[0]
    torch.testing.assert_close(latents.batch([6]), expected, rtol=HALF, atol=1e-5)
    if not has_posterior:
        with pytest.raises(ValueError, match="no posterior"):
            latents.batch([0], noise=torch.zeros(1, *latents.shape))


def table_of(folder: Path, photos: Path, **columns) -> Path:
    """A Parquet file of the seven pictures with further columns (feature, values)."""
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.rglob("*.png"))]
    features = {"image": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()}
    values = {"image": images} | {name: list(column) for name, (_, column) in columns.items()}
    datasets.Dataset.from_dict(values, features=datasets.Features(features)).to_parquet(folder / "table.parquet")
    return folder / "table.parquet"


def test_labels_of_tables_and_parts_of_the_data(model, photos, tmp_path):
    names = ["a", "b", "c", "d"]
    columns = {
        "label": (datasets.ClassLabel(names=names), [3, 1, -1, 0, 3, 1, 0]),
        "fine": (datasets.Value("int32"), [9, 8, 7, None, 5, 4, 3]),
        "kind": (datasets.Value("string"), ["dog", "cat", "dog", None, "ant", "dog", "cat"]),
        "weight": (datasets.Value("float32"), [0.5] * 7),
    }
    table = table_of(tmp_path, photos, **columns)

    def encoded(out: str, **changes):
        encode_images(model, table, tmp_path / out, SETTINGS.model_copy(update={"flips": False} | changes))
        return open_latents(tmp_path / out)

    whole = encoded("whole")
    assert (whole.labels.tolist(), whole.class_names, whole.num_classes) == (columns["label"][1], names, 4)
    assert whole.dataset["id"][:] == list("0123456") and not whole.has_flips
    with pytest.raises(ValueError, match="flips=false"):
        whole.batch([0], [True])
    fine = encoded("fine", label_column="fine")
    assert (fine.labels.tolist(), fine.class_names, fine.num_classes) == ([9, 8, 7, -1, 5, 4, 3], None, 10)
    named = encoded("kind", label_column="kind")
    assert (named.labels.tolist(), named.class_names) == ([2, 1, 2, -1, 0, 2, 1], ["ant", "cat", "dog"])
    held_out = encoded("part", label_column="kind", part="held_out", eval_fraction=0.3)
    rows = [int(number) for number in held_out.dataset["id"][:]]
    assert held_out.class_names == named.class_names and held_out.labels.tolist() == named.labels[rows].tolist()
    assert encoded("none", label_column=None).labels is None
    for column, message in (("weight", "holds Value"), ("nothing", "is not there; besides images: label, fine")):
        with pytest.raises(UserError, match=f"label_column: {column} of .* {message}"):
            encoded("never", label_column=column)
    parts = [encoded(part, part=part, eval_fraction=0.3) for part in ("train", "held_out")]
    ids = [part.dataset["id"][:] for part in parts]
    assert len(ids[1]) == 2 and sorted(ids[0] + ids[1]) == list("0123456")
    for part, numbers in zip(parts, ids, strict=True):
        rows = [int(number) for number in numbers]
        assert part.labels.tolist() == whole.labels[rows].tolist()
        assert torch.equal(part.batch(range(len(part))), whole.batch(rows))
    assert list(datasets.load_dataset(str(tmp_path / "held_out"))) == ["validation"]


def test_folders_are_classes_only_if_every_image_has_one(model, photos, tmp_path):
    mixed = tmp_path / "mixed" / "cats"
    mixed.mkdir(parents=True)
    for folder in (mixed, mixed.parent):
        (folder / "a.png").write_bytes((photos / "chat" / "1.png").read_bytes())
    assert encode_images(model, mixed.parent, tmp_path / "out", SETTINGS)["labels"] is None
    assert encode_images(model, mixed, tmp_path / "one", SETTINGS)["labels"] is None
    held_out = SETTINGS.model_copy(update={"part": "held_out", "eval_fraction": 0.1})
    one = encode_images(model, photos, tmp_path / "held", held_out)
    assert one["data"]["num_images"] == 1 and one["labels"]["names"] == ["chat", "größe"]  # numbered as in the whole
    with pytest.raises(UserError, match="label_column: x is a column"):
        encode_images(model, photos, tmp_path / "never", SETTINGS.model_copy(update={"label_column": "x"}))


def test_a_foreign_manifest_ends_in_a_message(model, photos, cache, tmp_path, capsys):
    good = json.loads((cache / "manifest.json").read_text())
    out = tmp_path / "out"
    out.mkdir()

    def refused(text):
        (out / "manifest.json").write_text(text)
        for call in (lambda: open_latents(out), lambda: encode_images(model, photos, out, SETTINGS)):
            with pytest.raises(UserError, match="manifest.json is no manifest of a latent cache"):
                call()

    refused('{"format":1,"complete":true}')
    refused("[" * 5000)
    for key in good.keys() & {"format", "complete", "model", "latent", "data", "labels", "made_from", "files"}:
        for value in ([], "x", -1, {}):
            refused(json.dumps(good | {key: value}))
    wrong = [("shape", [4, 8]), ("shape", [4, 8, 0]), ("scaling_factor", 0), ("shift_factor", None)]
    for key, value in [*wrong, ("std", [1.0]), ("mean", ["x"] * 4)]:
        refused(json.dumps(good | {"latent": good["latent"] | {key: value}}))
    # one that is well made, of other files
    shutil.rmtree(out)
    shutil.copytree(cache, out)
    latent = good["latent"] | {"shape": [size * 2 for size in good["latent"]["shape"]]}
    (out / "manifest.json").write_text(json.dumps(good | {"latent": latent}))
    with pytest.raises(UserError, match="the column mean does not hold the latents"):
        open_latents(out)


def test_mistakes_end_with_exit_code_2_and_what_to_do(model, photos, cache, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "manifest.json").write_text('{"format": 7}')
    for arguments, message in (
        ([str(model), str(photos), str(tmp_path / "out"), "resolution=33"], "multiple of the model's factor 2; use 32"),
        (
            [str(model), str(photos), str(tmp_path / "out"), "resize_px=8"],
            "8 is smaller than resolution 256",
        ),
        ([str(model), str(photos), str(tmp_path / "out"), "flip=false"], "did you mean flips"),
        ([str(model), str(tmp_path / "nowhere"), str(tmp_path / "out")], "DATA: no such file or folder"),
        ([str(model), str(photos), str(tmp_path / "out"), "split=test"], "split: "),
        ([str(photos), str(photos), str(tmp_path / "out")], "no config.json"),
        ([str(model), str(photos), str(tmp_path / "file"), "resolution=16"], "OUT: cannot write into"),
        ([str(model), str(photos), str(tmp_path), "resolution=16"], "is no manifest of a latent cache"),
    ):
        assert main(["encode", *arguments, "num_workers=0"]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err and captured.out == "", captured.err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="0"):
        main(["encode", "--help"])
    assert "example: latent-ae encode" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no latents"):
        open_latents(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    (copy / "manifest.json").write_bytes((cache / "manifest.json").read_bytes())
    shards = sorted((cache / "data").iterdir())
    for shard in shards[1:]:
        (copy / "data" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="3 of 4 files are there"):
        open_latents(copy)
    (copy / "data" / shards[0].name).write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        open_latents(copy)
    (copy / "data" / shards[0].name).write_bytes(shards[3].read_bytes())  # one image instead of two
    with pytest.raises(UserError, match="6 of 7 latents"):
        open_latents(copy)


def test_latents_that_no_number_can_hold_are_refused(photos, tmp_path):
    vae = tiny("AutoencoderKL")
    with torch.no_grad():
        vae.quant_conv.weight *= 1e6
    with pytest.raises(UserError, match=r"chat/1.png: its mean holds values that are not finite; set stored=fp32"):
        encode_images(vae, photos, tmp_path / "out", SETTINGS)
    encode_images(vae, photos, tmp_path / "fp32", SETTINGS.model_copy(update={"stored": "fp32"}))
    assert open_latents(tmp_path / "fp32").batch([0]).abs().max() > 65504


def test_too_little_space_is_said_before_the_first_image(model, photos, tmp_path, monkeypatch):
    needed = 7 * 4 * (4 * 8 * 8) * 2
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        if fits:
            encode_images(model, photos, tmp_path / "out", SETTINGS)
        else:
            with pytest.raises(UserError, match="has 14.3 kB free and the latents need 14.3 kB"):
                encode_images(model, photos, tmp_path / "out", SETTINGS)


def test_the_example_of_the_documentation_trains(cache, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "encode.md").read_text(encoding="utf-8")
    example = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    os.symlink(cache, tmp_path / "latents", target_is_directory=True)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The given NumPy array is not writable")
        exec(example, names)
    losses = names["losses"]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])


def test_where_labels_are_found_by_themselves(model, photos, tmp_path, capsys):
    """WebDataset's column is `cls`; names that hardly repeat are captions."""
    settings = SETTINGS.model_copy(update={"flips": False})
    for number, (column, feature, values, expected) in enumerate(
        (
            ("cls", datasets.Value("int64"), [2, 0, 1, 2, 0, 1, 1], [2, 0, 1, 2, 0, 1, 1]),
            ("label", datasets.Value("string"), ["b", "a", "b", "a", "b", "a", "b"], [1, 0, 1, 0, 1, 0, 1]),
            ("label", datasets.Value("string"), list("abcdefg"), None),
            ("species", datasets.Value("int64"), [0] * 7, None),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        table = table_of(folder, photos, **{column: (feature, values)})
        encode_images(model, table, folder / "out", settings, progress=True)
        labels = open_latents(folder / "out").labels
        assert (labels.tolist() if labels is not None else None) == expected
        said = capsys.readouterr().err
        assert (
            f"labels: those of the column {column}" in said
            if expected
            else f"labels: none (columns: {column});" in said
        )
