"""loss.scale_consistency: the gradient of a whole step against the loss written out, and what it does not go with."""

import pytest
import torch

from latent_ae.config import UserError, load_settings
from latent_ae.data.rng import downsampling_number
from latent_ae.objectives.reconstruction import ReconstructionSettings, downsampled, scales
from latent_ae_train.settings import TrainSettings
from tests.tiny import GAN, LATENT, SIDE, build_step, global_batch, micro_batches, settings_for

WEIGHT = 0.25


def smaller(x: torch.Tensor, times: int) -> torch.Tensor:
    """Bilinear downsampling by hand: a pixel lies in the middle of a block, between its four central pixels."""
    first, second = times // 2 - 1, times // 2
    rows = (x[..., first::times, :] + x[..., second::times, :]) / 2
    return (rows[..., first::times] + rows[..., second::times]) / 2


@pytest.mark.parametrize("times", [2, 4])
def test_the_gradient_is_that_of_the_loss_written_out(times: int) -> None:
    """In two passes of a step, with noise on the latents, which the second image has, too, and a discriminator, which
    does not see that image."""
    settings = settings_for(
        loss={"kl": 1e-2, "scale_consistency": WEIGHT},
        latents={"noise": 0.5, "noise_form": "added"},
        gan={**GAN, "adaptive": False},
        optim={"lr": 1e-30},
        batch_size=4,
        micro_batch_size=2,
    )
    number = next(step for step in range(50) if (downsampling_number(0, step) < 0.5) == (times == 2))
    step = build_step(settings)
    gradients: dict[str, torch.Tensor] = {}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in step.bare_reconstructor.named_parameters()})
    )
    twin = build_step(settings)
    reference, discriminator = twin.bare_reconstructor.autoencoder, twin.objectives["gan"].adversary
    logs = step(number, micro_batches(number, settings))
    images, noise = global_batch(number, settings)
    level, added = step.objectives["latent_noise"].draw(range(number * 4, number * 4 + 4), LATENT)
    posterior = reference.encode(images).latent_dist
    latent = posterior.mean + posterior.std * noise + level.view(4, 1, 1, 1) * added
    image, second = reference.decode(latent).sample, reference.decode(smaller(latent, times)).sample
    assert second.shape[-1] == SIDE // times
    consistency = (second - smaller(images, times)).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum() / images.numel()
    loss = (image - images).abs().mean() + 1e-2 * kl - 0.5 * discriminator(image).mean()
    (loss + WEIGHT * consistency).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[f"autoencoder.{name}"], parameter.grad, rtol=1e-3, atol=1e-7, msg=name)
    assert float(logs["l1_downsampled"]) == pytest.approx(consistency.item())


def test_off_decodes_once() -> None:
    step = build_step(settings_for(batch_size=2))
    done = step.forward_backward(next(micro_batches(0, step.settings)), 0)
    assert done.out.second is None and not any(key.endswith("_downsampled") for key in done.logs)


def test_only_scales_that_losses_can_see_are_drawn() -> None:
    own = ReconstructionSettings(scale_consistency=WEIGHT)  # VGG16 needs 16 px
    assert scales(own, 64, 8) == (2, 4) and scales(own, 32, 8) == (2,) and scales(own, 96, 6) == (2,)
    assert scales(own, 64, 7) == scales(own, 16, 8) == ()
    image = torch.rand(1, 3, 8, 8)
    assert all(torch.allclose(downsampled(image, times), smaller(image, times)) for times in (2, 4))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("loss.learned_logvar=true", "is no part of the likelihood that loss.learned_logvar makes"),
        ("loss.pixel=gaussian", "is no part of the likelihood that loss.pixel gaussian makes"),
        ("loss.pixel_weight=0 loss.perceptual=0 loss.convnext=1", "repeats loss.pixel and loss.perceptual"),
        ("latents.equivariance=0.5", "downsamples latents, as latents.equivariance does"),
        ("compile=true", "decodes images of other sizes"),
        ("data.resolution=24 validate.crop_px=24", "halves latents of 3 px and images of 24 px, of which"),
        ("data.resolution=40 validate.crop_px=40", "halves latents of 5 px and images of 40 px, of which"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(words: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"loss.scale_consistency: {expected}"):
        load_settings(TrainSettings, None, ["loss.scale_consistency=0.25", *words.split()])
