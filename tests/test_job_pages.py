"""The jobs' pages in a real browser: nothing fetched, no complaint, no sideways scrolling, names shown as they are."""

import numpy as np
import pytest
from PIL import Image

from latent_ae_eval.anomaly import find_anomalies
from latent_ae_eval.interpolate import interpolate
from latent_ae_eval.job_config import AnomalySettings, InterpolateSettings, LikelihoodSettings, ProbeSettings
from latent_ae_eval.likelihood import measure_likelihood
from latent_ae_eval.probe import probe

from .made_results import HOSTILE
from .test_eval_recon import model
from .test_pages_in_browser import in_browser, opened

__all__ = ["model"]  # a fixture
pytestmark = in_browser
NAME = HOSTILE.replace("/", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for name in (f"{NAME} a", "b" * 200):
        (root / name).mkdir()
        for number in range(8):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number} {NAME}{'x' * 150}.png")
    return str(root)


@pytest.mark.parametrize("job", ["interpolate", "probe", "anomaly", "likelihood"])
def test_pages_fit_a_telephone_and_fetch_nothing(model, folder, tmp_path, job):
    common = {"num_workers": 0}
    if job == "interpolate":
        settings = InterpolateSettings(steps=3, frames=1, num_images=2, lpips=None, **common)
        interpolate(model, folder, settings, out=tmp_path)
    elif job == "probe":
        probe(model, folder, ProbeSettings(labels_per_class=(2,), draws=2, **common), out=tmp_path)
    elif job == "likelihood":
        measure_likelihood(model, folder, LikelihoodSettings(samples=3, num_pictures=1, **common), out=tmp_path)
    else:
        settings = AnomalySettings(normal=folder, normal_class="b" * 200, lpips=None, num_pictures=1, **common)
        find_anomalies(model, folder, settings, out=tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    found = opened(tmp_path, text, width_px=400)
    assert found["width"] == 400 and found["overflow"] <= 0 and found["fetched"] == []
