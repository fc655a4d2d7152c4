"""Frozen networks that compare images: how images enter them, and how they are read from a local folder."""

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ae.config import Problem, UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's images, for RGB in [0, 1]; most published networks normalise by them."""
NEEDS_TRANSFORMERS = "needs transformers: pip install '.[alignment]' in the checkout"


class FrozenNetwork(nn.Module):
    """A network that is not trained and always stays in evaluation mode; gradients pass through it to the images.

    Args:
        model: The network; it becomes float32.
        mean: Mean of the images that it was trained on, for RGB in [0, 1]; one number or three.
        std: Their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32).view(1, -1, 1, 1))
        self.model = model.float().eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Do nothing: the network always stays in evaluation mode."""
        return super().train(False)

    def pixels(self, images: Tensor, size_px: tuple[int, int], antialias: bool = False) -> Tensor:
        """Return images as the network takes them.

        Args:
            images: (N, C, H, W) float in [-1, 1]; C is 3, or 1, which is repeated to 3.
            size_px: Height and width to which they are resized bilinearly.
            antialias: Whether a smaller size is filtered before, as torchvision does.

        Returns:
            (N, 3, *size_px), normalised.
        """
        x = images.expand(-1, 3, -1, -1)
        if x.shape[2:] != size_px:
            x = F.interpolate(x, size=size_px, mode="bilinear", align_corners=False, antialias=antialias)
        return (0.5 * (x + 1.0) - self.mean) / self.std


def folder_problems(key: str, folder: str) -> Iterator[Problem]:
    """Yield why a folder for transformers cannot be read, as far as it is known before the start.

    Args:
        key: The setting that names it.
        folder: The folder.
    """
    if find_spec("transformers") is None:
        yield Problem(key, NEEDS_TRANSFORMERS)
    if not Path(folder).expanduser().is_dir():
        yield Problem(key, f"no such folder: {folder} (from {Path.cwd()})")


def read_folder(
    folder: str | Path, setting: str, kind: str = "AutoModel", *, spare: Sequence[str] = (), **options: Any
) -> tuple[Any, Tensor, Tensor]:
    """Return a network that transformers loads from a local folder, and the mean and standard deviation of its images.

    No code from the folder is run, only safetensors are read, and nothing is looked for elsewhere.

    Args:
        folder: A folder with the model's config, safetensors weights and preprocessor_config.json.
        setting: The setting that names it, for messages.
        kind: Name of a class of transformers.
        spare: Names of parts whose weights the folder may lack, because their outputs are not used; transformers draws
            missing weights anew.
        **options: Passed to the class's `from_pretrained`.

    Raises:
        UserError: If transformers is missing, or the folder holds no such model with all of its weights.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{setting}: {NEEDS_TRANSFORMERS}") from error
    folder = Path(folder).expanduser()
    statistics = []
    needs = f"{setting}: {folder} needs a preprocessor_config.json with image_mean and image_std"
    try:
        processing = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        for name in ("mean", "std"):
            values = torch.tensor(processing[f"image_{name}"], dtype=torch.float32)
            if values.numel() not in (1, 3) or not values.isfinite().all() or (name == "std" and values.min() <= 0):
                raise ValueError(f"image_{name} is {processing[f'image_{name}']}")
            statistics.append(values)
    except FileNotFoundError as error:
        raise UserError(f"{needs}, and there is none: take it from where the model's other files are from") from error
    except Exception as error:  # what a foreign file holds may be of any kind
        raise UserError(f"{needs}: {reason(error)}") from error
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of missing weights in a table; here they are refused or spare
    try:
        model, loading = getattr(transformers, kind).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(key for key in loading["missing_keys"] if not {*key.split(".")} & {*spare}):
            name = type(model).__name__
            raise ValueError(f"{len(missing)} weights of a {name} are missing in it, such as {missing[0]}")
    except Exception as error:  # transformers raises many kinds for a foreign folder
        raise UserError(f"{setting}: transformers cannot load {folder}: {reason(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model, statistics[0], statistics[1]


def reason(error: Exception) -> str:
    """Return the kind and message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
