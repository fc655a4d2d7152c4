"""The cells of a HierarchicalVAE against their published arithmetic, and the networks that are made of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.models.cells import Bottleneck, Depthwise
from latent_ae.models.hierarchical import HierarchicalVAE
from latent_ae.models.reconstruct import Reconstructor

FEATURES = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def convolutions(cell: nn.Module) -> list[nn.Conv2d]:
    return [module for module in cell.modules() if isinstance(module, nn.Conv2d)]


def test_a_bottleneck_is_that_of_very_deep_vaes() -> None:
    """GELU before each of 1 x 1, 3 x 3, 3 x 3, 1 x 1, a quarter as wide; 1 x 1 on grids below 3 px."""
    torch.manual_seed(0)
    cell = Bottleneck(16, 4, depth=1)
    expected, paddings = FEATURES, (0, 1, 1, 0)
    for layer, padding in zip(convolutions(cell), paddings, strict=True):
        expected = F.conv2d(F.gelu(expected), layer.weight, layer.bias, padding=padding)
    torch.testing.assert_close(cell(FEATURES), FEATURES + expected)
    assert [tuple(layer.weight.shape) for layer in convolutions(cell)] == [
        *((4, 16, 1, 1), (4, 4, 3, 3), (4, 4, 3, 3), (16, 4, 1, 1))
    ]
    assert {layer.weight.shape[-1] for layer in convolutions(Bottleneck(16, 2, 1))} == {1}
    assert not any(layer.bias.any() for layer in convolutions(cell))
    torch.manual_seed(0)
    deep = Bottleneck(16, 4, depth=9)
    torch.testing.assert_close(deep.widen.weight * 3, cell.widen.weight)


def test_a_depthwise_cell_is_that_of_nvae_with_group_norm() -> None:
    torch.manual_seed(0)
    cell = Depthwise(16, 4)
    wide, by_channel, back, squeeze, excite = convolutions(cell)
    assert wide.weight.shape == (96, 16, 1, 1) and by_channel.weight.shape == (96, 1, 5, 5)
    branch = F.conv2d(F.group_norm(FEATURES, 4), wide.weight)
    branch = F.conv2d(F.silu(F.group_norm(branch, 4)), by_channel.weight, padding=2, groups=96)
    branch = F.group_norm(F.conv2d(F.silu(F.group_norm(branch, 4)), back.weight), 4)
    squeezed = F.relu(F.linear(branch.mean((2, 3)), squeeze.weight[:, :, 0, 0], squeeze.bias))
    gate = torch.sigmoid(F.linear(squeezed, excite.weight[:, :, 0, 0], excite.bias))
    torch.testing.assert_close(cell(FEATURES), FEATURES + 0.1 * branch * gate[:, :, None, None])


SHAPE: dict[str, Any] = {"sample_size": 16, "level_sides": [2, 4, 4, 16], "level_channels": [3, 2, 1, 0]}
DEEP: dict[str, dict[str, Any]] = {
    "bottleneck": {"width": [16, 12, 8], "blocks": 2, "encoder_blocks": [1, 2, 3], "side_bias": True, "mixtures": 3},
    "depthwise": {"width": 8, "norm_num_groups": 2, "encoder_cell": "residual", "open_posteriors": True},
}


@pytest.mark.parametrize("cell", DEEP)
def test_a_step_decodes_what_was_drawn(cell: str) -> None:
    """The one descent of a training step gives the image, and gradients to all weights, of draw and decode."""
    torch.manual_seed(0)
    network = HierarchicalVAE(cell=cell, **SHAPE, **DEEP[cell])
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    noise = torch.randn(2, 3 * 4 + 3 * 16, 1, 1, generator=torch.Generator().manual_seed(2))

    def gradients(output: Tensor, rates: tuple[Tensor, ...]) -> dict[str, Tensor]:
        network.zero_grad()
        (output.square().mean() + sum(rate.sum() for rate in rates)).backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    drawn = network.draw(IMAGES, noise)
    image, mixtures = network.decode_distribution(drawn.latent)
    expected = gradients(image if mixtures is None else mixtures, drawn.rates)
    head = nn.Flatten()
    result = Reconstructor(network, {"flat": head})(IMAGES, noise)
    torch.testing.assert_close(result.image, image)
    assert torch.equal(result.heads["flat"], drawn.latent.flatten(1)) and torch.equal(result.latent, drawn.latent)
    changed = Reconstructor(network)(IMAGES, noise, transforms=[lambda latent: 0.5 * latent])
    torch.testing.assert_close(changed.image, network.decode(0.5 * drawn.latent).sample)
    found = gradients(result.image if mixtures is None else result.stated, result.rates)
    assert (mixtures is None) == (cell == "depthwise")
    for name, gradient in found.items():
        assert gradient.any() or "excitation" in name, name  # whose ReLUs may all be off
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_learned_bias_is_added_where_a_grid_is_entered() -> None:
    """Once for each side but the first, whose start is learned anyway."""
    network = HierarchicalVAE(**SHAPE, width=4, norm_num_groups=2, blocks=0, side_bias=True).requires_grad_(False)
    assert sorted(network.decoder.biases) == ["16", "4"]
    states = dict[int, Tensor]()
    for number, level in enumerate(network.decoder.levels):  # which have no cells
        level.stack.register_forward_hook(lambda _, args, state, number=number: states.update({number: state}))
        if level.channels:
            level.conv_latent.weight.zero_()
            level.conv_latent.bias.zero_()
    network.decoder.biases["4"].copy_(torch.randn(1, 4, 4, 4))
    network.decode(torch.zeros(1, 60, 1, 1))
    larger = network.decoder.start.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(states[0], network.decoder.start)
    torch.testing.assert_close(states[1], larger + network.decoder.biases["4"])
    assert torch.equal(states[2], states[1])


def test_open_posteriors_are_informed_from_the_start() -> None:
    torch.manual_seed(0)
    network = HierarchicalVAE(**SHAPE, width=8, norm_num_groups=2, open_posteriors=True).requires_grad_(False)
    still, other = (network.draw(images, None).latent for images in (IMAGES, -IMAGES))
    assert float((still - other).abs().mean()) > 1e-2
    stds = [(drawn - still) for drawn in [network.draw(IMAGES, torch.ones(2, 60, 1, 1)).latent]]
    assert 0.5 < float(stds[0][:, :12].abs().mean() / torch.exp(torch.tensor(-2.0))) < 2.0


@pytest.mark.parametrize("log_std", [-2.0, 0.0])
def test_what_open_posteriors_cost_before_training(log_std: float) -> None:
    """With small means, (s^2 - ln s^2 - 1) / 2 nats for each latent value: 1.4 for -2, nothing for 0."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"open_posteriors": True, "open_log_std": log_std, "cell": "bottleneck", "width": 32}
    network = HierarchicalVAE(**SHAPE, **config).requires_grad_(False)
    for level in network.decoder.levels:
        if level.channels:
            level.posterior.conv.weight.mul_(1e-3)
    limited = 2.0 * 5.0 * math.tanh(log_std / 5.0)
    cost = (math.exp(limited) - limited - 1.0) / 2.0
    assert cost == pytest.approx(1.411 if log_std else 0.0, abs=1e-3)
    rates = network.draw(IMAGES, torch.zeros(2, 60, 1, 1)).rates
    torch.testing.assert_close(
        torch.cat([rate.flatten() for rate in rates]), torch.full((120,), cost), rtol=0, atol=1e-3
    )


