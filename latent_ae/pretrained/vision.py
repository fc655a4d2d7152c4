"""Features of a frozen vision transformer from a local folder."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.pretrained.frozen import FrozenNetwork, read_folder, reason
from latent_ae.pretrained.weight_files import tensors_sha256

SPARE = ("pooler", "head", "mask_token")
"""Parts of vision transformers that do not contribute to patch features; a checkpoint may lack them."""


class VisionModel(FrozenNetwork):
    """A frozen model such as DINOv2 that transformers loads (the extra `alignment`); it returns patch features.

    `num_features` is the number of features, `num_layers` that of transformer blocks, `patch_px` the side of a patch in
    px, and `grid` the last height and width in patches with which it was tried.

    Args:
        folder: A folder with the model's config, safetensors weights and preprocessor_config.json.
        grids: Heights and widths in patches, such as those of the latents that occur; the model is tried on each.
        image_px: Side in px to which images are resized, in place of `grids`; it is rounded down to whole patches.
        setting: The setting that names the folder, for messages.
        twice_differentiable: Compute attention so that gradients can be differentiated again, which is slower.

    Raises:
        UserError: If transformers is missing, or the folder holds no vision transformer that fits.
    """

    def __init__(
        self,
        folder: str | Path,
        grids: Sequence[tuple[int, int]] = (),
        *,
        image_px: int = 0,
        setting: str = "alignment.model",
        twice_differentiable: bool = False,
    ):
        options: dict[str, Any] = {"attn_implementation": "eager"} if twice_differentiable else {}
        model, mean, std = read_folder(folder, setting, spare=SPARE, **options)
        super().__init__(model, mean, std)
        folder = Path(folder).expanduser()
        patch = getattr(self.model.config, "patch_size", None)
        if self.model.main_input_name != "pixel_values" or not isinstance(patch, int):
            kind = type(self.model).__name__
            raise UserError(f"{setting}: {folder} holds a {kind}; a vision transformer is needed, such as DINOv2")
        self.patch_px: int = patch
        takes = inspect.signature(self.model.forward).parameters
        # DINO interpolates its position embeddings to any size by itself, other models on request
        self.extras = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        self.num_layers = int(getattr(self.model.config, "num_hidden_layers", 0))
        for self.grid in grids or [(max(1, image_px // patch),) * 2]:
            size = (image_px, image_px) if image_px else (patch * self.grid[0], patch * self.grid[1])
            try:
                with torch.no_grad():
                    features = self(torch.zeros(1, 3, *size), self.grid)
            except Exception as error:  # a model may accept a configuration with which its forward pass fails
                kind = f"{self.grid[0]} x {self.grid[1]} features" if grids else "features"
                sides = " x ".join(map(str, size))
                raise UserError(
                    f"{setting}: {folder} gives no {kind} for images of {sides} px: {reason(error)}"
                ) from error
            self.num_features: int = features.shape[1]

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
        x = self.pixels(images, (self.patch_px * height, self.patch_px * width))
        tokens = self.model(pixel_values=x, **self.extras).last_hidden_state.float()
        patches = tokens[:, -height * width :]
        return patches.transpose(1, 2).reshape(len(x), -1, height, width)

    def layers(self, images: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """Return the patch tokens after several blocks, without class and register tokens and before the last norm.

        Args:
            images: (N, C, H, W) float in [-1, 1], which are resized to `grid` patches; C is 3 or 1.
            depths: Numbers of blocks, 1 to `num_layers`.

        Returns:
            For each depth (N, num_features, patches).
        """
        height, width = self.grid
        x = self.pixels(images, (self.patch_px * height, self.patch_px * width))
        states = self.model(pixel_values=x, output_hidden_states=True, **self.extras).hidden_states
        return [states[depth][:, -height * width :].transpose(1, 2) for depth in depths]

    def sha256(self) -> str:
        """Return the checksum of the weights."""
        return tensors_sha256({name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()})


def vision_shape(folder: str | Path, setting: str) -> dict[str, int]:
    """Return `features` and `depth` (its transformer blocks) of the vision transformer in a folder, from its config.

    Raises:
        UserError: If the config cannot be read.
    """
    path = Path(folder).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        shape = {"features": config["hidden_size"], "depth": config["num_hidden_layers"]}
        if any(type(value) is not int or not 0 < value < 2**16 for value in shape.values()):
            raise ValueError(f"hidden_size and num_hidden_layers are {list(shape.values())}")
    except Exception as error:  # what a foreign file holds may be of any kind
        raise UserError(f"{setting}: {path} is no vision transformer's config: {reason(error)}") from error
    return shape
