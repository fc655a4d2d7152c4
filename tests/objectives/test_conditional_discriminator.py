"""gan.conditional: a discriminator that sees latents, against a plain one on channels put together by hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import UserError, load_settings
from latent_ae.export.model_card import discriminator_text
from latent_ae.models.discriminators import stored_discriminator
from latent_ae.models.patch_discriminator import PatchDiscriminator
from latent_ae_train.checkpoint import save_checkpoint
from latent_ae_train.settings import TrainSettings
from tests.tiny import GAN, LATENT, STATE, adversary_of, build_step, global_batch, micro_batches, settings_for

CONDITIONAL = {**GAN, "conditional": True, "adaptive": False}


def with_latents(images: Tensor, latents: Tensor) -> Tensor:
    """Each pixel of a latent is repeated over the pixels of the image that it covers."""
    side = images.shape[-1] // latents.shape[-1]
    return torch.cat([images, latents.repeat_interleave(side, 2).repeat_interleave(side, 3)], 1)


def test_both_networks_learn_from_images_and_their_latents() -> None:
    """One step in two passes against the losses written out, with a plain discriminator of 3 + 4 channels. The latent
    gets no gradient from the discriminator but through the image."""
    settings = settings_for(gan=CONDITIONAL, optim={"lr": 1e-30}, batch_size=4, micro_batch_size=2)
    step, twin = build_step(settings), build_step(settings)
    plain = PatchDiscriminator(3 + LATENT[0], channels=8, layers=1)
    plain.load_state_dict(adversary_of(step).state_dict())
    gradients: dict[str, Tensor] = {}
    networks = {"autoencoder": step.bare_reconstructor.autoencoder, "discriminator": adversary_of(step)}
    step.optimizers.autoencoder.register_step_pre_hook(
        lambda *_: gradients.update(
            {f"{key}.{name}": p.grad.clone() for key, one in networks.items() for name, p in one.named_parameters()}
        )
    )
    step(0, micro_batches(0, settings))
    reference, (images, noise) = twin.bare_reconstructor.autoencoder, global_batch(0, settings)
    posterior = reference.encode(images).latent_dist
    latent = posterior.mean + posterior.std * noise
    image, shown = reference.decode(latent).sample, latent.detach()
    ((image - images).abs().mean() - 0.5 * plain(with_latents(image, shown)).mean()).backward()
    plain.zero_grad()
    real, fake = plain(with_latents(images, shown)), plain(with_latents(image.detach(), shown))
    (0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
    for key, one in {"autoencoder": reference, "discriminator": plain}.items():
        for name, parameter in one.named_parameters():
            mine = gradients[f"{key}.{name}"]
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-7, msg=f"{key}.{name}")


def test_its_file_is_enough_to_build_it_and_to_go_on(tmp_path: Path) -> None:
    step = build_step(settings_for(gan=CONDITIONAL))
    folder = save_checkpoint(tmp_path, step, {**STATE, "step": 0}).folder
    loaded = stored_discriminator(folder)
    assert loaded.shape == {**adversary_of(build_step(settings_for(gan=GAN))).shape, "latent_channels": 4}
    assert "gan.conditional=true" in discriminator_text(loaded, "me/mine")
    begun = adversary_of(build_step(settings_for(gan={**CONDITIONAL, "init_from": str(folder)}, seed=1)))
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in begun.state_dict().items())
    with pytest.raises(UserError, match="sees latents of 4 channels, and these have 2"):
        other = settings_for(gan={**CONDITIONAL, "init_from": str(folder)}, model={"latent_channels": 2})
        build_step(other)
    with pytest.raises(UserError, match=r"has another shape .* gan\.conditional"):
        build_step(settings_for(gan={**GAN, "init_from": str(folder)}))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gan.network=stylegan", r"gan\.conditional: is for gan\.network patch, and this one is stylegan"),
        ("latents.equivariance=0.5", r"gan\.conditional: shows latents as they are"),
        ("gan.diffaug=[translation,color]", r"gan\.diffaug: moves images against the latents"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(words: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_settings(TrainSettings, None, ["gan.conditional=true", *words.split()])
