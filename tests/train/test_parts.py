"""The setting `train`: what matches learns, and everything else stays bit for bit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.models.build import facts_of
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.finish import keeps_scaling
from latent_ae_train.parts import collapsed, side_of, trained_names
from latent_ae_train.settings import TrainSettings
from tests.runs import SHAPES, words
from tests.tiny import GAN, build_step, micro_batches, settings_for
from tests.tiny_models import tiny

FIXED_GAN = GAN | {"adaptive": False}
ATTENTION = {"mid_block_add_attention": True}
# of each: what is written, the names that it means, and the side to which they belong
SELECTIONS = [
    (["decoder.conv_out"], r"decoder\.conv_out\.", "decoder"),
    (["decoder.up_blocks.*", "post_quant_conv"], r"decoder\.up_blocks\.|post_quant_conv\.", "decoder"),
    (["encoder.conv_out", "quant_conv"], r"encoder\.conv_out\.|quant_conv\.", "encoder"),
    (["*.attentions.*"], r".*\.attentions\.", "all"),
    (["decoder", "encoder.*.norm?.bias"], r"decoder\.|post_quant_conv\.|encoder\..*\.norm[12]\.bias", "all"),
    ("*.conv_in.weight", r"(encoder|decoder)\.conv_in\.weight", "all"),
    (["decoder"], r"decoder\.|post_quant_conv\.", "decoder"),
]


@pytest.mark.parametrize(("train", "meant", "side"), SELECTIONS)
def test_what_matches_learns_and_all_else_stays(train: Any, meant: str, side: str) -> None:
    optim = {"lr": 1e-2, "weight_decay": 0.1}
    settings = settings_for(
        train=train, model=ATTENTION, gan=FIXED_GAN, loss={"kl": 1e-3}, ema={"decay": 0.5}, optim=optim
    )
    step = build_step(settings)
    modules = [step.bare_reconstructor.autoencoder, step.ema.module]
    before = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]
    for number in range(2):
        logs = step(number, micro_batches(number, settings))
    expected = {name for name in before[0] if re.match(meant, name)}
    assert expected
    for old, module in zip(before, modules, strict=True):
        assert {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, old[name])} == expected
    assert step.objectives["gan"].run.train == side
    assert ("kl" in logs) == (side != "decoder"), "nothing is computed for a fixed encoder"
    assert len(step.optimizers.autoencoder.param_groups[0]["params"]) == len(expected)


@pytest.mark.parametrize(
    ("train", "learning"),
    [
        (["quantize"], {"quantize.embedding.weight"}),
        (["encoder.conv_out"], {"encoder.conv_out.weight", "encoder.conv_out.bias"}),
    ],
)
def test_a_codebook_learns_alone_or_stays(train: list[str], learning: set[str]) -> None:
    model = {"kind": "VQModel", "config": SHAPES["VQModel"]}
    settings = settings_for(train=train, model=model, loss={"revive_after": 1})
    step = build_step(settings)
    autoencoder = step.bare_reconstructor.autoencoder
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    for number in range(3):  # long enough to restart codes
        assert "codebook" in step(number, micro_batches(number, settings, latent=(3, 8, 8)))
    after = autoencoder.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == learning


@pytest.mark.parametrize(
    ("train", "kept"),
    [("decoder", True), (["decoder.*"], True), (["decoder.*", "quant_conv.bias"], False), ("all", False)],
)
def test_the_scaling_is_kept_where_the_latents_are(train: Any, kept: bool) -> None:
    settings, autoencoder = settings_for(train=train), tiny("AutoencoderKLQwenImage")
    assert keeps_scaling(settings.model_copy(update={"init_from": "some/where"}), autoencoder) == kept
    assert not keeps_scaling(settings, autoencoder)


def test_measured_classes_train_any_part_of_their_decoders(tmp_path: Path) -> None:
    tiny("AutoencoderKLQwenImage").save_pretrained(tmp_path)
    settings = settings_for(init_from=str(tmp_path), train=["decoder.conv_out"], gan=GAN)
    settings = settings.model_copy(update={"model": TrainSettings().model})
    model = starting_autoencoder(settings)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["decoder.conv_out.weight", "decoder.conv_out.bias"]
    with pytest.raises(UserError, match=r"only the decoder is trained here: set it to decoder"):
        starting_autoencoder(settings.model_copy(update={"train": ("quant_conv",)}))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train=decodr", "decodr matches no parameter of this autoencoder: did you mean decoder or"),
        ("train=[encoder.conv_out,decoder.upblocks.*]", "decoder.upblocks.* matches no parameter of this autoencoder: "
         "did you mean decoder.up_blocks"),
        ("train=xyzzy", "its modules are encoder, encoder.conv_in,"),
        ("train=[*.bias]", "put a pattern that begins with * in quotes"),
        ("train=[]", "names nothing that would learn"),
        ('train=""', "names nothing that would learn"),
        ('train=["",decoder]', "names nothing that would learn"),
        ("train=[decoder.up_blocks]", "gan.adaptive: measures gradients at the decoder's last layer"),
        ("train=[encoder.conv_in,decoder] loss.kl_target=0.5", ""),
        ("train=[post_quant_conv] gan.weight=0 loss.kl_target=0.5", "loss.kl_target: shapes the posterior, which"),
    ],
)  # fmt: skip
def test_each_mistake_ends_in_one_message(
    word: str, said: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*words(pictures, tmp_path / "run"), *word.split(), "--dry-run"])
    error = capsys.readouterr().err
    assert code == (2 if said else 0)
    assert said in error and error.count("\n  ") == (1 if said else 0)


def test_alignment_measures_at_a_layer_that_learns(tmp_path: Path) -> None:
    settings = settings_for(train=["encoder.conv_in", "decoder"], alignment={"model": str(tmp_path)})
    model = facts_of(starting_autoencoder(settings_for()))
    problems = {problem.key: problem.message for problem in settings.problems_with(model)}
    assert "the encoder's last layer, which train leaves fixed: set it to false" in problems["alignment.adaptive"]
    adaptive = settings_for(train=["encoder.conv_out", "decoder"], alignment={"model": str(tmp_path)})
    assert "alignment.adaptive" not in {problem.key for problem in adaptive.problems_with(model)}


def test_the_plan_names_what_trains(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = "train=[decoder,quant_conv.bias,encoder.down_blocks.*]"
    assert main([*words(pictures, tmp_path / "run", train), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "\ntrains:        encoder.down_blocks, decoder, quant_conv.bias, post_quant_conv\n" in out
    model = starting_autoencoder(load_settings(TrainSettings, "quickstart", words(pictures, tmp_path, train)[2:]))
    parts = (model.encoder.down_blocks, model.decoder, model.post_quant_conv)
    count = sum(p.numel() for part in parts for p in part.parameters()) + model.quant_conv.bias.numel()
    assert f"({count:,} train)" in out


def test_names_are_collapsed_and_have_a_side() -> None:
    names = ["encoder.a.weight", "encoder.a.bias", "encoder.b.0.weight", "decoder.a.weight", "quant_conv.weight"]
    assert collapsed(names[:3], names) == ["encoder"]
    assert collapsed(names[1:4], names) == ["encoder.a.bias", "encoder.b", "decoder"]
    assert [side_of(part) for part in (names[:3], names[3:4], names[4:], names[3:], [])] == [
        *("encoder", "decoder", "encoder", "all", "all")
    ]
    assert trained_names(["*.a"], names) == [names[0], names[1], names[3]]
    assert trained_names("encoder", names) == [*names[:3], names[4]]


@pytest.mark.parametrize("train", ["all", "decoder", ["decoder.*", "*.bias"], ["all", "decoder.*"], "encoder.conv_in"])
def test_a_checkpoint_gives_the_same_setting_back(train: Any) -> None:
    settings = settings_for(train=train)
    stored = settings.model_dump(mode="json", by_alias=True)
    assert TrainSettings.model_validate(stored) == settings
