"""Losses and discriminator against independent answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from latent_ae.models.discriminator import Blur
from latent_ae.models.patch_discriminator import PatchDiscriminator
from latent_ae.models.posterior import kl_per_dimension
from latent_ae.objectives.adversarial_losses import discriminator_loss, generator_loss, lecam_loss, r1_penalty
from latent_ae.objectives.balance import adaptive_ratio
from latent_ae.objectives.base import Batch
from latent_ae.objectives.kl import kl_loss
from latent_ae.objectives.reconstruction import CHARBONNIER_EPS, every_nth, pixel_loss
from tests.runs import SHAPES
from tests.tiny import build_step, micro_batches, settings_for


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
    torch.testing.assert_close(kl_loss([kl_per_dimension(mean, logvar)], 300), expected.sum((1, 2, 3)).mean() / 300)


def test_the_kl_weight_means_what_it_means_in_latent_diffusion() -> None:
    """Its loss: sum |d| per sample + 1e-6 * KL per sample. Ours: the same divided by the image's elements."""
    image, target = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    mean, logvar = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1.0 - logvar).sum((1, 2, 3))
    theirs = (image - target).abs().sum() / 2 + 1e-6 * kl.sum() / 2
    ours = pixel_loss("l1", image, target) + 1e-6 * kl_loss([kl_per_dimension(mean, logvar)], 3 * 8 * 8)
    torch.testing.assert_close(ours, theirs / (3 * 8 * 8))


def test_adversarial_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])
    assert float(discriminator_loss("hinge", real, fake)) == pytest.approx(0.5 * (0.25 + 0.75))
    assert float(generator_loss("hinge", fake)) == pytest.approx(0.75)
    ones, zeros = torch.ones(2), torch.zeros(2)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(discriminator_loss("vanilla", real, fake), 0.5 * (bce(real, ones) + bce(fake, zeros)))
    assert float(generator_loss("vanilla", fake)) == pytest.approx(0.75)
    for kind in ("vanilla", "non_saturating"):
        torch.testing.assert_close(discriminator_loss(kind, real, fake), 0.5 * (bce(real, ones) + bce(fake, zeros)))
    torch.testing.assert_close(generator_loss("non_saturating", fake), bce(fake, ones))


def test_r1_of_a_linear_discriminator() -> None:
    """D's patches are <w_p, x>: the gradient of their mean is the mean of the w_p, whatever x is."""
    weight, images = torch.randn(3, 12), torch.randn(5, 3, 2, 2, requires_grad=True)
    logits = (images.flatten(1) @ weight.T).view(5, 1, 3, 1)
    torch.testing.assert_close(r1_penalty(logits, images), 0.5 * weight.mean(0).square().sum())


def test_r1_trains_the_discriminator() -> None:
    """Its derivative by finite differences, through convolutions and group norm."""
    torch.manual_seed(0)
    network = PatchDiscriminator(3, channels=4, layers=1).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)

    def penalty() -> torch.Tensor:
        return r1_penalty(network.layers(images), images)

    weight = network.layers[0].weight
    (analytic,) = torch.autograd.grad(penalty(), weight)
    direction, eps = torch.randn_like(weight), 1e-8  # small: leaky ReLUs jump where they bend
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * eps * direction
        moved.append(penalty().item())
        with torch.no_grad():
            weight -= sign * eps * direction
    above, below = moved
    assert (above - below) / (2 * eps) == pytest.approx(float((analytic * direction).sum()), rel=1e-4)


def test_lecam_by_hand() -> None:
    """Tseng et al. 2021: mean relu(D(real) - average fake)^2 + mean relu(average real - D(fake))^2."""
    value = lecam_loss(torch.tensor([1.0, -3.0]), torch.tensor([0.5, 4.0]), torch.tensor(2.0), torch.tensor(-1.0))
    assert float(value) == pytest.approx((2.0**2 + 0) / 2 + (1.5**2 + 0) / 2)


def test_adaptive_ratio() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_ratio(a, b, cap=100.0)) == pytest.approx(5.0 / 2.0001, rel=1e-6)
    assert float(adaptive_ratio(a, b, cap=2.0)) == 2.0
    assert float(adaptive_ratio(a, torch.zeros(2), cap=7.0)) == 7.0
    assert not adaptive_ratio(torch.full((2,), float("inf")), b, cap=7.0).isfinite(), "infinity is not the cap"


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_a_sample_is_judged_alone(norm: str, blur: bool) -> None:
    """No logit depends on another sample: so real and reconstructed images can share one pass."""
    network = PatchDiscriminator(3, channels=16, layers=2, norm=norm, blur=blur).eval()
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


def test_batch_norm_looks_at_the_whole_batch() -> None:
    """Why it is refused where a batch is split. Against F.batch_norm on the same convolutions."""
    network = PatchDiscriminator(3, channels=4, layers=1, norm="batch")
    images = torch.randn(4, 3, 16, 16)
    first, _, second, norm, _, last = network.layers
    hidden = second(F.leaky_relu(first(images), 0.2))
    hidden = F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(network(images), last(F.leaky_relu(hidden, 0.2)))
    assert not torch.allclose(network(images)[:2], network(images[:2]))


def test_blur_keeps_constants_and_removes_the_finest_stripes() -> None:
    blur = Blur()
    constant = torch.full((1, 2, 8, 8), 0.7)
    torch.testing.assert_close(blur(constant), constant)
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 2, 8, 8)
    torch.testing.assert_close(blur(stripes)[..., 1:6], torch.zeros(1, 2, 8, 5), atol=1e-7, rtol=0)
    # a slow ramp moves by half a pixel, as an even number of taps must
    ramp = torch.arange(8.0).expand(1, 2, 8, 8)
    torch.testing.assert_close(blur(ramp)[..., 2:5], ramp[..., 2:5] + 0.5)


def test_the_gradient_of_a_codebook_is_the_textbook_one() -> None:
    """Against one autograd pass over van den Oord et al. 2017, eq. 3, written out."""
    model = {"kind": "VQModel", "config": SHAPES["VQModel"]}
    settings = settings_for(model=model, batch_size=4, optim={"lr": 1e-30}, loss={"commitment": 0.25})
    step = build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    batches = list(micro_batches(0, settings, latent=(3, 8, 8)))
    step(0, iter(batches))
    reference, (batch,) = build_step(settings).bare_reconstructor, batches
    out = reference(batch.images, batch.noise)
    codebook = (out.codes[0].vectors - out.mean.detach()).square().mean()
    commitment = (out.mean - out.codes[0].vectors.detach()).square().mean()
    ((out.image - batch.images).abs().mean() + codebook + 0.25 * commitment).backward()
    compared = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert any("quantize" in name for name in compared) and len(compared) > 20
    for name, gradient in compared.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_lpips_is_of_every_nth_sample_of_the_run_however_it_is_split(every: int) -> None:
    for first in range(8):
        numbers = list(range(first, first + 7))
        batch = Batch(torch.zeros(7, 1, 1, 1), torch.zeros(7, 1, 1, 1), torch.zeros(7, 1, 1, 1), numbers)
        assert numbers[every_nth(batch, every)] == [number for number in numbers if number % every == 0]
