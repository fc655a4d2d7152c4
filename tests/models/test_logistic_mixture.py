"""Mixtures of discretised logistics against scipy's distribution, and the loss and bound that are made of them."""

import itertools
import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from latent_ae.config import UserError, load_settings
from latent_ae.data.rng import posterior_noise
from latent_ae.models.hierarchical import HierarchicalVAE
from latent_ae.models.likelihood import Likelihood, log_likelihood
from latent_ae.models.logistic_mixture import mean_image, mixture_log_likelihood, mixture_of
from latent_ae_eval.likelihood.measure import measure_likelihood
from latent_ae_eval.likelihood.settings import LikelihoodSettings
from latent_ae_train.settings import TrainSettings
from tests.tiny import build_step, micro_batches, settings_for

K = 4
SHAPE = {"width": 8, "level_sides": [4, 8], "level_channels": [2, 1], "norm_num_groups": 2, "mixtures": K}
LEVELS = torch.linspace(-1.0, 1.0, 256, dtype=torch.float64)


@pytest.fixture(scope="module")
def parameters() -> Tensor:
    """Of one pixel of three channels; the means reach past both ends."""
    drawn = torch.randn(1, 10 * K, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[:, 4 * K : 7 * K] -= 2.5  # scales of about 0.08
    return drawn


def first_channels(parameters: Tensor, count: int) -> Tensor:
    """The marginal mixture of the first channels: their part of the parameters."""
    logits, means, scales, slopes = parameters.split([K, 3 * K, 3 * K, 3 * K], 1)
    pairs = count * (count - 1) // 2
    return torch.cat([logits, means[:, : count * K], scales[:, : count * K], slopes[:, : pairs * K]], 1)


def probabilities(parameters: Tensor, *channels: Tensor) -> Tensor:
    """Of pixels whose channels have the values (n,) or (1,)."""
    target = torch.stack(torch.broadcast_tensors(*channels))[None, :, None]
    return mixture_log_likelihood(parameters.expand(-1, -1, 1, target.shape[-1]), target).exp().flatten()


def scipys(parameters: Tensor, pixel: list[float]) -> float:
    """The probability of one pixel, component by component and channel by channel."""
    logits, means, scales, slopes = (part.flatten().numpy() for part in parameters.split([K, 3 * K, 3 * K, 3 * K], 1))
    total, weights = 0.0, torch.softmax(torch.from_numpy(logits), 0).tolist()
    for k in range(K):
        coefficient = [math.tanh(slopes[pair * K + k]) for pair in range(3)]
        centres = [
            means[k],
            means[K + k] + coefficient[0] * pixel[0],
            means[2 * K + k] + coefficient[1] * pixel[0] + coefficient[2] * pixel[1],
        ]
        product = weights[k]
        for channel, (value, centre) in enumerate(zip(pixel, centres, strict=True)):
            law = stats.logistic(centre, math.exp(max(scales[channel * K + k], -7.0)))
            upper = 1.0 if value == 1.0 else law.cdf(value + 1 / 255)
            product *= upper - (0.0 if value == -1.0 else law.cdf(value - 1 / 255))
        total += product
    return total


def test_pixels_have_scipys_probabilities(parameters: Tensor) -> None:
    """With both ends in every channel, and a scale below the least one."""
    narrow = parameters.clone()
    narrow[:, 4 * K] = -9.0
    for pixel in itertools.product([-1.0, float(LEVELS[90]), 1.0], repeat=3):
        found = probabilities(narrow, *(torch.tensor([value], dtype=torch.float64) for value in pixel))
        assert found.item() == pytest.approx(scipys(narrow, list(pixel)), rel=1e-6)


def test_probabilities_of_each_channel_given_those_before_add_up_to_one(parameters: Tensor) -> None:
    red, green = LEVELS[[3]], LEVELS[[200]]
    assert probabilities(first_channels(parameters, 1), LEVELS).sum().item() == pytest.approx(1.0)
    for count, known in ((1, [red]), (2, [red, green])):
        before = probabilities(first_channels(parameters, count), *known).item()
        summed = probabilities(first_channels(parameters, count + 1), *known, LEVELS).sum().item()
        assert summed == pytest.approx(before) and before < 0.5


def test_one_component_is_the_discretised_logistic() -> None:
    image = torch.linspace(-1.2, 1.2, 9, dtype=torch.float64).view(1, 3, 1, 3)
    scales = torch.linspace(-4, 0, 3, dtype=torch.float64).view(1, 3, 1, 1).expand_as(image)
    target = LEVELS[[0, 255, 7, 100, 101, 200, 0, 255, 90]].view(1, 3, 1, 3)
    logits, slopes = torch.full((1, 1, 1, 3), 0.7, dtype=torch.float64), torch.zeros_like(image)
    found = mixture_log_likelihood(torch.cat([logits, image, scales, slopes], 1), target)
    torch.testing.assert_close(found, log_likelihood("logistic", image, target, 2.0 * scales).sum(1))


def test_the_image_is_the_mean(parameters: Tensor) -> None:
    """Of two channels by their joint probabilities, where no component comes near the ends."""
    pair = first_channels(parameters, 2).clone()
    pair[:, K : 3 * K] *= 0.2
    pair[:, 3 * K : 5 * K] -= 1.0
    joint = torch.stack([probabilities(pair, red[None], LEVELS) for red in LEVELS])
    expected = torch.stack([(joint.sum(1) * LEVELS).sum(), (joint.sum(0) * LEVELS).sum()])
    torch.testing.assert_close(mean_image(pair, 2).flatten(), expected, rtol=0, atol=1e-4)


def test_a_network_begins_with_components_over_the_whole_range() -> None:
    network = HierarchicalVAE(**{**SHAPE, "sample_size": 16})
    mixture = mixture_of(network.decoder.conv_out.bias.detach()[None, :, None, None], 3)
    assert mixture.means[0, 2, :, 0, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert float(mixture.log_scales.max()) == float(mixture.log_scales.min()) == -2.0
    assert not mixture.logits.any() and not mixture.slopes.any()


def test_gradients_in_float32_stay_finite() -> None:
    """Far from the target, and with scales from the least to very large ones."""
    parameters = torch.randn(2, 10 * K, 4, 4, generator=torch.Generator().manual_seed(1))
    parameters = (parameters * torch.tensor([1.0, 30.0])[:, None, None, None]).requires_grad_()
    target = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(2)) / 127.5 - 1.0
    found = mixture_log_likelihood(parameters, target)
    (gradient,) = torch.autograd.grad(found.sum(), parameters)
    assert found.isfinite().all() and gradient.isfinite().all() and float(gradient.abs().max()) > 0


def published_loss(parameters: Tensor, target: Tensor) -> Tensor:
    """Nats per value, of probabilities as differences of sigmoids (Salimans et al. 2017, eq. 2)."""
    logits, means, log_scales, slopes = mixture_of(parameters.double(), 3)  # float32 would lose small differences
    x = target.double()[:, :, None]
    red, green, blue = means.unbind(1)
    green = green + slopes[:, 0] * x[:, 0]
    blue = blue + slopes[:, 1] * x[:, 0] + slopes[:, 2] * x[:, 1]
    centred, inverse = x - torch.stack([red, green, blue], 1), torch.exp(-log_scales)
    upper, lower = torch.sigmoid(inverse * (centred + 1 / 255)), torch.sigmoid(inverse * (centred - 1 / 255))
    chance = torch.where(x > 1 - 1 / 255, 1.0, upper) - torch.where(x < 1 / 255 - 1, 0.0, lower)
    by_component = chance.log().sum(1) + logits.log_softmax(1)
    return -by_component.logsumexp(1).mean() / 3


def test_training_minimises_the_negative_bound() -> None:
    """The step's gradients of all weights are those of the published loss and the KL, in micro-batches as in one."""
    settings = settings_for(
        model={"kind": "HierarchicalVAE", "config": SHAPE},
        loss={"pixel": "logistic_mixture", "kl": 1.0},
        batch_size=4,
        micro_batch_size=2,
    )
    step, reference = build_step(settings), build_step(settings)
    network = reference.bare_reconstructor.autoencoder
    network.decoder.conv_out.bias.data.zero_()  # wide distributions, of which differences of sigmoids are exact enough
    for parameter, other in zip(network.parameters(), step.bare_reconstructor.parameters(), strict=True):
        drawn = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))  # moments begin at 0
        parameter.data.add_(drawn)
        other.data.copy_(parameter.data)
    gradients: dict[str, Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    means = step(0, micro_batches(0, settings, 0, (96, 1, 1)))
    batches = list(micro_batches(0, settings, 0, (96, 1, 1)))
    images, noise = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "noise"))
    drawn = network.draw(images, noise)
    image, mixtures = network.decode_distribution(drawn.latent)
    torch.testing.assert_close(image, mean_image(mixtures, 3))
    loss, kl = published_loss(mixtures, images), sum(rate.sum() for rate in drawn.rates) / images.numel()
    (loss + kl).backward()
    assert float(means["logistic_mixture"]) == pytest.approx(loss.item(), rel=1e-4)
    assert float(means["bits_per_dimension"]) == pytest.approx((loss + kl).item() / math.log(2), rel=1e-4)
    for name, parameter in reference.bare_reconstructor.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_what_does_not_go_with_mixtures_is_refused_at_once() -> None:
    with pytest.raises(UserError) as refused:
        load_settings(TrainSettings, "deep-vae", ["gan.weight=0.5", "loss.learned_logvar=true", "loss.scale=0.2"])
    for text in (
        "gan.weight: an adversary judges an image, and loss.pixel logistic_mixture has no gradient there",
        "loss.learned_logvar: the decoder gives the scale of logistic_mixture",
        "loss.scale: pixel: logistic_mixture has none",
    ):
        assert text in str(refused.value)


