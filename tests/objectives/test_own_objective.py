"""An objective from outside the package, in one file: examples/edges.py, as docs/objectives.md shows it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from latent_ae.config import UserError, load_settings
from latent_ae_train import TrainSettings, train
from latent_ae_train.preflight import try_passes
from tests.distributed import children, own_objective
from tests.distributed.own_objective import Judged
from tests.runs import differing_tensors, words
from tests.tiny import build_step, global_batch, micro_batches, moved, settings_for, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("edges", ROOT / "examples/edges.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["edges"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_example() -> None:
    assert (ROOT / "examples/edges.py").read_text() in (ROOT / "docs/objectives.md").read_text()


def test_its_gradient_joins_the_others(example: ModuleType) -> None:
    """Against one autograd pass over both terms written out; two passes make the step."""
    settings = settings_for(optim={"lr": 1e-30}, batch_size=4, micro_batch_size=2)
    step = build_step(settings, more=[example.Edges(weight=0.5)])
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    logs = step(0, micro_batches(0, settings))
    reference, (images, noise) = build_step(settings).bare_reconstructor, global_batch(0, settings)
    difference = reference(images, noise).image - images
    across = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    down = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    (difference.abs().mean() + 0.5 * (across + down)).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)
    edges = float((across + down).detach())
    assert float(logs["edges"]) == pytest.approx(edges, rel=1e-5)
    assert float(logs["edges_average"]) == pytest.approx(0.1 * edges, rel=1e-5)


def test_what_it_remembers_is_rolled_back_with_a_skipped_step(example: ModuleType) -> None:
    settings = settings_for(batch_size=4)
    step = build_step(settings, more=[example.Edges(weight=0.5)])
    step(0, micro_batches(0, settings))
    before = step.objectives["edges"].average.clone()
    (batch,) = micro_batches(1, settings)
    batch.images[0, 0, 0, 0] = torch.nan
    step(1, iter([batch]))
    assert step.skipped_steps()[0] == [1] and torch.equal(step.objectives["edges"].average, before)


def test_its_parameters_and_its_adversary_train_and_its_buffers_roll_back() -> None:
    settings = settings_for(batch_size=4, micro_batch_size=2)
    step = build_step(settings, more=[Judged()])
    own = step.objectives["judged"]
    assert set(step.state.state_dict()) == {"judged.gain", "judged.passes"} and "judged" in step.optimizers.by_name
    judge, gain = weights(own.adversary), own.gain.item()
    logs = step(0, micro_batches(0, settings))
    assert moved(judge, weights(own.adversary)) == set(judge) and own.gain.item() != gain
    assert float(own.passes) == 2 and float(logs["grad_norm_judged"]) > 0
    try_passes(step, next(micro_batches(1, settings)))
    assert float(own.passes) == 2 and own.gain.grad is None
    batches = list(micro_batches(1, settings))
    batches[0].images[0, 0, 0, 0] = torch.nan
    before = weights(own.adversary)
    step(1, iter(batches))
    assert step.skipped_steps()[0] == [1] and float(own.passes) == 2 and not moved(before, weights(own.adversary))


@pytest.mark.trained
def test_its_gradients_are_those_of_the_global_batch(tmp_path: Path) -> None:
    """8 samples in one pass, and on two processes with two passes of 2 each."""
    expected = own_objective.gradients(build_step(settings_for(batch_size=8), more=[Judged()]))
    code, error = children.call(2, own_objective.on_two_processes, tmp_path, folder=tmp_path)
    assert code == 0, error
    found = torch.load(tmp_path / "two.pt", weights_only=True)
    assert set(found) == {"gain", "weight", "bias"} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_two_of_one_name_are_refused(example: ModuleType) -> None:
    with pytest.raises(UserError, match="each needs a name of its own, and there are two: edges"):
        build_step(settings_for(), more=[example.Edges(0.5), example.Edges(1.0)])


@pytest.mark.usefixtures("no_finish")
def test_a_run_with_it_goes_on_bit_for_bit_and_not_without_it(
    example: ModuleType, pictures: Path, tmp_path: Path
) -> None:
    constant = ("optim.schedule=constant",)

    def run(name: str, steps: int, *weights: float) -> Path:
        command, *changes = words(pictures, tmp_path / name, f"steps={steps}", "checkpoint.every=3", *constant)[1:]
        settings = load_settings(TrainSettings, command, changes)
        train(settings, objectives=[example.Edges(weight) for weight in weights])
        return tmp_path / name

    whole = run("whole", 6, 0.5)
    run("parts", 3, 0.5)
    with pytest.raises(UserError, match="the objectives passed to train\\(\\)"):
        run("parts", 6)
    parts = run("parts", 6, 0.5)
    last = "checkpoints/step-00000006"
    assert not differing_tensors(whole / last, parts / last)
    assert float(load_file(parts / last / "objectives.safetensors")["edges.average"]) > 0
    lines = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert all(line["edges_average"] > 0 for line in lines if line["event"] == "train")
