"""One entry to all evaluations."""

import pytest
import torch

from latent_ae.config import UserError
from latent_ae_eval import evaluate
from latent_ae_eval.job import JOBS, job_of
from latent_ae_eval.latents.measure import evaluate_latents
from latent_ae_eval.latents.settings import LatentsSettings
from tests.tiny_models import tiny


def test_every_job_names_functions_that_are_there() -> None:
    for name in JOBS:
        job = job_of(name)
        assert job.name == name and job.batch_key in job.settings.model_fields
        assert callable(job.function("measure", job.measure)) and callable(job.function("report", job.text))


def test_a_job_by_name_is_the_function_itself() -> None:
    model = tiny("AutoencoderKL").eval()
    changes = {"limit": 3, "crop_px": 32, "resize_px": 32, "lpips": None, "num_decoded": 2, "num_workers": 0}
    directly = evaluate_latents(model, "photos", LatentsSettings(**changes))
    by_name = evaluate("latents", model, "photos", LatentsSettings(limit=5), **changes)
    assert by_name["settings"]["limit"] == 3
    assert {**by_name, "seconds": 0} == {**directly, "seconds": 0}


def test_mistakes_are_named() -> None:
    same = torch.nn.Identity()
    with pytest.raises(UserError, match="no such evaluation: rcon; did you mean recon?"):
        evaluate("rcon", same, "photos")
    with pytest.raises(UserError, match="(?s)crop_px: input.*given: -1.*limt: no such setting; did you mean limit"):
        evaluate("recon", same, "photos", limt=3, crop_px=-1)
    with pytest.raises(UserError, match="eval recon takes ReconSettings, not LatentsSettings"):
        evaluate("recon", same, "photos", LatentsSettings())
