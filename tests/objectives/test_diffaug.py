"""Differentiable augmentation against the same operations written with NumPy and slices."""

import numpy as np
import pytest
import torch

from latent_ae.data.rng import augmentation_numbers
from latent_ae.objectives.diffaug import NUMBERS, augment

IMAGES = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
MIDDLE = torch.full((3, NUMBERS), 0.5)


def with_numbers(**changes: float) -> torch.Tensor:
    names = ("brightness", "saturation", "contrast", "shift_y", "shift_x", "hole_y", "hole_x")
    numbers = MIDDLE.clone()
    for name, value in changes.items():
        numbers[:, names.index(name)] = value
    return numbers


def test_the_middle_changes_nothing_and_an_empty_policy_neither() -> None:
    torch.testing.assert_close(augment(IMAGES, MIDDLE, ("color", "translation")), IMAGES)
    assert augment(IMAGES, torch.rand(3, NUMBERS), ()) is IMAGES


def test_colour_by_hand() -> None:
    numbers = torch.rand(3, NUMBERS)
    expected = []
    for image, (brightness, saturation, contrast, *_) in zip(IMAGES.numpy(), numbers.numpy(), strict=True):
        image = image + (brightness - 0.5)
        image = (image - image.mean(0)) * 2 * saturation + image.mean(0)
        expected.append((image - image.mean()) * (contrast + 0.5) + image.mean())
    result = augment(IMAGES, numbers, ("color",))
    np.testing.assert_allclose(result.numpy(), np.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("uniform", "shift"), [(0.0, -2), (0.5, 0), (0.999, 2)])
def test_translation_fills_with_zeros(uniform: float, shift: int) -> None:
    result = augment(IMAGES, with_numbers(shift_y=uniform), ("translation",))  # an eighth of 16 rows is 2
    expected = torch.zeros_like(IMAGES)
    if shift >= 0:
        expected[:, :, shift:] = IMAGES[:, :, : 16 - shift]
    else:
        expected[:, :, :shift] = IMAGES[:, :, -shift:]
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("uniform", "first"), [(0.0, -4), (0.5, 4), (0.999, 12)])
def test_cutout_makes_a_hole_of_half_the_side(uniform: float, first: int) -> None:
    result = augment(IMAGES, with_numbers(hole_y=uniform, hole_x=0.5), ("cutout",))
    expected = IMAGES.clone()
    expected[:, :, max(0, first) : first + 8, 6:18] = 0
    assert torch.equal(result, expected)


def test_every_shift_and_hole_is_as_likely() -> None:
    numbers = augmentation_numbers(0, range(4000), NUMBERS)
    ones = torch.ones(4000, 1, 16, 16)
    shifts = augment(ones, numbers, ("translation",)).sum(dim=(1, 2, 3)).div(16).round()
    assert shifts.min() >= 12 and len(shifts.unique()) > 3
    moved_down = (augment(ones, numbers, ("translation",))[:, 0, 0].sum(1) == 0).float().mean()
    assert float(moved_down) == pytest.approx(2 / 5, abs=0.04)


def test_gradient_is_that_of_finite_differences() -> None:
    images = (IMAGES[:, :, :8, :8]).double().requires_grad_()
    numbers = torch.rand(3, NUMBERS)
    assert torch.autograd.gradcheck(lambda x: augment(x, numbers, ("color", "translation", "cutout")), images)


def test_numbers_belong_to_the_sample() -> None:
    together = augmentation_numbers(3, [5, 6, 7], NUMBERS)
    assert torch.equal(together[1:], augmentation_numbers(3, [6, 7], NUMBERS))
    assert not torch.equal(together, augmentation_numbers(4, [5, 6, 7], NUMBERS))
    assert float(together.min()) >= 0 and float(together.max()) < 1
