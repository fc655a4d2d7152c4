"""What a first stage leaves of text, read by tesseract where it is installed, and by comparison with templates."""

import json
import random
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F
from torchmetrics.functional.text import edit_distance as reference_distance

from latent_ae.__main__ import main
from latent_ae_eval import evaluate
from latent_ae_eval.text import measure
from latent_ae_eval.text.fonts import OF_MATPLOTLIB, fonts_for
from latent_ae_eval.text.reading import comparable, edit_distance, ned
from latent_ae_eval.text.rendering import RenderedText, samples_of
from latent_ae_eval.text.scripts import SCRIPTS
from latent_ae_eval.text.settings import TextSettings
from tests.tiny_models import tiny

LATIN = {"latin": fonts_for(SCRIPTS["latin"], [])}
MONO = str(LATIN["latin"][OF_MATPLOTLIB.index("DejaVuSansMono.ttf")].path)
SIZES, SIDE = (8, 20), 64
SMALL = {
    **{"scripts": ("latin",), "sizes_px": SIZES, "backgrounds": ("light",), "fonts": (MONO,), "lines": 1},
    **{"crop_px": SIDE, "lpips": None, "num_workers": 0, "num_readers": 2},
}
HAS_TESSERACT = shutil.which("tesseract") is not None and find_spec("pytesseract") is not None


class Templates:
    """Reads one line of a fixed-width font, dark on light, by the nearest rendered letter in each cell."""

    languages = frozenset({"eng"})

    def __init__(self):
        self.cells = {}
        self.calls = 0
        letters = sorted(set(SCRIPTS["latin"].words + SCRIPTS["latin"].letters + SCRIPTS["latin"].digits))
        for size in SIZES:
            font = ImageFont.truetype(MONO, size, layout_engine=ImageFont.Layout.BASIC)
            wide, high = round(font.getlength("m")), round(1.25 * size)
            drawn = []
            for letter in letters:
                cell = Image.new("L", (wide, high), 255)
                ImageDraw.Draw(cell).text((0, 0), letter, 0, font)
                drawn.append(np.asarray(cell) / 255)
            self.cells[size] = letters, np.stack(drawn)

    def read(self, pixels, language):
        self.calls += 1
        grey = pixels.mean(2)
        if np.ptp(grey) < 10:
            return ""
        grey = (grey - grey.min()) / np.ptp(grey)
        best = (np.inf, "")
        for letters, templates in self.cells.values():
            high, wide = templates.shape[1:]
            count = (SIDE - 16) // wide
            flat = templates.reshape(len(letters), -1)
            for top in range(8, SIDE - 8 - high + 1):
                cells = grey[top : top + high, 8 : 8 + count * wide].reshape(high, count, wide).swapaxes(0, 1)
                cells = cells.reshape(count, -1)
                errors = np.square(cells).sum(1)[:, None] - 2 * cells @ flat.T + np.square(flat).sum(1)
                outside = np.square(1 - grey).sum() - np.square(1 - cells).sum()
                best = min(best, (errors.min(1).sum() + outside, "".join(letters[i] for i in errors.argmin(1))))
        return best[1]

    def describe(self):
        return {"name": "templates"}


@pytest.fixture
def templates(monkeypatch):
    reader = Templates()
    monkeypatch.setattr(measure, "Tesseract", lambda: reader)
    return reader


def blurred(images):
    return F.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)


def test_the_edit_distance_is_that_of_torchmetrics():
    rng = random.Random(0)
    for _ in range(30):
        a, b = ("".join(rng.choices("абab河", k=rng.randint(0, 9))) for _ in range(2))
        assert edit_distance(a, b) == reference_distance([a], [b], reduction="sum")
    assert ned("kitten", "sit\nting ") == 1 - 3 / 7
    assert ned("", " \n") == 1 and ned("a", "") == 0
    assert comparable("ＡＢ\u200f１ \u2029①\n") == "AB11"


