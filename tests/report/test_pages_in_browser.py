"""The pages in a real browser: nothing fetched, no complaint, pictures at full size on click, no sideways scrolling.

The pages hold no script. A copy gets one that clicks, measures and leaves its findings in the document.
"""

import numpy as np
import pytest
from PIL import Image

from latent_ae.data.images import to_tensor
from latent_ae_eval.compare.measure import compare
from latent_ae_eval.latents.measure import evaluate_latents
from latent_ae_eval.latents.settings import LatentsSettings
from latent_ae_eval.recon.report import Shown, write_recon_report
from tests.made_results import HOSTILE, result, table, write
from tests.report.browser import PROBE, _found, in_browser, narrow
from tests.tiny_models import tiny

pytestmark = in_browser

# fmt: on
WIDTH_PX = 700
"""Of the pictures: wider than a third of the page."""


def opened(folder, text: str, *, width_px: int | None = None, dark: bool = False) -> dict:
    """What the probe found in a page, in a window of 1280 px or a frame of `width_px`."""
    if width_px is not None:
        return narrow(folder, [text], width_px, dark=dark)[0]
    return _found(folder, text.replace("</body>", PROBE + "</body>"), dark=dark)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = [row | {"name": f"{HOSTILE}{'x' * 300}"} for row in table()]
    random = np.random.default_rng(0)
    image, made = (to_tensor(random.integers(0, 256, (90, WIDTH_PX, 3), dtype=np.uint8)) for _ in range(2))
    shown = {heading: [Shown(rows[0]["name"], 0, rows[0], image, made)] for heading in ("Worst", "Median", "Best")}
    document = result(rows, "name-" * 60, notes=["a note", "y" * 300])
    write_recon_report(path, document | {"settings": {"z" * 200: "w" * 300}}, rows, shown)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("comparison")
    folders = []
    for index, name in enumerate(("a", f"{HOSTILE.replace('/', '')}", "long-name-" * 20)):
        rows = table(noise=0.1, seed=index, shift=index / 10)
        folders.append(write(folder / str(index), result(rows, name, notes=["v" * 300]), rows))
    compare(folders, out=folder / "out")
    return (folder / "out" / "comparison.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("latents")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "noise.png")
    tiny("AutoencoderKL").save_pretrained(folder / f"{HOSTILE.replace('/', '')}{'x' * 100}")
    (model,) = [path for path in folder.iterdir() if path.is_dir()]
    settings = LatentsSettings(resize_px=None, crop_px=32, lpips=None, num_workers=0)
    evaluate_latents(model, folder, settings, out=folder / "out")
    return (folder / "out" / "latents.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """A comparison of nine models, each with two evaluations."""
    folder = tmp_path_factory.mktemp("many")
    folders = []
    for index in range(9):
        rows = table(noise=0.1, seed=index, shift=index / 10)
        document = result(rows, f"first-stage-{index}", model={"sha256": str(index)})
        folders.append(write(folder / f"recon-{index}", document, rows))
        part = {"metrics": {"midpoints": {"n": 60, "frechet_vgg16": 100.0 + index}}, "intervals": {}, "notes": []}
        folders.append(write(folder / f"ifid-{index}", document | part | {"format": "latent-ae ifid 1"}))
    compare(folders, out=folder / "out")
    return (folder / "out" / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width_px", [None, 390])
@pytest.mark.parametrize("name", ["report", "comparison", "many", "latents"])
def test_pages_fit_and_fetch_nothing_and_can_be_read_by_day_and_by_night(request, tmp_path, name, width_px, dark):
    found = opened(tmp_path, request.getfixturevalue(name), width_px=width_px, dark=dark)
    assert found["dark"] == dark
    assert found["contrast"] >= 4.5, found["faintest"]  # WCAG 2.2, 1.4.3
    assert found["width"] == (width_px or 1280)
    assert found["overflow"] <= 0
    assert found["fetched"] == []
    assert found["letters"] >= 10 and not found["broken"]


@pytest.mark.parametrize("width_px", [None, 400])
def test_a_click_shows_a_picture_at_its_full_size_and_another_closes_it(report, tmp_path, width_px):
    pictures = opened(tmp_path, report, width_px=width_px)["pictures"]
    assert len(pictures) == 9
    for picture in pictures:
        assert picture["natural"] == picture["large"] == WIDTH_PX
        assert picture["small"] < WIDTH_PX / 2 and picture["again"] == picture["small"]
        assert picture["covers"] and picture["reach"] >= WIDTH_PX  # all of it can be scrolled to


def test_the_probe_sees_what_it_looks_for(tmp_path):
    """So that the tests above can fail."""
    outside = '<img src="http://127.0.0.1:9/x.png"><link rel="stylesheet" href="http://127.0.0.1:9/y.css">'
    small = '<svg width="50" height="50" viewBox="0 0 100 100"><text style="font-size:20px">x</text></svg>'
    style = "display:block;width:3em;overflow-wrap:anywhere"
    keys = f'<table class="pairs"><tr><th style="{style}">settings.seed</th></tr></table>'
    assert opened(tmp_path, '<!doctype html><body><p style="color:#777">x</p></body>')["contrast"] == pytest.approx(
        4.48, abs=0.01
    )
    found = opened(
        tmp_path, f'<!doctype html><body style="margin:0"><p style="width:1500px">{outside}</p>{small}{keys}</body>'
    )
    assert found["letters"] == 10 and found["broken"] == ["settings.seed"]
    assert found["overflow"] == 220 and found["fetched"] == [
        f"http://127.0.0.1:9/{name}" for name in ("x.png", "y.css")
    ]
    with pytest.raises(AssertionError, match="CONSOLE"):
        opened(tmp_path, "<body><script>console.error('x')</script></body>")
