"""The same global batch gives the same gradients and reduced numbers, however it is split over passes and processes.

On tiny real networks, each step from equal weights and states (see `split`), and the same with the step broken on
purpose: each breakage is seen a hundred times more clearly than the tolerance.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from latent_ae.objectives import gan as gan_module
from tests.distributed import children, split
from tests.distributed.split import (
    BROKEN_STEPS,
    Distance,
    Reference,
    cases,
    differences,
    observed_from,
    reference_run,
    split_settings,
)
from tests.runs import SHAPES
from tests.teacher import save_teacher
from tests.tiny import build_step
from tests.tiny_models import TWO, tiny
from tests.tiny_vision import save_convnext, save_vision_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.trained
TOLERANCE = 1e-5
NAMES = (
    *(
        "pixels",
        "latents",
        "capacity",
        "labels",
        "buckets",
        "AutoencoderTiny, taught",
        "codes",
        "frozen networks",
        "RGBA",
        "stored latents",
        "flow",
        "distilled flow",
        "density",
    ),
    *SHAPES,
)
AUTOENCODER, DISCRIMINATOR = "gradient of the autoencoder", "gradient of the discriminator"
LOGVAR = "gradient of reconstruction.logvar"
WEIGHT, LECAM = "gan.balance.weight", "gan.lecam_averages"
CONTROL, ALIGNMENT = "kl.control", "alignment.balance.weight"
ASSIGNMENT = "code_entropy.assignment"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    save_vision_model(folder / "vision")
    save_convnext(folder / "convnext")
    save_teacher(folder / "teacher")
    torch.manual_seed(0)
    AutoencoderKL(**TWO).save_pretrained(folder / "original")
    tiny("FlowMatchingVAE").save_pretrained(folder / "flow")
    return folder


@pytest.fixture(scope="module")
def references(place: Path) -> dict[str, Reference]:
    found = {name: reference_run(case) for name, case in cases(place).items()}
    assert found.keys() == set(NAMES)
    return found


@pytest.fixture(scope="module")
def on_two(place: Path, references: dict[str, Reference]) -> dict[str, dict[str, Any]]:
    """What two processes observed, by case and breakage ("": none)."""
    for name, reference in references.items():
        torch.save(reference.states, place / f"{name}.pt")
    code, error = children.call(2, split.on_two_processes, place, folder=place)
    assert code == 0, error
    return {name: torch.load(place / f"{name}.two.pt", weights_only=True) for name in references}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compared_is_there(references: dict[str, Reference], name: str) -> None:
    """Both networks' gradients, and each number that is taken over the global batch moves."""
    seen = references[name].seen
    alone = name in ("capacity", "codes", "labels", "density", "distilled flow")
    expected = {AUTOENCODER} | (set() if alone else {DISCRIMINATOR, WEIGHT, LECAM})
    more = {
        "pixels": {LOGVAR},
        "latents": {CONTROL, ALIGNMENT},
        "capacity": {LOGVAR},
        "labels": {"semi_supervised.averages"},
        "density": {"density.density.means", "density.density.covariances"},
        "codes": {"codebook.code_age", "averaged codes 1", "code_averages.uses", ASSIGNMENT},
        "VQModel": {"codebook.code_age", "revived codes 1", ASSIGNMENT},
        "VQVAE2": {"codebook.code_age", "revived codes 1", "revived codes 2", ASSIGNMENT},
    }
    for key in expected | more.get(name, set()):
        assert sum(bool(one[key].any()) for one in seen) > 1, key
        assert len({float(one[key].double().norm()) for one in seen}) > 1, key


@pytest.mark.parametrize("name", NAMES)
def test_passes_give_the_same_gradients(place: Path, references: dict[str, Reference], name: str) -> None:
    """8 samples in one pass, and in four of 2."""
    case, (states, seen) = cases(place)[name], references[name]
    step = build_step(split_settings(case, 2), Distance())
    found = differences(seen, observed_from(states, step, range(case.steps)))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("name", NAMES)
def test_processes_give_the_same_gradients(
    references: dict[str, Reference], on_two: dict[str, dict[str, Any]], name: str
) -> None:
    """8 samples in one pass, and on two processes with two passes of 2 each."""
    found = differences(references[name].seen, on_two[name][""])
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize(
    ("name", "breakage", "missed"),
    [
        ("pixels", "bypass", {AUTOENCODER}),
        ("latents", "bypass", {AUTOENCODER}),
        ("pixels", "bypass_discriminator", {DISCRIMINATOR}),
        ("latents", "bypass_discriminator", {DISCRIMINATOR}),
        ("pixels", "local_weight", {WEIGHT}),
        ("latents", "local_weight", {WEIGHT}),
        ("pixels", "forgotten", {WEIGHT, LECAM, LOGVAR}),
        ("latents", "forgotten", {WEIGHT, LECAM, CONTROL, ALIGNMENT}),
    ],
)
def test_a_broken_step_is_noticed(
    references: dict[str, Reference], on_two: dict[str, dict[str, Any]], name: str, breakage: str, missed: set[str]
) -> None:
    found = differences([references[name].seen[number] for number in BROKEN_STEPS], on_two[name][breakage])
    assert {key for key, difference in found.items() if difference > TOLERANCE} == missed, found
    assert min(found[key] for key in missed) >= 100 * TOLERANCE, found


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_a_discriminator_that_learns_from_the_generators_loss_is_noticed(
    place: Path, references: dict[str, Reference], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, seen = references[name]
    step = build_step(split_settings(cases(place)[name], 8), Distance())
    original = gan_module.generator_loss

    def leaking(*arguments: Any) -> torch.Tensor:
        objective = original(*arguments)
        objective.backward(inputs=list(step.objectives["gan"].adversary.parameters()), retain_graph=True)
        return objective

    monkeypatch.setattr(gan_module, "generator_loss", leaking)
    found = differences([seen[number] for number in BROKEN_STEPS], observed_from(states, step, BROKEN_STEPS))
    assert {key for key, difference in found.items() if difference > TOLERANCE} == {DISCRIMINATOR}, found
    assert found[DISCRIMINATOR] >= 100 * TOLERANCE
