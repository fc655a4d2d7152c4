"""latent-ae data check against what was put into the folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.data.check import check
from latent_ae.data.settings import DataSettings
from latent_ae_train.settings import TrainSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    (tmp_path / "deep").mkdir()
    picture(40, 60).save(tmp_path / "a.png")
    (tmp_path / "deep/copy of a.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "deep/another.png").write_bytes((tmp_path / "a.png").read_bytes())
    picture(300, 30).save(tmp_path / "b.jpg")
    picture(50, 50).convert("CMYK").save(tmp_path / "c.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(20, 80).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(rng.integers(0, 2**16, (32, 32), dtype=np.uint16)).save(tmp_path / "deep.png")
    np.save(tmp_path / "array.npy", rng.random((16, 16, 3), dtype=np.float32))
    np.save(tmp_path / "wrong.npy", rng.random((16, 16, 5), dtype=np.float32))
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "text.jpg").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_is_found_and_named(folder: Path, workers: int) -> None:
    found = check(str(folder), DataSettings(num_workers=workers, resolution=32))
    assert (found["num_images"], found["num_readable"]) == (11, 8)
    assert found["skipped_fraction"] == pytest.approx(3 / 11)
    assert [line.split(":")[0] for line in found["skipped"]] == ["text.jpg", "torn.png", "wrong.npy"]
    assert "3 channels are expected" in found["skipped"][2]
    kinds = {"PNG RGB": 4, "JPEG RGB": 2, "JPEG CMYK": 1, "PNG I;16": 1, "NumPy array": 2, "unknown": 1}
    assert found["kinds"] == kinds
    assert found["shorter_side_px"] == {"min": 16, "median": 36, "max": 50}
    assert found["longer_side_px"]["max"] == 300 and found["smaller_than_resolution"] == 3
    assert found["duplicates"] == [["a.png", "deep/another.png", "deep/copy of a.png"]]
    assert found["num_superfluous"] == 2


def test_the_command_says_whether_training_would_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(folder), "num_workers=0"]) == 2
    out, error = capsys.readouterr()
    assert json.loads(out)["num_readable"] == 8  # the findings are not lost
    assert "training would stop" in error and "torn.png: " in error and "a.png = deep/another.png" in error
    assert main(["data", "check", str(folder), "num_workers=0", "max_bad_fraction=0.5"]) == 0
    assert "11/11" in capsys.readouterr().err
    assert main(["data", "check", str(folder / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["data", "check", str(folder), "max_bad=0.5"]) == 2
    assert "did you mean max_bad_fraction" in capsys.readouterr().err


def test_what_channels_mean(folder: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        check(str(folder / "x"), DataSettings())
    five = check(str(folder), DataSettings(num_workers=0), channels=5)
    assert five["num_readable"] == 1  # wrong.npy is the right one


def test_arrays_of_other_channels_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(25):
        np.save(tmp_path / f"{number}.npy", np.full((16, 16, 5), 0.5, dtype=np.float32))
    words = ["data", "check", str(tmp_path), "num_workers=0", "resolution=16"]
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert error.count("expected") == 1 and "25 arrays have 5 channels and 3 are expected: give channels=5" in error
    assert error.rstrip().endswith("training would stop at these files; give channels=5")
    assert len(json.loads(out)["skipped"]) == 25
    # what the line says works, here and in training
    assert main([*words, "channels=5"]) == 0
    advice = error.split("training then takes ")[1].splitlines()[0].split()
    load_settings(TrainSettings, None, advice)
    (tmp_path / "torn.png").write_bytes(b"not a picture")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "  torn.png: " in error and "mend or remove them" in error
