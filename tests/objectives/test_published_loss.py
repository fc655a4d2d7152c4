"""The complete loss against latent diffusion's formula, and LeCam's averages against their closed form."""

import pytest
import torch
import torch.nn.functional as F

from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.step import TrainStep
from tests.tiny import GAN, build_step, global_batch, micro_batches, settings_for

pytestmark = pytest.mark.trained

ELEMENTS = 3 * 16 * 16
"""C H W of an image: what latent diffusion sums over and we average over."""


def latent_diffusion_gradients(
    step: TrainStep, lpips: LPIPS, images: torch.Tensor, noise: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Gradients of both networks and d_weight before its clamp, by LPIPSWithDiscriminator's formulas.

    ldm/modules/losses/contperceptual.py with the values of autoencoder_kl_32x32x4.yaml: logvar 0, perceptual_weight 1,
    kl_weight 1e-6, disc_weight .5, disc_factor 1 after disc_start, hinge.
    """
    model, judge = step.bare_reconstructor, step.objectives["gan"].adversary
    result = model(images, noise)
    # LPIPS, N x 1 x 1 x 1, is added to every element and summed with them
    rec = (images - result.image).abs() + lpips(images, result.image).view(-1, 1, 1, 1)
    nll = rec.sum() / len(images)
    kl = 0.5 * (result.mean**2 + result.logvar.exp() - 1.0 - result.logvar).sum((1, 2, 3)).sum() / len(images)
    g_loss = -judge(result.image).mean()
    (nll_grad,) = torch.autograd.grad(nll, model.last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(g_loss, model.last_layer, retain_graph=True)
    raw = nll_grad.norm() / (g_grad.norm() + 1e-4)
    loss = nll + 1e-6 * kl + 0.5 * raw.clamp(0.0, 1e4).detach() * g_loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    own = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    d_loss = 0.5 * (F.relu(1.0 - judge(images)).mean() + F.relu(1.0 + judge(result.image.detach())).mean())
    names, parameters = zip(*judge.named_parameters(), strict=True)
    return own, dict(zip(names, torch.autograd.grad(d_loss, parameters), strict=True)), float(raw)


@pytest.mark.parametrize(("judgement", "binds"), [(0.02, True), (2.0, False)])
def test_the_complete_loss_is_latent_diffusions(judgement: float, binds: bool, lpips_vgg: LPIPS) -> None:
    """Divided by C H W. `judgement` scales the logits: what the discriminator says little of gets a large weight."""
    settings = settings_for(
        loss={"perceptual": 1.0, "kl": 1e-6},
        gan={**GAN, "adaptive_cap": 1e4 / ELEMENTS, "adaptive_smoothing": 0.0},
        optim={"lr": 1e-30, "discriminator_lr": 1e-30},
        batch_size=4,
    )
    step, reference = (build_step(settings, lpips_vgg) for _ in range(2))
    for one in (step, reference):
        with torch.no_grad():
            one.objectives["gan"].adversary.layers[-1].weight.mul_(judgement)
    ours: dict[str, torch.Tensor] = {}
    for optimizer, network in (
        (step.optimizers.autoencoder, step.bare_reconstructor),
        (step.optimizers.adversaries["gan"], step.objectives["gan"].adversary),
    ):
        optimizer.register_step_pre_hook(
            lambda *_, network=network: ours.update({n: p.grad.clone() for n, p in network.named_parameters()})
        )
    for number in range(2):  # the weight lags by one step: the first measures, the second applies it to the same batch
        step(number, micro_batches(0, settings))
    theirs, judged, raw = latent_diffusion_gradients(reference, lpips_vgg, *global_batch(0, settings))
    assert (raw > 1e4) == binds, raw
    assert ours.keys() == theirs.keys() | judged.keys()
    for name, gradient in theirs.items():
        # the perceptual term's kinks and sums in another order; biases before a norm have next to no gradient
        error = float((ours[name] * ELEMENTS - gradient).norm() / (gradient.norm() + 1e-6 * ELEMENTS))
        assert error < 2e-5, (name, error)
    for name, gradient in judged.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_lecams_averages_are_debiased() -> None:
    """After t steps sum_i d^(t - i) x_i (1 - d) / (1 - d^t), as zero_debias of the authors' code; nothing before."""
    step = build_step(settings_for(gan={**GAN, "lecam": 0.1}))
    seen: list[torch.Tensor] = []
    for number in range(4):
        means = step(number, micro_batches(number, step.settings))
        assert (float(means["lecam"]) > 0.0) == (number > 0), "there is no average in the first step"
        seen.append(torch.stack([means["logits_real"], means["logits_fake"]]))
        shares = torch.tensor([0.99 ** (number - i) * 0.01 / (1 - 0.99 ** (number + 1)) for i in range(number + 1)])
        real, fake, known = step.objectives["gan"].lecam_anchors()
        expected = (torch.stack(seen) * shares[:, None]).sum(0)
        torch.testing.assert_close(torch.stack([real, fake]), expected, rtol=1e-5, atol=1e-6)
        assert float(known) == 1.0
