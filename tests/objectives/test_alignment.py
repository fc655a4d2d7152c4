"""Alignment to a frozen vision model: features, terms, gradients, and what it does to a run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from latent_ae.__main__ import main
from latent_ae.config import UserError, load_settings
from latent_ae.objectives.alignment import alignment_loss
from latent_ae.pretrained.vision import VisionModel
from latent_ae_train.settings import TrainSettings
from tests.runs import differing_tensors, words
from tests.tiny import GAN, SIDE, build_step, micro_batches, moved, settings_for, weights
from tests.tiny_vision import MEAN, PATCH, STD, save_vision_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vision") / "dino")


def test_off_means_nothing_is_there() -> None:
    step = build_step(settings_for())
    assert "alignment" not in step.objectives and not any("heads" in name for name in weights(step.bare_reconstructor))
    assert not any(name.startswith("alignment") for name in step(0, micro_batches(0, step.settings)))


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "ViT"])
def test_features_are_the_patches_in_their_places(tmp_path: Path, kind: str) -> None:
    """Against transformers called by hand; the tokens before the patches are 1, 1 + 4 registers, and 1."""
    place = save_vision_model(tmp_path / kind, kind)
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = VisionModel(place, [(5, 4)])(images, (5, 4))
    sized = F.interpolate((images + 1) / 2, size=(5 * PATCH, 4 * PATCH), mode="bilinear", align_corners=False)
    pixels = (sized - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    model = transformers.AutoModel.from_pretrained(place).eval()
    more = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    with torch.no_grad():
        tokens = model(pixel_values=pixels, **more).last_hidden_state
    first = 5 if kind == "Dinov2WithRegisters" else 1
    assert tokens.shape[1] == first + 20
    for row in range(5):
        for column in range(4):
            torch.testing.assert_close(found[:, :, row, column], tokens[:, first + 4 * row + column])


def test_one_channel_is_repeated_and_the_model_stays_frozen(folder: Path) -> None:
    vision = VisionModel(folder, [(8, 8)]).train()
    grey = torch.rand(1, 1, 16, 16)
    assert torch.equal(vision(grey, (8, 8)), vision(grey.repeat(1, 3, 1, 1), (8, 8)))
    assert not vision.training and not vision.model.training
    assert not any(parameter.requires_grad for parameter in vision.parameters())


def test_terms_are_those_of_va_vae() -> None:
    """Written out position by position and pair by pair."""
    generator = torch.Generator().manual_seed(0)
    z, f = (torch.randn(2, 6, 3, 3, generator=generator) for _ in range(2))
    cosine, distance, similarity = alignment_loss(z, f, 0.5, 0.25)
    first = second = mean = 0.0
    angle = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    for n in range(2):
        places = [(z[n, :, y, x], f[n, :, y, x]) for y in range(3) for x in range(3)]
        for ours, theirs in places:
            mean += angle(ours, theirs) / 18
            first += max(0.0, 1 - 0.5 - angle(ours, theirs)) / 18
            for other, counterpart in places:
                second += max(0.0, abs(angle(ours, other) - angle(theirs, counterpart)) - 0.25) / 162
    assert (float(cosine), float(distance), float(similarity)) == pytest.approx((first, second, mean), rel=1e-5)
    assert float(alignment_loss(z, 3 * z, 0.5, 0.25)[0]) == 0.0


def test_the_term_alone_moves_the_encoder_and_raises_the_cosine(folder: Path) -> None:
    """Not the decoder; the projection trains too, and the vision model does not."""
    settings = settings_for(
        loss={"pixel_weight": 0.0}, alignment={"model": str(folder), "adaptive": False}, optim={"lr": 3e-3}
    )
    step = build_step(settings)
    vision = step.objectives["alignment"].vision
    before, frozen = weights(step.bare_reconstructor), weights(vision)
    logs = [step(number, micro_batches(number, settings)) for number in range(40)]
    changed = moved(before, weights(step.bare_reconstructor))
    assert {"autoencoder.encoder.conv_in.weight", "heads.alignment.weight"} <= changed
    assert not any(".decoder." in name or "post_quant" in name for name in changed)
    assert not moved(frozen, weights(vision))
    first, last = (sum(float(log["alignment_similarity"]) for log in part) / 5 for part in (logs[:5], logs[-5:]))
    assert last > first + 0.2


def test_the_adaptive_weight_and_the_whole_gradient_are_those_of_va_vae(folder: Path) -> None:
    """Norms of two autograd passes at the encoder's last layer; the weight lags by one step, over two passes."""
    settings = settings_for(
        loss={"kl": 1e-2},
        latents={"equivariance": 1.0, "min_channels": 2},
        alignment={"model": str(folder)},
        optim={"lr": 1e-30},
        batch_size=4,
        micro_batch_size=2,
    )
    step = build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )

    def losses(number: int, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Image, alignment and KL terms over the global batch in one pass, and the area that is reconstructed."""
        whole = settings.model_copy(update={"micro_batch_size": None})
        (batch,) = micro_batches(number, whole)
        for objective in step.objectives.values():
            batch = objective.prepare(batch, number)
        result = model(batch.images, batch.noise, batch.transforms)
        features = step.objectives["alignment"].vision(batch.images, result.latent.shape[2:])
        terms = alignment_loss(result.heads["alignment"], features, 0.5, 0.25)
        kl = 0.5 * (result.mean**2 + result.logvar.exp() - 1 - result.logvar).sum() / batch.images.numel()
        area = (batch.target.shape[-1] / SIDE) ** 2  # sums over a sample count by it
        return area * (result.image - batch.target).abs().mean(), terms[0] + terms[1], kl, area

    model = build_step(settings).bare_reconstructor
    first = step(0, micro_batches(0, settings))
    image, alignment, _, area = losses(0, model)
    layer = model.autoencoder.encoder.conv_out.weight
    norms = [torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (image, alignment)]
    expected = float(norms[0] / (norms[1] + 1e-4)) / area  # at full size; 1e-4 as in the authors' code
    assert float(step.objectives["alignment"].balance.weight) == pytest.approx(expected, rel=1e-4)
    assert float(first["alignment_weight"]) == pytest.approx(0.1 * expected, rel=1e-4)
    assert not gradients["heads.alignment.weight"].any(), "the first step only measures"
    step(1, micro_batches(1, settings))
    image, alignment, kl, area = losses(1, model)
    (image + 0.1 * area * expected * alignment + 1e-2 * kl).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_what_is_aligned_already_keeps_the_weight(folder: Path) -> None:
    step = build_step(settings_for(alignment={"model": str(folder)}))
    alignment = step.objectives["alignment"]
    alignment.balance.weight.fill_(2.0)
    alignment.remember({"alignment/reconstruction": torch.ones(3), "alignment/term": torch.zeros(3)}, {})
    assert float(alignment.balance.weight) == 2.0


def everything(folder: Path) -> dict[str, Any]:
    """All that shapes the latents, together with the adversarial term."""
    return {
        "loss": {"kl": 1e-2, "kl_target": 0.3, "free_bits": 0.05},
        "latents": {"equivariance": 0.6, "noise": 1.0, "min_channels": 2},
        "alignment": {"model": str(folder)},
        # LeCam: the hinge loss alone gives the last bias a gradient of 0 but for rounding, which Adam turns into steps
        "gan": {**GAN, "discriminator_warmup": 2, "warmup": 5, "lecam": 0.1},
        "ema": {"decay": 0.9},
        "optim": {"clip": 1.0},
    }


@pytest.mark.usefixtures("no_finish")
def test_a_run_with_everything_goes_on_bit_for_bit(
    pictures: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [f"{section}.{key}={value}" for section, keys in everything(folder).items() for key, value in keys.items()]
    more = [word for word in more if not word.startswith(("gan.", "ema."))]
    more += ["optim.schedule=constant", "micro_batch_size=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(words(pictures, whole, *more)) == 0
    assert main(words(pictures, parts, *more, "steps=2")) == 0
    assert main(words(pictures, parts, *more)) == 0
    last = "checkpoints/step-00000006"
    assert differing_tensors(whole / last, parts / last) == []
    assert load_file(parts / last / "heads.safetensors")["alignment.weight"].shape == (16, 4, 1, 1)
    assert not any("heads" in name for name in load_file(parts / last / "ema.safetensors"))
    events = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    line = [event for event in events if event["event"] == "train"][-1]
    assert {"alignment_cosine", "alignment_distance", "alignment_similarity", "alignment_weight"} <= line.keys()
    assert {"kl_weight", "kl_free", "scale", "noise_level", "kept_channels"} <= line.keys()
    assert main(words(pictures, parts, *more, "steps=8", "alignment.model=null")) == 2
    assert "alignment.model: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("preprocessor_config.json", changes)
        for changes in (
            *([], "[" * 5000, {"image_mean": "x"}, {"image_mean": None}, {"image_mean": [0.1, float("nan"), 0.1]}),
            *({"image_mean": [0.1] * 4}, {"image_std": 0}, {"image_std": [1, 1, -1]}, {"image_std": [[1], [1, 2]]}),
        )
    ]
    + [
        ("config.json", changes)
        for changes in (
            *([], "[" * 5000, {"patch_size": 0}, {"patch_size": -2}, {"patch_size": "x"}, {"num_attention_heads": 0}),
            *({"hidden_size": None}, {"num_hidden_layers": "x"}, {"model_type": []}, {"hidden_act": "evil"}),
        )
    ],
)
def test_a_foreign_folder_ends_in_a_message(file: str, changes: Any, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    if isinstance(changes, dict):
        changes = json.loads((folder / file).read_text()) | changes
    (copy / file).write_text(changes if isinstance(changes, str) else json.dumps(changes))
    with pytest.raises(UserError, match="alignment.model: "):
        VisionModel(copy, [(4, 4)])


def test_what_cannot_serve_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(place: Path, expected: str) -> None:
        with pytest.raises(UserError, match=expected):
            VisionModel(place, [(4, 4)])

    bare = tmp_path / "bare"
    bare.mkdir()
    refusal(bare, "needs a preprocessor_config.json with image_mean and image_std")
    (bare / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    refusal(bare, "transformers cannot load")
    # weights in a pickle, which could run code
    (bare / "config.json").write_text((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), bare / "pytorch_model.bin")
    refusal(bare, "transformers cannot load")
    text = tmp_path / "text"
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10
    )
    transformers.BertModel(config).save_pretrained(text)
    (text / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    refusal(text, "holds a BertModel; a vision transformer is needed")
    for more, expected in (
        ([f"alignment.model={tmp_path / 'nowhere'}"], "alignment.model: no such folder"),
        ([f"alignment.model={folder}", "train=decoder"], "alignment.model: moves the encoder"),
    ):
        with pytest.raises(UserError, match=expected):
            load_settings(TrainSettings, None, more)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refusal(folder, r"needs transformers: pip install '.\[alignment\]' in")
    with pytest.raises(UserError, match="alignment.model: needs transformers: pip install"):
        load_settings(TrainSettings, None, [f"alignment.model={folder}"])
