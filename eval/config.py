"""Settings of the evaluations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from latent_ae.config import NonNegative, Positive, Problem, Settings, Weight
from latent_ae.data_settings import DataSettings
from latent_ae.encode_settings import EncodeSettings
from latent_ae.stage_settings import StageSettings

from .protocols import PROTOCOLS, Extractor, Latent, Name, Net, Protocol, Resample, Rounding

OfProtocol = Literal["protocol"]


class QuestionSettings(StageSettings):
    """What every question to a first stage about held-out images needs to know."""

    split: str | None = None
    """Of the data; null takes its validation or test split, and all of it where it has neither."""
    limit: Positive | None = None
    """Only so many images, spread over all of them by `seed`; of a stream the first ones."""
    seed: NonNegative = 0
    """Of whatever is drawn: the posterior's samples, choices of images."""

    def data(self, source: str) -> DataSettings:
        """What opens `source` as held-out images."""
        return self._data(eval_source=source, eval_split=self.split)


class EvalSettings(QuestionSettings):
    """Of the measurements, whose images may come as a stream."""

    streaming: bool = False
    """Read a hub dataset or tables from their start, without storing them first."""

    def data(self, source: str) -> DataSettings:
        return super().data(source).model_copy(update={"streaming": self.streaming})


class ReconSettings(EvalSettings):
    """How reconstructions are measured; docs/evaluation.md says what each choice means for the figures."""

    protocol: Name = "default"
    """How others measured theirs; the next seven settings change single parts of it."""
    resize_px: Positive | OfProtocol | None = "protocol"
    """Shorter side that an image is resized to before the crop, px; null keeps its size."""
    crop_px: Positive | OfProtocol | None = "protocol"
    """Side of the square cut from the middle, px; null takes whole images, cut to a multiple of the factor."""
    resample: Resample | OfProtocol = "protocol"
    """How an image is resized."""
    rounding: Rounding | OfProtocol = "protocol"
    """How a float becomes one of 256 levels: to the nearest with halves up or to even, or cut off."""
    latents: tuple[Latent, ...] | OfProtocol = "protocol"
    """What is decoded: the posterior's mean (mode) or a sample of it."""
    lpips: tuple[Net, ...] | OfProtocol = "protocol"
    """Networks of LPIPS."""
    extractor: Extractor | OfProtocol = "protocol"
    """Whose Inception: how it resizes to 299 px and normalises."""
    frechet: tuple[Literal["inception", "vgg16", "alexnet"], ...] = ("inception",)
    """Features whose Fréchet distance is measured: inception gives FID and KID; the others, at hand wherever LPIPS is,
    are named after themselves."""
    inception_weights: str | None = None
    """Other weights than the published ones; the distances are then not called FID and KID."""
    baseline: bool = True
    """Measure bicubic down- and upsampling by the model's factor beside it."""

    reference_cache: bool = True
    """Keep Inception's features of the originals for the next model, under a key of their content and the protocol."""
    num_pictures: NonNegative = 3
    """Worst, median and best images in the report, of each."""

    def problems(self) -> Iterator[Problem]:
        protocol = self.resolved()
        resize_px, crop_px = protocol.resize_px, protocol.crop_px
        if resize_px is not None and crop_px is not None and resize_px < crop_px:
            key = "crop_px" if self.resize_px == "protocol" else "resize_px"
            yield Problem(key, f"resize_px {resize_px} is smaller than crop_px {crop_px}; change one or set it to null")
        if not protocol.latents:
            yield Problem("latents", "nothing to decode: give [mode], [sample] or [mode, sample]")
        if len(set(protocol.latents)) < len(protocol.latents):
            yield Problem("latents", "names one twice")
        weights = self.inception_weights
        if weights is not None and not Path(weights).expanduser().is_file():
            yield Problem("inception_weights", f"no such file: {weights} (from {Path.cwd()})")

    def changes(self) -> dict[str, Any]:
        """What is set apart from the protocol."""
        own = {name: getattr(self, name) for name in Protocol.model_fields if name in type(self).model_fields}
        protocol = PROTOCOLS[self.protocol]
        return {key: value for key, value in own.items() if value not in ("protocol", getattr(protocol, key))}

    def resolved(self) -> Protocol:
        """The protocol with those changes."""
        return PROTOCOLS[self.protocol].model_copy(update=self.changes())


