"""All settings of a training run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from latent_ae.config import FIXED, SILENT, Positive, Problem, Settings, looks_like_path, made_by
from latent_ae.data.settings import TrainingData
from latent_ae.export.pipelines import PipelineName, Shape, kind_misfit, shape_misfits
from latent_ae.models.settings import DecoderSettings, ModelFacts, ModelSettings
from latent_ae.objectives import OBJECTIVES
from latent_ae.objectives.alignment import AlignmentSettings
from latent_ae.objectives.alpha import AlphaSettings
from latent_ae.objectives.bands import BandSettings
from latent_ae.objectives.base import Objective, RunFacts
from latent_ae.objectives.channel_masking import ChannelMaskingSettings
from latent_ae.objectives.code_averages import CodeAveragesSettings
from latent_ae.objectives.code_entropy import CodeEntropySettings
from latent_ae.objectives.code_gradient import CodeGradientSettings
from latent_ae.objectives.code_relaxation import CodeRelaxationSettings
from latent_ae.objectives.codebook import CodebookSettings
from latent_ae.objectives.convnext import ConvNeXtSettings
from latent_ae.objectives.density import DensitySettings
from latent_ae.objectives.dino import DinoSettings
from latent_ae.objectives.distillation import DistillationSettings
from latent_ae.objectives.equivariance import EquivarianceSettings
from latent_ae.objectives.flow_matching import FlowMatchingSettings
from latent_ae.objectives.fsq import FSQSettings, shape_of_codebook
from latent_ae.objectives.gan import GanSettings, settings_of_others
from latent_ae.objectives.kl import KLSettings
from latent_ae.objectives.latent_noise import LatentNoiseSettings
from latent_ae.objectives.reconstruction import ReconstructionSettings
from latent_ae.objectives.semi_supervised import SemiSupervisedSettings
from latent_ae.objectives.spectral import SpectralSettings
from latent_ae.objectives.total_correlation import TotalCorrelationSettings
from latent_ae.objectives.unit_codes import UnitCodesSettings

from .parts import read_parts, side_of, trained_names, unmatched
from .phases import phase_problems, phases_of
from .run_config import CheckpointSettings, EmaSettings, LogSettings, OptimSettings, ValidateSettings

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Modes that accelerate's launcher announces in the environment and that the training step does not support."""


def _refuse_fp16(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "fp16 needs a loss scale for each of the two networks' gradients and one for the adaptive weight's, and "
            "overflows in the decoder of published first stages; use bf16, or fp32 where the device has no bf16"
        )
    return value


def _refuse_one_section(value: Any) -> Any:
    if isinstance(value, dict):
        raise ValueError("is a list with a section for each phase, as in phases=[{steps: 900}, {train: decoder}]")
    return value


def micro_batch_of(batch_size: int, processes: int, most: int | None) -> int:
    """Return the largest micro-batch that divides a process's part of the batch and is not larger than `most`.

    Args:
        batch_size: Samples of a global batch.
        processes: Number of processes.
        most: Largest number of samples per pass; None takes a process's whole part.
    """
    share = batch_size // processes
    return next((size for size in range(min(most or share, share), 0, -1) if share % size == 0), 1)


# pydantic has the fields of the last base first
class LossSettings(
    CodebookSettings,
    TotalCorrelationSettings,
    SpectralSettings,
    KLSettings,
    DinoSettings,
    ConvNeXtSettings,
    BandSettings,
    AlphaSettings,
    ReconstructionSettings,
):
    """All terms are means: per image element (pixel, kl) or per sample (perceptual). See docs/losses.md."""


class LatentSettings(ChannelMaskingSettings, LatentNoiseSettings, EquivarianceSettings):
    """Changes to the latents during training; all are off by default. See docs/latents.md."""


class CodeSettings(
    CodeRelaxationSettings,
    FSQSettings,
    CodeAveragesSettings,
    CodeEntropySettings,
    CodeGradientSettings,
    UnitCodesSettings,
):
    """How codes of a VQModel or VQVAE2 are compared, learned and spread, or a DiscreteVAE's drawn: docs/codes.md."""


