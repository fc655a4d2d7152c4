"""The discriminators besides PatchGAN, against the published networks written out, and in training steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import UserError, load_settings
from latent_ae.export.model_card import discriminator_text
from latent_ae.models.build import count_parameters
from latent_ae.models.dino_discriminator import DinoDiscriminator
from latent_ae.models.discriminator import FILE, Discriminator, read_network, save_network
from latent_ae.models.discriminators import NETWORKS, discriminator_weights, stored_discriminator
from latent_ae.models.stylegan_discriminator import Block, StyleGANDiscriminator
from latent_ae.objectives.gan import GanSettings
from latent_ae.pretrained.vision import VisionModel
from latent_ae_train.checkpoint import load_checkpoint, save_checkpoint
from latent_ae_train.plan import describe_plan
from latent_ae_train.settings import TrainSettings
from tests.tiny import GAN, MODEL, STATE, adversary_of, build_step, micro_batches, moved, settings_for, weights
from tests.tiny_vision import MEAN, PATCH, STD, save_vision_model

transformers = pytest.importorskip("transformers")
DINO_PX, TOKENS = 6 * PATCH, 36


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("vision") / "dino")


def gan_of(network: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Settings of an adversarial term that is felt from the first step."""
    own = {"dino_model": str(folder), "dino_px": DINO_PX, "norm": "instance"} if network == "dino" else {"channels": 4}
    return {key: value for key, value in GAN.items() if key not in ("channels", "layers")} | {
        "network": network,
        **own,
        **more,
    }


def images_of(side: int, channels: int = 3, count: int = 3) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def dino_network(folder: Path, norm: str = "instance", **more: Any) -> DinoDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DinoDiscriminator(3, 16, 2, dino_kernel=5, norm=norm)
    network.attach(VisionModel(folder, image_px=DINO_PX, **more), "")
    return network


def stylegan_network(side: int = 16) -> StyleGANDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StyleGANDiscriminator(3, side, 4)


@pytest.mark.parametrize("norm", ["instance", "group", "none"])
def test_heads_on_a_frozen_transformer_are_those_of_rae(folder: Path, norm: str) -> None:
    """bytetriper/RAE src/disc/dinodisc.py, with its BatchNormLocal of one sample, on tokens of transformers' model."""
    network = dino_network(folder, norm).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    images = images_of(16)
    sized = F.interpolate((images + 1) / 2, size=(DINO_PX, DINO_PX), mode="bilinear", align_corners=False)
    pixels = (sized - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    state = network.state_dict()

    def convolve(x: Tensor, name: str) -> Tensor:
        weight, u = state[f"{name}.parametrizations.weight.original"], state[f"{name}.parametrizations.weight.0._u"]
        sigma = u @ weight.flatten(1) @ state[f"{name}.parametrizations.weight.0._v"]
        reach = weight.shape[-1] // 2
        around = torch.cat([x[..., x.shape[-1] - reach :], x, x[..., :reach]], dim=-1)
        return F.conv1d(around, weight / sigma, state[f"{name}.bias"])

    def normalise(x: Tensor, name: str) -> Tensor:
        if norm == "none":
            return x
        # one channel is a group here: the width of the tiny model is below 32
        mean, variance = x.mean(2, keepdim=True), x.var(2, keepdim=True, unbiased=False)
        scaled = (x - mean) / torch.sqrt(variance + 1e-6)
        return scaled * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]

    with torch.no_grad():
        tokens = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        logits = []
        for head, depth in enumerate((2, 1, 2)):
            x = tokens[depth][:, 1:].transpose(1, 2)
            h = F.leaky_relu(normalise(convolve(x, f"heads.{head}.0.0"), f"heads.{head}.0.1"), 0.2)
            wide = convolve(h, f"heads.{head}.1.network.0")
            h = (F.leaky_relu(normalise(wide, f"heads.{head}.1.network.1"), 0.2) + h) / 2**0.5
            logits.append(convolve(h, f"heads.{head}.2").flatten(1))
        found = network(images)
    assert found.shape == (3, 3 * TOKENS) and float(found.std()) > 0.01
    torch.testing.assert_close(found, torch.cat(logits, dim=1), rtol=1e-4, atol=1e-5)