class LatentsSettings(EvalSettings):
    """How latents are measured; docs/latents.md says what the figures mean."""

    resize_px: Positive | None = 256
    """Shorter side that images are resized to; null keeps their size."""
    crop_px: Positive | None = 256
    """Side of the square cut from the middle; null takes the largest sides that twice the model's factor divides."""
    num_decoded: NonNegative = 64
    """So many of the images, spread over them, are also decoded: scaled, rotated and noised in latent space."""
    noise: tuple[Weight, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    """Standard deviations of the noise added to latents, in the latents' own standard deviation."""
    lpips: Net | None = "vgg"
    """Network of LPIPS of noised latents' images, where its weights can be had; null leaves it out."""

    def problems(self) -> Iterator[Problem]:
        if self.resize_px is not None and self.crop_px is not None and self.resize_px < self.crop_px:
            message = f"{self.resize_px} is smaller than crop_px {self.crop_px}; change one or set it to null"
            yield Problem("resize_px", message)
        if len(set(self.noise)) < len(self.noise):
            yield Problem("noise", "names one twice")


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


class DiffusionSettings(Settings):
    """A diffusion model trained on a first stage's latents, and how it is judged; docs/diffusion.md says more."""

    presets: ClassVar[dict[str, dict[str, Any]]] = DIFFUSION_PRESETS
    preset: Literal["cpu", "gpu"] = "cpu"
    """Small images on two CPU cores, or larger ones on a GPU; the next settings change single parts of it."""
    resolution: Positive | OfPreset = "preset"
    """Side of the squares cut from the middle of the images, whose shorter side is resized to it, px."""
    width: Positive | OfPreset = "preset"
    """Of the transformer, a multiple of 64: so many channels has a head."""
    depth: Positive | OfPreset = "preset"
    """Its blocks."""
    patch_size: Positive | OfPreset = "preset"
    """Latent px along each side of a token; of `eval sample` as preset 2 where it divides the latent's side, else 1."""
    steps: Positive | OfPreset = "preset"
    """Of training."""
    batch_size: Positive | OfPreset = "preset"
    """Of a training step."""
    lr: Annotated[float, Field(gt=0)] | OfPreset = "preset"
    """Learning rate."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | OfPreset = "preset"
    """Of the averaged weights, which are validated and sampled from."""
    precision: Literal["fp32", "bf16"] | OfPreset = "preset"
    """That the transformer trains in."""
    samples: Annotated[int, Field(ge=2)] | OfPreset = "preset"
    """Images to draw; as many of the data are compared with them."""
    sampling_steps: Annotated[int, Field(ge=2)] | OfPreset = "preset"
    """Of the sampler, for each image."""
    validation_images: Positive | OfPreset = "preset"
    """Held-out latents of the loss curve."""
    frechet: tuple[Literal["inception", "vgg16"], ...] | OfPreset = "preset"
    """Features of the Fréchet distances; only Inception's is an FID."""
    validations: Annotated[int, Field(ge=2)] = 10
    """Points of the loss curve, the first before training."""
    seed: NonNegative = 0
    """Of everything: order, flips, noise, times, first weights, samples."""
    latents: str | None = None
    """Latents to train on that `latent-ae encode` wrote (part=train); null encodes into the folder of --out."""
    held_out_latents: str | None = None
    """Latents to validate on (part=held_out); null encodes."""

    split: str = "train"
    """Of the data, where it has splits; its validation or test split is held out, else `eval_fraction` of it."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Part of the data that is held out where it has no validation or test split."""
    image_column: str = "image"
    """Of tables and hub datasets."""
    label_column: str | None = "auto"
    """Of classes: `auto` takes the column `label`, or the names of the folders that image files lie in; null none."""
    data_revision: str | None = None
    """Commit or tag of a hub dataset."""
    num_workers: NonNegative = 2
    """That decode images."""
    subfolder: str | None = None
    """Of the model; a pipeline's first stage is found without it."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    variant: str | None = None
    """Of the model's weight files: fp16, non_ema, ..."""
    ema: bool | None = None
    """Averaged weights (true) or raw ones (false) where the model has both; null takes what it loads by default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything computes; auto takes a GPU where there is one."""
    images_at_a_time: Positive = 50
    """To encode, sample, decode and measure; changes the results by rounding only."""

    def problems(self) -> Iterator[Problem]:
        if self.chosen("width") % HEAD_CHANNELS:
            yield Problem("width", f"{self.chosen('width')} is not a multiple of {HEAD_CHANNELS}")
        if not self.chosen("frechet"):
            yield Problem("frechet", "nothing to compare samples by: give [vgg16], [inception] or both")
        for key in ("latents", "held_out_latents"):
            folder = getattr(self, key)
            if folder is not None and not Path(folder).expanduser().is_dir():
                yield Problem(key, f"no such folder: {folder} (from {Path.cwd()})")

    def chosen(self, key: str) -> Any:
        """The value of a setting, or the preset's."""
        value = getattr(self, key)
        return self.presets[self.preset][key] if value == "preset" else value

    def recipe(self) -> dict[str, Any]:
        """All values that the preset gives or that were set in their place."""
        return {key: self.chosen(key) for key in self.presets[self.preset]}

    def encoding(self, part: Literal["train", "held_out"]) -> EncodeSettings:
        """How latents are encoded where none are given."""
        same = {key: getattr(self, key) for key in EncodeSettings.model_fields if key in type(self).model_fields}
        own = {"part": part, "resolution": self.chosen("resolution"), "batch_size": self.images_at_a_time}
        return EncodeSettings(**(same | own))


PRIORS = ("normal", "gaussian", "flow")


class SampleSettings(DiffusionSettings):
    """Which prior is sampled from, how a flow is fitted, and how samples are judged; docs/jobs.md says more."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": DIFFUSION_PRESETS["cpu"]
        | {"width": 128, "depth": 4, "patch_size": None, "steps": 1500, "samples": 1000, "validation_images": 500},
        "gpu": DIFFUSION_PRESETS["gpu"] | {"patch_size": None},
    }
    prior: str = "normal"
    """`normal`: N(0, I), or what a model has in its place; `gaussian` and `flow` are fitted to the latents of DATA; or
    a folder that `prior=flow` wrote."""
    label_column: str | None = None
    """A prior knows no classes."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.prior not in PRIORS and not Path(self.prior).expanduser().is_dir():
            yield Problem("prior", f"neither one of {', '.join(PRIORS)} nor a folder: {self.prior} (from {Path.cwd()})")
        if self.label_column is not None:
            yield Problem("label_column", "a prior knows no classes; leave it null, or ask eval diffusion")