class TrainSettings(Settings):
    """A training run."""

    output_dir: Annotated[str, SILENT] = "runs/first-stage"
    """The run folder: checkpoints, log, previews, export and report go there."""
    seed: Annotated[int, Field(ge=0, lt=2**63), FIXED] = 0
    """Seed of the initial weights, order, crops, flips and noise."""
    steps: Positive = 100_000
    """Number of updates of the weights."""
    batch_size: Annotated[Positive, FIXED] = 32
    """Samples per update, over all processes and accumulation."""
    micro_batch_size: Annotated[Positive | None, SILENT] = None
    """Largest number of samples per process and pass; null takes a process's whole part of the batch."""
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(_refuse_fp16), FIXED] = "fp32"
    """Precision of the networks' passes. bf16 is autocast; weights, losses and optimizers stay fp32."""
    tf32: bool = False
    """Let float32 operations round their inputs to TF32 on NVIDIA GPUs: faster, with 10 mantissa bits instead of 23."""
    init_from: Annotated[str | None, FIXED] = None
    """A run, checkpoint, diffusers folder or hub id from whose weights to start; its shape replaces a recipe's."""
    train: Annotated[str | tuple[str, ...], BeforeValidator(read_parts), FIXED] = "all"
    """What learns: all, decoder, encoder, or a list of names and patterns, [decoder.up_blocks.*, encoder.conv_out].
    Where nothing of the encoder learns, latents stay bit-identical and keep the scaling of init_from's config."""
    compile: Annotated[bool | Literal["cuda"], SILENT] = False
    """torch.compile of the blocks and the discriminator: minutes at the start, then faster steps, because normalisation
    and activation become one kernel. true, false, or cuda (on NVIDIA GPUs only)."""
    cudnn_benchmark: Annotated[bool, SILENT] = False
    """Let cuDNN try its algorithms on each new shape of a convolution and keep the fastest, on NVIDIA GPUs. Two runs
    may choose differently, and then differ by rounding."""
    gradient_checkpointing: Annotated[bool, SILENT] = False
    """Recompute the autoencoder's blocks in the backward pass: less memory, about a third more time."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], SILENT] = ()
    """Trackers to which losses are logged besides log.jsonl."""
    export_for: PipelineName | None = None
    """Family of diffusers pipelines that the export must fit; a model that does not is refused before the start."""
    push_to_hub: Annotated[str | None, SILENT] = None
    """Id of the hub repository to which the export is uploaded at the end."""
    weights_dir: str | None = None
    """Folder with the LPIPS trunk weights; null searches the usual places (docs/weights.md)."""
    phases: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_refuse_one_section)] = ()
    """Phases that run one after another (docs/phases.md): for each, an optional name and the settings that differ from
    the others here, as in phases=[{steps: 900}, {name: sharp, train: decoder, gan: {start: 0}}]. Each starts from the
    averaged weights of the one before. The word steps=9 holds in all phases, phases.2.steps=9 or phases.sharp.steps=9
    in one."""
    model: Annotated[ModelSettings, FIXED] = ModelSettings()
    decoder: Annotated[DecoderSettings, FIXED] = DecoderSettings()
    data: Annotated[TrainingData, FIXED] = TrainingData()
    loss: LossSettings = LossSettings()
    latents: LatentSettings = LatentSettings()
    codebook: Annotated[CodeSettings, FIXED] = CodeSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    distillation: DistillationSettings = DistillationSettings()
    flow: FlowMatchingSettings = FlowMatchingSettings()
    semi_supervised: SemiSupervisedSettings = SemiSupervisedSettings()
    density: DensitySettings = DensitySettings()
    gan: GanSettings = GanSettings()
    optim: OptimSettings = OptimSettings()
    ema: EmaSettings = EmaSettings()
    checkpoint: Annotated[CheckpointSettings, SILENT] = CheckpointSettings()
    validation: ValidateSettings = Field(ValidateSettings(), alias="validate")
    log: Annotated[LogSettings, SILENT] = LogSettings()

    @property
    def processes(self) -> int:
        """Number of processes that the launcher started."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def knows_shape(self) -> bool:
        """Whether these settings determine the autoencoder's shape; otherwise it is checked after loading."""
        return self.init_from is None and self.model.gives_shape

    @property
    def _train_word(self) -> str:
        """`train` as a user writes it."""
        return self.train if isinstance(self.train, str) else f"[{', '.join(self.train)}]"

    @property
    def layerwise(self) -> bool:
        """Whether AdamW's steps are made independent of the width."""
        given, fresh = self.optim.layerwise, self.init_from is None and self.model.init == "linear"
        return fresh and self.optim.kind == "adamw" if given is None else given

    @property
    def micro_batch(self) -> int:
        """Samples per process and pass."""
        return micro_batch_of(self.batch_size, self.processes, self.micro_batch_size)

    @property
    def accumulation(self) -> int:
        """Passes per process and step."""
        return self.batch_size // (self.processes * self.micro_batch)

    @property
    def validation_sides(self) -> tuple[int, ...]:
        """Sides of the held-out crops that are measured, px; the first one's figures decide which step is the best."""
        return (self.validation.crop_px or self.data.resolution, *self.validation.also_px)

    def section_of(self, objective: type[Objective[Any]]) -> Any:
        """Return the section of these settings that holds an objective's settings."""
        return getattr(self, objective.section) if objective.section else None

    @property
    def objectives(self) -> list[type[Objective[Any]]]:
        """The enabled objectives, in the order in which they act."""
        return [objective for objective in OBJECTIVES if objective.enabled(self.section_of(objective))]

    def facts(self, model: ModelFacts | None = None) -> RunFacts:
        """Return the facts of the run that objectives may use.

        Args:
            model: The autoencoder, by whose names of parameters patterns in `train` are resolved; without them a run
                with patterns counts as one that trains all.
        """
        names: Sequence[str] = ()
        ends: Mapping[str, str] = {}
        if isinstance(self.train, str):
            ends = {"encoder": "encoder", "decoder": "decoder", "codes": "quantize"}
            names = tuple(ends.values())
        elif model is not None:
            names, ends = model.parameters, model.last_layers
        trained = trained_names(self.train, names)
        return RunFacts(
            seed=self.seed,
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            resolution=min(map(min, self.data.crop_sizes)),
            validation_px=min(self.validation_sides),
            smallest_px=max(objective.needs_px(self.section_of(objective)) for objective in OBJECTIVES),
            train=side_of(trained),
            fixed_ends=frozenset(part for part, name in ends.items() if name not in trained),
            crop_sizes=self.data.crop_sizes,
            compile=self.compile,
            weights_dir=self.weights_dir,
            enabled=frozenset(objective.name for objective in self.objectives),
            existing=self.init_from is not None,
            one_size=not (self.latents.equivariance and self.latents.equivariance_to != "rotation"),
        )

    @classmethod
    def settle(cls, values: dict[str, Any], given: Sequence[str]) -> None:
        """Drop what words replace: the file's model if they name an init_from and no model, because the shape of
        init_from replaces it; and if they name a gan.network, the file's settings of another one."""
        sections = {key.split(".")[0] for key in given}
        if "init_from" in sections and "model" not in sections and values.get("init_from") is not None:
            values.pop("model", None)
        gan = values.get("gan")
        if "gan.network" in given and isinstance(gan, dict):
            for key in settings_of_others(str(gan["network"])):
                if f"gan.{key}" not in given:
                    gan.pop(key, None)

    @model_validator(mode="before")
    @classmethod
    def _a_new_decoder_trains_alone(cls, values: Any) -> Any:
        """Return the values, with `train: decoder` if they describe a new decoder and do not say what trains."""
        wanted = isinstance(values, dict) and isinstance(values.get("decoder"), dict)
        if wanted and any(value not in (None, {}) for value in values["decoder"].values()):
            return {"train": "decoder", **values}
        return values

    @model_validator(mode="before")
    @classmethod
    def _levels_give_the_size_of_the_codebook(cls, values: Any) -> Any:
        """Return the values, with the keys of model.config that follow from codebook.levels, unless they are given."""
        sections = [values.get(key) if isinstance(values, dict) else None for key in ("model", "codebook")]
        model, codebook = (section if isinstance(section, dict) else {} for section in sections)
        levels, config = codebook.get("levels"), model.get("config")
        if model.get("kind") != "VQModel" or not isinstance(config, dict) or not isinstance(levels, (list, tuple)):
            return values
        if not levels or not all(type(number) is int for number in levels):  # which is reported as such
            return values
        keys = dict(zip(("num_vq_embeddings", "vq_embed_dim"), shape_of_codebook(tuple(levels)), strict=True))
        given = {key: value for key, value in config.items() if value is not None or key not in keys}
        return {**values, "model": {**model, "config": keys | given}}

    def problems(self) -> Iterator[Problem]:
        if self.phases:
            yield from phase_problems(self)
            return
        yield from super().problems()
        yield from self._decoder_problems()
        yield from self._label_problems()
        sides = self.validation_sides
        if twice := next((side for side in sides if sides.count(side) > 1), None):
            first = f" ({'validate.crop_px' if self.validation.crop_px else 'data.resolution'} is measured, too)"
            yield Problem("validate.also_px", f"{twice} is given twice{first * (twice == sides[0])}: give it once")
        yield from self._batch_problems()
        yield from self._shape_problems()
        yield from self._path_problems()
        if self.model.kind == "AutoencoderRAE":
            yield from self._representation_problems()
        yield from self.problems_with(self.model.facts(self.data.resolution) if self.init_from is None else None)
        for name in SHARDED:
            if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
                yield Problem(
                    "accelerate",
                    f"its configuration asks for {name}, which shards the model; a first stage is small, and its step "
                    "needs the decoder's last layer whole: launch with --multi_gpu instead (docs/multi-gpu.md)",
                )
        for tracker in self.report_to:
            if find_spec(tracker) is None:
                yield Problem("report_to", f"{tracker} is not installed: pip install '.[{tracker}]' in the checkout")

    def problems_with(self, model: ModelFacts | None) -> Iterator[Problem]:
        """Yield settings that do not go with each other or with the autoencoder (None: not known yet)."""
        run = self.facts(model)
        yield from self._layer_problems(model)
        if model is not None:
            sides = [("data.resolution", self.data.resolution), ("validate.crop_px", self.validation.crop_px)]
            sides += [("validate.also_px", side) for side in self.validation.also_px]
            for key, side in sides:
                if side is not None and model.side is not None and side != model.side:
                    yield Problem(key, f"{side}, and {model.name} takes images of {model.side} px only")
                elif side is not None and side % model.factor:
                    near = max(model.factor, side // model.factor * model.factor)
                    yield Problem(key, f"{side} is not a multiple of the model's factor {model.factor}: use {near}")
            yield from self._bucket_problems(model)
            known = isinstance(self.train, str) or model.parameters
            if model.latent == "hierarchy" and self.train != "all":
                yield Problem(
                    "train", f"{self._train_word}: the latents of {model.name} are made by both parts: set it to all"
                )
            elif not model.trains:
                yield Problem("train", f"{model.name} is of a class that is measured here and not trained")
            elif known and run.train not in model.trains:
                part = model.trains[0]
                yield Problem(
                    "train", f"{self._train_word}: of {model.name} only the {part} is trained here: set it to {part}"
                )
            elif model.parameters and (texts := unmatched(self.train, model.parameters)):
                yield from (Problem("train", text) for text in texts)
                return  # what is trained is not known
        for objective in OBJECTIVES:
            yield from objective.problems(self.section_of(objective), run, model)

    def _layer_problems(self, model: ModelFacts | None) -> Iterator[Problem]:
        key = "optim.layerwise"
        if not self.optim.layerwise:
            return
        if self.optim.kind != "adamw":
            yield Problem(key, f"is for adamw, and optim.kind is {self.optim.kind}: leave it out")
        if self.decoder.latents is not None:
            yield Problem(
                key, "looks at what the encoder makes of images, and decoder.latents are stored: leave it out"
            )
        if model is not None and model.latent != "posterior":
            yield Problem(key, f"is for first stages with a Gaussian posterior, unlike {model.name}: leave it out")

    def _bucket_problems(self, model: ModelFacts) -> Iterator[Problem]:
        uneven = [one.title for one in self.data.buckets if one.width % model.factor or one.height % model.factor]
        if self.data.buckets and model.side is not None:
            yield Problem("data.buckets", f"{model.name} takes images of {model.side} px only: leave it out")
        elif uneven:
            near = [max(1, side // model.factor) * model.factor for side in map(int, uneven[0].split()[:3:2])]
            yield Problem(
                "data.buckets",
                f"{', '.join(uneven)}: sides must be multiples of the model's factor {model.factor}, such as {near}",
            )

    def warnings(self) -> Iterator[str]:
        """Yield sentences on what these settings do that is rarely intended."""
        if self.phases:
            for phase in phases_of(self):
                yield from (f"{phase.title}: {text}" for text in phase.settings.warnings())
            return
        if self.compile and len(self.data.buckets) > 1:
            yield (
                "compile with data.buckets: blocks are compiled twice, for the first size and then for any size, so "
                "two of the first steps take minutes"
            )
        if self.init_from is None and self.train != "all" and self.model.encoder is None:
            fixed = {"decoder": "the encoder", "encoder": "the decoder"}.get(self._train_word, "all else")
            part = f"the {self.train}" if isinstance(self.train, str) else "these parts"
            start = "linear" if self.model.init == "linear" else "random"
            yield (
                f"train={self._train_word} without init_from: {fixed} stays at its {start} start. To train {part} of "
                "an existing first stage, give init_from"
            )

        for key, warmup, what in (
            ("optim.warmup", self.optim.warmup, "the learning rate"),
            ("loss.kl_warmup", self.loss.kl_warmup, "the weight of the KL term"),
        ):
            if warmup >= self.steps:
                yield f"{key} is {warmup:,} steps and the run has {self.steps:,}: {what} never reaches its full value"

    def _batch_problems(self) -> Iterator[Problem]:
        if self.batch_size % self.processes:
            below = self.batch_size // self.processes * self.processes
            nearest = f"{below} or {below + self.processes}" if below else str(self.processes)
            yield Problem(
                "batch_size",
                f"{self.batch_size} does not divide into {self.processes} processes: set batch_size to {nearest}, or "
                "start another number of processes",
            )

    def _decoder_problems(self) -> Iterator[Problem]:
        if self.decoder == DecoderSettings():
            return
        if self.init_from is None:
            yield Problem("decoder", "is for the latents of an existing first stage: give init_from")
        if self.train != "decoder":
            yield Problem(
                "train", f"{self._train_word}, and with decoder.* the decoder trains whole and alone: leave it out"
            )
        if self.decoder.latents is not None and not self.facts().one_size:
            yield Problem("latents.equivariance", "encodes smaller images, and decoder.latents are stored: set it to 0")
        if self.decoder.latents is not None and self.data.streaming:
            yield Problem("data.streaming", "decoder.latents belong to stored images, not to a stream: set it to false")
        for key in ("buckets", "scale", "scaled_decoding"):
            if self.decoder.latents is not None and getattr(self.data, key):
                yield Problem(f"data.{key}", "decoder.latents are of crops that are stored already: leave it out")
        if self.decoder.latents is not None and self.data.mixture:
            yield Problem("data.mixture", "decoder.latents belong to the images of one source: give data.source")
        if self.decoder.wanted and self.model != ModelSettings():
            yield Problem("model", "a new decoder's first stage is init_from's: leave model.* out, or give model={}")
        if self.decoder.wanted and self.flow.teacher_steps:
            yield Problem(
                "flow.teacher_steps",
                "the decoder of init_from teaches, and decoder.* replaces it by a fresh one: give init_from a trained "
                "FlowMatchingVAE, decoder={} and train=decoder",
            )
        if self.distillation.teacher is not None:
            yield Problem(
                "distillation.teacher",
                "decoder.* is for the latents of init_from themselves, without a teacher: leave it out",
            )

    def _label_problems(self) -> Iterator[Problem]:
        if self.semi_supervised.classes is None:
            return
        if self.data.streaming:
            yield Problem(
                "data.streaming",
                "semi_supervised finds labels by the number of an image, and a stream has none: set it to false",
            )
        if self.data.mixture:
            yield Problem("data.mixture", "semi_supervised takes images and labels from one source: give data.source")
        if self.decoder.latents is not None:
            yield Problem("decoder.latents", "have no labels, which semi_supervised needs: set it to null")

    def _representation_problems(self) -> Iterator[Problem]:
        if self.model.encoder is not None and self.init_from is not None:
            yield Problem("model.encoder", "the encoder is that of init_from: give model={}, or remove init_from")
        elif self.model.encoder is None and self.init_from is None:
            yield Problem("model.encoder", "an AutoencoderRAE needs one: give the folder of a model of transformers")
        if self.train == "all":
            yield Problem("train", "all: of an AutoencoderRAE only the decoder is trained here: set it to decoder")

    def _shape_problems(self) -> Iterator[Problem]:
        factor, groups = self.model.factor, self.model.norm_num_groups
        if (
            self.knows_shape
            and (factor, factor) in self.data.crop_sizes
            and self.model.block_out_channels[-1] == groups
        ):
            yield Problem(
                "model.norm_num_groups",
                f"{groups} groups of {groups} channels hold one number each where the latent has no height and width, "
                "and normalise it away: use fewer groups",
            )
        if self.export_for is not None and self.init_from is None:
            wrong_kind = kind_misfit(self.export_for, self.model.kind)
            lines = [wrong_kind] if wrong_kind is not None else []
            if wrong_kind is None and self.knows_shape:
                model = self.model
                shape = Shape(model.latent_channels, model.in_channels, model.out_channels, factor)
                lines = shape_misfits(self.export_for, shape)
            for line in lines:
                yield Problem("export_for", f"{self.export_for}: {line}")

    def _path_problems(self) -> Iterator[Problem]:
        start = self.init_from
        if start is not None and Path(start).expanduser().is_file():
            message = f"{start} is a file: latent-ae convert {start} OUT writes the folder to give here"
            yield Problem("init_from", message)
        elif start is not None and looks_like_path(start) and not Path(start).expanduser().is_dir():
            yield Problem("init_from", f"no such folder: {start} (from {Path.cwd()}){made_by(start)}")
        stored = self.decoder.latents
        if stored is not None and not (Path(stored).expanduser() / "manifest.json").is_file():
            yield Problem(
                "decoder.latents", f"{stored} holds no latents (from {Path.cwd()}): `latent-ae encode` writes them"
            )
        if self.weights_dir is not None and not Path(self.weights_dir).expanduser().is_dir():
            yield Problem("weights_dir", f"no such folder: {self.weights_dir} (from {Path.cwd()})")
        output = Path(self.output_dir).expanduser()
        existing = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not existing.is_dir():
            yield Problem("output_dir", f"{existing} is a file; name a folder")
        elif not os.access(existing, os.W_OK):
            yield Problem("output_dir", f"{existing} is not writable")
