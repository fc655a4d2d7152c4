"""Runs that train a decoder for latents that exist: a new one, and on stored latents."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.latents.encode import encode_images
from latent_ae.latents.settings import EncodeSettings
from latent_ae.models.loading import load_first_stage
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.checkpoint import Checkpoint
from latent_ae_train.plan import describe_plan
from latent_ae_train.run import changes_since
from latent_ae_train.settings import TrainSettings
from tests.runs import differing_tensors, words
from tests.tiny import GAN, STATE, build_step, micro_batches, moved, settings_for, weights
from tests.tiny_models import TWO

SIDE = 16


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    AutoencoderKL(**TWO | {"scaling_factor": 0.4, "shift_factor": 0.1}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(original: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "latents"
    encode_images(original, pictures, folder, EncodeSettings(resolution=SIDE, stored="fp32", device="cpu"))
    return folder


@pytest.fixture(autouse=True)
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latent_ae.export.write.verify_export", lambda *_: 0.0)
    monkeypatch.setattr("latent_ae_train.finish.STATISTICS_CROPS", 16)


def command(pictures: Path, original: Path, run: Path, *more: str) -> list[str]:
    kept = [word for word in words(pictures, run) if not word.startswith(("model.", "gan."))]
    return [*kept, f"init_from={original}", "gan.weight=0", *more]


def encoder_of(folder: Path) -> dict[str, torch.Tensor]:
    model = json.loads((folder / "config.json").read_text())["_class_name"]
    weights = {"AutoencoderKL": AutoencoderKL, "AsymmetricAutoencoderKL": AsymmetricAutoencoderKL}[model]
    state = weights.from_pretrained(folder).state_dict()
    return {name: weight for name, weight in state.items() if name.startswith(("encoder.", "quant_conv."))}


def test_a_run_exports_the_new_decoder_beside_the_old_encoder(
    original: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(pictures, original, tmp_path / "run", "decoder.block_out_channels=[4,8]")
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "decoder:       6,935 parameters, in place of 26,231\ntrains:        decoder, post_quant_conv" in said
    assert main(words) == 0
    made = AsymmetricAutoencoderKL.from_pretrained(tmp_path / "run/export")
    assert made.config.scaling_factor == 0.4 and made.config.shift_factor == 0.1
    assert list(made.config.up_block_out_channels) == [4, 8]
    old, new = encoder_of(original), encoder_of(tmp_path / "run/export")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    start = starting_autoencoder(load_settings(TrainSettings, None, [*words[2:], "data.num_workers=0"]))
    assert not torch.equal(start.decoder.conv_out.weight, made.decoder.conv_out.weight)
    # a changed recipe is refused with words that go on from the trained decoder
    capsys.readouterr()
    assert main([*words, "batch_size=2"]) == 2
    advice = shlex.split(capsys.readouterr().err.splitlines()[-1])
    later = load_settings(TrainSettings, None, [*words[2:], "batch_size=2", *advice])
    assert later.train == "decoder" and not later.decoder.wanted
    assert torch.equal(starting_autoencoder(later).decoder.conv_out.weight, made.decoder.conv_out.weight)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([], ["decoder.layers_per_block=2"], []),
        (["decoder.layers_per_block=2"], ["decoder.layers_per_block=3"], []),
        (["decoder.layers_per_block=2"], ["decoder.layers_per_block=2", "seed=5"], ["decoder={}", "train=decoder"]),
        (
            ["decoder.kind=AutoencoderTiny", "decoder.block_out_channels=[8,8]"],
            ["decoder.kind=AutoencoderTiny", "decoder.block_out_channels=[4,4]"],
            ["decoder.kind=null"],
        ),
    ],
)
def test_the_words_of_a_new_phase_keep_a_decoder_that_the_run_has_not_trained(
    tmp_path: Path, before: list[str], now: list[str], expected: list[str]
) -> None:
    own = ["init_from=original", "train=decoder", "model={}", "gan.weight=0"]
    first, later = (load_settings(TrainSettings, None, [*own, *more]) for more in (before, now))
    checkpoint = Checkpoint(tmp_path / "run/checkpoints/step-00000001", 1)
    checkpoint.folder.mkdir(parents=True)
    state = {**STATE, "step": 1, "settings": first.model_dump(mode="json", by_alias=True), "versions": {}}
    (checkpoint.folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError) as refusal:
        changes_since(checkpoint, later)
    run = tmp_path / "run"
    advice = shlex.split(str(refusal.value).splitlines()[-1])
    assert advice == [f"output_dir={run}-2", f"init_from={run}", *expected]
    phase = load_settings(TrainSettings, None, [*own, *now, *advice])
    assert phase.decoder.wanted == (expected != ["decoder={}", "train=decoder"]) and phase.train == "decoder"


def test_a_run_on_stored_latents_has_no_encoder_and_exports_it(
    original: Path, pictures: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that was killed ends with the same bits."""
    words = command(pictures, original, tmp_path / "run", f"decoder.latents={cache}", "decoder.layers_per_block=2")
    words += ["steps=2", "checkpoint.every=1", "validate.every=2"]
    assert main(words) == 0
    old, new = encoder_of(original), encoder_of(tmp_path / "run/export")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    whole = load_first_stage(str(tmp_path / "run/checkpoints/step-00000002"))
    images = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(whole.encode(images).mean, load_first_stage(str(original)).encode(images).mean)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("checkpoints/step-00000002", "export"):
        shutil.rmtree(tmp_path / "again" / name)
    assert main([*words, f"output_dir={tmp_path / 'again'}"]) == 0
    ends = [tmp_path / name / "checkpoints/step-00000002" for name in ("run", "again")]
    assert differing_tensors(*ends) == []


