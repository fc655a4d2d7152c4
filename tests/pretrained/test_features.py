"""Inception's features against torch-fidelity's and pytorch-fid's arithmetic, with random weights."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from latent_ae.config import UserError
from latent_ae.pretrained.inception import InceptionFeatures
from tests.inception import pytorch_fid, random_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def pictures(side: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_are_torch_fidelitys_bit_for_bit(weights):
    reference = FeatureExtractorInceptionV3("reference", ["2048"], feature_extractor_weights_path=str(weights))
    ours = InceptionFeatures(weights=weights)
    assert torch.equal(ours(pictures()), reference(pictures())[0])
    assert not ours.is_published
    gray = pictures()[:, :1]
    assert torch.equal(ours(gray), ours(gray.expand(-1, 3, -1, -1)))
    ours.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(pictures()), reference(pictures())[0], rtol=1e-5, atol=1e-6)


def test_the_other_resize_is_pytorch_fids(weights):
    ours = InceptionFeatures("pytorch-fid", weights)(pictures())
    torch.testing.assert_close(ours, pytorch_fid(weights, pictures()), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, InceptionFeatures(weights=weights)(pictures()), rtol=1e-2)


def test_double_precision_is_nearly_the_same(weights):
    single, double = (InceptionFeatures(weights=weights, double=double)(pictures()) for double in (False, True))
    assert double.dtype == torch.float32 and not torch.equal(single, double)
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-4)


def test_other_weights_have_another_name_and_no_file_is_unpickled(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "same.safetensors")
    assert InceptionFeatures(weights=tmp_path / "same.safetensors").sha256 == InceptionFeatures(weights=weights).sha256
    mark = tmp_path / "mark"

    class Hostile:
        def __reduce__(self):
            return (mark.write_text, ("run",))

    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    for name in ("hostile.pth", "other.pth", "list.pth", "absent.pth"):
        with pytest.raises(UserError, match=f"inception_weights: .*{name}: not Inception's state dict"):
            InceptionFeatures(weights=tmp_path / name)
    assert not mark.exists()


def test_floats_are_refused(weights):
    with pytest.raises(ValueError, match="uint8"):
        InceptionFeatures(weights=weights)(pictures() / 255)
