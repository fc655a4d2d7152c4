"""Decoders of classes that are measured only: `train=decoder` from a folder, the latents staying as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_ae.__main__ import main
from latent_ae.models.build import channels_of, factor_of, latent_channels_of
from latent_ae.models.loading import first_stage
from latent_ae.models.registry import class_of, family_of, recompute_blocks_, recomputes
from latent_ae.models.settings import ModelSettings
from latent_ae_train.data import drawn_batch
from tests.runs import words
from tests.tiny import GAN, build_step, drawing, settings_for
from tests.tiny_models import MEASURED, pictures, tiny

ONLY_DECODERS = [name for name in MEASURED if family_of(tiny(name)).trains == ("decoder",)]
SIDE = 32


def settings(place: Path, **changes: Any) -> Any:
    model = ModelSettings().model_dump()
    data = {"resolution": SIDE}
    return settings_for(init_from=str(place), train="decoder", model=model, data=data, batch_size=2, **changes)


def command(folder: Path, place: Path, run: Path, *more: str) -> list[str]:
    """A run of two steps from the first stage at `place`."""
    kept = [word for word in words(folder, run) if not word.startswith("model.")]
    sides = (f"data.resolution={SIDE}", f"validate.crop_px={SIDE}", "batch_size=2")
    return [*kept, "model={}", f"init_from={place}", "train=decoder", "steps=2", *sides, *more]


def test_which_train() -> None:
    assert set(MEASURED) - set(ONLY_DECODERS) == {"AutoencoderKLQwenImage21", "ConsistencyDecoderVAE"}
    assert family_of(class_of("AutoencoderKLQwenImage21")(**RGB21)).trains == ("decoder",)


RGB21 = {
    **{"base_dim": 8, "decoder_base_dim": 16, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1},
    **{"temperal_downsample": [True], "in_channels": 3, "out_channels": 3, "scale_factor_spatial": 2},
}


@pytest.mark.parametrize("name", [*ONLY_DECODERS, "AutoencoderKLQwenImage21 RGB"])
def test_every_weight_of_the_decoder_learns_and_no_other(name: str, tmp_path: Path) -> None:
    before = class_of("AutoencoderKLQwenImage21")(**RGB21) if name.endswith("RGB") else tiny(name)
    before.eval().save_pretrained(tmp_path)
    own = settings(tmp_path, gan=GAN | {"start": 0}, optim={"lr": 1e-3, "weight_decay": 0.0})
    step = build_step(own)
    after = step.bare_reconstructor.autoencoder
    learning = {name for name, weight in after.named_parameters() if weight.requires_grad}
    latent = (latent_channels_of(after), SIDE // factor_of(after), SIDE // factor_of(after))
    assert channels_of(after) == 3
    batch = drawn_batch(pictures(SIDE), torch.randn(2, *latent), range(2), drawing(own))
    step.bare_reconstructor(pictures(SIDE)).image.square().mean().backward()
    assert {name for name, weight in after.named_parameters() if weight.grad is not None} == learning
    # with the adversary, whose adaptive weight is measured at the last layer
    step(0, iter([batch]))
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and changed <= learning
    assert all(name.startswith(("decoder", "post_quant_conv")) for name in learning)
    assert not any("encoder." in name.removeprefix("decoder") or "time_conv" in name for name in changed)
    assert len(changed) > 0.8 * len(learning)
    latent = first_stage(before).encode(pictures(SIDE)).mean
    before.load_state_dict(new)  # as an export is loaded; in training another layout in memory rounds differently
    assert torch.equal(first_stage(before).encode(pictures(SIDE)).mean, latent)


@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage", "AutoencoderRAE"])
def test_a_tuned_decoder_is_exported_for_the_stock_class(
    name: str, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its encoder, latents and their scaling are those it began with, bit for bit."""
    monkeypatch.setattr("latent_ae_train.finish.STATISTICS_CROPS", 16)  # the scaling stays whatever is measured
    start = tiny(name).eval()
    start.save_pretrained(tmp_path / "start")
    run = tmp_path / "run"
    small = ["data.resolution=16", "validate.crop_px=16"] if name == "AutoencoderKLQwenImage" else []
    assert main(command(pictures, tmp_path / "start", run, "batch_size=8", *small)) == 0
    stock = class_of(name).from_pretrained(run / "export").eval()
    assert stock.config.latents_mean == start.config.latents_mean
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        assert torch.equal(first_stage(stock).encode(images).mean, first_stage(start).encode(images).mean)
        assert not torch.allclose(first_stage(stock).reconstruct(images), first_stage(start).reconstruct(images))
    results = json.loads((run / "results.json").read_text())
    assert results["export"]["max_abs_difference"] <= 1e-5
    card = (run / "export/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("'run'", repr(str(run / "export")))
    made: dict[str, Any] = {"images": images}
    exec(code.replace("'export'", repr(str(run / "export"))), made)
    assert made["images"].shape == images.shape


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("AutoencoderKLWan", ["train=all"], "only the decoder is trained here: set it to decoder"),
        ("ConsistencyDecoderVAE", [], "is of a class that is measured here and not trained"),
        ("AutoencoderKLQwenImage21", [], "is of a class that is measured here and not trained"),
        (
            "AutoencoderKLHunyuanImage",
            ["compile=true"],
            "compile: this project does not know which blocks of a Auto",
        ),
        (
            "AutoencoderKLQwenImage",
            ["gradient_checkpointing=true"],
            "gradient_checkpointing: diffusers has no correct",
        ),
        ("AutoencoderRAE", ["data.resolution=24"], "takes images of 32 px only"),
    ],
)
def test_what_cannot_train_ends_in_one_message(
    name: str, more: list[str], said: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(name).save_pretrained(tmp_path / "start")
    assert main(command(pictures, tmp_path / "start", tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "run").exists()


def checkpointing(name: str) -> bool:
    return recomputes(tiny(name)) and name in ONLY_DECODERS


@pytest.mark.parametrize("name", [name for name in MEASURED if checkpointing(name)])
def test_checkpointed_gradients_are_the_same(name: str, tmp_path: Path) -> None:
    """And the blocks are computed again: more calls of the decoder's layers."""
    gradients, calls = [], [0, 0]
    for wanted in (False, True):
        model = tiny(name).train()
        for layer in model.decoder.modules():
            if not list(layer.children()):
                layer.register_forward_hook(lambda *_, wanted=wanted: calls.__setitem__(wanted, calls[wanted] + 1))
        model.requires_grad_(False).decoder.requires_grad_(True)
        if wanted:
            recompute_blocks_(model)
        latent = torch.randn(1, latent_channels_of(model), 8, 8, generator=torch.Generator().manual_seed(0))
        family_of(model).decode(model, latent).square().mean().backward()
        gradients.append([weight.grad for weight in model.decoder.parameters()])
    torch.testing.assert_close(*gradients)
    assert calls[True] > 1.3 * calls[False]