def test_depths_and_widths_of_the_published_heads() -> None:
    """For the 12 blocks of DINO-S: RAE's key_depths (2, 5, 8, 11) from 0, and the last once more; kernel 9."""
    width = 48
    network = DinoDiscriminator(3, width, 12)
    assert network.depths == [12, 3, 6, 9, 12]
    head = (width + 9 * width + 1) * width + 2 * width + 1 + 2 * 2 * width  # three convolutions with biases, two norms
    assert count_parameters(network) == 5 * head
    per_sample = DinoDiscriminator(3, width, 12, norm="instance")
    assert (network.heads[0][0][1].num_groups, per_sample.heads[0][0][1].num_groups) == (24, 48)


def test_the_stylegan_discriminator_is_llamagens() -> None:
    """FoundationVision/LlamaGen tokenizer/tokenizer_image/discriminator_stylegan.py, written out."""
    network = stylegan_network()
    values = iter([parameter.detach() for parameter in network.parameters()])
    taps = torch.tensor([1.0, 2.0, 1.0])

    def convolve(x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = next(values), next(values)
        return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)

    images = images_of(16)
    x = F.leaky_relu(convolve(images), 0.2)
    for width in (8, 16):
        shortcut = convolve(x, 2)
        inner = F.leaky_relu(convolve(F.leaky_relu(convolve(x), 0.2)), 0.2)
        padded = F.pad(inner, (1, 1, 1, 1), mode="reflect").unfold(2, 3, 1).unfold(3, 3, 1)
        blurred = torch.einsum("nchwij,i,j->nchw", padded, taps, taps) / 16
        x = (convolve(blurred, 2) + shortcut) / 2**0.5
        assert x.shape[1] == width
    x = F.leaky_relu(convolve(x), 0.2).flatten(1)
    x = F.leaky_relu(F.linear(x, next(values), next(values)), 0.2)
    expected = F.linear(x, next(values), next(values))
    assert list(values) == [] and expected.shape == (3, 1)
    torch.testing.assert_close(network(images), expected)
    with torch.device("meta"):
        full = StyleGANDiscriminator(3, 256, 64)
    widths = [module.shortcut.out_channels for module in full.modules() if isinstance(module, Block)]
    assert widths == [128, 256, 512, 512, 512, 512]  # at 128 px to 4 px


def test_a_sample_is_judged_alone_in_any_layout(folder: Path) -> None:
    """So real and reconstructed images share one pass, and a batch may be split."""
    images = images_of(16)
    for network in (dino_network(folder).eval(), dino_network(folder, "group").eval(), stylegan_network()):
        with torch.no_grad():
            together = network(images)
            apart = torch.cat([network(image[None]) for image in images])
            lasting = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lasting, together, rtol=1e-4, atol=1e-5)


def test_grey_images_are_repeated_for_the_transformer(folder: Path) -> None:
    network, grey = dino_network(folder).eval(), images_of(16, 1)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("network", ["dino", "stylegan"])