def test_bottlenecks_end_without_an_activation() -> None:
    """As DmolNet of openai/vdvae, where the state after the last block goes into a 1 x 1 convolution."""
    torch.manual_seed(0)
    sides: dict[str, Any] = {"level_sides": [4, 16], "level_channels": [3, 0], "sample_size": 16}
    network = HierarchicalVAE(**sides, width=8, cell="bottleneck", mixtures=2).requires_grad_(False)
    decoder, state = network.decoder, torch.randn(2, 8, 16, 16)
    expected = F.conv2d(decoder.stack(state), decoder.conv_out.weight, decoder.conv_out.bias)
    torch.testing.assert_close(network.output(state)[1], expected)


def test_a_folder_from_before_these_keys_loads_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = HierarchicalVAE(**SHAPE, width=8, norm_num_groups=2).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = ("cell", "encoder_cell", "encoder_blocks", "side_bias", "open_posteriors", "open_log_std", "mixtures")
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in new}))
    again = HierarchicalVAE.from_pretrained(tmp_path)
    assert torch.equal(again(IMAGES).sample, network(IMAGES).sample)
    assert not [name for name, _ in network.named_parameters() if "biases" in name or "passage" in name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": [8, 8]}, r"width \[8, 8\] must be one number, or one for each of the sides \[2, 4, 16\]"),
        ({"encoder_blocks": [1]}, r"encoder_blocks \[1\] must be one number"),
        ({"cell": "dense"}, "dense is no kind of cell: residual, bottleneck, depthwise"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HierarchicalVAE(**SHAPE, **config)