def test_rendering_is_a_function_of_the_settings_and_draws_every_size_and_background():
    axes = (["latin"], [8, 16, 32], ["light", "dark", "photo"], ["words", "random"], 2)
    text = RenderedText(samples_of(*axes), LATIN, seed=3, side_px=128, lines=2)
    assert len(text) == len(set(text.keys())) == 36
    fewer = RenderedText([sample for sample in text.samples if sample.size_px == 16][::-1], LATIN, 3, 128, 2)
    assert fewer.read(0) == text.read(list(text.samples).index(fewer.samples[0]))
    seen, heights = set(), {8: [], 16: [], 32: []}
    for i, sample in enumerate(text.samples):
        picture, words, _ = text.render(i)
        pixels = np.asarray(picture.convert("L")).astype(int)
        known = set(SCRIPTS["latin"].words.split())
        assert (set(words.split()) <= known) == (sample.content == "words") or sample.size_px == 32
        seen.add(words)
        if sample.background == "photo":
            assert len(np.unique(pixels[:8])) > 1
            continue
        ground = pixels[0, 0]
        assert (pixels[:8] == ground).all() and (pixels[:, :6] == ground).all() and (pixels[:, -6:] == ground).all()
        assert ground > 180 if sample.background == "light" else ground < 75
        assert (pixels < ground - 100 if sample.background == "light" else pixels > ground + 100).any()
        rows = np.flatnonzero((pixels != ground).any(1))
        heights[sample.size_px].append(rows[-1] - rows[0] + 1)
    assert len(seen) == 36
    for size, found in heights.items():  # two lines, from the top of one to the foot of the other
        assert 1.25 * size + 0.4 * size < np.median(found) < 2.5 * size


def test_an_identity_is_read_like_its_originals_and_a_blur_costs_small_letters_more(templates, tmp_path):
    same = evaluate("text", lambda images: images, **SMALL)
    assert same["metrics"]["ned_original"] == 1.0 and same["metrics"]["exact_original"] == 1.0
    assert same["metrics"]["ned_lost"] == 0.0 and same["metrics"]["exact_agreement"] == 1.0
    assert same["metrics"]["psnr"] == 100.0
    worse = evaluate("text", blurred, out=tmp_path / "out", **SMALL)
    lost = {size: group["metrics"]["ned_lost"] for size, group in worse["groups"]["size_px"].items()}
    assert lost["8"] > 0.5 > lost["20"]
    assert worse["metrics"]["ned_original"] == 1.0
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "readings.parquet").to_pylist()
    assert len(rows) == 8 and worse == json.loads((tmp_path / "out" / "result.json").read_text())
    for row in rows:
        distance = reference_distance([comparable(row["read_reconstruction"])], [comparable(row["text"])])
        longest = max(len(comparable(row[key])) for key in ("text", "read_reconstruction"))
        assert row["ned_reconstruction"] == pytest.approx(1 - float(distance) / longest)
    page = (tmp_path / "out" / "report.html").read_text()
    worst = max(rows, key=lambda row: row["ned_lost"])
    assert worst["name"] in page and worst["text"] in page and "By size (px)" in page
    assert (tmp_path / "out" / "pairs.png").is_file()


def test_crops_of_data_are_compared_with_their_own_readings(templates, tmp_path):
    (tmp_path / "crops").mkdir()
    text = RenderedText(
        samples_of(["latin"], [20], ["light"], ["words"], 3), {"latin": [LATIN["latin"][2]]}, 0, SIDE, 1
    )
    for i in range(3):
        text.render(i).picture.save(tmp_path / "crops" / f"{i}.png")
    Image.new("RGB", (SIDE, SIDE), "white").save(tmp_path / "crops" / "empty.png")
    quick = {"lpips": None, "num_workers": 0}
    result = evaluate("text", lambda images: images.flip(3), tmp_path / "crops", out=tmp_path / "out", **quick)
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "readings.parquet").to_pylist()
    assert [comparable(row["read_original"]) for row in rows[:3]] == [comparable(text.render(i).text) for i in range(3)]
    assert "ned_original" not in result["metrics"] and result["groups"] == {}
    expected = [ned(row["read_original"], row["read_reconstruction"]) for row in rows[:3]]
    assert rows[3]["ned_agreement"] is None and max(expected) < 1
    assert result["metrics"]["ned_agreement"] == pytest.approx(np.mean(expected))
    assert any("1 of 4 originals" in note for note in result["notes"])


