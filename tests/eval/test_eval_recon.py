"""latent-ae eval recon against a computation with diffusers, Pillow and scikit-image alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import skimage
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.metrics.labels import short_name
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_eval.job import default_folder
from latent_ae_eval.recon.measure import evaluate_reconstruction
from latent_ae_eval.recon.settings import ReconSettings
from tests.distributed.launch import DISTRIBUTED, launch
from tests.inception import random_inception
from tests.tiny_models import SIZES, tiny_autoencoder
from tests.tiny_vision import save_vision_model

NO_LPIPS = ReconSettings(resize_px=None, crop_px=32, lpips=(), frechet=(), num_workers=0)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def direct(model: str, path: Path, box: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Centre crop of a file and its reconstruction, uint8 HWC."""
    with Image.open(path) as picture:
        (width, height), pixels = picture.size, np.asarray(picture)
    top, left = (height - box[0]) // 2, (width - box[1]) // 2
    pixels = pixels[top : top + box[0], left : left + box[1]]
    autoencoder = AutoencoderKL.from_pretrained(model)
    with torch.no_grad():
        x = torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None]
        y = autoencoder.decode(autoencoder.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0).numpy()
    return pixels, np.rint((y.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


@pytest.mark.parametrize("crop_px", [32, None])
def test_equals_a_direct_computation(model, photos, crop_px):
    result = evaluate_reconstruction(model, photos, NO_LPIPS.model_copy(update={"crop_px": crop_px, "batch_size": 3}))
    files = sorted(Path(photos).iterdir())
    assert [row["name"] for row in result["images"]] == [file.name for file in files]
    for row, file, (width, height) in zip(result["images"], files, SIZES, strict=True):
        box = (32, 32) if crop_px else (height // 4 * 4, width // 4 * 4)  # the factor is 4
        assert (row["height"], row["width"]) == box
        given, made = direct(model, file, box)
        assert row["mode_psnr"] == pytest.approx(peak_signal_noise_ratio(given, made, data_range=255), abs=1e-3)
        similarity = structural_similarity(
            given, made, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert row["mode_ssim"] == pytest.approx(similarity, abs=1e-4)
    for key in ("psnr", "ssim"):
        mean = np.mean([row[f"mode_{key}"] for row in result["images"]])
        assert result["metrics"]["mode"][key] == pytest.approx(mean, rel=1e-12)
    assert result["intervals"] == {"mode": {}, "sample": {}}  # of five images, none
    baseline = result["baseline"]
    assert result["metrics"]["mode"]["n"] == baseline["metrics"]["n"] == result["data"]["num_images"] == 5
    assert baseline["name"] == "bicubic /4" and baseline["metrics"]["psnr"] > result["metrics"]["mode"]["psnr"]


def test_lpips_is_measured_on_the_rounded_pixels(model, photos):
    try:
        distance = LPIPS("alex")
    except UserError as error:
        pytest.skip(f"{str(error).splitlines()[0]} docs/weights.md says how.")
    result = evaluate_reconstruction(model, photos, NO_LPIPS.model_copy(update={"lpips": ("alex",), "limit": 2}))
    for row in result["images"]:
        file = Path(photos) / row["name"]
        given, made = (
            torch.from_numpy(p / 127.5 - 1).float().permute(2, 0, 1)[None] for p in direct(model, file, (32, 32))
        )
        assert row["mode_lpips_alex"] == pytest.approx(float(distance(given, made)), abs=1e-4)
    assert len(result["images"]) == 2 and "lpips_vgg" not in result["metrics"]["mode"]


def test_batch_size_and_workers_do_not_matter(model, photos):
    changes = ({"batch_size": 1}, {"batch_size": 4, "num_workers": 2})
    one, four = (evaluate_reconstruction(model, photos, NO_LPIPS.model_copy(update=change)) for change in changes)
    assert [row["name"] for row in one["images"]] == [row["name"] for row in four["images"]]
    for key in ("mode_psnr", "mode_ssim", "sample_psnr", "sample_ssim"):
        assert [row[key] for row in one["images"]] == pytest.approx([row[key] for row in four["images"]], abs=1e-4)


def test_a_posterior_sample_is_not_the_mode_and_follows_the_seed(model, photos):
    def measured(**changes):
        return evaluate_reconstruction(model, photos, NO_LPIPS.model_copy(update=changes))["metrics"]

    both = measured()
    assert both == measured() and set(both) == {"mode", "sample"}
    alone, other = measured(latents=("sample",)), measured(seed=1)
    assert alone == {"sample": both["sample"]} and other["mode"] == both["mode"]
    assert len({both["sample"]["psnr"], both["mode"]["psnr"], other["sample"]["psnr"]}) == 3


def test_two_processes_give_the_numbers_of_one(model, photos, tmp_path, inception):
    # an odd number of images; a process whose only image is unreadable; nothing readable anywhere
    half, none = tmp_path / "half", tmp_path / "none"
    half.mkdir()
    none.mkdir()
    Image.fromarray(skimage.data.coffee()[:40, :40]).save(half / "a.png")
    for path in (half / "b.png", none / "a.png", none / "b.png"):
        path.write_bytes(b"not a picture")
    script = DISTRIBUTED / "recon_on_processes.py"
    out = [str(tmp_path / name) for name in ("photos-out", "half-out", "none-out")]
    dinov2 = str(save_vision_model(tmp_path / "dinov2", patch_size=56, image_size=224))
    data = [word for pair in zip((photos, str(half), str(none)), out, strict=True) for word in pair]
    done = launch(2, script, model, str(inception), dinov2, *data)
    assert done.returncode == 0, done.stderr
    for data, folder in ((photos, out[0]), (str(half), out[1])):
        ranks = [json.loads(Path(f"{folder}.rank{rank}.json").read_text()) for rank in (0, 1)]
        features = {"frechet": ("inception", "dinov2"), "precision_recall": ("dinov2",), "dinov2_model": dinov2}
        features |= {"inception_weights": str(inception), "max_bad_fraction": 1.0, "batch_size": 2, "limit": 4}
        alone = evaluate_reconstruction(model, data, NO_LPIPS.model_copy(update=features))
        assert ranks[0] == ranks[1]
        written = json.loads((Path(folder) / "result.json").read_text())
        assert written == {key: value for key, value in ranks[0].items() if key != "images"}
        assert pyarrow.parquet.read_table(Path(folder) / "images.parquet").to_pylist() == ranks[0]["images"]
        assert ranks[0]["data"] == alone["data"]
        for key in ("mode_psnr", "sample_ssim"):
            assert [row[key] for row in ranks[0]["images"]] == pytest.approx(
                [row[key] for row in alone["images"]], abs=1e-4
            )
        for kind, metrics in alone["metrics"].items():
            assert ranks[0]["metrics"][kind] == pytest.approx(metrics, rel=1e-4)
        assert [row["index"] for row in ranks[0]["images"]] == [row["index"] for row in alone["images"]]
    for rank in (0, 1):
        assert "none of its 2 images is readable; a.png: " in Path(f"{out[2]}.rank{rank}.json").read_text()
    assert ranks[0]["data"]["skipped"] == ["b.png: not a known image format, or damaged at its start"]


def test_the_command_prints_one_json_document_and_writes_files(model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            ["eval", "recon", model, photos, "crop_px=32", "resize_px=null", "--out", "here", "lpips=[]", "frechet=[]"]
        )
        == 0
    )
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == json.loads((tmp_path / "here" / "result.json").read_text())
    assert result["protocol"]["crop_px"] == 32 and result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "pairs.png" in captured.err and "5/5" in captured.err
    with Image.open(tmp_path / "here" / "pairs.png") as picture:
        assert 4 * picture.width / 3 > picture.height > 2 * picture.width / 3  # worst, median, best: rows of three


def test_files_go_into_a_folder_named_after_the_run_by_default(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    for location, name in (
        (str(tmp_path / "runs" / "mine" / "export"), "recon-mine"),
        ("user/some-vae", "recon-some-vae"),
        (f"{tmp_path}/model/", "recon-model"),
        (str(tmp_path / "runs" / "vae"), "recon-vae"),
        (str(tmp_path / "runs" / "vae" / "export"), "recon-vae"),
        (str(tmp_path / "pipeline" / "vae"), "recon-pipeline"),
        ("user/vae", "recon-vae"),
    ):
        assert default_folder("recon", location, "photos") == Path(name)


def test_a_result_of_another_model_or_of_other_data_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def store(folder, model, data):
        Path(folder).mkdir()
        Path(folder, "result.json").write_text(json.dumps({"model": {"location": model}, "data": {"location": data}}))

    store("recon-vae", "a/vae", "photos")
    assert default_folder("recon", "a/vae", "photos") == Path("recon-vae")
    for model, data in (("b/vae", "photos"), ("a/vae", "others")):
        assert default_folder("recon", model, data) == Path("recon-vae-2")
    store("recon-vae-2", "b/vae", "photos")
    assert default_folder("recon", "b/vae", "photos") == Path("recon-vae-2")
    assert default_folder("recon", "c/vae", "photos") == Path("recon-vae-3")
    (tmp_path / "a/vae").mkdir(parents=True)
    for same in ("./a/vae", "a/vae/", str(tmp_path / "a/vae")):
        assert default_folder("recon", same, "photos") == Path("recon-vae")
    store("text-vae", "a/vae", None)
    assert default_folder("text", "a/vae", "") == Path("text-vae")


def test_short_names_say_which_model():
    for location, name in (
        ("runs/mine/export", "mine"),
        ("user/some-vae", "some-vae"),
        ("./runs/vae", "runs/vae"),
        ("runs/vae/export", "runs/vae"),
        ("/models/sd15/vae/", "sd15/vae"),
        ("vae", "vae"),
        ("", "other"),
    ):
        assert short_name(location, "other") == name


def test_an_unreadable_image_is_named_and_too_many_are_an_error(model, photos, tmp_path, capsys):
    for file in sorted(Path(photos).iterdir()):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "cut short.png").write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"^max_bad_fraction: 1 of the first 6 images .*\n  cut short.png: "):
        evaluate_reconstruction(model, str(tmp_path), NO_LPIPS)
    result = evaluate_reconstruction(model, tmp_path, NO_LPIPS.model_copy(update={"max_bad_fraction": 0.2}))
    assert result["metrics"]["mode"]["n"] == 5 and len(result["data"]["skipped"]) == 1
    assert "skipped 1 of 6 images:\n  cut short.png" in capsys.readouterr().err


def test_mistakes_end_with_exit_code_2_and_what_to_do(model, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    tiny_autoencoder(in_channels=5, out_channels=5).save_pretrained(tmp_path / "five")
    tiny_autoencoder(in_channels=3, out_channels=1).save_pretrained(tmp_path / "uneven")
    (tmp_path / "file").write_text("in the way")
    words = ["crop_px=32", "resize_px=null", "lpips=[]", "frechet=[]", "num_workers=0", "--out", str(tmp_path / "out")]
    for arguments, message in (
        ([str(tmp_path / "nowhere" / "export"), photos, *words], "no such model folder"),
        ([photos, photos, *words], "no config.json"),
        ([str(tmp_path / "other"), photos, *words], "UNet2DModel"),
        ([str(tmp_path / "five"), photos, *words], "5 need .npy arrays"),
        ([str(tmp_path / "uneven"), photos, *words], "3 channels and gives 1"),
        ([model, str(tmp_path / "nowhere"), *words], "DATA: no such file or folder"),
        ([model, str(tmp_path / "empty"), *words], "holds no images"),
        ([model, photos, *words, "split=test"], "split: "),
        ([model, photos, *words, "crop_px=34"], "factor 4; use 32"),
        ([model, photos, *words, "crop=34", "resize_px=8"], "did you mean crop_px"),
        ([model, photos, *words[:-1], str(tmp_path / "file")], "cannot write"),
    ):
        assert main(["eval", "recon", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_help_and_settings_need_no_heavy_imports(model):
    code = (
        "import sys\nfrom latent_ae.__main__ import main\n"
        "try:\n    main(['eval', 'recon', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert main(['eval', 'recon', 'a', 'b', 'nonsense=1']) == 2\n"
        "assert not {'torch', 'diffusers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "example: latent-ae eval recon" in done.stdout