def test_it_trains_with_all_that_a_discriminator_has_and_goes_on_bit_for_bit(
    network: str, folder: Path, tmp_path: Path
) -> None:
    """LeCam, R1, augmentation, the adaptive weight, two passes a step; the frozen transformer is stored nowhere."""
    more = {"lecam": 0.1, "r1": 0.1, "r1_every": 1, "diffaug": ["color", "translation", "cutout"]}
    settings = settings_for(gan=gan_of(network, folder, **more), batch_size=4, micro_batch_size=2)
    step, plain = build_step(settings), build_step(settings_for(batch_size=4, micro_batch_size=2))
    adversary = step.bare_adversaries["gan"]
    trunk = adversary.__dict__.get("trunk")
    before, frozen = weights(adversary), weights(trunk)
    for number in range(2):
        logs = step(number, micro_batches(number, settings))
        plain(number, micro_batches(number, plain.settings))
    assert moved(before, weights(adversary)) == before.keys()
    assert float(logs["r1"]) > 0 and float(logs["lecam"]) > 0 and float(logs["adaptive_weight"]) > 0
    assert moved(weights(plain.bare_reconstructor), weights(step.bare_reconstructor))
    if trunk is not None:
        assert frozen and not moved(frozen, weights(trunk)) and not trunk.model.training
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in trunk.parameters())
    state = {**STATE, "step": 2, **step.objectives["gan"].facts()}
    checkpoint = save_checkpoint(tmp_path, step, state)
    stored, shape = read_network(checkpoint.folder / FILE)
    assert stored.keys() == adversary.state_dict().keys() and not any("trunk" in name for name in stored)
    again = build_step(settings)
    again.objectives["gan"].refuse_another(checkpoint.state())
    load_checkpoint(checkpoint, again)
    first, second = (one(2, micro_batches(2, settings)) for one in (step, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for own, other in zip(step.networks, again.networks, strict=True):
        assert not moved(weights(own), weights(other))
    # its file is enough to build it, and another run starts from it
    loaded = stored_discriminator(checkpoint.folder)
    assert type(loaded) is NETWORKS[network] and loaded.shape == adversary.shape == shape
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
    begun = build_step(settings_for(gan=gan_of(network, folder, init_from=str(checkpoint.folder))))
    assert all(torch.equal(t, stored[name]) for name, t in begun.bare_adversaries["gan"].state_dict().items())


def test_spectral_norm_takes_one_power_iteration_per_step(folder: Path) -> None:
    settings = settings_for(gan=gan_of("dino", folder), batch_size=4, micro_batch_size=1)
    step = build_step(settings)
    parametrized = adversary_of(step).heads[0][0][0].parametrizations.weight
    weight, v = parametrized.original.detach().clone().flatten(1), parametrized[0]._v.clone()
    step(0, micro_batches(0, settings))
    torch.testing.assert_close(parametrized[0]._u, F.normalize(weight @ v, dim=0))


@pytest.mark.parametrize("network", ["dino", "stylegan"])
def test_the_gradients_do_not_depend_on_the_split(network: str, folder: Path) -> None:
    gradients: list[list[Tensor]] = []
    for micro in (4, 1):
        settings = settings_for(gan=gan_of(network, folder), batch_size=4, micro_batch_size=micro)
        step = build_step(settings)
        for index, batch in enumerate(micro_batches(0, settings)):
            step.bare_adversaries["gan"].train(index == 0)
            step.forward_backward(batch, 0, index == 0)
        parameters = [*step.bare_adversaries["gan"].parameters(), *step.bare_reconstructor.parameters()]
        gradients.append([parameter.grad for parameter in parameters])
    whole, parts = (torch.cat([one.flatten() for one in found]) for found in gradients)
    assert float((whole - parts).norm() / whole.norm()) < 1e-5


def test_what_does_not_fit_a_stored_discriminator_is_told(folder: Path, tmp_path: Path) -> None:
    save_network(dino_network(folder), tmp_path / FILE)
    small, other = StyleGANDiscriminator(3, 8, 4), DinoDiscriminator(3, 16, 2, dino_kernel=3, norm="instance")
    other.attach(None, "")
    cases: list[tuple[Discriminator, str]] = [
        (small, "is another: set gan.network=dino$"),
        (other, "gan.dino_kernel=5$"),
    ]
    strange = DinoDiscriminator(3, 16, 2, dino_kernel=5, norm="instance")
    strange.attach(None, "another")
    cases.append((strange, "learned on another vision model"))
    for network, expected in cases:
        with pytest.raises(UserError, match=expected):
            discriminator_weights(str(tmp_path), network)
    save_network(stylegan_network(), tmp_path / FILE)
    with pytest.raises(UserError, match="takes images of 16 px, and these have 8"):
        discriminator_weights(str(tmp_path), small)


def test_the_model_card_says_how_to_go_on(folder: Path) -> None:
    words = {DinoDiscriminator: "gan.network=dino gan.dino_kernel=5 gan.norm=instance gan.dino_model=FOLDER\n"}
    words[StyleGANDiscriminator] = "gan.network=stylegan gan.channels=4\n"
    for network in (dino_network(folder), stylegan_network()):
        text = discriminator_text(network, "place")
        assert f"gan.init_from=place gan.start=0 {words[type(network)]}" in text and network.title in text


def test_a_run_that_goes_on_needs_the_same_transformer(folder: Path) -> None:
    gan = build_step(settings_for(gan=gan_of("dino", folder))).objectives["gan"]
    with pytest.raises(UserError, match="gan.dino_model: the discriminator learned on weights with sha256 0123"):
        gan.refuse_another({"dino_sha256": "0123"})


@pytest.mark.parametrize("network", ["dino", "stylegan"])
def test_the_plan_counts_what_is_trained(network: str, folder: Path) -> None:
    settings = settings_for(gan=gan_of(network, folder), output_dir="nowhere")
    plan, trained = describe_plan(settings), count_parameters(build_step(settings).bare_adversaries["gan"])
    assert f"discriminator: {trained:,} parameters" in plan
    assert f"adversarial:   {network} discriminator from step 0" in plan


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gan.network=dino", "gan.dino_model: gan.network=dino needs a folder"),
        ("gan.network=dino gan.dino_model=/nowhere", "gan.dino_model: no such folder: /nowhere"),
        ("gan.network=dino gan.dino_model={folder} gan.norm=batch", "gan.norm: batch is not for gan.network dino"),
        ("gan.network=dino gan.dino_model={folder} gan.blur=true", "gan.blur: is for gan.network patch"),
        ("gan.network=dino gan.dino_model={folder} gan.dino_kernel=4", "gan.dino_kernel: 4 is even"),
        ("gan.network=dino gan.dino_model={folder} model.in_channels=4 model.out_channels=4", "gan.network: dino sees"),
        ("gan.dino_kernel=7", "gan.dino_kernel: is for gan.network dino, and this one is patch"),
        ("gan.norm=instance", "gan.norm: instance is not for gan.network patch: use group or spectral"),
        ("gan.network=stylegan gan.norm=batch", "gan.norm: is for gan.network patch and dino"),
        ("gan.network=stylegan data.resolution=96", "gan.network: stylegan halves images to 4 px"),
        ("gan.network=stylegan latents.equivariance=0.5", "gan.network: stylegan takes images of one size"),
        ("gan.replay=8 data.buckets=[128,256]", "gan.replay: stores images of one size"),
        ("loss.scale_consistency=1 data.buckets=[128,256]", "loss.scale_consistency: downsamples images of one size"),
        ("gan.network=stylegan data.buckets=[128,256]", "gan.network: stylegan takes square images of one size"),
    ],
)
def test_settings_that_do_not_go_together(words: str, expected: str, folder: Path) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load_settings(TrainSettings, None, ["loss.perceptual=0", *words.format(folder=folder).split()])
    assert str(caught.value).startswith("1 problem in the settings")


