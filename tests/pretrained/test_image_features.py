"""Features of DINOv2 and CLIP against transformers and Pillow, with random weights."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from latent_ae.config import UserError
from latent_ae.pretrained.frozen import IMAGENET_MEAN, IMAGENET_STD
from latent_ae.pretrained.image_features import (
    CLIP_MEAN,
    CLIP_STD,
    CMMD,
    FD_DINOV2,
    ClipFeatures,
    DinoFeatures,
    _agrees,
)
from tests.tiny_vision import MEAN, STD, save_clip, save_vision_model


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_pillow(images: torch.Tensor, side_px: int) -> torch.Tensor:
    """Resized bicubically and normalised, picture by picture."""
    resized = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((side_px, side_px), Image.BICUBIC) for x in images]
    x = torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("size", [(300, 260), (40, 60)])
def test_images_are_resized_as_pillow_does_it(tmp_path, size):
    network = DinoFeatures(save_vision_model(tmp_path, patch_size=56, image_size=224))
    difference = network._levels(pictures(*size), 224) - by_pillow(pictures(*size), 224)
    assert (difference * torch.tensor(STD).view(3, 1, 1)).abs().max() < 1.01 / 255


def test_dinov2_gives_its_class_token_with_positions_as_the_hub_interpolates_them(tmp_path):
    network = DinoFeatures(save_vision_model(tmp_path, patch_size=32, image_size=96))
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    images = pictures(224, 224)
    with torch.no_grad():
        otherwise = model(pixel_values=by_pillow(images, 224)).pooler_output
        # facebookresearch/dinov2, dinov2/models/vision_transformer.py, with interpolate_offset=0.1 of hub/backbones.py
        grid = model.embeddings.position_embeddings[:, 1:].reshape(1, 3, 3, 16).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, mode="bicubic", antialias=False, scale_factor=((7 + 0.1) / 3, (7 + 0.1) / 3))
        first = model.embeddings.position_embeddings[:, :1]
        model.embeddings.position_embeddings.data = torch.cat([first, grid.permute(0, 2, 3, 1).view(1, 49, 16)], 1)
        expected = model(pixel_values=by_pillow(images, 224)).pooler_output
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(otherwise, expected, rtol=1e-4, atol=1e-5)
    assert network.dimensions == 16 and not network.is_published
    torch.testing.assert_close(network(images[:, :1]), network(images[:, :1].expand(-1, 3, -1, -1)))


def test_clip_gives_the_embedding_of_the_middle_square_in_unit_length(tmp_path):
    network = ClipFeatures(save_clip(tmp_path))
    images = pictures(32, 47)
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = model.get_image_features(pixel_values=by_pillow(images[..., 7:39], 32))
    expected = getattr(found, "pooler_output", found)  # older versions of transformers return the tensor itself
    torch.testing.assert_close(network(images), F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert network.dimensions == 12 and not network.is_published


def test_only_the_published_sizes_and_normalisation_have_the_published_name():
    # of facebook/dinov2-large and openai/clip-vit-large-patch14-336
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    dinov2 = transformers.Dinov2Config(**large, image_size=518)
    clip = transformers.CLIPVisionConfig(**large, image_size=336, projection_dim=768)
    for config, published, mean, std in (
        (dinov2, FD_DINOV2, IMAGENET_MEAN, IMAGENET_STD),
        (clip, CMMD, CLIP_MEAN, CLIP_STD),
    ):
        network = SimpleNamespace(
            model=SimpleNamespace(config=config), mean=torch.tensor(mean).view(1, 3, 1, 1), std=torch.tensor(std)
        )
        assert _agrees(network, published, mean, std)
        assert not _agrees(network, published, MEAN, std)
        config.num_hidden_layers = 12
        assert not _agrees(network, published, mean, std)


def test_a_folder_of_something_else_is_refused(tmp_path):
    save_vision_model(tmp_path / "vit", "ViT")
    for network, message in (
        (DinoFeatures, "dinov2_model: .*vit holds a ViTModel; a DINOv2 is needed"),
        (ClipFeatures, "clip_model: transformers cannot load .*vit: "),
    ):
        with pytest.raises(UserError, match=message):
            network(tmp_path / "vit")
