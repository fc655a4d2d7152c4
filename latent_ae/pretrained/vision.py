"""Features of a frozen vision transformer from a local folder, on the grid of the latents."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.config import UserError


class VisionModel(nn.Module):
    """A frozen model such as DINOv2 that transformers loads (the extra `alignment`); it returns patch features.

    `num_features` is the number of features, `patch_px` the side of a patch in px.

    Args:
        folder: A folder with the model's config, safetensors weights and preprocessor_config.json.
        grids: Heights and widths of the latents that occur, px; the model is tried on each.

    Raises:
        UserError: If transformers is missing, or the folder holds no vision transformer that fits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | Path, grids: Sequence[tuple[int, int]]):
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError as error:
            raise UserError("alignment.model: needs transformers: pip install 'latent-ae[alignment]'") from error
        folder = Path(folder).expanduser()
        try:
            processing = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
            for name in ("mean", "std"):
                values = torch.tensor(processing[f"image_{name}"], dtype=torch.float32)
                if values.numel() not in (1, 3) or not values.isfinite().all() or (name == "std" and values.min() <= 0):
                    raise ValueError(f"image_{name} is {processing[f'image_{name}']}")
                self.register_buffer(name, values.view(1, -1, 1, 1))
        except Exception as error:  # what a foreign file holds may be of any kind
            raise UserError(
                f"alignment.model: {folder} needs a preprocessor_config.json with image_mean and image_std: "
                f"{_reason(error)}"
            ) from error
        try:
            # no code from the folder is run, and nothing is looked for elsewhere
            self.model = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds for a foreign folder
            raise UserError(f"alignment.model: transformers cannot load {folder}: {_reason(error)}") from error
        self.model = self.model.float().eval().requires_grad_(False)
        patch = getattr(self.model.config, "patch_size", None)
        if self.model.main_input_name != "pixel_values" or not isinstance(patch, int):
            kind = type(self.model).__name__
            raise UserError(f"alignment.model: {folder} holds a {kind}; a vision transformer is needed, such as DINOv2")
        self.patch_px: int = patch
        takes = inspect.signature(self.model.forward).parameters
        # DINO interpolates its position embeddings to any size by itself, other models on request
        self.extras = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        for height, width in grids:
            try:
                features = self(torch.zeros(1, 3, height, width), (height, width))
            except Exception as error:  # a model may accept a configuration with which its forward pass fails
                sides = " x ".join(f"{self.patch_px * side}" for side in (height, width))
                raise UserError(
                    f"alignment.model: {folder} gives no {height} x {width} features for images of {sides} px: "
                    f"{_reason(error)}"
                ) from error
            self.num_features: int = features.shape[1]

    def train(self, mode: bool = True) -> "VisionModel":
        """Do nothing: the model always stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: Sequence[int]) -> Tensor:
        """Return the patch features of images, without those of class and register tokens, after the model's last norm.

        Images are resized bilinearly so that one patch is one latent px, as in VA-VAE (Yao et al. 2025): 224 px for a
        latent of 16 px and patches of 14 px.

        Args:
            images: (N, C, H, W) float in [-1, 1]; C is 3, or 1, which is repeated to 3.
            grid: Height h and width w of the latents, px.

        Returns:
            (N, num_features, h, w) float32.
        """
        height, width = grid
        size = self.patch_px * height, self.patch_px * width
        x = images.expand(-1, 3, -1, -1)
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        x = (0.5 * (x + 1.0) - self.mean) / self.std
        tokens = self.model(pixel_values=x, **self.extras).last_hidden_state.float()
        patches = tokens[:, -height * width :]
        return patches.transpose(1, 2).reshape(len(x), -1, height, width)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
