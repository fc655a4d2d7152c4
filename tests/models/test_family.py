"""Every class of first stage trains, resumes, exports for stock diffusers; and the codebook of a VQModel."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file

from latent_ae.__main__ import main
from latent_ae.models.build import build_autoencoder, factor_of, latent_channels_of
from latent_ae.models.loading import load_first_stage
from latent_ae.models.quantize import Quantiser, Relaxation, quantised
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.models.registry import BLOCKS, class_of, module_of
from latent_ae.models.settings import ModelSettings
from latent_ae.objectives.codebook import code_counts, codebook_loss, perplexity
from latent_ae_train.build import compile_blocks, starting_autoencoder
from latent_ae_train.settings import TrainSettings
from tests.runs import SHAPES, difference_of_the_third_step, differing_tensors, family_words, words
from tests.tiny import SIDE, build_step, micro_batches, settings_for


@pytest.mark.parametrize("kind", SHAPES)
def test_every_class_trains_and_its_export_is_stock(
    pictures: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(family_words(pictures, run, kind)) == 0
    before, after = (load_file(run / f"checkpoints/step-0000000{n}/autoencoder.safetensors") for n in (2, 6))
    learning = [name for name in before if "condition_encoder" not in name and not name.startswith("bn.")]
    assert all(not torch.equal(before[name], after[name]) for name in learning)
    stock = class_of(kind).from_pretrained(run / "export").eval()
    averaged = load_file(run / "checkpoints/step-00000006/ema.safetensors")
    assert all(torch.equal(stock.state_dict()[name], averaged[name]) for name in learning)
    results = json.loads((run / "results.json").read_text())
    assert results["export"]["max_abs_difference"] <= 1e-5
    assert all(results["held_out"]["after"][key] is not None for key in ("psnr", "ssim"))
    if "scaling_factor" in stock.config:
        assert stock.config.scaling_factor == pytest.approx(1 / results["latents"]["std"])
    # levels packed into 1 x 1 have too many channels for figures of each
    assert (len(results["latents"]["channel_mean"]) == 1) == (kind == "HierarchicalVAE")
    assert f"from {module_of(kind)} import {kind}\n" in (run / "export/README.md").read_text()
    # a checkpoint is a first stage, too, and another run can begin with the export, told its shape or not
    assert load_first_stage(str(run / "checkpoints/step-00000006")).name == kind
    for model in ({}, {"kind": kind, "config": SHAPES[kind]}):
        settings = TrainSettings.model_validate(
            {"model": model, "init_from": str(run / "export"), "data": {"resolution": 16}}
        )
        start = starting_autoencoder(settings).state_dict()
        assert all(torch.equal(start[name], averaged[name]) for name in learning)
    assert main(words(pictures, tmp_path / "other", f"init_from={run / 'export'}")) == 2
    assert "model.kind: AutoencoderKL, and init_from brings" in capsys.readouterr().err


def test_pipelines_that_cannot_use_a_class_or_its_shape_are_refused_before_the_first_step(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for family, told in (
        ("sana", "latent_channels is 4, its denoisers take 32: train with model.config.latent_channels=32"),
        (
            "flux2",
            "flux2: its pipelines take the class AutoencoderKLFlux2, not AutoencoderDC: it may fit sana",
        ),
    ):
        assert main(family_words(pictures, run, "AutoencoderDC", f"export_for={family}")) == 2
        assert told in " ".join(capsys.readouterr().err.split())
        assert not (run / "checkpoints").exists()


def test_flux2_latents_are_normalised_by_its_batch_norm(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(family_words(pictures, run, "AutoencoderKLFlux2", "steps=2")) == 0
    stock = diffusers.AutoencoderKLFlux2.from_pretrained(run / "export").eval()
    found = json.loads((run / "results.json").read_text())["latents"]
    # as the pipeline makes patches: channel after channel, each with its 2 x 2 places
    means, deviations = ([value for value in found[key] for _ in range(4)] for key in ("channel_mean", "channel_std"))
    assert stock.bn.running_mean.tolist() == pytest.approx(means, rel=1e-5)
    assert stock.bn.running_var.sqrt().tolist() == pytest.approx(deviations, rel=1e-5)


@pytest.mark.trained
@pytest.mark.usefixtures("no_finish")
def test_a_codebook_resumes_and_splits_alike(pictures: Path, tmp_path: Path) -> None:
    """With codes that are revived on the way, have length 1, are running means, and share an entropy penalty."""
    codes = "codebook={normalised: true, gradient: rotation, entropy: 0.1, ema_decay: 0.9}"
    more = ("optim.schedule=constant", "loss.revive_after=1", "micro_batch_size=2", "ema.decay=0.5", codes)
    whole, parts, two = tmp_path / "whole", tmp_path / "parts", tmp_path / "two"
    assert main(family_words(pictures, whole, "VQModel", *more)) == 0
    assert main(family_words(pictures, parts, "VQModel", *more, "steps=2")) == 0
    shutil.copytree(parts, two)
    assert main(family_words(pictures, parts, "VQModel", *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(whole / last, parts / last) == []
    assert difference_of_the_third_step(two, family_words(pictures, two, "VQModel", *more)) < 1e-5
    events = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    logged = [event for event in events if event["event"] == "train"]
    assert all(1 <= event["codebook_perplexity"] <= 32 and 0 < event["codebook_used"] <= 1 for event in logged)
    assert all("kl" not in event and event["codebook"] > 0 for event in logged)


@pytest.mark.usefixtures("no_finish")
def test_reviving_puts_more_codes_to_use(pictures: Path, tmp_path: Path) -> None:
    """diffusers' fresh codes lie near 0 together, and most are never the nearest."""
    used = []
    for revive_after in (0, 2):
        run = tmp_path / f"revive-{revive_after}"
        more = ("steps=40", f"loss.revive_after={revive_after}", "gan.weight=0", "log.every=40", "optim.lr=1e-3")
        assert main(family_words(pictures, run, "VQModel", *more, "checkpoint.every=40", "validate.every=40")) == 0
        events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        used.append([event for event in events if event["event"] == "train"][-1]["codebook_used"])
    assert used[1] > 2 * used[0] and used[1] > 0.5


