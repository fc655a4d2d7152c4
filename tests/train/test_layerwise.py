"""Learning rates by layer and centred inputs, against the centred layers written out and against plain AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latent_ae.config import UserError, load_settings
from latent_ae_train.checkpoint import load_checkpoint, save_checkpoint
from latent_ae_train.layerwise import Layerwise
from latent_ae_train.settings import TrainSettings
from tests.tiny import MODEL, STATE, build_step, global_batch, micro_batches, moved, settings_for, weights

LINEAR = {**MODEL, "init": "linear", "norm_num_groups": 2}


def linear(width: int, **optim: Any) -> TrainSettings:
    model = {**LINEAR, "block_out_channels": [width, width], "norm_num_groups": width // 8}
    return settings_for(model=model, optim={"lr": 1e-4, **optim})


def test_a_step_is_that_of_centred_layers() -> None:
    """Each layer as W (x - a) + b, whose weights and bias AdamW trains."""
    step = build_step(linear(16, lr=1e-3, eps=1e-5))  # gradients that are rounding noise do not count
    layerwise, model = step.optimizers.layerwise, step.bare_reconstructor
    assert layerwise is not None
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    images, noise = global_batch(0, step.settings)
    names = {layer: name for name, layer in model.named_modules()}
    centred = {names[layer]: mean for layer, mean in layerwise.means.items()}
    assert len(centred) == sum(isinstance(one, (nn.Conv2d, nn.Linear)) for one in model.modules())

    def offset(name: str, values: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = values[f"{name}.weight"]
        return (weight.sum((2, 3)) if weight.ndim == 4 else weight) @ centred[name]

    own = {name: value.clone() for name, value in before.items()}
    for name in centred:  # the bias of the centred layer, which has W a besides
        own[f"{name}.bias"] = own[f"{name}.bias"] + offset(name, own)
    own = {name: value.requires_grad_() for name, value in own.items()}
    groups = [{"params": [p], "lr": 1e-3 * layerwise.scale(dict(model.named_parameters())[n])} for n, p in own.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for number in range(2):
        images, noise = global_batch(number, step.settings)
        plain = {**own, **{f"{name}.bias": own[f"{name}.bias"] - offset(name, own) for name in centred}}
        optimizer.zero_grad()
        F.l1_loss(torch.func.functional_call(model, plain, (images, noise)).image, images).backward()
        optimizer.step()
        step(number, micro_batches(number, step.settings))
    after = dict(model.named_parameters())
    moved_by = sum((after[name].detach() - before[name]).square().sum() for name in after).sqrt()
    expected = {**own, **{f"{name}.bias": own[f"{name}.bias"] - offset(name, own) for name in centred}}
    apart = sum((after[name] - expected[name]).detach().square().sum() for name in after).sqrt()
    assert float(apart) < 1e-3 * float(moved_by)


@pytest.mark.parametrize(("layerwise", "low", "high"), [(True, 0.6, 1.7), (False, 2.3, 10.0)])
def test_the_width_does_not_change_how_far_a_first_step_goes(layerwise: bool, low: float, high: float) -> None:
    """The change of the reconstruction by one step at four times the width, relative to that of the narrow one."""
    changes = []
    for width in (64, 256):
        step = build_step(linear(width, layerwise=layerwise))
        images, _ = global_batch(0, step.settings)
        with torch.no_grad():
            before = step.bare_reconstructor(images).image
        step(0, micro_batches(0, step.settings))
        with torch.no_grad():
            changes.append(float((step.bare_reconstructor(images).image - before).square().mean().sqrt()))
    assert low < changes[1] / changes[0] < high


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """With what was measured when it began, whatever another processor or another init_from would give."""
    settings = linear(256)
    step, again = build_step(settings), build_step(settings)
    assert again.optimizers.layerwise is not None
    for one in again.optimizers.layerwise.buffers():
        one.mul_(3)
    again.optimizers.autoencoder = again.optimizers.new_adamw()
    groups = [[len(group["params"]) for group in one.optimizers.autoencoder.param_groups] for one in (step, again)]
    assert groups[0] != groups[1]
    for number in range(2):
        step(number, micro_batches(number, settings))
    load_checkpoint(save_checkpoint(tmp_path, step, {**STATE, "step": 2}), again)
    for each in (step, again):
        each(2, micro_batches(2, settings))
    assert not moved(weights(step.bare_reconstructor), weights(again.bare_reconstructor))


def test_a_checkpoint_of_an_older_version_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    step = build_step(linear(16))
    checkpoint = save_checkpoint(tmp_path, step, {**STATE, "step": 2})
    (checkpoint.folder / "layerwise.safetensors").unlink()
    with pytest.raises(UserError, match="written by an older version"):
        load_checkpoint(checkpoint, step)


def test_all_processes_take_what_the_first_one_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of processors may round a layer's rate to different powers of 2."""
    model = build_step(linear(256)).bare_reconstructor
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.fill_(401.0))
    layerwise = Layerwise(model, (16, 16))
    assert {layerwise.scale(one.weight) for one in layerwise.means} == {0.5}
    assert all(bool((mean == 401.0).all()) for mean in layerwise.means.values())


def test_it_belongs_to_the_linear_start() -> None:
    assert linear(16).layerwise and not settings_for().layerwise
    assert not linear(16, layerwise=False).layerwise and settings_for(optim={"layerwise": True}).layerwise
    plain = build_step(settings_for()).optimizers
    assert plain.layerwise is None and len(plain.autoencoder.param_groups) == 1
    wide = build_step(linear(256)).optimizers
    scales = {group["lr_scale"] for group in wide.autoencoder.param_groups}
    assert max(scales) == 1.0 and min(scales) == 0.25


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("optim.kind=muon", "is for adamw"),
        ("model.kind=HierarchicalVAE data.resolution=32", "is for first stages with a Gaussian posterior"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"optim.layerwise: {expected}"):
        load_settings(TrainSettings, None, ["optim.layerwise=true", *words.split()])