def test_a_word_for_the_network_replaces_the_recipes_settings_of_another(folder: Path) -> None:
    """The recipe has gan.channels and gan.layers; a word for one of them is still refused."""
    words = ["gan.network=dino", f"gan.dino_model={folder}"]
    assert load_settings(TrainSettings, "quickstart").gan.layers != GanSettings().layers
    gan = load_settings(TrainSettings, "quickstart", words).gan
    assert (gan.network, gan.layers, gan.channels) == ("dino", 3, 64)
    recipe = load_settings(TrainSettings, "quickstart").gan
    assert load_settings(TrainSettings, "quickstart", ["gan.network=stylegan"]).gan.channels == recipe.channels
    with pytest.raises(UserError, match=r"gan\.layers: is for gan\.network patch"):
        load_settings(TrainSettings, "quickstart", [*words, "gan.layers=2"])


def test_a_folder_that_cannot_serve_ends_in_one_message(folder: Path, tmp_path: Path) -> None:
    wide = gan_of("dino", folder, dino_kernel=TOKENS + 1)
    with pytest.raises(UserError, match=r"^gan\.dino_kernel: 37 is wider than the 36 tokens"):
        build_step(settings_for(gan=wide))
    for text in ("{", json.dumps({"hidden_size": 16}), json.dumps({"hidden_size": "x", "num_hidden_layers": 2})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"^gan\.dino_model: .* is no vision transformer's config"):
            build_step(settings_for(gan=gan_of("dino", tmp_path)))


def test_patch_is_the_default_and_unchanged() -> None:
    assert GanSettings().network == "patch"
    own = {"model": MODEL, "gan": GAN}
    network = adversary_of(build_step(settings_for(**own)))
    assert network.shape == {"in_channels": 3, "channels": 8, "layers": 1, "norm": "group", "blur": False}
