"""Every setting of a training run."""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from latent_ae.config import Positive, Problem, Settings, looks_like_path
from latent_ae.data.settings import DataSettings
from latent_ae.export.pipelines import SHAPE, PipelineName, misfits
from latent_ae.models.settings import ModelSettings

from .loss_config import (
    AlignmentSettings,
    DistillationSettings,
    GanSettings,
    LatentSettings,
    LossSettings,
    scaled_sides,
)
from .run_config import CheckpointSettings, EmaSettings, LogSettings, OptimSettings, ValidateSettings

LPIPS_MIN_PX = {"vgg": 16, "alex": 31}
"""Smaller images have no features left at the trunk's last layer."""
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""What accelerate's launcher announces in the environment and the step cannot run on."""


def _refuse_fp16(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "fp16 needs a loss scale for each of the two networks' gradients and one for the adaptive weight's, and "
            "overflows in the decoder of published first stages; use bf16, or fp32 where the device has no bf16"
        )
    return value


def micro_batch_of(batch_size: int, processes: int, most: int | None) -> int:
    """The largest number of samples per pass that divides a process's share of the batch and is not above `most`."""
    share = batch_size // processes
    return next((size for size in range(min(most or share, share), 0, -1) if share % size == 0), 1)


class TrainSettings(Settings):
    """A training run."""

    output_dir: str = "runs/first-stage"
    """The run folder: checkpoints, log, previews, export and report go there."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of first weights, order, crops, flips and noise."""
    steps: Positive = 100_000
    """Updates of the weights."""
    batch_size: Positive = 32
    """Global: over all processes and accumulation."""
    micro_batch_size: Positive | None = None
    """The most samples per process and pass; null takes the whole share of a process. See `micro_batch`."""
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(_refuse_fp16)] = "fp32"
    """bf16: autocast; weights, losses and optimizer stay fp32."""
    tf32: bool = False
    """Whether what is float32 may round its inputs to TF32 on NVIDIA GPUs: faster, with 10 bits instead of 23."""
    init_from: str | None = None
    """A run, checkpoint, diffusers folder or hub id whose weights to start with; its shape replaces a recipe's."""
    train: Literal["all", "decoder", "encoder"] = "all"
    """What learns. decoder: latents stay bit-identical, and so does the scaling of init_from's config."""
    compile: bool = False
    """torch.compile of the blocks and the discriminator: minutes at the start, then faster steps."""
    gradient_checkpointing: bool = False
    """Recompute the autoencoder's blocks in the backward pass: less memory, about a third more time."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that losses go to besides log.jsonl."""
    export_for: PipelineName | None = None
    """Family of diffusers' pipelines that the export must fit; a model that cannot is refused before the first step."""
    push_to_hub: str | None = None
    """Repository id that the export is uploaded to at the end."""
    weights_dir: str | None = None
    """Folder with the LPIPS trunk weights; null looks in the usual places (docs/weights.md)."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    loss: LossSettings = LossSettings()
    latents: LatentSettings = LatentSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    distillation: DistillationSettings = DistillationSettings()
    gan: GanSettings = GanSettings()
    optim: OptimSettings = OptimSettings()
    ema: EmaSettings = EmaSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidateSettings = Field(ValidateSettings(), alias="validate")
    log: LogSettings = LogSettings()

    @property
    def processes(self) -> int:
        """Number of processes that the launcher started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def knows_shape(self) -> bool:
        """Whether these settings say the autoencoder's shape; otherwise it is checked when the autoencoder is there."""
        return self.init_from is None and self.model.gives_shape

    @property
    def smallest_px(self) -> int:
        """Side of the smallest image that the losses can look at."""
        lpips = LPIPS_MIN_PX[self.loss.perceptual_net] if self.loss.perceptual else 1
        return max(lpips, 3 * 2**self.gan.layers if self.gan.weight else 1)

    @property
    def micro_batch(self) -> int:
        """Samples per process and pass."""
        return micro_batch_of(self.batch_size, self.processes, self.micro_batch_size)

    @property
    def accumulation(self) -> int:
        """Passes per process and step."""
        return self.batch_size // (self.processes * self.micro_batch)

    @classmethod
    def settle(cls, values: dict[str, Any], given: Sequence[str]) -> None:
        """Where words name an init_from and say nothing of the model, its shape replaces the file's."""
        sections = {key.split(".")[0] for key in given}
        if "init_from" in sections and "model" not in sections and values.get("init_from") is not None:
            values.pop("model", None)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from self._batch_problems()
        yield from self._shape_problems()
        yield from self._path_problems()
        yield from self._gan_problems()
        yield from self._latent_problems()
        yield from self._distillation_problems()
        if self.model.packs_levels and self.init_from is None:
            yield from self.packed_latent_problems(self.model.config.get("sample_size", self.data.resolution))
        for name in SHARDED:
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
                yield Problem(
                    "accelerate",
                    f"its configuration asks for {name}, which shards the model; a first stage is small, and its step "
                    "needs the decoder's last layer whole: launch with --multi_gpu instead (docs/multi-gpu.md)",
                )
        for tracker in self.report_to:
            if find_spec(tracker) is None:
                yield Problem("report_to", f"{tracker} is not installed: pip install 'latent-ae[{tracker}]'")

    def warnings(self) -> Iterator[str]:
        """What these settings do that is seldom meant."""
        if self.init_from is None and self.train != "all":
            fixed = {"decoder": "encoder", "encoder": "decoder"}[self.train]
            start = "linear" if self.model.init == "linear" else "random"
            yield (
                f"train={self.train} without init_from: the {fixed} stays at its {start} start. To train the "
                f"{self.train} of an existing first stage, give init_from"
            )

    def _batch_problems(self) -> Iterator[Problem]:
        if self.batch_size % self.processes:
            below = self.batch_size // self.processes * self.processes
            nearest = f"{below} or {below + self.processes}" if below else str(self.processes)
            yield Problem(
                "batch_size",
                f"{self.batch_size} does not divide into {self.processes} processes: set batch_size to {nearest}, or "
                "start another number of processes",
            )

    def _shape_problems(self) -> Iterator[Problem]:
        factor, side = self.model.factor, self.data.resolution
        if self.knows_shape and side % factor:
            yield Problem(
                "data.resolution",
                f"{side} is not a multiple of the model's factor {factor} (levels in model.block_out_channels): "
                f"use {max(factor, side // factor * factor)}",
            )
        crop_px = self.validation.crop_px
        if self.knows_shape and crop_px is not None and crop_px % factor:
            near = max(factor, crop_px // factor * factor)
            yield Problem("validate.crop_px", f"{crop_px} is not a multiple of the model's factor {factor}: use {near}")
        if self.knows_shape and side == factor and self.model.block_out_channels[-1] == self.model.norm_num_groups:
            yield Problem(
                "model.norm_num_groups",
                f"{self.model.norm_num_groups} groups of {self.model.block_out_channels[-1]} channels hold one number "
                "each where the latent has no height and width, and normalise it away: use fewer groups",
            )
        least = LPIPS_MIN_PX[self.loss.perceptual_net]
        if self.loss.perceptual and min(side, crop_px or side) < least:
            yield Problem(
                "loss.perceptual_net", f"{self.loss.perceptual_net} needs images of at least {least} px for LPIPS"
            )
        smallest = 3 * 2**self.gan.layers
        if self.gan.weight and side < smallest:
            yield Problem(
                "gan.layers",
                f"{self.gan.layers} need crops of at least {smallest} px; data.resolution is {side}",
            )
        if self.loss.perceptual and self.model.in_channels not in (1, 3):
            yield Problem(
                "loss.perceptual",
                f"LPIPS sees 1 or 3 channels, model.in_channels is {self.model.in_channels}: set loss.perceptual=0",
            )
        if self.export_for is not None and not self.model.gives_shape:
            yield Problem("export_for", f"knows AutoencoderKL only, not {self.model.kind}: leave it out")
        if self.export_for is not None and self.knows_shape:
            for line in misfits(self.export_for, {key: getattr(self.model, key) for key in SHAPE}):
                yield Problem("export_for", f"{self.export_for}: {line}")
        if not (self.loss.pixel_weight or self.loss.perceptual):
            yield Problem("loss", "pixel_weight and perceptual are both 0: nothing would be reconstructed")

    def _gan_problems(self) -> Iterator[Problem]:
        gan = self.gan
        if not gan.weight:
            return
        if gan.norm == "batch" and (self.micro_batch != self.batch_size or self.batch_size < 2):
            yield Problem(
                "gan.norm",
                f"batch takes its statistics from one pass of {self.micro_batch}, and batch_size is {self.batch_size}: "
                "training would depend on the split. Use group, or one process with micro_batch_size null and "
                "batch_size of at least 2",
            )
        if self.train == "encoder" and gan.adaptive:
            yield Problem(
                "gan.adaptive",
                "measures gradients at the decoder's last layer, which train: encoder leaves fixed: set it to false",
            )
        if self.compile and gan.r1:
            yield Problem("gan.r1", "needs a second derivative, which compiled networks do not give: set compile=false")

    def _latent_problems(self) -> Iterator[Problem]:
        if 2 * self.loss.kl_cycles > self.steps:
            yield Problem("loss.kl_cycles", f"{self.loss.kl_cycles} cycles in {self.steps} steps: a cycle needs two")
        least, channels = self.latents.min_channels, self.model.latent_channels
        if least and self.knows_shape and least >= channels:
            yield Problem("latents.min_channels", f"{least} of {channels} latent channels masks none: use fewer")
        if self.loss.total_correlation:
            yield from self._total_correlation_problems()
        if self.latents.equivariance and self.compile:
            yield Problem(
                "latents.equivariance",
                "changes the images' size from step to step, and compiled networks are compiled for each anew: "
                "set compile=false",
            )
        if self.latents.equivariance and self.knows_shape:
            yield from self.size_problems(self.model.factor)
        if (model := self.alignment.model) is not None:
            if find_spec("transformers") is None:
                yield Problem("alignment.model", "needs transformers: pip install 'latent-ae[alignment]'")
            if not Path(model).expanduser().is_dir():
                yield Problem("alignment.model", f"no such folder: {model} (from {Path.cwd()})")
            if self.model.in_channels not in (1, 3):
                yield Problem("alignment.model", f"sees 1 or 3 channels, model.in_channels is {self.model.in_channels}")
        if self.train != "decoder":
            return
        if self.alignment.model is not None:
            yield Problem("alignment.model", "moves the encoder, which train: decoder leaves fixed: set it to null")
        for key in ("kl_warmup", "kl_cycles", "kl_target", "free_bits", "kl_capacity", "total_correlation"):
            if getattr(self.loss, key):
                yield Problem(f"loss.{key}", "shapes the posterior, which train: decoder leaves fixed: set it to 0")

    def _distillation_problems(self) -> Iterator[Problem]:
        if self.distillation.teacher is None:
            return
        if self.alignment.model is not None:
            yield Problem("alignment.model", "shapes latents that distillation.teacher gives: keep one, null the other")
        decode = self.distillation.decode
        if self.train == "encoder" and decode == "teacher":
            yield Problem(
                "distillation.decode", "teacher moves the decoder, which train: encoder leaves fixed: use own"
            )
        if self.train == "decoder" and decode == "own":
            yield Problem("distillation.decode", "own, and train: decoder leave nothing to the teacher: use teacher")

    def packed_latent_problems(self, side_px: int) -> Iterator[Problem]:
        """What a model for images of `side_px` cannot have whose latents are levels packed into one of 1 x 1."""
        kind = self.model.kind if self.init_from is None else "model of init_from"
        for key, side in (("data.resolution", self.data.resolution), ("validate.crop_px", self.validation.crop_px)):
            if side not in (None, side_px):
                yield Problem(key, f"{side}, and the {kind} takes images of {side_px} px only")
        if self.train != "all":
            yield Problem("train", f"{self.train}: a {kind}'s latents are made by both parts: set it to all")
        for key in ("equivariance", "noise", "min_channels"):
            if getattr(self.latents, key):
                yield Problem(
                    f"latents.{key}",
                    f"changes a latent before it is decoded, and the finer levels of a {kind} rest on the "
                    "coarser ones as they were: leave it out",
                )
        if self.alignment.model:
            yield Problem("alignment.model", f"needs latents on one grid; a {kind}'s are on several: leave it out")

    def _total_correlation_problems(self) -> Iterator[Problem]:
        if self.micro_batch != self.batch_size:
            yield Problem(
                "loss.total_correlation",
                f"permutes each latent dimension over the whole batch of {self.batch_size}, and a pass holds "
                f"{self.micro_batch}: training would depend on the split. Use one process and micro_batch_size null",
            )
        if self.batch_size % 2 or self.batch_size < 4:
            yield Problem(
                "batch_size", f"{self.batch_size} has no two halves for loss.total_correlation: even, 4 or more"
            )
        if self.latents.equivariance:
            yield Problem(
                "latents.equivariance",
                "changes the latent's size from step to step, and loss.total_correlation judges one size: set one to 0",
            )

    def size_problems(self, factor: int) -> Iterator[Problem]:
        """Whether there is a size to scale latents of an autoencoder with this factor to."""
        if self.latents.equivariance and not scaled_sides(self.data.resolution // factor, factor, self.smallest_px):
            yield Problem(
                "latents.equivariance",
                f"scales images down, and the losses need {self.smallest_px} px of {self.data.resolution}: raise "
                "data.resolution, or lower gan.layers",
            )

    def _path_problems(self) -> Iterator[Problem]:
        start = self.init_from
        if start is not None and looks_like_path(start) and not Path(start).expanduser().is_dir():
            yield Problem("init_from", f"no such folder: {start} (from {Path.cwd()})")
        if self.gan.init_from is not None and not Path(self.gan.init_from).expanduser().is_dir():
            yield Problem("gan.init_from", f"no such folder: {self.gan.init_from} (from {Path.cwd()})")
        if self.weights_dir is not None and not Path(self.weights_dir).expanduser().is_dir():
            yield Problem("weights_dir", f"no such folder: {self.weights_dir} (from {Path.cwd()})")
        output = Path(self.output_dir).expanduser()
        existing = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not existing.is_dir():
            yield Problem("output_dir", f"{existing} is a file; name a folder")
        elif not os.access(existing, os.W_OK):
            yield Problem("output_dir", f"{existing} is not writable")
