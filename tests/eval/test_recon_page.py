"""report.html: what it says, what it shows, and that its pictures are the pixels that were given."""

import numpy as np
import pytest
import torch

from latent_ae.config import UserError
from latent_ae.data.images import to_tensor
from latent_ae_eval.recon.report import Shown, error_map, write_recon_report
from tests.made_results import HOSTILE, result, table
from tests.report.html_reader import pictures, read


def picture(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def shown(rows, name="7.png", **size) -> dict[str, list[Shown]]:
    image, made = to_tensor(picture(**size)), to_tensor(picture(seed=1, **size))
    return {"Worst": [Shown(name, 7, rows[7], image, made)], "Median": [], "Best": []}


def written(tmp_path, document=None, rows=None, images=None) -> str:
    rows = rows or table()
    document = document or result(rows)
    write_recon_report(tmp_path / "report.html", document, rows, shown(rows) if images is None else images)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = read(text)
    assert "script" not in {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:"))
    return text


def test_the_page_says_what_was_measured(tmp_path):
    document = result(
        table(), "sd-vae", notes=["N = 60 < 2,048: rFID is unreliable."], data={"skipped": ["x.png: bad"]}
    )
    text = read(written(tmp_path, document)).text
    mode = document["metrics"]["mode"]
    low, high = document["intervals"]["mode"]["psnr"]
    assert text.count("sd-vae: reconstructions of holiday") == 2
    assert f"{mode['psnr']:.2f} {low:.2f} – {high:.2f}" in text and "PSNR (dB) ↑" in text and "LPIPS (VGG) ↓" in text
    assert f"{document['metrics']['sample']['psnr']:.2f}" in text
    assert f"{document['baseline']['metrics']['psnr']:.2f}" in text and "bicubic /8" in text
    assert "N = 60 < 2,048" in text and "rFID is missing" not in text
    for path, value in (("protocol.crop_px", "256"), ("data.fingerprint", "f" * 64), ("versions.torch", "2.15.0")):
        assert f"{path}{value}" in text
    assert "settings.batch_size8" in text and "data.skippedx.png: bad" in text and "were skipped: 1." in text
    assert f"mode: PSNR (dB) {table()[7]['mode_psnr']:.2f}, SSIM" in text


def test_a_missing_fid_is_said_and_not_left_out(tmp_path):
    document = result(table())
    for values in document["metrics"].values():
        del values["fid"]
        values["frechet_vgg16"] = np.float32(1.25)
    document["notes"] = ["N = 60 < 2,048: rFID and KID depend on N."]
    text = read(written(tmp_path, document)).text
    assert "rFID is missing" in text and "rFID ↓–––" in text.replace("\n", "")
    assert "Fréchet, vgg16 (not FID) ↓1.2501.250–" in text.replace("\n", "")
    reason = "rFID is missing: the Inception weights were not found."
    assert read(written(tmp_path, document | {"notes": [reason]})).text.count("rFID is missing") == 1


def test_pictures_hold_the_very_pixels_and_the_error_four_times(tmp_path):
    given, made, error = pictures(written(tmp_path))
    assert np.array_equal(np.asarray(given), picture()) and np.array_equal(np.asarray(made), picture(seed=1))
    difference = np.abs(picture().astype(float) - picture(seed=1)).mean(2)
    expected = np.minimum(4 * difference, 255)
    assert np.abs(np.asarray(error.convert("L")).astype(float) - expected).max() <= 0.51


def test_error_map_is_zero_for_equal_images_and_full_where_nothing_is_known():
    image = to_tensor(picture())
    assert torch.equal(error_map(image, image), torch.full((1, 24, 32), -1.0))
    broken = image.clone()
    broken[1, 3, 5] = torch.nan
    assert error_map(image, broken)[0, 3, 5] == 1 and (error_map(image, broken) == 1).sum() == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_images_of_any_channel_count_are_shown(tmp_path, channels):
    rows = table()
    text = written(tmp_path, rows=rows, images=shown(rows, channels=channels))
    assert [image.size for image in pictures(text)] == [(32, 24)] * 3
    assert ("channels, of which" in text) == (channels in (2, 7))


def test_large_images_keep_their_size_and_the_page_stays_small(tmp_path):
    rows = table()
    image = to_tensor(picture(2000, 3000))  # noise: nothing compresses worse
    smooth = torch.linspace(-1, 1, 3000).expand(3, 2000, 3000)
    one = written(tmp_path, rows=rows, images={"Worst": [Shown("a", 0, rows[0], smooth, smooth)]})
    assert [photo.size for photo in pictures(one)] == [(3000, 2000)] * 3
    text = written(tmp_path, rows=rows, images={"Worst": [Shown("a", i, rows[i], image, -image) for i in range(2)]})
    assert len(text) < 20_000_000 and "of its size)" in text
    assert [photo.size for photo in pictures(text)][:2] == [(1500, 1000)] * 2


def test_a_reconstruction_that_is_not_finite_is_shown(tmp_path):
    rows = table()
    rows[7] |= {"mode_psnr": None, "mode_ssim": None, "mode_lpips_vgg": float("nan")}
    image = to_tensor(picture())
    images = {"Worst": [Shown("nan.png", 7, rows[7], image, torch.full_like(image, torch.nan))]}
    text = written(tmp_path, result(table()), rows, images)
    assert np.asarray(pictures(text)[2]).min() == 255 and "mode: PSNR" not in text and "sample: PSNR" in text


def test_a_deterministic_model_without_baseline_and_images(tmp_path):
    rows = table(kinds=("mode",))
    document = result(rows, baseline=None, intervals=None)
    text = read(written(tmp_path, document, rows, {})).text
    assert "bicubic" not in text and "sample" not in text


def test_hostile_names_are_shown_and_never_run(tmp_path):
    rows = [row | {"name": f"{HOSTILE}\udcff"} for row in table()]
    model = {"location": f"/m/{HOSTILE}\udcff", "class": HOSTILE}
    baseline = {"name": f"$x_{HOSTILE}"}
    document = result(rows, model=model, notes=[HOSTILE], data={"location": HOSTILE}, baseline=baseline)
    document["settings"] = {HOSTILE: [HOSTILE, "\udcff"]}
    text = read(written(tmp_path, document, rows, shown(rows, f"{HOSTILE}\udcff"))).text
    assert text.count(HOSTILE) >= 4 and "\\udcff" in text


def test_the_former_page_stays_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    before = written(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="report.html: No space"):
        write_recon_report(tmp_path / "report.html", result(table()), table(), {})
    assert (tmp_path / "report.html").read_text() == before