def test_a_code_starts_again_after_so_many_steps_without_use() -> None:
    settings = settings_for(model={"kind": "VQModel", "config": SHAPES["VQModel"]}, loss={"revive_after": 2})
    step = build_step(settings)
    step(0, micro_batches(0, settings, latent=(3, 8, 8)))
    objective, model, optimizer = step.objectives["codebook"], step.bare_reconstructor, step.optimizers.autoencoder
    codebook, moments = model.codebooks[0], optimizer.state[model.codebooks[0]]

    def after(number: int, counts: torch.Tensor, skipped: torch.Tensor) -> None:
        """The step's own part rolls back what is remembered when it was skipped."""
        before = objective.code_age.clone()
        objective.remember({"codebook/counts": counts}, {})
        objective.after_update(number, skipped, model, optimizer)
        objective.code_age.copy_(torch.where(skipped, before, objective.code_age))

    objective.code_age.zero_()
    moments["exp_avg"].fill_(1.0)
    before = codebook.detach().clone()
    good, bad = torch.tensor(False), torch.tensor(True)
    always, once = torch.eye(32)[0], torch.eye(32)[:2].sum(0)
    for number, counts in enumerate((always, once), start=1):
        after(number, counts, good)
        assert torch.equal(codebook, before)
    after(3, always, bad)
    assert torch.equal(codebook, before) and objective.code_age.tolist() == [0, 0] + [2] * 30
    after(3, always, good)
    assert objective.code_age.tolist() == [0, 1] + [0] * 30
    assert torch.equal(codebook[:2], before[:2]) and (codebook[2:] != before[2:]).any(1).all()
    (candidates,) = objective.candidates
    assert candidates.shape == (64, 3) and len(candidates.unique(dim=0)) == 64
    assert (codebook[2:, None] == candidates).all(2).any(1).all(), "each is a latent of the step's first sample"
    assert len(codebook[2:].unique(dim=0)) == 30, "of two equal codes one would never be the nearest"
    assert (moments["exp_avg"][:2] == 1).all() and not moments["exp_avg"][2:].any()
    objective.candidates = [candidates[:20]]  # of a coarse grid
    before, objective.code_age = codebook.detach().clone(), torch.full((32,), 2.0)
    after(4, torch.zeros(32), good)
    assert objective.code_age.tolist() == [0] * 20 + [3] * 12 and torch.equal(codebook[20:], before[20:])
    assert {tuple(row) for row in codebook[:20].tolist()} == {tuple(row) for row in candidates[:20].tolist()}
    after(5, torch.zeros(32), good)
    assert objective.code_age.tolist() == [1] * 20 + [0] * 12, "the others restart in the next step"