def test_the_bound_takes_the_mixtures(tmp_path: Path) -> None:
    """Distortions are those of the published loss, for the samples of the posterior that the seed gives."""
    torch.manual_seed(0)
    network = HierarchicalVAE(**{**SHAPE, "sample_size": 16}).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "model/likelihood.json").write_text(json.dumps(Likelihood("logistic_mixture", None)._asdict()))
    levels = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    (tmp_path / "images").mkdir()
    for number, one in enumerate(levels):
        Image.fromarray(one.numpy()).save(tmp_path / f"images/{number}.png")
    settings = LikelihoodSettings(crop_px=16, samples=2, num_workers=0, num_pictures=1)
    result = measure_likelihood(tmp_path / "model", tmp_path / "images", settings, out=tmp_path / "out")
    assert result["likelihood"] == {
        **{"kind": "logistic_mixture", "scale": None, "scale_from": None},
        "discretised": True,
    }
    assert not result["notes"]
    images = levels.movedim(-1, 1) / 127.5 - 1.0
    for number, row in enumerate(pyarrow.parquet.read_table(tmp_path / "out/images.parquet").to_pylist()):
        noises = [posterior_noise(settings.seed, [number], [96, 1, 1], sample) for sample in range(2)]
        drawn = [network.draw(images[[number]], noise) for noise in noises]
        expected = [published_loss(network.decode_distribution(one.latent)[1], images[[number]]) for one in drawn]
        assert row["distortion"] == pytest.approx(sum(expected).item() / 2 * 768, rel=1e-4)
    with pytest.raises(UserError, match="scale: the model was trained with logistic_mixture"):
        measure_likelihood(tmp_path / "model", tmp_path / "images", settings.model_copy(update={"scale": 0.1}))
