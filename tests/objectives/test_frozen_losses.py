"""The perceptual losses by frozen networks, against transformers and torchvision called by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_ae.config import UserError, load_settings
from latent_ae.objectives.dino import dino_loss
from latent_ae.pretrained.convnext import ConvNeXtLogits
from latent_ae.pretrained.vision import VisionModel
from latent_ae_train.checkpoint import modules_of
from latent_ae_train.settings import TrainSettings
from tests.tiny import build_step, micro_batches, moved, settings_for, weights
from tests.tiny_vision import MEAN, PATCH, STD, save_convnext, save_vision_model

transformers = pytest.importorskip("transformers")
DINO_PX = 6 * PATCH


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_convnext(tmp_path_factory.mktemp("convnext") / "tiny")


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("dino") / "tiny")


@pytest.fixture(scope="module")
def both(convnext: Path, dino: Path) -> dict[str, Any]:
    return {
        **{"convnext": 0.3, "convnext_weights": str(convnext)},
        **{"dino": 0.7, "dino_model": str(dino), "dino_px": DINO_PX},
    }


def images_of(side: int, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normalised(images: Tensor, size: int, mean: Any = MEAN, std: Any = STD, antialias: bool = False) -> Tensor:
    """By torchvision's transforms."""
    from torchvision.transforms import functional

    sized = functional.resize(images * 0.5 + 0.5, [size, size], antialias=antialias)
    return functional.normalize(sized, mean, std)


@pytest.mark.parametrize("side", [40, 288])
def test_logits_of_a_folder_are_those_of_transformers(convnext: Path, side: int) -> None:
    """Resized to 224 px with torchvision's filter, as in 1d-tokenizer's perceptual_loss.py."""
    model = transformers.ConvNextForImageClassification.from_pretrained(convnext).eval()
    with torch.no_grad():
        expected = model(normalised(images_of(side), 224, antialias=True)).logits
        found = ConvNeXtLogits(convnext)(images_of(side))
    assert found.shape == (2, 10) and float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_logits_of_a_file_are_those_of_torchvision(tmp_path: Path, suffix: str) -> None:
    """Widths and depths are those of the file; ImageNet's mean and standard deviation."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(4, 6, 1), CNBlockConfig(6, 8, 2), CNBlockConfig(8, None, 3)]
    model = ConvNeXt(blocks, layer_scale=1.0, num_classes=7).eval()
    path = tmp_path / f"convnext.{suffix}"
    if suffix == "pth":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    with torch.no_grad():
        expected = model(normalised(images_of(32), 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        torch.testing.assert_close(ConvNeXtLogits(path)(images_of(32)), expected)


def test_the_features_loss_is_one_minus_the_cosine_of_patches(dino: Path) -> None:
    """Patch by patch, on tokens of transformers' own model; the class token takes no part."""
    model = transformers.AutoModel.from_pretrained(dino).eval()
    a, b = images_of(16), images_of(16).flip(0)
    with torch.no_grad():
        first, second = (model(pixel_values=normalised(x, DINO_PX)).last_hidden_state for x in (a, b))
        vision = VisionModel(dino, image_px=DINO_PX + 1)  # rounded down to whole patches
        found = dino_loss(vision(a, vision.grid), vision(b, vision.grid))
    cosines = [
        float(first[n, token] @ second[n, token] / (first[n, token].norm() * second[n, token].norm()))
        for n in range(2)
        for token in range(1, 37)
    ]
    assert len(cosines) == 72 and first.shape[1] == 37
    assert float(found) == pytest.approx(1 - sum(cosines) / 72, rel=1e-5)


def test_a_step_has_the_gradient_of_the_sum_of_all_image_losses(both: dict[str, Any]) -> None:
    """Also what the adversarial term is balanced against. One autograd pass over the formulas; a scaled-down batch."""
    settings = settings_for(loss=both, latents={"equivariance": 1.0}, batch_size=2)
    step = build_step(settings)
    (batch,) = micro_batches(1, settings)
    done = step.forward_backward(batch, 1)
    area, image, target = done.batch.area, done.out.image.detach().requires_grad_(), done.batch.target
    assert area < 1
    logits = transformers.ConvNextForImageClassification.from_pretrained(both["convnext_weights"]).eval()
    features = transformers.AutoModel.from_pretrained(both["dino_model"]).eval()
    classes = [logits(normalised(x, 224)).logits for x in (image, target)]
    patches = [features(pixel_values=normalised(x, DINO_PX)).last_hidden_state[:, 1:] for x in (image, target)]
    terms = {
        "l1": (1.0, (image - target).abs().mean()),
        "convnext": (0.3, ((classes[0] - classes[1]) ** 2).mean()),
        "dino": (0.7, (1 - F.cosine_similarity(*patches, dim=-1)).mean()),
    }
    for name, (_, term) in terms.items():
        assert float(done.logs[name]) == pytest.approx(float(term.detach()), rel=1e-4)
    expected = torch.autograd.grad(area * sum(weight * term for weight, term in terms.values()), image)[0]
    torch.testing.assert_close(done.image_gradient, expected, rtol=1e-3, atol=1e-8)
    assert torch.equal(done.image_gradient, done.reconstruction_gradient)