def test_codes_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    shape = {key: tuple(value) if isinstance(value, list) else value for key, value in SHAPES["VQModel"].items()}
    model = VQModel(**shape)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    latent = torch.randn(2, 3, 5, 4, requires_grad=True)
    ours, codes = quantised(latent, model.quantize.embedding.weight)
    theirs, their_loss, (_, _, indices) = model.quantize(latent)
    assert torch.equal(codes.indices.flatten(), indices)
    assert torch.allclose(ours, theirs, atol=1e-6)
    (slope,) = torch.autograd.grad((ours * torch.arange(4.0)).sum(), latent)
    assert torch.equal(slope, torch.arange(4.0).expand_as(latent)), "straight through"
    # diffusers puts the weight on the term of the codes, the paper on that of the latents: the sum is the same
    loss = codebook_loss(latent, codes.vectors, 0.25)
    assert float(loss.detach()) == pytest.approx(float(their_loss.detach()), rel=1e-5)
    to_latent, to_codes = torch.autograd.grad(loss, (latent, model.quantize.embedding.weight))
    away = latent.detach() - codes.vectors.detach()
    assert torch.allclose(to_latent, 0.25 * 2 * away / away.numel(), atol=1e-7)
    expected = torch.zeros_like(to_codes).index_add_(0, indices, -2 * away.movedim(1, -1).flatten(0, 2) / away.numel())
    assert torch.allclose(to_codes, expected, atol=1e-7)


