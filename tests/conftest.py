"""What several test files need: the real LPIPS trunk, and one thread, so that small tests do not fight for cores.

The imports of a process that runs tests stand in `_prepare` and in the fixtures, because the process of xdist that only
gives out the tests reads this file, too, and importing torch and diffusers takes long.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from latent_ae.pretrained.lpips import LPIPS
    from tests.made_jobs import Jobs


def pytest_configure(config: pytest.Config) -> None:
    if not getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        _prepare()


def _prepare() -> None:
    from tests.distributed import warm

    warm.start()
    import torch

    import latent_ae.export.write
    from tests import economy
    from tests.distributed import children

    torch.set_num_threads(1)
    # but for one test of the check itself, which has a process that starts as a user's does
    latent_ae.export.write.subprocess = SimpleNamespace(run=warm.run)  # type: ignore[assignment]
    economy.apply()
    children.start(warm.streams())


LONGEST = (
    *("train/test_train", "train/test_resume", "models/test_family", "distributed/test_split", "eval/test_eval_whole"),
    *("test_python_api", "robustness/test_soak", "eval/test_measured_classes", "train/test_signals"),
    *("latents/test_encode", "train/test_step", "models/test_decoder_training", "train/test_finish", "test_packaging"),
    *("robustness/test_fuzz", "robustness/test_inputs_to_survive", "eval/generation/test_diffusion"),
    *("eval/generation/test_sample", "objectives/test_rate", "train/test_reliability", "eval/test_eval_recon"),
)
"""Files that take longest. They start first, so that no process is left with one of them at the end."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.fixture(scope="session")
def lpips_vgg() -> LPIPS:
    """LPIPS on the trained VGG16 trunk."""
    from latent_ae.config import UserError
    from latent_ae.pretrained.lpips import LPIPS

    try:
        return LPIPS("vgg")
    except UserError as error:
        pytest.skip(f"{str(error).splitlines()[0]} docs/weights.md says how.")


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Every command of `latent-ae eval`, each run once."""
    from tests.made_jobs import Jobs

    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small pictures with colour gradients and edges."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(12):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((40, 30), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def no_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end after their last checkpoint: latents, export and report are not what the test is about."""
    monkeypatch.setattr("latent_ae_train.loop.finish_run", lambda *_: {})


@pytest.fixture
def world(tmp_path, monkeypatch):
    from tests.pretrained.weights_world import World

    return World(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny first stage in a folder."""
    from tests.tiny_models import tiny_autoencoder

    folder = tmp_path_factory.mktemp("model") / "export"
    tiny_autoencoder().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of photographs of several sizes, with a name that is hard to print."""
    import skimage

    from tests.tiny_models import SIZES

    folder = tmp_path_factory.mktemp("photos")
    astronaut = skimage.data.astronaut()
    for number, (width, height) in enumerate(SIZES):
        crop = astronaut[50 * number : 50 * number + height, 80 * number : 80 * number + width]
        Image.fromarray(crop).save(folder / f"größe <{number}>.png")
    return str(folder)
