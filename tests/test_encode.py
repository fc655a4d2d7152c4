"""latent-ae encode and open_latents against stock diffusers on the same pixels, by Pillow alone."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
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
from latent_ae.config import UserError
from latent_ae.encode import LOCK, encode_images
from latent_ae.encode_settings import EncodeSettings
from latent_ae.latent_cache import open_latents

from .launch import ROOT, launch_module
from .test_first_stages import tiny

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
    assert manifest["complete"] and manifest["shards"] == 4 and manifest["data"]["num_images"] == 7
    assert manifest["latent"] == {
        "kind": "moments of the posterior",
        "shape": [4, 8, 8],
        "stored": "fp16",
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
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
    for mistake in ({"numbers": [7]}, {"numbers": [-1]}, {"numbers": [0, 1], "flips": [True]}):
        with pytest.raises(ValueError):
            latents.batch(**mistake)


def test_two_processes_write_the_bytes_of_one(model, photos, cache, tmp_path):
    done = launch_module(2, "encode", str(model), str(photos), str(tmp_path / "out"), *WORDS)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == files_of(cache)
    assert json.loads(done.stdout)["processes"] == 2


def test_a_killed_encoding_goes_on_and_ends_like_one_that_was_not(model, photos, cache, tmp_path, capsys):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "latent_ae", "encode", str(model), str(photos), str(out), *WORDS]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((out / "unfinished").glob("train-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shards = sorted((out / "unfinished").glob("train-*"))
    assert shards, "it was killed too late"
    with pytest.raises(UserError, match="unfinished; run the same"):
        open_latents(out)
    times = shards[0].stat().st_mtime_ns
    (out / "unfinished" / "train-00003-of-00004.parquet").write_bytes(b"of a machine that lost power")
    encode_images(model, photos, out, SETTINGS)
    assert f"going on from {len(shards)} of 4 finished files" in capsys.readouterr().err
    assert (out / "data" / shards[0].name).stat().st_mtime_ns == times
    assert files_of(out) == files_of(cache)


def test_the_last_two_steps_can_be_interrupted(model, photos, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("latent_ae.encode.write_manifest", interrupted_when_complete)
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
        subprocess_free(model, photos, cache)


def subprocess_free(model: Path, photos: Path, cache: Path) -> None:
    """In another thread, because a lock of this one is this thread's own."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(encode_images, model, photos, cache, SETTINGS).result()