def test_each_loss_alone_moves_the_autoencoder_and_nothing_of_the_network(both: dict[str, Any]) -> None:
    """Networks stay in evaluation mode, have no gradient, and are in no checkpoint."""
    for name, attribute in (("convnext", "network"), ("dino", "vision")):
        own = {key: value for key, value in both.items() if key.startswith(name)}
        settings = settings_for(loss={**own, "pixel_weight": 0.0}, batch_size=2)
        step = build_step(settings)
        network = getattr(step.objectives[name], attribute)
        before, frozen = weights(step.bare_reconstructor), weights(network)
        step(0, micro_batches(0, settings))
        changed = moved(before, weights(step.bare_reconstructor))
        assert any(".encoder." in key for key in changed) and any(".decoder." in key for key in changed)
        assert frozen and not moved(frozen, weights(network))
        assert not network.model.training and not any(p.requires_grad for p in network.parameters())
        assert modules_of(step).keys() == {"autoencoder"}


def test_off_means_nothing_is_there() -> None:
    step = build_step(settings_for())
    assert not step.objectives.keys() & {"convnext", "dino"}
    assert not step(0, micro_batches(0, step.settings)).keys() & {"convnext", "dino"}


def test_one_channel_is_repeated_and_the_layout_does_not_matter(convnext: Path, dino: Path) -> None:
    grey, colour = images_of(32, 1), images_of(32)
    vision = VisionModel(dino, image_px=DINO_PX)
    for network in (ConvNeXtLogits(convnext), lambda images: vision(images, (6, 6))):
        assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))
        torch.testing.assert_close(network(colour.to(memory_format=torch.channels_last)), network(colour))


def test_what_cannot_serve_ends_in_one_message(
    convnext: Path, dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(weights: Path | None, expected: str) -> None:
        with pytest.raises(UserError, match=rf"^loss\.convnext_weights: {expected}"):
            ConvNeXtLogits(weights)

    headless = shutil.copytree(convnext, tmp_path / "headless")
    state = load_file(convnext / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "classifier" not in k}, headless / "model.safetensors", {"format": "pt"}
    )
    refusal(headless, r"transformers cannot load .*: 2 weights of a ConvNextForImageClassification are missing in it")
    (headless / "preprocessor_config.json").unlink()
    refusal(headless, ".* needs a preprocessor_config.json with image_mean and image_std, and there is none: take it")
    other = tmp_path / "other.pth"
    for content in (state, {"state": [1]}):
        torch.save(content, other)
        refusal(other, f"{other} is not a state dict of torchvision's ConvNeXt, nor a folder of transformers'")
    for name, value in (("XDG_CACHE_HOME", tmp_path), ("TORCH_HOME", tmp_path), ("LATENT_AE_OFFLINE", 1)):
        monkeypatch.setenv(name, str(value))
    refusal(None, "null takes torchvision's convnext_small, and the weights of convnext_small are not available")
    coarse = copy_with(dino, tmp_path / "coarse", {"patch_size": "x"})
    with pytest.raises(UserError, match=r"^loss\.dino_model: "):
        VisionModel(coarse, image_px=DINO_PX, setting="loss.dino_model")


def test_a_checkpoint_may_lack_the_pooler_and_no_weights_of_features(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_vision_model(tmp_path / "vit", "ViT")
    state, images = load_file(folder / "model.safetensors"), torch.rand(1, 3, DINO_PX, DINO_PX)
    features = VisionModel(folder, image_px=DINO_PX).layers(images, [2])[0]
    for lacking in ("pooler", "layer.1"):
        kept = {key: value for key, value in state.items() if lacking not in key}
        assert len(kept) < len(state)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        capfd.readouterr()
        if lacking == "pooler":
            assert torch.equal(VisionModel(folder, image_px=DINO_PX).layers(images, [2])[0], features)
        else:
            with pytest.raises(UserError, match=r"^loss\.dino_model: .* weights of a ViTModel are missing in it"):
                VisionModel(folder, image_px=DINO_PX, setting="loss.dino_model")
        assert "MISSING" not in "".join(capfd.readouterr())


def copy_with(folder: Path, place: Path, changes: dict[str, Any]) -> Path:
    """A copy of a model's folder with changes to its config."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("loss.convnext=1 loss.convnext_weights=/nowhere", "loss.convnext_weights: no such file or folder: /nowhere"),
        ("loss.convnext_weights=/nowhere", "loss.convnext_weights: are used by loss.convnext, whose weight is 0"),
        ("loss.dino=1", "loss.dino_model: loss.dino needs a folder"),
        ("loss.dino=1 loss.dino_model=/nowhere", "loss.dino_model: no such folder: /nowhere"),
        ("loss.dino_model=/nowhere", "loss.dino_model: is used by loss.dino, whose weight is 0"),
        ("loss.dino_px=64", "loss.dino_px: is used by loss.dino, whose weight is 0"),
        ("codebook.entropy_temperature=1", "codebook.entropy_temperature: is used by codebook.entropy, whose weight"),
        ("loss.convnext=1 model.in_channels=4 model.out_channels=4", "loss.convnext: ConvNeXt sees 1 or 3 channels"),
        ("loss.pixel_weight=0 loss.perceptual=0", "loss: pixel_weight and perceptual are both 0"),
    ],
)
def test_settings_that_do_not_go_together(words: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_settings(TrainSettings, None, words.split())


def test_a_loss_of_features_may_stand_alone(dino: Path) -> None:
    words = ["loss.pixel_weight=0", "loss.perceptual=0", "loss.dino=1", f"loss.dino_model={dino}"]
    load_settings(TrainSettings, None, words)
