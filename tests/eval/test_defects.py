"""Pasted defects: a function of seed and number, with masks that say what changed."""

import pytest
import skimage
import torch

from latent_ae.data.images import to_tensor
from latent_ae_eval.anomaly.defects import KINDS, LEVEL, paste_defect


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    return to_tensor(skimage.data.astronaut()[100:260, 100:300])


def test_a_defect_is_a_function_of_seed_and_number(photograph):
    kinds = set()
    for number in range(20):
        before = photograph.clone()
        first, again = paste_defect(photograph, 1, number), paste_defect(photograph, 1, number)
        assert torch.equal(photograph, before)
        assert torch.equal(first.image, again.image) and torch.equal(first.mask, again.mask)
        change = (first.image - photograph).abs().amax(0)
        assert torch.equal(first.mask, change > LEVEL) and first.mask.any()
        assert first.image.shape == photograph.shape and float(first.image.abs().max()) <= 1
        assert 0.0001 < first.mask.float().mean() < 0.16
        kinds.add(first.kind)
    assert kinds == set(KINDS)
    assert not torch.equal(paste_defect(photograph, 1, 0).image, paste_defect(photograph, 2, 0).image)
    assert not torch.equal(paste_defect(photograph, 1, 0).image, paste_defect(photograph, 1, 1).image)


def test_a_patch_is_a_rectangle_from_elsewhere_in_the_image(photograph):
    down, across = torch.meshgrid(torch.arange(160.0), torch.arange(200.0), indexing="ij")
    marked = torch.stack([down, across, torch.zeros(160, 200)]) / 200 - 0.5  # every pixel says where it comes from
    found = 0
    for number in range(30):
        image, mask, kind = paste_defect(marked, 0, number)
        if kind == "patch":
            found += 1
            rows, columns = torch.nonzero(mask, as_tuple=True)
            box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
            shift = (image - marked)[:2, box[0], box[1]]
            assert mask[box].all() and float(shift.amax((1, 2)).sub(shift.amin((1, 2))).max()) < 1e-6
            height, width = mask[box].shape
            assert 0.015 < height * width / (160 * 200) < 0.16 and max(height / width, width / height) < 3.6
    assert found >= 5


def test_a_flat_image_gets_what_shows_on_it():
    for level in (-1.0, 0.0, 1.0):
        for number in range(6):
            assert paste_defect(torch.full((1, 32, 32), level), 0, number).kind in ("scratch", "blob")
    with pytest.raises(ValueError, match="sides of 8 px"):
        paste_defect(torch.zeros(3, 7, 30), 0, 0)