def test_latents_of_one_encoder_go_with_every_decoder_and_with_no_other_encoder(
    original: Path, pictures: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the export goes on with the latents, and a resumed run is refused if init_from was replaced."""
    moved, stored = shutil.copytree(original, tmp_path / "moved"), shutil.copytree(cache, tmp_path / "stored")
    short = ["steps=2", "checkpoint.every=1", "validate.every=2"]
    own = [f"decoder.latents={stored}", "decoder.block_out_channels=[4,8]", *short]
    first = command(pictures, moved, tmp_path / "first", *own)
    assert main(first) == 0
    later = [f"decoder.latents={stored}", "train=decoder", *short]
    assert main(command(pictures, tmp_path / "first", tmp_path / "later", *later)) == 0
    old, new = encoder_of(original), encoder_of(tmp_path / "later/export")
    assert all(torch.equal(old[name], new[name]) for name in old)
    usual = command(pictures, moved, tmp_path / "usual", "decoder.block_out_channels=[4,8]", *short)
    assert main(usual) == 0
    torch.manual_seed(9)
    AutoencoderKL(**TWO | {"scaling_factor": 0.4, "shift_factor": 0.1}).save_pretrained(moved)
    capsys.readouterr()
    assert main([*usual, "steps=3"]) == 2
    assert "step-00000002 was trained: restore it, or choose another output_dir" in capsys.readouterr().err
    assert main([*first, "steps=3"]) == 2
    assert "holds latents of another encoder or scaling" in capsys.readouterr().err
    shutil.rmtree(stored)
    encode_images(moved, pictures, stored, EncodeSettings(resolution=SIDE, stored="fp32", device="cpu"))
    assert main([*first, "steps=3"]) == 2
    assert "init_from: its encoder or its scaling is not the one with which" in capsys.readouterr().err


def test_a_decoder_of_scaled_latents_needs_a_measured_scaling(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoencoderKL(**TWO | {"scaling_factor": 1.0}).save_pretrained(tmp_path / "model")
    words = command(pictures, tmp_path / "model", tmp_path / "run", "steps=1", "validate.every=1")
    assert main([*words, "decoder.kind=AutoencoderTiny", "decoder.block_out_channels=[8,8]"]) == 2
    assert "has no measured scaling_factor: give init_from the folder that" in capsys.readouterr().err
    assert main([*words, "decoder.layers_per_block=2"]) == 0
    assert "warning: " in (said := capsys.readouterr().err) and "has no measured scaling_factor, so" in said


def test_a_new_decoder_trains_against_a_discriminator_with_checkpointing(original: Path) -> None:
    """Its gradients are those without checkpointing."""
    ends = []
    for recomputed in (False, True):
        own = {"init_from": str(original), "train": "decoder", "model": TrainSettings().model.model_dump()}
        step = build_step(
            settings_for(**own, decoder={"layers_per_block": 2}, gan=GAN, gradient_checkpointing=recomputed)
        )
        before = weights(step.bare_reconstructor.autoencoder)
        step(0, micro_batches(0, step.settings))
        ends.append(weights(step.bare_reconstructor.autoencoder))
        assert any(name.startswith("decoder.") for name in moved(before, ends[-1]))
        assert not any(name.startswith(("encoder.", "quant_conv.")) for name in moved(before, ends[-1]))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-5)


def test_the_model_on_stored_latents_has_no_parameter_of_an_encoder(original: Path, cache: Path) -> None:
    own = settings_for(
        init_from=str(original),
        train="decoder",
        model=TrainSettings().model.model_dump(),
        decoder={"latents": str(cache)},
    )
    without, usual = (
        starting_autoencoder(one) for one in (own, own.model_copy(update={"decoder": TrainSettings().decoder}))
    )
    assert not any(name.startswith("encoder.") for name, _ in without.named_parameters())
    said = describe_plan(own)
    assert f"not in memory; its latents are read from {cache}" in said
    assert "43,711 parameters (26,231 train)" in said  # with the encoder, which checkpoints hold
    state, expected = without.state_dict(), usual.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
