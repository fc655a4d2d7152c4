"""Whole evaluations: parity with torch-fidelity's command, kill and go on, caches, protocols, what is left out."""

import json
import os
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.models.registry import FAMILIES
from latent_ae.pretrained.inception import InceptionFeatures
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.protocols import PROTOCOLS
from latent_ae_eval.recon.settings import ReconSettings
from tests.distributed import children
from tests.distributed.launch import launch_command
from tests.eval.small import frechet, settings_with, write_photos
from tests.tiny_models import TRAINED, tiny

pytestmark = pytest.mark.usefixtures("own_cache")


def test_fid_and_kid_are_those_of_torch_fidelitys_own_command(tmp_path, inception):
    count, model = 6, tiny("AutoencoderKL").eval()
    originals = write_photos(tmp_path / "originals", count, side=32)
    (tmp_path / "made").mkdir()
    for path in sorted(originals.iterdir()):  # by diffusers and Pillow alone
        x = torch.from_numpy(np.asarray(Image.open(path)) / 127.5 - 1).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            y = model(x).sample[0].permute(1, 2, 0).clamp(-1, 1)
        Image.fromarray(((y + 1) * 127.5).round().to(torch.uint8).numpy()).save(tmp_path / "made" / path.name)
    words = ["--input1", str(tmp_path / "made"), "--input2", str(originals), "--cpu", "--kid", "--json"]
    words += ["--kid-subset-size", str(count), "--feature-extractor-weights-path", inception, "--batch-size", "3"]
    words += ["--cache-root", str(tmp_path / "kept"), "--input1-cache-name", "made", "--input2-cache-name", "originals"]
    command = [sys.executable, "-m", "torch_fidelity.fidelity", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    settings = settings_with(frechet=("inception",), inception_weights=inception, latents=("mode",))
    metrics = evaluate_reconstruction(model, originals, settings)["metrics"]["mode"]
    (fid,) = (value for key, value in metrics.items() if key.startswith("frechet_inception_"))
    (kid,) = (value for key, value in metrics.items() if key.startswith("kernel_inception_"))
    features = (kept_features(tmp_path / "kept", name) for name in ("made", "originals"))
    assert fid == pytest.approx(frechet(*features), rel=1e-4)
    assert kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert not {"fid", "kid"} & set(metrics)  # with other weights it is no FID


def kept_features(root, name) -> torch.Tensor:
    """The features that torch-fidelity's command has kept, (images, 2048)."""
    (path,) = (path for path in root.rglob("*.pt") if name in path.name and path.name.endswith("features-2048.pt"))
    return torch.load(path).double()


def test_published_weights_make_it_an_fid(tmp_path, inception, monkeypatch):
    features = "latent_ae_eval.recon.shard.InceptionFeatures"
    monkeypatch.setattr(features, lambda *words, **options: as_published(inception))
    photos = write_photos(tmp_path / "photos", 4)
    result = evaluate_reconstruction(tiny("AutoencoderKL"), photos, settings_with(frechet=("inception",)))
    assert result["metrics"]["mode"]["fid"] > 0 and "kid" in result["metrics"]["sample"]
    assert any(note.startswith("fid: N = 4 is under 2,048") for note in result["notes"])


def as_published(weights: str) -> InceptionFeatures:
    network = InceptionFeatures(weights=weights)
    network.is_published = True
    return network


def test_a_killed_evaluation_goes_on_from_its_finished_parts(tmp_path):
    photos, model = write_photos(tmp_path / "photos", 70), tiny("AutoencoderKL")
    model.save_pretrained(tmp_path / "model")
    whole = evaluate_reconstruction(tmp_path / "model", photos, settings_with(batch_size=3))
    out = tmp_path / "out"
    words = ["eval", "recon", str(tmp_path / "model"), str(photos), "--out", str(out), "crop_px=32", "resize_px=null"]
    words += ["lpips=[]", "frechet=[]", "num_workers=0", "batch_size=3"]
    process = children.start_command(words, tmp_path / "said")
    deadline = time.monotonic() + 120
    while not list((out / "unfinished").glob("shard-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    left = sorted((out / "unfinished").glob("shard-*.safetensors"))
    assert left and not (out / "result.json").exists(), "killed too late to show anything"
    stamps = {path: path.stat().st_mtime_ns for path in left}
    left[0].write_bytes(left[0].read_bytes()[:50])  # a machine that lost power: made again
    done = launch_command(1, *words)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {len(stamps) - 1} finished parts" in done.stderr or len(stamps) == 1
    assert pyarrow.parquet.read_table(out / "images.parquet").to_pylist() == whole["images"]
    result = json.loads(done.stdout)
    assert result["metrics"] == whole["metrics"] and result["intervals"] == whole["intervals"]
    assert not (out / "unfinished").exists()


def test_parts_of_another_evaluation_are_not_gone_on_from(tmp_path, monkeypatch):
    photos, model = write_photos(tmp_path / "photos", 5), tiny("AutoencoderKL")
    out, tokens = tmp_path / "out", set[str]()

    def interrupted(settings, where=photos, what=model):
        """The tokens of parts that are new."""
        monkeypatch.setattr(
            "latent_ae_eval.recon.measure._result", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            evaluate_reconstruction(what, where, settings, out=out)
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        found = {path.name.split("-")[1] for path in (out / "unfinished").glob("shard-*.safetensors")}
        assert tokens <= found  # none of the others is lost
        new = found - tokens
        tokens.update(new)
        return new

    assert len(interrupted(settings_with())) == 1
    assert interrupted(settings_with(batch_size=2)) == set()  # does not change the numbers
    others = [interrupted(settings_with(seed=1)), interrupted(settings_with(crop_px=16))]
    others.append(interrupted(settings_with(), what=tiny("AutoencoderKL", seed=1)))
    (photos / "001.png").write_bytes((photos / "000.png").read_bytes())
    others.append(interrupted(settings_with()))
    (photos / "extra.png").write_bytes((photos / "000.png").read_bytes())
    others.append(interrupted(settings_with()))
    (photos / "extra.png").unlink()
    assert [len(new) for new in others] == [1] * len(others)
    changed = evaluate_reconstruction(model, photos, settings_with(), out=out)
    assert changed["images"][0]["mode_psnr"] == changed["images"][1]["mode_psnr"]  # not the old second image


def test_features_of_the_originals_are_kept_until_a_file_changes(tmp_path, inception, monkeypatch):
    photos, seen = write_photos(tmp_path / "photos", 20), []

    def features(_, images):  # which are kept, not what the network makes of them
        seen.append(len(images))
        return images.flatten(1)[:, :2048].double()

    monkeypatch.setattr(InceptionFeatures, "forward", features)
    settings = settings_with(frechet=("inception",), inception_weights=inception, latents=("mode",))

    def measured(seed: int, **changes) -> tuple[int, float]:
        seen.clear()
        result = evaluate_reconstruction(tiny("AutoencoderKL", seed), photos, settings.model_copy(update=changes))
        values = result["metrics"]["mode"]
        return sum(seen), next(value for key, value in values.items() if key.startswith("frechet"))

    fresh = measured(0)
    assert fresh[0] == 40 and measured(0) == (20, pytest.approx(fresh[1], rel=1e-6))
    assert measured(1)[0] == 20  # another model, the same originals
    assert measured(0, crop_px=16)[0] == 40  # another framing
    Image.fromarray(np.asarray(Image.open(photos / "018.png"))[::-1]).save(photos / "018.png")
    assert measured(0)[0] == 24  # the shard of four that it lies in is seen again
    assert measured(0, reference_cache=False)[0] == 40


@pytest.mark.parametrize("name", TRAINED)
def test_every_class_of_first_stage_is_measured(name, tmp_path):
    photos, model = write_photos(tmp_path / "photos", 2), tiny(name)
    result = evaluate_reconstruction(model, photos, settings_with())
    random = FAMILIES[name].latent in ("posterior", "categorical", "flow", "hierarchy")
    assert set(result["metrics"]) == ({"mode", "sample"} if random else {"mode"})
    if random:
        assert result["metrics"]["sample"]["psnr"] != result["metrics"]["mode"]["psnr"]
    assert result["model"]["class"] == name
    same = evaluate_reconstruction(
        lambda images: model.decode(latent_of(model, images)).sample, photos, settings_with()
    )
    assert same["metrics"]["mode"]["psnr"] == pytest.approx(result["metrics"]["mode"]["psnr"], rel=1e-5)


def latent_of(model, images):
    encoded = model.encode(images)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def test_protocols_change_what_they_say_and_stand_in_full_in_the_result(tmp_path):
    photos, model = write_photos(tmp_path / "photos", 3, side=48), tiny("AutoencoderKL")
    values = set()
    for name, protocol in PROTOCOLS.items():
        settings = ReconSettings(protocol=name, resize_px=40, crop_px=32, lpips=(), frechet=(), num_workers=0)
        result = evaluate_reconstruction(model, photos, settings)
        manifest = result["protocol"]
        assert manifest["source"] == protocol.source and manifest["name"] == name
        assert manifest["rounding"] == protocol.rounding and manifest["resample"] == protocol.resample
        expected = {"resize_px": 40, "crop_px": 32} | ({} if protocol.lpips == () else {"lpips": []})
        assert manifest["changed"] == expected
        assert set(result["metrics"]) == set(protocol.latents)
        kind = protocol.latents[0]
        values.add((kind, round(result["metrics"][kind]["psnr"], 6)))
    assert len(values) >= 5  # rae and dcae differ from default in what the test switches off
    whole = ReconSettings(protocol="dcae").resolved()
    assert (whole.resize_px, whole.crop_px, whole.extractor, whole.lpips) == (512, 512, "pytorch-fid", ("alex",))
    assert load_settings(ReconSettings, None, ["crop_px=null"]).resolved().crop_px is None
    assert ReconSettings().resolved() == PROTOCOLS["default"] and not ReconSettings().changes()


def test_a_published_number_can_be_read_off_by_hand(tmp_path):
    """vavae: bilinear resize of floats, torchvision's crop, SSIM of floats; titok: halves to even; rae: cut off."""
    from torchvision.transforms import v2

    path = write_photos(tmp_path / "photos", 1, side=75) / "000.png"
    picture = Image.open(path)
    frames = {
        "vavae": [v2.Resize(41, antialias=True), v2.CenterCrop(32)],
        "titok": [v2.Resize(41, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)],
    }
    for name, (resize, crop) in frames.items():
        tensor = v2.functional.pil_to_tensor(picture).float() / 255
        if name == "titok":
            tensor = v2.functional.pil_to_tensor(resize(picture)).float() / 255
            expected = crop(tensor)
        else:
            expected = crop(resize(tensor))
        seen = []
        settings = ReconSettings(protocol=name, resize_px=41, crop_px=32, lpips=(), frechet=(), num_workers=0)
        evaluate_reconstruction(lambda images, seen=seen: seen.append(images.clone()) or images, path.parent, settings)
        torch.testing.assert_close((seen[0][0] + 1) / 2, expected, rtol=0, atol=2e-6)
    off = 0.6 / 127.5  # six tenths of a level: rounding makes it one, cutting none
    for name, level in (("default", 1), ("titok", 1), ("rae", 0)):
        settings = ReconSettings(protocol=name, resize_px=41, crop_px=32, lpips=(), frechet=(), num_workers=0)
        grays = (off - 1, level / 127.5 - 1)
        off_level, on_level = (
            evaluate_reconstruction(lambda images, gray=gray: images * 0 + gray, path.parent, settings)["metrics"]
            for gray in grays
        )
        assert off_level == on_level


def test_what_is_left_out_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LATENT_AE_OFFLINE", "1")
    photos = write_photos(tmp_path / "photos", 4, side=20)

    def spoils_the_first(images):
        images = images.clone()
        images[0, 0, 0, 0] = torch.nan
        return images

    result = evaluate_reconstruction(spoils_the_first, photos, settings_with(frechet=("inception",), batch_size=4))
    shifts = {"shift_red": 0.0, "shift_green": 0.0, "shift_blue": 0.0}
    assert result["metrics"]["mode"] == {"n": 4, "psnr": 100.0, "ssim": 1.0, "fid": None, "kid": None} | shifts
    missing, left_out, second, *shifted, enlarged = result["notes"]
    assert missing == (
        "FID and KID are missing: the weights of inception are not available; `latent-ae weights fetch` says why and "
        "what helps"
    )
    assert left_out == "mode_psnr: 1 of 4 images left out, their reconstruction holds NaN or infinity"
    assert [note.split(":")[0] for note in shifted] == [f"mode_{shift}" for shift in shifts]
    assert second.startswith("mode_ssim: 1 of 4") and enlarged.startswith("4 of 4 images are smaller than the crop")
    assert result["images"][0]["mode_psnr"] is None


def test_references_of_generation_benchmarks_are_refused(tmp_path):
    np.savez(tmp_path / "VIRTUAL_imagenet256_labeled.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"VIRTUAL.* is a reference file of generation benchmarks: .* its own original"):
        evaluate_reconstruction(tiny("AutoencoderKL"), tmp_path / "VIRTUAL_imagenet256_labeled.npz")


def test_a_stream_is_measured_like_the_table_it_is(tmp_path):
    photos = write_photos(tmp_path / "photos", 7)
    column = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.iterdir())]
    table = datasets.Dataset.from_dict({"image": column}, features=datasets.Features(image=datasets.Image()))
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table/data.parquet")
    results = [
        evaluate_reconstruction(tiny("AutoencoderKL"), tmp_path / "table", settings_with(streaming=streaming), out=out)
        for streaming, out in ((False, None), (True, tmp_path / "out"))
    ]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["metrics"]["mode"]["n"] == 7
    assert (tmp_path / "out/pairs.png").is_file()


def test_names_that_no_table_can_hold_are_shown(tmp_path):
    photos = write_photos(tmp_path / "photos", 1)
    os.rename(photos / "000.png", os.fsencode(photos) + b"/caf\xe9.png")
    result = evaluate_reconstruction(tiny("AutoencoderKL"), photos, settings_with(), out=tmp_path / "out")
    assert result["images"][0]["name"] == "caf\\udce9.png"


def test_settings_that_contradict_each_other_end_with_exit_code_2(tmp_path, capsys):
    for words, message in (
        (["crop_px=512"], "resize_px 256 is smaller than crop_px 512"),
        (["protocol=vae"], "'default', 'ldm', 'vavae', 'titok', 'rae', 'dcae', 'lavinal712', 'uae', "),
        (["latents=[]"], "nothing to decode"),
        (["inception_weights=/nowhere/at/all.pth"], "no such file: /nowhere"),
        (["dtype=fp8"], "dtype"),
    ):
        assert main(["eval", "recon", str(tmp_path), str(tmp_path), *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err, captured.err
