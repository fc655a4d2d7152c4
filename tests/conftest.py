"""What several test files need: the real LPIPS trunk, and one thread, so that small tests do not fight for cores."""

from types import SimpleNamespace

import pytest
import torch

import latent_ae.export.write
from latent_ae.config import UserError
from latent_ae.pretrained.lpips import LPIPS

from . import warm
from .made_jobs import Jobs

torch.set_num_threads(1)
# but for one test of the check itself, which has a process that starts as a user's does
latent_ae.export.write.subprocess = SimpleNamespace(run=warm.run)  # type: ignore[assignment]


@pytest.fixture(scope="session")
def lpips_vgg() -> LPIPS:
    """LPIPS on the trained VGG16 trunk."""
    try:
        return LPIPS("vgg")
    except UserError as error:
        pytest.skip(f"{str(error).splitlines()[0]} docs/weights.md says how.")


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Every command of `latent-ae eval`, each run once."""
    return Jobs(tmp_path_factory.mktemp("jobs"))
