"""Losses and discriminator against independent answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from latent_ae.discriminators import PatchDiscriminator
from latent_ae.losses import (
    CHARBONNIER_EPS,
    adaptive_ratio,
    discriminator_loss,
    generator_loss,
    kl_loss,
    kl_per_dimension,
    lecam_loss,
    pixel_loss,
)


def test_pixel_losses_by_hand() -> None:
    a, b = torch.tensor([0.0, 0.5, -1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert float(pixel_loss("l1", a, b)) == pytest.approx(2.5 / 4)
    assert float(pixel_loss("l2", a, b)) == pytest.approx(4.25 / 4)
    expected = sum(math.sqrt(d * d + CHARBONNIER_EPS**2) - CHARBONNIER_EPS for d in (0, 0.5, 2, 0)) / 4
    assert float(pixel_loss("charbonnier", a, b)) == pytest.approx(expected)


def test_kl_equals_torch_distributions() -> None:
    mean, logvar = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_per_dimension(mean, logvar), expected)
    torch.testing.assert_close(kl_loss(mean, logvar, 300), expected.sum((1, 2, 3)).mean() / 300)


def test_the_kl_weight_means_what_it_means_in_latent_diffusion() -> None:
    """Its loss: sum |d| per sample + 1e-6 * KL per sample. Ours: the same divided by the image's elements."""
    image, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    mean, logvar = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1.0 - logvar).sum((1, 2, 3))
    theirs = (image - target).abs().sum() / 2 + 1e-6 * kl.sum() / 2
    ours = pixel_loss("l1", image, target) + 1e-6 * kl_loss(mean, logvar, 3 * 8 * 8)
    torch.testing.assert_close(ours, theirs / (3 * 8 * 8))


def test_adversarial_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert float(discriminator_loss("hinge", real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))
    assert float(generator_loss("hinge", fake)) == pytest.approx(0.75)
    ones, zeros = torch.ones(2), torch.zeros(2)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), 0.5 * (bce(real, ones) + bce(fake, zeros)))
    torch.testing.assert_close(generator_loss("vanilla", fake), bce(fake, ones))


def test_lecam_by_hand() -> None:
    """Tseng et al. 2021: mean relu(D(real) - average fake)^2 + mean relu(average real - D(fake))^2."""
    value = lecam_loss(torch.tensor([1.0, -3.0]), torch.tensor([0.5, 4.0]), torch.tensor(2.0), torch.tensor(-1.0))
    assert float(value) == pytest.approx((2.0**2 + 0) / 2 + (1.5**2 + 0) / 2)


def test_adaptive_ratio() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_ratio(a, b, cap=100.0)) == pytest.approx(2.5, rel=1e-5)
    assert float(adaptive_ratio(a, b, cap=2.0)) == 2.0
    assert float(adaptive_ratio(a, torch.zeros(2), cap=7.0)) == 7.0


@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_a_sample_is_judged_alone(norm: str) -> None:
    """No logit depends on another sample: so real and reconstructed images can share one pass."""
    network = PatchDiscriminator(3, channels=16, layers=2, norm=norm).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        together = network(images)
        apart = torch.cat([network(image[None]) for image in images])
    assert together.shape == (4, 1, 6, 6)
    torch.testing.assert_close(together, apart)


def test_the_receptive_field_is_70_px_with_three_layers() -> None:
    network = PatchDiscriminator(1, channels=4, layers=3, norm="none")
    image = torch.randn(1, 1, 128, 128, requires_grad=True)
    logits = network(image)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], image)
    rows = gradient[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
