"""Inception features of images, for FID and KID."""

import io
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from latent_ae.config import UserError
from latent_ae.pretrained.weight_files import Unusable, first_words, read_any, tensors_sha256
from latent_ae.pretrained.weights import weight_file

Resize = Literal["torch-fidelity", "pytorch-fid"]
INCEPTION_PX = 299
FEATURES = 2048


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of FID and KID: torch-fidelity's Inception v3, frozen.

    `is_published` says whether the weights are the published ones: only then is a Fréchet distance an FID.

    Args:
        resize: How an image is resized to 299 x 299: "torch-fidelity" as TensorFlow 1 did it (like every number that
            descends from the original FID; values (x - 128) / 128), "pytorch-fid" by F.interpolate (values 2 x / 255 -
            1).
        weights: A file with other weights (a state dict as .pth or .safetensors); None takes the published ones.
        double: Compute in float64 instead of float32.

    Raises:
        UserError: If there are no weights, or the file does not hold Inception's.
    """

    def __init__(self, resize: Resize = "torch-fidelity", weights: str | Path | None = None, *, double: bool = False):
        super().__init__()
        self.resize: Resize = resize
        self.is_published = weights is None
        try:
            state = load_file(weight_file("inception")) if weights is None else read_any(Path(weights).expanduser())
            self.sha256 = tensors_sha256(state)
            # as a stream of plain tensors: the class itself would unpickle whatever a file holds
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
        except (Unusable, RuntimeError) as error:
            raise UserError(
                f"inception_weights: {weights}: not Inception's state dict ({first_words(error)})"
            ) from error
        # all layers but the classifier, in the order of the forward pass; the resize before them is `self.resize`
        self.dtype = torch.float64 if double else torch.float32  # torch-fidelity 0.4 takes float64 for float32
        self.trunk = nn.Sequential(*list(network.children())[:-1]).eval().requires_grad_(False).to(self.dtype)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: (N, C, H, W) uint8; C is 3, or 1, which is repeated to 3.

        Returns:
            (N, 2048) float32.

        Raises:
            ValueError: If the images are of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"uint8 images N x 3 x H x W are needed, not {images.dtype} {tuple(images.shape)}")
        x = images.expand(-1, 3, -1, -1).to(self.dtype)
        size = (INCEPTION_PX, INCEPTION_PX)
        if self.resize == "torch-fidelity":
            x = (interpolate_bilinear_2d_like_tensorflow1x(x, size=size, align_corners=False) - 128) / 128
        else:
            x = 2 * F.interpolate(x / 255, size=size, mode="bilinear", align_corners=False) - 1
        return self.trunk(x).flatten(1).float()
