"""Every page in a real browser, as wide as a telephone: nothing fetched, no sideways scrolling, names as they are."""

import json

import pytest

from latent_ae_train.report import write_report
from latent_ae_train.settings import TrainSettings
from tests.made_jobs import COMMANDS, DOWNLOADS, Jobs
from tests.report.browser import in_browser, narrow

pytestmark = in_browser


@pytest.fixture(scope="module")
def pages(jobs: Jobs, tmp_path_factory) -> dict[str, str]:
    """The pages of all commands, and a training's, by name."""
    made = {name: jobs(name).page for name in COMMANDS if name not in (*DOWNLOADS, "recon-other")}
    for name, text in made.items():
        assert "<script" not in text and "&lt;script&gt;" in text, name
    run = tmp_path_factory.mktemp("run")
    keys = ("l1", "lpips", "generator", "discriminator", "grad_norm", "grad_norm_discriminator")
    lines = [{"event": "train", "step": step, "verdict": "balanced; " * 30} | dict.fromkeys(keys, 1) for step in (1, 2)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = [{"": "after", "PSNR (dB)": "30.44", "SSIM": "0.892", "LPIPS (VGG)": "0.151", "LPIPS (Alex)": "0.151"}]
    write_report(run, TrainSettings.model_validate({"steps": 2}), rows)
    return made | {"training": (run / "report.html").read_text(encoding="utf-8")}


@pytest.mark.parametrize("width_px, least_px", [(390, 10), (320, 8.5)])
def test_pages_fit_a_telephone_and_fetch_nothing(pages, tmp_path, width_px, least_px):
    # a frame's scroll bar takes 15 px, which a telephone's does not
    for name, found in zip(pages, narrow(tmp_path, list(pages.values()), width_px), strict=True):
        assert found["width"] == width_px and found["overflow"] <= 0 and found["fetched"] == [], name
        assert (found["letters"] or least_px) >= least_px and not found["broken"], name


def test_pages_of_generated_images_fit_a_telephone(jobs: Jobs, lpips_vgg, tmp_path):
    texts = [jobs(name).page for name in ("sample-compared", "diffusion")]
    assert all(found["overflow"] <= 0 and not found["broken"] for found in narrow(tmp_path, texts, 390))
    settings = json.loads((jobs("diffusion").folder / "result.json").read_text())["settings"]
    assert settings["lr"] == "preset" and all("<td>preset</td>" not in text for text in texts)
