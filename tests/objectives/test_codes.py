"""Codebooks in training: codes of length 1, running means, the entropy penalty and fixed levels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.models.fsq import grid
from latent_ae.models.quantize import Quantiser
from latent_ae.models.reconstruct import codebooks_of
from latent_ae.objectives.code_averages import SMALLEST
from latent_ae.objectives.code_entropy import SMOOTHING, entropy_penalty
from latent_ae_train.build import planned_autoencoder, starting_autoencoder
from latent_ae_train.plan import describe_plan
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep
from tests.distributed.split import restore, saved
from tests.runs import SHAPES
from tests.tiny import build_step, micro_batches, settings_for

LATENT = (3, 8, 8)
SHAPE = {**SHAPES["VQModel"], "block_out_channels": [8, 8], "layers_per_block": 1}
UNIT = {"normalised": True, "gradient": "rotation", "entropy": 0.1, "entropy_temperature": 0.1}
AVERAGED = {**UNIT, "ema_decay": 0.9}
LEVELS = {"levels": [4, 3, 5]}


def settings_of(codebook: dict[str, Any], **changes: Any) -> TrainSettings:
    """Tiny settings of a VQModel, whose unused codes restart at once where they learn."""
    model = {"kind": "VQModel", "config": {**SHAPE}}
    if "levels" in codebook:
        del model["config"]["vq_embed_dim"]  # both follow from the levels
        model["config"]["num_vq_embeddings"] = None
    loss = {} if "levels" in codebook else {"revive_after": 1}
    return settings_for(model=model, codebook=codebook, loss=loss, **changes)


def take(step: TrainStep, number: int) -> dict[str, Tensor]:
    return step(number, micro_batches(number, step.settings, latent=LATENT))


def codes_of(step: TrainStep) -> Tensor:
    return step.bare_reconstructor.codebooks[0].detach().clone()


@pytest.mark.parametrize("codebook", [UNIT, AVERAGED, LEVELS], ids=lambda one: "-".join(one))
def test_training_goes_on_from_what_a_checkpoint_holds(codebook: dict[str, Any]) -> None:
    """Bit for bit, with codes that restart and averaged weights; codes keep their length or their place."""
    settings = settings_of(codebook, ema={"decay": 0.5}, optim={"weight_decay": 0.1})
    whole, part = build_step(settings), build_step(settings)
    start = codes_of(whole)
    take(whole, 0)
    restore(part, saved(whole))
    for step in (whole, part):
        take(step, 1)
        logs = take(step, 2)
    for one, other in zip((*whole.networks, whole.ema.module), (*part.networks, part.ema.module), strict=True):
        assert all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())
    averaged = whole.ema.module.quantize.embedding.weight
    for codes in (codes_of(whole), averaged):
        if "normalised" in codebook:
            torch.testing.assert_close(codes.norm(dim=1), torch.ones(len(codes)))
        assert torch.equal(codes, start) == ("levels" in codebook)
    assert not torch.equal(codes_of(whole), averaged) or "levels" in codebook
    assert logs["codebook_perplexity"] > 1 and ("codebook" in logs) == ("levels" not in codebook)


@pytest.mark.parametrize("codebook", [AVERAGED, LEVELS], ids=lambda one: "-".join(one))
def test_a_step_that_is_skipped_changes_nothing(codebook: dict[str, Any]) -> None:
    step = build_step(settings_of(codebook))
    take(step, 0)
    before = [tensor.clone() for network in step.networks for tensor in network.state_dict().values()]
    (batch,) = micro_batches(1, step.settings, latent=LATENT)
    step(1, iter([batch._replace(images=batch.images * torch.nan)]))
    after = [tensor for network in step.networks for tensor in network.state_dict().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(("normalised", "micro"), [(False, 8), (True, 4)])
def test_codes_are_the_running_means_of_a_textbook_loop(normalised: bool, micro: int) -> None:
    """van den Oord et al. 2017, appendix A.1, with Laplace smoothing, over latents that are collected on the way."""
    settings = settings_of({"ema_decay": 0.8, "normalised": normalised}, micro_batch_size=micro, optim={"lr": 1e-30})
    step = build_step(settings.model_copy(update={"loss": settings.loss.model_copy(update={"revive_after": 0})}))
    codes, count = codes_of(step), torch.ones(32)
    total = codes.clone()
    optimised = [id(p) for group in step.optimizers.autoencoder.param_groups for p in group["params"]]
    assert id(step.bare_reconstructor.codebooks[0]) not in optimised
    for number in range(3):
        with torch.no_grad():
            batches = list(micro_batches(number, settings, latent=LATENT))
            latents = torch.cat([step.bare_reconstructor(batch.images).mean for batch in batches])
        latents = latents.movedim(1, -1).flatten(0, 2)
        latents = F.normalize(latents, dim=1) if normalised else latents
        chosen = torch.stack([(latents - code).square().sum(1) for code in codes], 1).argmin(1)
        take(step, number)
        for code in range(32):
            own = latents[chosen == code]
            count[code] = 0.8 * count[code] + 0.2 * len(own)
            total[code] = 0.8 * total[code] + 0.2 * own.sum(0)
        smooth = (count + SMALLEST) / (count.sum() + 32 * SMALLEST) * count.sum()
        codes = total / smooth[:, None]
        if normalised:  # a sum goes on in the direction of its code
            codes = F.normalize(codes, dim=1)
            total = codes * smooth[:, None]
        torch.testing.assert_close(codes_of(step), codes, rtol=1e-4, atol=1e-6)
    assert len(chosen.unique()) > 3 and step.state["code_averages"].uses.sum() > 100


def test_a_running_mean_restarts_as_a_latent_and_goes_on_from_there() -> None:
    step = build_step(settings_of({"ema_decay": 0.9}, optim={"lr": 1e-30}))
    take(step, 0)
    candidates = step.objectives["codebook"].candidates[0]
    codes = codes_of(step)
    restarted = (codes[:, None] == candidates).all(2).any(1)
    assert restarted.sum() > 16 and step.objectives["codebook"].code_age.max() == 0
    before = len(step.optimizers.autoencoder.state)
    take(step, 1)
    moved = (codes_of(step) - codes).norm(dim=1) / codes.norm(dim=1)
    assert (moved[restarted] < 1).all() and len(step.optimizers.autoencoder.state) == before


def test_a_running_mean_that_no_latent_chose_stays_where_it_is() -> None:
    """However rarely it was used, as after many restarts, when smoothing weighs as much as its uses."""
    settings = settings_of({"ema_decay": 0.9}, optim={"lr": 1e-30})
    settings = settings.model_copy(update={"loss": settings.loss.model_copy(update={"revive_after": 0})})
    step = build_step(settings)
    step.state["code_averages"].uses[8:] = SMALLEST / 10
    before = codes_of(step)
    for number in range(3):
        take(step, number)
    unused = step.state["code_averages"].uses <= SMALLEST / 10
    assert 3 < unused.sum() < 32 and torch.equal(codes_of(step)[unused], before[unused])
    assert not torch.equal(codes_of(step)[~unused], before[~unused])


@pytest.mark.parametrize("codebook", [{}, UNIT, AVERAGED], ids=["plain", "unit", "averaged"])
def test_a_code_that_restarts_does_so_in_the_averaged_weights(codebook: dict[str, Any]) -> None:
    """They are what is validated and exported, and would move to the new place for thousands of steps."""
    step = build_step(settings_of(codebook, ema={"decay": 0.9}))
    restarts = 0
    for number in range(4):
        take(step, number)
        ((_, dead),) = step.objectives["codebook"].restarted
        averaged, codes = codebooks_of(step.ema.module)[0], codes_of(step)
        assert torch.equal(averaged[dead], codes[dead])
        assert not torch.equal(averaged[~dead], codes[~dead])
        restarts += int(dead.sum())
    assert restarts > 3


def test_trained_codes_do_not_restart_at_once(tmp_path: Path) -> None:
    """Fresh ones that the first step does not use do; those of init_from have not been unused for any step."""
    fresh = settings_of({}, optim={"lr": 1e-30}).model_copy(update={"train": "all"})
    fresh = fresh.model_copy(update={"loss": fresh.loss.model_copy(update={"revive_after": 2})})
    step = build_step(fresh)
    step.bare_reconstructor.autoencoder.save_pretrained(tmp_path / "trained")
    trained = build_step(fresh.model_copy(update={"init_from": str(tmp_path / "trained")}))
    for one, changed in ((step, [True, False, False]), (trained, [False, False, True])):
        for number, expected in enumerate(changed):
            before = codes_of(one)
            take(one, number)
            assert torch.allclose(codes_of(one), before) != expected, (number, expected)


def textbook_penalty(latents: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """LlamaGen's, by explicit distances and autograd through both terms."""
    distances = (latents[:, None] - codebook).square().sum(2)
    p = torch.softmax(-distances / temperature, 1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()


def test_the_entropy_penalty_at_its_own_mean_is_the_textbook_one() -> None:
    torch.manual_seed(0)
    latents, codebook = torch.randn(50, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    with torch.no_grad():
        _, entropy, mean = entropy_penalty(latents, codebook, torch.full((7,), 1 / 7), 0.5)
    assert float(entropy - torch.special.entr(mean).sum()) == pytest.approx(
        float(textbook_penalty(latents, codebook, 0.5).detach()), abs=1e-5
    )
    loss, _, _ = entropy_penalty(latents, codebook, mean, 0.5)
    expected = torch.autograd.grad(textbook_penalty(latents, codebook, 0.5), (latents, codebook))
    for one, other in zip(torch.autograd.grad(loss, (latents, codebook)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # with the mean of the step before, the second term pulls towards what was rare then
    rare = torch.full((7,), 0.15)
    rare[2] = 0.1
    loss, _, mean = entropy_penalty(latents, codebook, rare, 0.5)
    first = loss - mean @ rare.log()
    assert float(first.detach()) == pytest.approx(float(entropy), abs=1e-6)
    assert entropy_penalty(latents, codebook, torch.eye(7)[0], 0.01)[0].isfinite()


def gradients_of(step: TrainStep, number: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hook = step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    take(step, number)
    hook.remove()
    return found


@pytest.mark.parametrize("micro", [8, 2])
def test_the_entropy_penalty_of_a_step_is_of_the_whole_batch(micro: int) -> None:
    """However it is split: against autograd over the whole batch, with the mean that the steps before left."""
    codebook = {"entropy": 0.3, "entropy_temperature": 0.05, "normalised": True}
    settings = settings_of(codebook, micro_batch_size=micro)
    step = build_step(settings)
    take(step, 0)
    objective, start = step.objectives["code_entropy"], saved(step)
    before = objective.assignment.clone()
    assert float(before.sum()) == pytest.approx(1.0) and before.std() > 0
    found = gradients_of(step, 1)

    plain = build_step(settings_of({"normalised": True}, micro_batch_size=8))
    plain.bare_reconstructor.load_state_dict(start["reconstructor"])
    model, (batch,) = plain.bare_reconstructor, micro_batches(1, plain.settings, latent=LATENT)
    latents = F.normalize(model(batch.images).mean.movedim(1, -1).flatten(0, 2), dim=1)
    table = F.normalize(model.codebooks[0], dim=1)
    p = torch.softmax(-torch.stack([(latents - code).square().sum(1) for code in table], 1) / 0.05, 1)
    penalty = -(p * p.log()).sum(1).mean() + (p.mean(0) * before.log()).sum()
    names = [name for name, _ in model.named_parameters()]
    added = torch.autograd.grad(0.3 * penalty, list(model.parameters()), allow_unused=True)
    rest = gradients_of(plain, 1)
    for name, own in zip(names, added, strict=True):
        expected = rest[name] if own is None else rest[name] + own
        assert float((found[name] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-8, name
    assert float(added[names.index("autoencoder.encoder.conv_in.weight")].norm()) > 1e-3
    torch.testing.assert_close(objective.assignment, SMOOTHING * before + (1 - SMOOTHING) * p.mean(0).detach())


@pytest.mark.parametrize("codebook", [AVERAGED, LEVELS], ids=lambda one: "-".join(one))
def test_a_stock_model_has_the_codes_and_images_of_training(codebook: dict[str, Any], tmp_path: Path) -> None:
    step = build_step(settings_of(codebook, ema={"decay": 0.5}))
    for number in range(3):
        take(step, number)
    (batch,) = micro_batches(3, step.settings, latent=LATENT)
    how = Quantiser(levels=(4, 3, 5)) if "levels" in codebook else Quantiser(normalised=True, rotation=True)
    step.bare_reconstructor.autoencoder.save_pretrained(tmp_path)
    stock = VQModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        trained = step.bare_reconstructor(batch.images, quantiser=how)
        latent = stock.encode(batch.images).latents
        _, _, (_, _, indices) = stock.quantize(latent)
        torch.testing.assert_close(stock.decode(latent).sample, trained.image, rtol=0, atol=1e-5)
    assert torch.equal(indices, trained.codes[0].indices.flatten()) and len(indices.unique()) > 3
    if "levels" in codebook:
        assert (stock.config.num_vq_embeddings, stock.config.vq_embed_dim) == (60, 3)
        assert torch.equal(stock.quantize.embedding.weight, grid([4, 3, 5]))


def test_codes_of_other_lengths_are_normalised_at_the_start(tmp_path: Path) -> None:
    starting_autoencoder(settings_of({})).save_pretrained(tmp_path)
    settings = settings_for(model={}, codebook={"normalised": True}, init_from=str(tmp_path))
    settings = settings.model_copy(update={"model": type(settings.model)()})
    before = VQModel.from_pretrained(tmp_path).quantize.embedding.weight
    torch.testing.assert_close(codes_of(build_step(settings)), F.normalize(before, dim=1).detach())


ALONE = {"model": {"kind": "VQModel", "config": SHAPE}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codebook": {"normalised": True}}, "codebook.normalised: is for a codebook, which this AutoencoderKL does"),
        ({"codebook": {"gradient": "rotation"}}, "codebook.gradient: is for a codebook"),
        ({"codebook": {"entropy": 0.1}}, "codebook.entropy: is for a codebook"),
        ({"codebook": {"ema_decay": 0.9}}, "codebook.ema_decay: is for a codebook"),
        ({"codebook": {"levels": [3, 3]}}, "codebook.levels: is for a codebook"),
        (
            {**ALONE, "codebook": {"levels": [8, 5]}},
            "model.config: this VQModel has 32 codes of 3 channels, and codebook.levels make 40 of 2: set "
            "num_vq_embeddings to 40 and vq_embed_dim to 2, or leave both out",
        ),
        (
            {**ALONE, "codebook": {"levels": [4, 4, 2], "entropy": 0.1, "normalised": True}},
            "codebook.levels: fix the codes, and codebook.normalised, codebook.entropy would be for codes that learn",
        ),
        ({**ALONE, "codebook": {"levels": [4, 4, 2]}, "loss": {"commitment": 1}}, "loss.commitment: is for codes that"),
        ({**ALONE, "codebook": {"levels": [999, 999, 999]}}, "codebook.levels: make 997,002,999 codes, more than 1,04"),
        ({**ALONE, "codebook": {"ema_decay": 0.9}, "train": "decoder"}, "changes codes, which train leaves fixed"),
        (
            {**ALONE, "codebook": {"normalised": True}, "train": ["encoder.*"]},
            "which train leaves fixed: set it to fal",
        ),
        ({**ALONE, "codebook": {"entropy": 0.1}, "train": "decoder"}, "is for encoder and codes, which train leaves"),
        ({**ALONE, "codebook": {"gradient": "rotation"}, "train": "decoder"}, "codebook.gradient: is for encoder and"),
    ],
)
def test_what_does_not_go_together_is_one_message(changes: dict[str, Any], said: str) -> None:
    model = {"model": {}} if "model" not in changes else {}
    with pytest.raises(UserError) as refused:
        planned_autoencoder(
            TrainSettings.load(
                None,
                *[f"{key}={json.dumps(value)}" for key, value in ({**model, **changes}).items()],
                "data.resolution=32",
                "gan.weight=0",
            )
        )
    text = str(refused.value)
    assert said in text and text.count("\n") == 1


def test_codes_that_no_gradient_moves_do_not_train_alone() -> None:
    from latent_ae_train.build import build_objectives

    settings = settings_of({"ema_decay": 0.9}, train=["quantize"])
    with pytest.raises(UserError, match="train: names only codes"):
        build_objectives(settings, starting_autoencoder(settings), torch.device("cpu"))


def test_the_plan_states_how_codes_learn() -> None:
    def line(codebook: dict[str, Any]) -> list[str]:
        rows = describe_plan(settings_of(codebook)).splitlines()
        return [row.removeprefix("codebook:").strip() for row in rows if row.startswith("codebook:")]

    assert line({}) == ["commitment 0.25, codes unused for 1 steps restart"]
    assert line(AVERAGED) == [
        "gradient rotated, codes are means of latents, decay 0.9, commitment 0.25, codes unused for 1 steps restart, "
        "entropy penalty 0.1 at temperature 0.1, codes of length 1"
    ]
    assert line(LEVELS) == ["fixed, 4 x 3 x 5 levels"]
    (stays,) = [row for row in describe_plan(settings_of({}, train="decoder")).splitlines() if "codebook:" in row]
    assert stays.endswith("codes stay as they are")
    assert "codebook" not in describe_plan(settings_for())
