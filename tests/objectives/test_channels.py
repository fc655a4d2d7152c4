"""Losses of RGBA images and of images of n channels, against formulas written out here."""

import pytest
import torch
from torch import Tensor

from latent_ae.config import UserError, load_settings
from latent_ae.models.build import facts_of
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.settings import TrainSettings
from tests.distributed.split import Distance
from tests.tiny import build_step, micro_batches, settings_for

FOUR = {"in_channels": 4, "out_channels": 4}


def over(rgba: Tensor, colour: Tensor) -> Tensor:
    """Alpha compositing in [0, 1], as image editors define it, back in [-1, 1]."""
    unit, below = (rgba + 1) / 2, ((colour + 1) / 2)[..., None, None]
    return 2 * (unit[:, 3:] * unit[:, :3] + (1 - unit[:, 3:]) * below) - 1


def test_the_gradient_over_two_backgrounds_is_that_of_alphavaes_expectation() -> None:
    """RGBAVAELoss.reconstruction_loss of o0o0o00o0/AlphaVAE, train/losses.py, for the mean and the mean square of the
    two colours, and besides LPIPS over each of them and the error of alpha."""
    colours = [[51, 30, 0], [194, 200, 255]]
    loss = {"pixel": "l2", "backgrounds": colours, "alpha": 0.25, "perceptual": 0.5, "perceptual_every": 2}
    settings = settings_for(model=FOUR, loss=loss, batch_size=4, micro_batch_size=4)
    network = Distance()
    step = build_step(settings, network)
    (batch,) = micro_batches(1, settings)
    done = step.forward_backward(batch, 1)
    image, target = done.image.detach().double().requires_grad_(), batch.target.double()

    b = torch.tensor(colours, dtype=torch.float64) / 127.5 - 1
    eb, eb2 = (x.mean(0).view(1, 3, 1, 1) for x in (b, b * b))
    a, a_hat = (target[:, 3:] + 1) / 2, (image[:, 3:] + 1) / 2
    rgba_diff, alpha_diff = target[:, :3] * a - image[:, :3] * a_hat, a - a_hat
    pixel = (rgba_diff**2 - 2 * eb * rgba_diff * alpha_diff + eb2 * alpha_diff**2).mean()
    pairs = [(over(image, colour)[::2], over(target, colour)[::2]) for colour in b]
    perceptual = torch.stack([network.double()(x, y) for x, y in pairs]).mean()
    alpha = (image[:, 3] - target[:, 3]).abs().mean()
    assert {"l2", "lpips", "alpha"} <= done.logs.keys()
    for name, expected in (("l2", pixel), ("lpips", perceptual), ("alpha", alpha)):
        assert float(done.logs[name]) == pytest.approx(float(expected.detach()), rel=1e-4)
    (gradient,) = torch.autograd.grad(pixel + 0.5 * perceptual + 0.25 * alpha, image)
    assert done.image_gradient is not None and float(gradient.norm()) > 1e-3
    torch.testing.assert_close(done.image_gradient, gradient.float(), rtol=1e-3, atol=1e-7)


def test_colours_of_invisible_pixels_do_not_count_and_random_ones_belong_to_the_sample() -> None:
    settings = settings_for(model=FOUR, loss={"backgrounds": ["random", "white"]}, batch_size=4, micro_batch_size=2)
    step = build_step(settings)
    first, second = micro_batches(0, settings)
    (whole,) = micro_batches(0, settings.model_copy(update={"micro_batch_size": None}))
    colours = torch.cat([first.draws["alpha"][0], second.draws["alpha"][0]])
    assert torch.equal(colours, whole.draws["alpha"][0]) and len(colours[:, 0].unique()) == 12
    assert bool((colours[:, 1] == 1).all()) and float(colours[:, 0].abs().max()) <= 1
    clear = step.objectives["alpha"].prepare(first, 0).compared
    images = torch.rand(2, 4, 16, 16)
    images[:, 3] = -1
    torch.testing.assert_close(clear(images)[0], colours[:2, 0, :, None, None].expand(-1, -1, 16, 16))


def test_networks_see_groups_of_bands_and_pixel_losses_all_channels() -> None:
    five = {"in_channels": 5, "out_channels": 5}
    loss = {"perceptual": 0.5, "bands": [[4, 2, 0], [1, 1, 3]]}
    settings = settings_for(model=five, loss=loss, batch_size=2)
    network = Distance()
    step = build_step(settings, network)
    (batch,) = micro_batches(1, settings)
    done = step.forward_backward(batch, 1)
    image = done.image.detach().requires_grad_()
    groups = [network(image[:, group], batch.target[:, group]).mean() for group in ([4, 2, 0], [1, 1, 3])]
    expected = (image - batch.target).abs().mean() + 0.5 * (groups[0] + groups[1]) / 2
    (gradient,) = torch.autograd.grad(expected, image)
    torch.testing.assert_close(done.image_gradient, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loss.backgrounds=[black]", "loss.backgrounds: is for images of four channels, RGBA, and this AutoencoderKL"),
        ("loss.alpha=1", "loss.alpha: is for RGBA images over loss.backgrounds"),
        ("loss.bands=[[0,1]]", "loss.bands: [0, 1] is a group of 2: a network sees one channel or three"),
        ("loss.bands=[[]]", "loss.bands: [] is a group of 0"),
        ("loss.bands=[[0],[3]]", "loss.bands: 3, and the channels of this AutoencoderKL are 0 to 2"),
        (
            "model.in_channels=4 model.out_channels=4 loss.bands=[[0]] loss.backgrounds=[black] loss.pixel=logistic",
            "loss.bands: loss.backgrounds shows composites of RGBA already",
        ),
        (
            "model.in_channels=4 model.out_channels=4 loss.backgrounds=[black] loss.pixel=logistic",
            "loss.backgrounds: compares composites, and loss.pixel logistic is a likelihood",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_settings(TrainSettings, None, words.split())
    assert message in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("loss.backgrounds=[purple] loss.alpha=1", "loss.backgrounds: give black, gray, white, random or [red, green,"),
        ("loss.backgrounds=[[300,0,0]] loss.alpha=1", "loss.backgrounds: give black, gray, white, random or [red,"),
        ("loss.bands=[0,1,2]", "loss.bands: is a list of groups, each in brackets of its own, as in [[0,1,2]]"),
    ],
)
def test_a_mistake_is_told_once_and_nothing_that_follows_from_it(words: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_settings(TrainSettings, None, [*(f"model.{key}=4" for key in FOUR), *words.split(" ")])
    assert str(error.value).startswith(f"1 problem in the settings:\n  {message}"), str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_one_background_needs_no_list() -> None:
    for word, expected in (("white", "white"), ("[30,200,90]", (30, 200, 90))):
        words = [*(f"model.{key}=4" for key in FOUR), f"loss.backgrounds={word}"]
        assert load_settings(TrainSettings, None, words).loss.backgrounds == (expected,)


def test_the_cure_for_three_channels_is_one_that_the_class_takes() -> None:
    autoencoder = starting_autoencoder(load_settings(TrainSettings, "vqgan"))
    settings = load_settings(TrainSettings, "vqgan", ["loss.backgrounds=[black]"])
    for name, cure in (
        (None, "set model.config.in_channels=4 model.config.out_channels=4"),
        ("runs/old", "start from a first stage of four"),
    ):
        problems = [one for one in settings.problems_with(facts_of(autoencoder, name)) if one.key == "loss.backgrounds"]
        assert [one.message.rpartition(", or ")[2] for one in problems] == [cure]
