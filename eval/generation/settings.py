"""Settings of `latent-ae eval diffusion`, which `eval sample` extends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem
from latent_ae.latents.settings import EncodeSettings
from latent_ae_eval.settings import FeatureSettings

OfPreset = Literal["preset"]
HEAD_CHANNELS = 64
DIFFUSION_PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "resolution": 32,
        "width": 192,
        "depth": 6,
        "patch_size": 2,
        "steps": 2500,
        "batch_size": 64,
        "lr": 1e-3,
        "ema_decay": 0.995,
        "precision": "fp32",
        "samples": 2000,
        "sampling_steps": 25,
        "validation_images": 1000,
        "frechet": ("vgg16",),
    },
    "gpu": {
        "resolution": 256,
        "width": 384,
        "depth": 12,
        "patch_size": 2,
        "steps": 40_000,
        "batch_size": 256,
        "lr": 2e-4,
        "ema_decay": 0.9995,
        "precision": "bf16",
        "samples": 10_000,
        "sampling_steps": 50,
        "validation_images": 5000,
        "frechet": ("inception", "vgg16"),
    },
}


class DiffusionSettings(FeatureSettings):
    """A diffusion model trained on a first stage's latents, and how it is measured; docs/diffusion.md says more."""

    presets: ClassVar[dict[str, dict[str, Any]]] = DIFFUSION_PRESETS
    preset: Literal["cpu", "gpu"] = "cpu"
    """Small images on two CPU cores, or larger ones on a GPU; the next settings change single parts of it."""
    resolution: Positive | OfPreset = "preset"
    """Side of the centre crop, px; the images' shorter side is resized to it."""
    width: Positive | OfPreset = "preset"
    """Width of the transformer, a multiple of 64, the width of a head."""
    depth: Positive | OfPreset = "preset"
    """Number of blocks of the transformer."""
    patch_size: Positive | OfPreset = "preset"
    """Latent px along each side of a token; the preset of `eval sample` is 2 if that divides the latent's side, else
    1."""
    steps: Positive | OfPreset = "preset"
    """Number of training steps."""
    batch_size: Positive | OfPreset = "preset"
    """Samples of a training step."""
    lr: Annotated[float, Field(gt=0)] | OfPreset = "preset"
    """Learning rate."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | OfPreset = "preset"
    """Decay of the averaged weights, which are validated and sampled."""
    precision: Literal["fp32", "bf16"] | OfPreset = "preset"
    """Precision in which the transformer is trained."""
    samples: Annotated[int, Field(ge=2)] | OfPreset = "preset"
    """Number of samples; the same number of images is compared with them."""
    sampling_steps: Annotated[int, Field(ge=2)] | OfPreset = "preset"
    """Steps of the sampler for each image."""
    validation_images: Positive | OfPreset = "preset"
    """Number of held-out latents for the loss curve."""
    frechet: tuple[Literal["inception", "vgg16", "dinov2", "clip"], ...] | OfPreset = "preset"
    """Features of the Fréchet distances; only Inception's is an FID; dinov2 and clip need their folder."""
    validations: Annotated[int, Field(ge=2)] = 10
    """Number of points of the loss curve, the first before training."""
    seed: NonNegative = 0
    """Seed of everything random: order, flips, noise, times, initial weights, samples."""
    latents: str | None = None
    """Latents to train on that `latent-ae encode` wrote (part=train); null encodes into the folder of --out."""
    held_out_latents: str | None = None
    """Latents to validate on (part=held_out); null encodes into the folder of --out."""

    split: str = "train"
    """Split of the data, if it has splits; its validation or test split is held out, else `eval_fraction` of it."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the data that is held out if there is no validation or test split."""
    image_column: str = "image"
    """Column of images in tables and hub datasets."""
    label_column: str | None = "auto"
    """Column of the classes: auto takes `label` or `cls`, or the names of files' folders; null takes none."""
    data_revision: str | None = None
    """Commit or tag of a hub dataset."""
    num_workers: NonNegative = 2
    """Worker processes that decode images."""
    subfolder: str | None = None
    """Subfolder of the model; a pipeline's first stage is found without it."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    variant: str | None = None
    """Variant of the model's weight files: fp16, non_ema, ..."""
    ema: bool | None = None
    """Averaged (true) or raw weights (false) if the model has both; null takes those that are loaded by default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs; auto takes a GPU if there is one."""
    images_at_a_time: Positive = 50
    """Number of images that are encoded, sampled, decoded and measured together; changes results by rounding only."""

    def problems(self) -> Iterator[Problem]:
        if self.chosen("width") % HEAD_CHANNELS:
            yield Problem("width", f"{self.chosen('width')} is not a multiple of {HEAD_CHANNELS}")
        if not self.chosen("frechet"):
            yield Problem("frechet", "nothing to compare samples by: give [vgg16], [inception] or both")
        yield from self.problems_of_features(self.chosen("frechet"))
        for key in ("latents", "held_out_latents"):
            folder = getattr(self, key)
            if folder is not None and not Path(folder).expanduser().is_dir():
                yield Problem(key, f"no such folder: {folder} (from {Path.cwd()})")

    def chosen(self, key: str) -> Any:
        """Return the value of a setting; if it is "preset", the preset's value."""
        value = getattr(self, key)
        return self.presets[self.preset][key] if value == "preset" else value

    def recipe(self) -> dict[str, Any]:
        """Return the values of all settings that a preset has."""
        return {key: self.chosen(key) for key in self.presets[self.preset]}

    def encoding(self, part: Literal["train", "held_out"]) -> EncodeSettings:
        """Return the settings with which latents are encoded if the settings name none."""
        same = {key: getattr(self, key) for key in EncodeSettings.model_fields if key in type(self).model_fields}
        own = {"part": part, "resolution": self.chosen("resolution"), "batch_size": self.images_at_a_time}
        return EncodeSettings(**(same | own))