def test_what_was_read_before_a_kill_is_not_read_again(templates, tmp_path, monkeypatch):
    tiny("AutoencoderKL").save_pretrained(tmp_path / "model")
    many = SMALL | {"repeats": 5, "num_readers": 1}
    whole = evaluate("text", tmp_path / "model", **many)
    assert templates.calls == 40
    read = Templates.read

    def interrupted(self, pixels, language):
        if self.calls == 75:
            raise KeyboardInterrupt
        return read(self, pixels, language)

    monkeypatch.setattr(Templates, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("text", tmp_path / "model", out=tmp_path / "out", **many)
    monkeypatch.setattr(Templates, "read", read)
    templates.calls = 0
    resumed = evaluate("text", tmp_path / "model", out=tmp_path / "out", **many)
    assert templates.calls == 2 * (20 - 16)
    for key in ("metrics", "intervals", "groups", "data"):
        assert resumed[key] == whole[key], key
    assert whole["intervals"]["ned_original"] and not (tmp_path / "out" / "unfinished").exists()


def test_a_script_without_language_or_font_is_left_out_and_named(templates):
    few = SMALL | {"scripts": ("latin", "greek"), "sizes_px": (20,), "repeats": 1}
    result = evaluate("text", lambda images: images, **few)
    assert list(result["groups"]["script"]) == ["latin"]
    assert any("greek" in note and "tesseract-ocr-ell" in note for note in result["notes"])
    broken = evaluate("text", lambda images: images / 0, **few)
    assert broken["metrics"]["ned_original"] == 1.0 and broken["metrics"]["ned_reconstruction"] == 0.0
    assert any("2 of 2 reconstructions are not finite" in note for note in broken["notes"])
    templates.languages = frozenset({"jpn"})
    assert refused("text", lambda images: images, **SMALL | {"scripts": ("japanese",)}) == (
        "no script can be rendered and read:\n  japanese: left out, because no font has all of its letters; name one "
        "in fonts, or install one, on Debian for example fonts-noto-core and fonts-noto-cjk"
    )


def refused(*words, **settings):
    with pytest.raises(ValueError) as error:
        evaluate(*words, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["sizes_px=[8,300]"], "sizes_px: 300 px is too large for crops of 256 px; take 192 or less"),
        (["scripts=[]", "sizes_px=[300,300]", "fonts=[/nowhere.ttf]"], "3 problems in the settings"),
        (["languages=[eng,deu]"], "languages: is about DATA, and there is none"),
        (["photos", "repeats=3"], "repeats: is about rendered text, and there is DATA"),
        (
            ["photos", "languages=[deu]"],
            "lacks the language deu (on Debian: apt-get install tesseract-ocr-deu",
        ),
        (["crop_px=97"], "crop_px: 97 is not a multiple of the model's factor 2"),
    ],
)
def test_mistakes_are_named(templates, tmp_path, capsys, words, complaint):
    tiny("AutoencoderKL").save_pretrained(tmp_path / "model")
    assert main(["eval", "text", str(tmp_path / "model"), *words, "--out", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err


def test_lines_of_data_may_be_lower_than_the_letters_that_would_be_rendered():
    assert not list(TextSettings(crop_px=32).problems()) and not list(TextSettings(crop_px=32).misplaced(has_data=True))


def test_tesseract_is_missed_before_anything_else(tmp_path, capsys, monkeypatch):
    command = ["eval", "text", str(tmp_path / "no-model"), "--out", str(tmp_path / "out")]
    if HAS_TESSERACT:
        import pytesseract

        monkeypatch.setattr(pytesseract.pytesseract, "tesseract_cmd", str(tmp_path / "tesseract"))
        assert main(command) == 2
        assert "the program tesseract, which is not on the PATH" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pytesseract", None)
    assert main(command) == 2
    assert "pip install '.[text]' in the checkout" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(not HAS_TESSERACT, reason="needs tesseract and pytesseract")
def test_tesseract_reads_what_was_rendered():
    few = {"scripts": ("latin",), "sizes_px": (12,), "contents": ("words",), "repeats": 1, "lines": 2}
    few |= {"crop_px": 192, "lpips": None, "num_workers": 0}
    same = evaluate("text", lambda images: images, **few)
    assert same["metrics"]["ned_original"] > 0.9 and same["metrics"]["ned_lost"] == 0.0
    grey = evaluate("text", lambda images: torch.zeros_like(images), **few | {"backgrounds": ("dark",)})
    assert grey["metrics"]["ned_reconstruction"] == 0.0 and grey["metrics"]["ned_original"] > 0.9
