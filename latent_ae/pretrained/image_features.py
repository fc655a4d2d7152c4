"""One feature vector for each image, of a DINOv2 or a CLIP from a local folder, for distances between sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from latent_ae.config import UserError
from latent_ae.pretrained.frozen import IMAGENET_MEAN, IMAGENET_STD, FrozenNetwork, read_folder, reason
from latent_ae.pretrained.weight_files import tensors_sha256

Kind = Literal["dinov2", "clip"]
DINOV2_PX = 224
"""Side to which Stein et al. (2023) resize images for DINOv2, px."""
HUB_OFFSET = 0.1
"""What the published DINOv2 (facebookresearch/dinov2, hub/backbones.py) adds to the patches along a side when it
interpolates its position embeddings; transformers does not."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VIT_L14 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
FD_DINOV2 = {"model_type": "dinov2", "image_size": 518, "mlp_ratio": 4, "use_swiglu_ffn": False, **VIT_L14}
"""The DINOv2 ViT-L/14 of FD-DINOv2 (Stein et al. 2023; layer6ai-labs/dgm-eval 74c79f7)."""
CMMD = {"model_type": "clip_vision_model", "image_size": 336, "projection_dim": 768, "hidden_act": "quick_gelu"}
CMMD |= VIT_L14
"""The CLIP ViT-L/14 at 336 px of CMMD (Jayasumana et al. 2024; google-research/google-research 5b09c22, cmmd/)."""


class ImageFeatures(FrozenNetwork):
    """A frozen network that returns one feature vector for each image.

    `dimensions` is the number of features, `sha256` the checksum of the weights. `is_published` says whether size,
    image size and normalisation are those of the published distance; of the weights nothing but the checksum is known.
    """

    dimensions: int
    is_published: bool

    def __init__(self, folder: str | Path, setting: str, loaded: tuple[Any, Tensor, Tensor]) -> None:
        super().__init__(*loaded)
        # of the files: names and parts in memory depend on the version of transformers
        files = [*Path(folder).glob("model.safetensors"), *Path(folder).glob("model-*-of-*.safetensors")]
        self.sha256 = tensors_sha256({name: tensor for file in files for name, tensor in load_file(file).items()})
        try:
            self.dimensions = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]
        except Exception as error:  # a model may accept a configuration with which its forward pass fails
            raise UserError(f"{setting}: {folder} gives no features of RGB images: {reason(error)}") from error

    def _levels(self, images: Tensor, side_px: int) -> Tensor:
        """Return uint8 images as the network takes them: resized to a square as Pillow does it, and normalised.

        Pillow resizes bicubically and antialiased, first the width and then the height, and rounds to levels each time.
        """
        x = images.expand(-1, 3, -1, -1).float()
        for size in ((x.shape[2], side_px), (side_px, side_px)):
            x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return (x / 255 - self.mean) / self.std


class DinoFeatures(ImageFeatures):
    """The class token of a DINOv2 after its last norm, as FD-DINOv2 compares it (Stein et al. 2023, arXiv:2306.04675).

    Args:
        folder: A folder of transformers' Dinov2Model or Dinov2WithRegistersModel: config.json, model.safetensors,
            preprocessor_config.json.
        setting: The setting that names it, for messages.

    Raises:
        UserError: If transformers is missing, or the folder holds no such model.
    """

    def __init__(self, folder: str | Path, setting: str = "dinov2_model") -> None:
        loaded = read_folder(folder, setting, spare=("mask_token",))
        config = loaded[0].config
        if config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise UserError(f"{setting}: {folder} holds a {type(loaded[0]).__name__}; a DINOv2 is needed")
        if config.model_type == "dinov2":
            _interpolate_as_published(loaded[0].embeddings)
        super().__init__(folder, setting, loaded)
        self.is_published = _agrees(self, FD_DINOV2, IMAGENET_MEAN, IMAGENET_STD)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images, which are resized to 224 x 224 px whatever their aspect ratio.

        Args:
            images: (N, C, H, W) uint8; C is 3, or 1, which is repeated to 3.

        Returns:
            (N, dimensions) float32.
        """
        tokens = self.model(pixel_values=self._levels(images, DINOV2_PX)).last_hidden_state
        return tokens[:, 0].float()


class ClipFeatures(ImageFeatures):
    """The embedding of CLIP, of unit length, as CMMD compares it (Jayasumana et al. 2024, arXiv:2401.09603).

    Args:
        folder: A folder of transformers' CLIPModel or CLIPVisionModelWithProjection: config.json, model.safetensors,
            preprocessor_config.json.
        setting: The setting that names it, for messages.

    Raises:
        UserError: If transformers is missing, or the folder holds no such model.
    """

    def __init__(self, folder: str | Path, setting: str = "clip_model") -> None:
        super().__init__(folder, setting, read_folder(folder, setting, "CLIPVisionModelWithProjection"))
        self.is_published = _agrees(self, CMMD, CLIP_MEAN, CLIP_STD)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of the middle squares of images, which are resized to the size that CLIP takes.

        Args:
            images: (N, C, H, W) uint8; C is 3, or 1, which is repeated to 3.

        Returns:
            (N, dimensions) float32.
        """
        side = min(images.shape[2:])
        top, left = ((whole - side) // 2 for whole in images.shape[2:])
        square = images[..., top : top + side, left : left + side]
        embeddings = self.model(pixel_values=self._levels(square, self.model.config.image_size)).image_embeds
        return F.normalize(embeddings.float(), dim=1)


def image_features(kind: Kind, folder: str | Path) -> ImageFeatures:
    """Return the network in a folder that the setting `dinov2_model` or `clip_model` names.

    Raises:
        UserError: If transformers is missing, or the folder holds no such model.
    """
    return (DinoFeatures if kind == "dinov2" else ClipFeatures)(Path(folder).expanduser())


def _interpolate_as_published(embeddings: nn.Module) -> None:
    """Give DINOv2 position embeddings for images of 224 px, interpolated as facebookresearch/dinov2 does it."""
    positions: Tensor = embeddings.position_embeddings.detach().float()
    side, new = round((positions.shape[1] - 1) ** 0.5), DINOV2_PX // embeddings.patch_size
    if side == new:
        return
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(new + HUB_OFFSET) / side, mode="bicubic")
    embeddings.position_embeddings = nn.Parameter(torch.cat([positions[:, :1], grid.flatten(2).mT], 1))


def _agrees(network: ImageFeatures, config: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> bool:
    """Return whether a network has the values of a published one in its config, and the same normalisation."""
    normalisation = torch.stack([network.mean.flatten(), network.std.flatten()])
    same = normalisation.shape == (2, 3) and torch.allclose(normalisation, torch.tensor([mean, std]), atol=1e-4)
    return same and all(getattr(network.model.config, key, None) == value for key, value in config.items())
