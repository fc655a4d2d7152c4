"""What holds for every objective: settings, marks, docs, and that nothing is named twice."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from latent_ae.config import all_keys, resume_marks
from latent_ae.objectives import OBJECTIVES
from latent_ae.objectives.base import Objective
from latent_ae_train.settings import TrainSettings

ROOT = Path(__file__).parents[2]


def own_keys(objective: type[Objective[Any]]) -> list[str]:
    """The keys of an objective's settings, without their section."""
    (base,) = (base for base in objective.__orig_bases__ if base.__origin__ is Objective)
    return list(base.__args__[0].model_fields)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.name)
def test_its_page_names_each_of_its_settings(objective: type[Objective[Any]]) -> None:
    page = (ROOT / objective.docs).read_text(encoding="utf-8")
    unnamed = [
        key for key in own_keys(objective) if f"`{key}`" not in page and f"{objective.section}.{key}" not in page
    ]
    assert unnamed == []


def test_each_key_of_its_sections_belongs_to_one_objective() -> None:
    keys = [f"{one.section}.{key}" for one in OBJECTIVES for key in own_keys(one)]
    sections = {one.section for one in OBJECTIVES}
    assert sorted(keys) == sorted(key for key in all_keys(TrainSettings) if key.split(".")[0] in sections)


def test_names_are_unique() -> None:
    for names in (
        [one.name for one in OBJECTIVES],
        [one.adversary_name for one in OBJECTIVES if one.adversary_name],
        [title for one in OBJECTIVES for title in one.charts],
        list(itertools.chain(*(keys for one in OBJECTIVES for keys in one.charts.values()))),
    ):
        assert len(names) == len(set(names)), names


def test_what_a_run_that_goes_on_may_change() -> None:
    """The whole table, so that a mark that is lost is seen."""
    marks = resume_marks(TrainSettings)
    keys = set(all_keys(TrainSettings))
    by_mark = {mark: {key for key in keys if marks[key] == mark} for mark in set(marks.values())}
    assert by_mark["switch"] == {
        *("gan.weight", "ema.decay", "loss.kl_target", "loss.kl_balance", "loss.spectral", "loss.total_correlation"),
        "loss.backgrounds",  # metrics are of composites with it, and of channels without
        *("alignment.model", "alignment.adaptive", "distillation.teacher", "flow.teacher_steps"),
    }
    assert by_mark["fixed with learned_logvar"] == {"loss.pixel", "loss.scale"}
    fixed_sections = {key for key in keys if key.split(".")[0] in ("codebook", "data", "decoder", "model")}
    assert by_mark["fixed"] == (fixed_sections - {"data.num_workers", "data.max_bad_fraction"}) | {
        *("seed", "batch_size", "precision", "init_from", "train", "validate.images", "validate.crop_px"),
        *("validate.also_px", "optim.kind", "optim.layerwise"),
        *("loss.perceptual_net", "loss.bands", "loss.learned_logvar", "loss.total_correlation_width"),
        "loss.total_correlation_estimate",
        *("gan.loss", "gan.network", "gan.norm", "gan.channels", "gan.layers", "gan.blur"),
        *(f"semi_supervised.{key}" for key in ("classes", "labels_per_class", "draw", "label_column", "share")),
        *("semi_supervised.style_size", "semi_supervised.width", "density.components"),
        *("gan.dino_px", "gan.dino_kernel", "gan.conditional", "gan.replay"),
    }
    assert by_mark["silent"] == {
        *("output_dir", "report_to", "push_to_hub", "micro_batch_size"),
        *("compile", "cudnn_benchmark", "gradient_checkpointing"),
        *("gan.init_from", "validate.every", "validate.preview_images", "log.every"),
        *(key for key in keys if key.startswith("checkpoint.")),
    }