def test_perplexity_and_counts() -> None:
    assert float(perplexity(torch.ones(8))) == pytest.approx(8)
    assert float(perplexity(torch.tensor([5.0, 0.0, 0.0]))) == pytest.approx(1)
    assert float(perplexity(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)
    assert code_counts(torch.tensor([[[0, 2], [2, 2]]]), 4).tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.config={num_vq_embedings: 5}", "model.config.num_vq_embedings: VQModel has no such key"),
        ("model.config={block_out_channels: [7]}", "model.config: VQModel refuses it"),
        ("model.latent_channels=5", "model.latent_channels: is AutoencoderKL's"),
        ("data.resolution=15", "data.resolution: 15 is not a multiple"),
        ("model.kind=VQGAN", "model.kind"),
    ],
)
def test_mistakes_are_said(
    pictures: Path, tmp_path: Path, word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(family_words(pictures, tmp_path / "run", "VQModel", word)) == 2
    assert said in capsys.readouterr().err


def quantiser_for(kind: str, noise: torch.Tensor) -> Quantiser:
    """One with which gradients reach the encoder."""
    codes = SHAPES["DiscreteVAE"]["num_vq_embeddings"]
    relaxation = Relaxation(torch.zeros(len(noise), codes, *noise.shape[2:]), 1.0)
    return Quantiser(relaxation=relaxation if kind == "DiscreteVAE" else None)


@pytest.mark.parametrize("kind", SHAPES)
def test_what_init_from_brings_learns_as_a_fresh_one_does(tmp_path: Path, kind: str) -> None:
    """Several processes wait for the gradient of every weight that asks for one."""
    model = ModelSettings(kind=kind, config=SHAPES[kind])
    build_autoencoder(model, sample_size=SIDE).save_pretrained(tmp_path)
    fresh, brought = (
        starting_autoencoder(settings_for(**change))
        for change in (
            {"model": model.model_dump()},
            {"model": ModelSettings().model_dump(), "init_from": str(tmp_path)},
        )
    )
    learning = [name for name, weight in brought.named_parameters() if weight.requires_grad]
    assert learning == [name for name, weight in fresh.named_parameters() if weight.requires_grad]
    images = torch.rand(2, 3, SIDE, SIDE)
    noise = torch.randn(2, latent_channels_of(brought), *2 * [SIDE // factor_of(brought)])
    result = Reconstructor(brought)(images, noise, quantiser=quantiser_for(kind, noise))
    codes = [codes.vectors.sum() for codes in result.codes]
    torch.autograd.backward([result.image.sum(), *codes])
    assert [name for name, weight in brought.named_parameters() if weight.grad is not None] == learning


@pytest.mark.parametrize("kind", SHAPES)
def test_every_class_has_blocks_that_compile(kind: str) -> None:
    """Or `compile` would be a word without a meaning there."""
    network = build_autoencoder(ModelSettings(kind=kind, config=SHAPES[kind]), sample_size=SIDE)
    compile_blocks(network)
    for part in (network.encoder, network.decoder):
        compiled = [module for module in part.modules() if module._compiled_call_impl is not None]
        within = {id(weight) for module in compiled for weight in module.parameters()}
        weights = [weight for weight in part.parameters() if weight.requires_grad]
        inside = sum(weight.numel() for weight in weights if id(weight) in within)
        assert inside > 0.5 * sum(weight.numel() for weight in weights)


CANNOT_CHECKPOINT = {"AutoencoderTiny", "AutoencoderDC"}
IN_VAIN = [
    ("AutoencoderTiny", "loss.kl_target=0.1", "loss.kl_target: shapes a KL term, and this AutoencoderTiny has no post"),
    ("AutoencoderDC", "loss.kl_capacity=2", "loss.kl_capacity: shapes a KL term, and this AutoencoderDC has no"),
    ("VQModel", "loss.free_bits=0.1", "loss.free_bits: shapes a KL term, and this VQModel has no posterior"),
    *(
        (
            kind,
            "gradient_checkpointing=true",
            f"gradient_checkpointing: diffusers has no correct one for this {kind}",
        )
        for kind in sorted(CANNOT_CHECKPOINT)
    ),
    ("FlowAutoencoderKL", "loss.kl_capacity=2", "loss.kl_capacity: the rates of this FlowAutoencoderKL are of single"),
    (
        "HierarchicalVAE",
        "loss.commitment=1",
        "loss.commitment: is for a codebook, which this HierarchicalVAE does not have",
    ),
    (
        "AutoencoderTiny",
        "loss.revive_after=5",
        "loss.revive_after: is for a codebook, which this AutoencoderTiny",
    ),
    (
        "DiscreteVAE",
        "loss.commitment=1",
        "loss.commitment: is for the nearest codes of a codebook, and this DiscreteVAE",
    ),
    ("DiscreteVAE", "codebook.entropy=0.1", "codebook.entropy: is for the nearest codes of a codebook, and this Discr"),
    ("DiscreteVAE", "loss.pixel=logit_laplace loss.learned_logvar=true", "loss.learned_logvar: the decoder gives the"),
    (
        "DiscreteVAE",
        "codebook.temperature_end=2",
        "codebook.temperature_end: 2 is above the first temperature, 1: lower",
    ),
    (
        "VQModel",
        "codebook.temperature=2",
        "codebook.temperature: is for codes that are drawn, as a DiscreteVAE's, and not",
    ),
    (
        "VQModel",
        "loss.pixel=logit_laplace",
        "loss.pixel: logit_laplace needs a decoder that gives the scale of each value",
    ),
    ("AutoencoderKLFlux2", "model.config={in_channels: 1}", "model.config: in_channels is 1 and out_channels 3"),
]


@pytest.mark.parametrize(("kind", "word", "said"), IN_VAIN)
def test_what_means_nothing_to_a_class_is_refused_before_anything_is_written(
    pictures: Path, tmp_path: Path, kind: str, word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = word.split() if kind == "DiscreteVAE" else [word]
    command = family_words(pictures, tmp_path / "run", kind, *words)
    for more in ([], ["--dry-run"]):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_plan_of_a_class_without_a_posterior_has_no_kl_term(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*family_words(pictures, tmp_path / "run", "AutoencoderTiny"), "--dry-run"]) == 0
    assert "KL:            off" in capsys.readouterr().out


@pytest.mark.parametrize("kind", sorted(SHAPES.keys() - CANNOT_CHECKPOINT))
def test_checkpointed_gradients_are_the_same(kind: str) -> None:
    gradients = []
    for checkpointing, times in ((False, 1), (True, 2)):
        model = {"kind": kind, "config": SHAPES[kind]}
        network = starting_autoencoder(settings_for(model=model, gradient_checkpointing=checkpointing))
        calls: list[torch.nn.Module] = []
        for part in (network.encoder, network.decoder):
            block = [module for module in part.modules() if isinstance(module, BLOCKS)][-1]
            block.register_forward_pre_hook(lambda block, _, calls=calls: calls.append(block))
        torch.manual_seed(0)
        images = torch.rand(2, 3, SIDE, SIDE)
        noise = torch.randn(2, latent_channels_of(network), *2 * [SIDE // factor_of(network)])
        result = Reconstructor(network)(images, noise, quantiser=quantiser_for(kind, noise))
        result.image.square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        assert len(calls) == 2 * times, "the blocks run again in the backward pass"
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)
