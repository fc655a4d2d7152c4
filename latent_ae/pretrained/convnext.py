"""Logits of a frozen ConvNeXt classifier, which a perceptual loss compares."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from latent_ae.config import UserError
from latent_ae.pretrained.frozen import IMAGENET_MEAN, IMAGENET_STD, FrozenNetwork, read_folder, reason
from latent_ae.pretrained.weight_files import read_any
from latent_ae.pretrained.weights import weight_file

NAME = "convnext_small"
"""The published network: torchvision's ConvNeXt-S with its weights IMAGENET1K_V1."""
SIZE_PX = 224


class ConvNeXtLogits(FrozenNetwork):
    """A frozen ConvNeXt classifier (Liu et al. 2022); it returns the logits of images.

    Args:
        weights: A folder of transformers' ConvNextForImageClassification, or a file with torchvision's state dict of a
            ConvNeXt of any size; None takes the published file, see `latent_ae.pretrained.weights.weight_file`.
        weights_folder: The folder to search first for the published file.
        setting: The setting that names `weights`, for messages.

    Raises:
        UserError: If there are no such weights.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        weights_folder: str | Path | None = None,
        setting: str = "loss.convnext_weights",
    ) -> None:
        if weights is None:
            try:
                path = weight_file(NAME, weights_folder)
            except UserError as error:
                raise UserError(f"{setting}: null takes torchvision's {NAME}, and {error}") from error
        else:
            path = Path(weights).expanduser()
        if path.is_dir():
            super().__init__(*read_folder(path, setting, "ConvNextForImageClassification"))
        else:
            super().__init__(_of_torchvision(path, setting), IMAGENET_MEAN, IMAGENET_STD)
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, SIZE_PX, SIZE_PX))
        except Exception as error:  # a model may accept a configuration with which its forward pass fails
            raise UserError(f"{setting}: {path} gives no logits of RGB images: {reason(error)}") from error

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images that are resized to 224 px, bilinearly and filtered, and normalised.

        Args:
            images: (N, C, H, W) float in [-1, 1]; C is 3, or 1, which is repeated to 3.

        Returns:
            (N, classes) float32.
        """
        out = self.model(self.pixels(images, (SIZE_PX, SIZE_PX), antialias=True))
        logits: Tensor = getattr(out, "logits", out)
        return logits.float()


def _of_torchvision(path: Path, setting: str) -> nn.Module:
    """Return torchvision's ConvNeXt with the weights of a file, whose widths and depths are read from their shapes."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    try:
        state = read_any(path)
        stages: dict[int, list[int]] = {}  # the widths of the blocks of each stage
        for key, tensor in state.items():
            if match := re.fullmatch(r"features\.(\d+)\.\d+\.block\.0\.weight", key):
                stages.setdefault(int(match[1]), []).append(len(tensor))
        ordered = [stages[place] for place in sorted(stages)]
        widths = [*(sizes[0] for sizes in ordered), None]
        settings = [CNBlockConfig(widths[n], widths[n + 1], len(sizes)) for n, sizes in enumerate(ordered)]
        with torch.device("meta"):
            model = ConvNeXt(settings, num_classes=len(state["classifier.2.weight"]))
        model.load_state_dict(state, assign=True)
    except Exception as error:  # a foreign file may fail in any way
        raise UserError(
            f"{setting}: {path} is not a state dict of torchvision's ConvNeXt, nor a folder of transformers' "
            f"ConvNextForImageClassification ({reason(error)}): give one of the two, or null for torchvision's {NAME}"
        ) from error
    return model
