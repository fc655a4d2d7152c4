"""The common part of evaluations that model latents: they encode the data, train a flow and compare sets of images."""

import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.arithmetic import float32_arithmetic, lay_out
from latent_ae.config import UserError
from latent_ae.data.held_out import Framing, HeldOutImages
from latent_ae.data.images import ImageError, to_uint8
from latent_ae.data.loader import open_images
from latent_ae.data.rng import decoder_generators, spread
from latent_ae.data.sources import StoredImages, StreamSource, digest_of, part_of
from latent_ae.distributed import processes
from latent_ae.latents.cache import LatentCache, open_latents
from latent_ae.latents.encode import encode_images
from latent_ae.models.loading import FirstStage, load
from latent_ae.models.registry import FAMILIES, scaling_of
from latent_ae.only_writer import only_writer
from latent_ae.pretrained.lpips import TRUNKS
from latent_ae.progress import progress_bar
from latent_ae.provenance import versions
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.features import FeatureNetwork
from latent_ae_eval.generation.flow import CHOICE_SEED, NULL_CLASS, Trivial, Validation
from latent_ae_eval.generation.sampling import (
    GRID,
    KINDS,
    ImageSet,
    StandInDecoder,
    distances,
    finite_pixels,
    image_set,
    stock_pipeline,
)
from latent_ae_eval.generation.settings import DiffusionSettings
from latent_ae_eval.generation.training import Measure, Trainer, trained
from latent_ae_eval.jobs import write_json, written_into

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")
LARGE_MEAN, FAR_STD = 0.5, 2.0
COMPARED = 16
"""Number of files of DATA that are looked up in existing latents."""
LOSSES = ("loss", "relative_loss", "loss_by_time", "relative_loss_by_time")
PageWriter = Callable[[Path, Mapping[str, Any], Mapping[str, Image.Image]], None]
Job = TypeVar("Job", bound="Generation")


class Flow(NamedTuple):
    """A transformer trained on latents, its training and validation data, and its loss curve."""

    train: LatentCache
    held_out: LatentCache
    trivial: Trivial
    validation: Validation
    trainer: Trainer
    curve: list[dict[str, Any]]

    def describe(self, settings: DiffusionSettings) -> dict[str, Any]:
        """Return the description for a result, JSON-ready."""
        train, trivial, model = self.train, self.trivial, self.trainer.model
        own = {"patch_size": model.config.patch_size, "parameters": sum(p.numel() for p in model.parameters())}
        return {
            "latents": {
                "shape": list(train.shape),
                "train": len(train),
                "held_out": len(self.held_out),
                "classes": train.num_classes,
                "scaling_factor": train.scaling_factor,
                "scaled_mean": float(trivial.mean.mean()),
                "scaled_std": float((trivial.variance.mean() + trivial.mean.var(correction=0)).sqrt()),
                "shift_left_out": train.shift_factor * train.scaling_factor,
            },
            "recipe": settings.recipe() | own,
            "validated_on": self.validation.choice,
            "loss": {"trivial": float(self.validation.trivial.mean())} | {key: self.curve[-1][key] for key in LOSSES},
            "curve": self.curve,
        }


def begin(
    stack: ExitStack,
    kind: type[Job],
    command: str,
    model: str | Path | nn.Module,
    data: str,
    settings: DiffusionSettings,
    out: str | Path | None,
    progress: bool,
) -> Job:
    """Begin an evaluation on one process, in a folder that is locked until `stack` ends.

    Args:
        stack: Holds the lock and the arithmetic settings.
        kind: The class of the evaluation.
        command: Its name, for messages.
        model: A folder, a hub id, or a first stage of diffusers as a module.
        data: The location of the images; may be empty.
        settings: The settings.
        out: The folder; None takes a temporary one.
        progress: Show progress bars.

    Raises:
        UserError: If several processes were launched, the model cannot be loaded, or the folder cannot be used.
    """
    state, device = processes(settings.device)
    if state.num_processes > 1:
        raise UserError(
            f"eval {command} runs in one process; encode on many with `accelerate launch -m latent_ae encode` (once "
            "with part=train, once with part=held_out), then give latents=DIR and held_out_latents=DIR to one process"
        )
    where = {key: getattr(settings, key) for key in ("subfolder", "revision", "variant", "ema")}
    stage = load(model, device=device, dtype="fp32", **where)
    if stage.module is None:
        raise UserError(f"eval {command} needs latents, and the function {stage.name} has none; give a first stage")
    # the layout of the saved pipeline, because convolutions round differently in another layout
    lay_out(stage.module, torch.contiguous_format)
    # TF32 convolutions would change the third digit of latents and results
    stack.enter_context(float32_arithmetic(repeatable=True))
    return kind(model, stage, data, settings, device, _taken(stack, out), progress)


def _taken(stack: ExitStack, out: str | Path | None) -> Path:
    """Return a folder that no other evaluation writes into until `stack` ends."""
    if out is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latent-ae-")))
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder}: {error.strerror or error}") from error
    refusal = f"--out: another evaluation is writing into {folder}; wait for it, or give another folder"
    stack.enter_context(only_writer(folder / ".evaluation.lock", refusal))
    return folder


@dataclass
class Generation:
    """Base class of the evaluations that generate images."""

    model: str | Path | nn.Module
    stage: FirstStage
    data: str
    settings: DiffusionSettings
    device: torch.device
    folder: Path
    progress: bool
    seconds: dict[str, float] = field(default_factory=dict)
    processor_seconds: dict[str, float] = field(default_factory=dict)
    """Processor time of this process, without the workers that decode images."""
    shared: int = 0
    """Number of held-out images whose latents are also trained on."""
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The choice of the images with which samples are compared, by part of the data; see rng.choice_facts."""

    def check_pipeline(self) -> None:
        """Raise UserError if the config of the first stage does not tell how to scale its latents."""
        assert self.stage.module is not None and self.stage.family is not None
        if self.stage.family.scaled_by_patches or not self.stage.module.config.get("scaling_factor", 1.0):
            raise UserError(
                f"{self.stage.name} has no scaling_factor, so DiTPipeline cannot decode its latents; known to work are "
                + ", ".join(name for name, family in FAMILIES.items() if family.pipeline_decodes)
            )

    @property
    def stock(self) -> bool:
        """Whether a stock DiTPipeline, which divides by scaling_factor and decodes, can use the first stage.

        It would decode all images from the same noise, if a decoder begins with any.
        """
        assert self.stage.module is not None and self.stage.family is not None
        has_factor, family = "scaling_factor" in self.stage.module.config, self.stage.family
        plain = family.plain and not family.decodes_noise
        return plain and has_factor and scaling_of(self.stage.module).mean is None

    def pipeline(self, transformer: DiTTransformer2DModel) -> DiTPipeline:
        """Return a pipeline that samples latents with the transformer and decodes them."""
        assert self.stage.module is not None
        return stock_pipeline(transformer, self.stage.module if self.stock else StandInDecoder(self.stage))

    def check_data(self) -> None:
        """Raise UserError if samples cannot be compared with the images."""
        if self.stage.channels not in (1, 3):
            raise UserError(
                f"images of {self.stage.channels} channels have no features to compare samples by; 1 or 3 are needed"
            )
        least, resolution = TRUNKS["vgg"].min_px, self.settings.chosen("resolution")
        if resolution < least:
            raise UserError(f"resolution: {resolution} is too small for VGG16's features; {least} is enough")
        if min(len(self.source(part)) for part in PARTS) < 2:
            raise UserError(f"DATA: {self.data} holds too few images to hold out two of them")

    def flow(self) -> Flow:
        """Encode missing latents and train a flow; a training that was killed is resumed.

        Raises:
            UserError: If images cannot be encoded, latents do not fit, or the training diverges.
        """
        train, held_out = self.both_latents()
        trivial = Trivial.of(train, self.settings.seed)
        validation = Validation(held_out, trivial, self.settings)
        trainer = Trainer(train, self.settings, self.device)
        curve = self.fit(trainer, validation, self.key(train, held_out))
        return Flow(train, held_out, trivial, validation, trainer, curve)

    def both_latents(self) -> tuple[LatentCache, LatentCache]:
        """Return the latents to train on and the held-out ones; missing ones are encoded.

        Raises:
            UserError: If images cannot be encoded, or latents do not fit.
        """
        with self.timed("encode"):
            train, held_out = (self.latents(part) for part in PARTS)
        self._check_latents(train, held_out)
        return train, held_out

    def fit(self, trainer: Trainer, validation: Measure, key: str) -> list[dict[str, Any]]:
        """Train, or resume a training that was killed if it has the same `key`, and return the loss curve.

        Raises:
            UserError: If the training diverges.
        """
        with self.timed("train"):
            unfinished = self.folder / "unfinished" / "training.pt"
            unfinished.parent.mkdir(exist_ok=True)
            with self.bar("train", trainer.steps * self.settings.chosen("batch_size")) as bar:
                return trained(trainer, validation, unfinished, key, bar)

    def compared(
        self, samples: ImageSet, networks: dict[str, FeatureNetwork], count: int
    ) -> tuple[dict[str, ImageSet], dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]:
        """Measure distances of samples and, for comparison, of held-out images and their reconstructions.

        Args:
            samples: The samples.
            networks: Feature networks by the name of the distance.
            count: Number of training images to compare with, and the largest number of held-out images.

        Returns:
            The sets, and the values and intervals of `distances`.
        """
        with self.timed("measure"):
            sets = {"samples": samples}
            sets["reference"] = self.image_set(self._images("train", count), networks, count, "images")
            count = min(count, len(self.source("held_out")))
            sets["held_out"] = self.image_set(self._images("held_out", count), networks, count, "held-out images")
            sets["reconstructions"] = self.image_set(self._reconstructed(count), networks, count, "reconstructions")
            return sets, *distances(sets)

    def image_set(
        self, batches: Iterable[Tensor], networks: dict[str, FeatureNetwork], count: int, what: str
    ) -> ImageSet:
        """Call `sampling.image_set` with a progress bar named `what`."""
        with self.bar(what, count) as bar:
            return image_set(batches, networks, count, bar.update)

    def notes(self, metrics: dict[str, Any], networks: Mapping[str, FeatureNetwork]) -> list[str]:
        """Return notes on the pipeline and on distances that were measured on few images, for a result."""
        notes = []
        if not self.stock:
            assert self.stage.family is not None
            reason = (
                "would decode all images from the same noise" if self.stage.family.decodes_noise else "cannot decode"
            )
            notes.append(
                f"DiTPipeline {reason} with {self.stage.name}: pipeline/ holds the transformer and the scheduler"
            )
        fewest = min(metrics["samples"][key] for key in ("n", "reference_images"))
        notes += [
            f"{name}: {fewest:,} images are fewer than the network has features ({network.dimensions:,}): biased "
            "upwards, and not to be compared with values at another number"
            for name, network in networks.items()
            if name in metrics["samples"] and fewest < network.dimensions
        ]
        requested = self.settings.chosen("samples")
        if self.shared:
            notes.append(f"{self.shared:,} of the held-out images are among those trained on")
        if missing := metrics["held_out"]["n"] - metrics["reconstructions"]["n"]:
            notes.append(f"reconstructions: {missing:,} are not finite and left out")
        return notes + [
            f"{kind}: {metrics[kind]['n']:,} images, fewer than samples={requested:,}; a Fréchet distance of fewer "
            "images is larger"
            for kind in KINDS
            if metrics[kind]["n"] < requested
        ]

    def latents(self, part: Part) -> LatentCache:
        """Return the latents that the settings name, or those in the folder, which are encoded if they are missing.

        Raises:
            UserError: If images cannot be encoded, or the latents are of another model or framing.
        """
        existing = self.settings.latents if part == "train" else self.settings.held_out_latents
        folder = Path(existing).expanduser() if existing else self.folder / "latents" / part
        if not existing:
            source = self.model if isinstance(self.model, nn.Module) else str(self.model)
            try:
                encode_images(source, self.data, folder, self.settings.encoding(part), progress=self.progress)
            except UserError as error:
                raise UserError(str(error).replace("OUT: ", "--out: ")) from error
        cache = open_latents(folder)
        key, made = "latents" if part == "train" else "held_out_latents", cache.manifest
        if made["model"]["sha256"] != self.stage.sha256:
            raise UserError(f"{key}: {folder} holds latents of another model ({made['model']['location']})")
        framing = self.settings.encoding(part).framing()
        if made["framing"] != framing:
            raise UserError(f"{key}: {folder} holds latents of images framed as {made['framing']}, not {framing}")
        return cache

    def check_images(self, cache: LatentCache, part: Part) -> None:
        """Raise UserError if the latents that the settings name belong to other images than DATA's."""
        key = "latents" if part == "train" else "held_out_latents"
        if getattr(self.settings, key) and not self._holds_images_of(cache, part):
            location = cache.manifest["data"]["location"]
            raise UserError(f"{key}: {cache.folder} holds latents of other images ({location}) than {self.data}")

    def _holds_images_of(self, cache: LatentCache, part: Part) -> bool:
        """Return whether the numbers of files are equal and most of COMPARED files of DATA were encoded."""
        source = self.source(part)
        if len(source) != cache.manifest["data"]["num_files"]:
            return False
        encoded = set(cache.dataset.data.column("digest").to_pylist())
        drawn = [int(row) for row in spread(CHOICE_SEED, len(source), COMPARED)]
        matches = 0
        for row in drawn:
            with suppress(ImageError):
                matches += digest_of(source.read(row)) in encoded
        return 2 * matches > len(drawn)

    def _check_latents(self, train: LatentCache, held_out: LatentCache) -> None:
        patch = self.settings.chosen("patch_size")
        if patch and train.shape[1] % patch:
            raise UserError(f"patch_size: {patch} does not divide the latents' side of {train.shape[1]}")
        digests = [cache.dataset.data.column("digest").to_pylist() for cache in (train, held_out)]
        self.shared = shared = len(set(digests[0]) & set(digests[1]))
        if 2 * shared > len(held_out):  # many data sets hold some images twice
            raise UserError(
                f"held_out_latents: {shared} of its {len(held_out)} images are among those trained on; encode with "
                "part=train and part=held_out"
            )
        self.check_images(train, "train")
        self.check_images(held_out, "held_out")
        if train.num_classes > NULL_CLASS:
            raise UserError(
                f"{self.data} has {train.num_classes} classes, DiTPipeline knows {NULL_CLASS}; set label_column=null"
            )

    def source(self, part: Part) -> StoredImages:
        """Open the images of a part of the data. Raises UserError if they cannot be opened."""
        try:
            source = open_images(self.settings.encoding(part).data(self.data), part)
        except UserError as error:
            # the settings of evaluations have other names than those of training
            raise UserError(str(error).replace("data.source", "DATA").replace("data.", "")) from error
        assert not isinstance(source, StreamSource)
        return source

    def _images(self, part: Part, count: int) -> Iterator[Tensor]:
        """Yield batches of `count` images, always the same ones, framed like the latents': (N, C, H, W) uint8."""
        return (levels for levels, _ in self._numbered(part, count))

    def _numbered(self, part: Part, count: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the batches of `_images` and the numbers of their images among those chosen."""
        encoding = self.settings.encoding(part)
        source, self.choices[part] = part_of(self.source(part), count, CHOICE_SEED)
        images = HeldOutImages(
            source,
            encoding.data(self.data),
            self.stage.channels or 3,
            Framing(**encoding.framing()),
            self.stage.factor,
        )
        readable = iter(images)
        while batch := list(itertools.islice(readable, self.settings.images_at_a_time)):
            yield torch.stack([to_uint8(image) for _, _, image in batch]), [number for number, _, _ in batch]

    def _reconstructed(self, count: int) -> Iterator[Tensor]:
        """Yield batches of reconstructions of held-out images, (N, C, H, W) uint8 on the CPU."""
        for levels, numbers in self._numbered("held_out", count):
            images = levels.to(self.device).float() / 127.5 - 1
            generators = decoder_generators(self.settings.seed, numbers)
            with torch.no_grad():
                yield finite_pixels(self.stage.reconstruct(images, generators=generators).cpu())

    def key(self, train: LatentCache, held_out: LatentCache) -> str:
        """Return a digest of everything that the trained weights depend on."""
        parts = [self.settings.recipe(), self.settings.seed, self.settings.validations, versions(), self.stage.sha256]
        made = [(fingerprint(cache), cache.manifest["made_from"]["settings"]) for cache in (train, held_out)]
        return hashlib.sha256(json.dumps([parts, made], sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return settings, versions, device and times for a result, JSON-ready."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "settings": settings.model_dump(mode="json"),
            "versions": versions(),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
        }

    def write(self, result: dict[str, Any], sets: dict[str, ImageSet], page: str, write_page: PageWriter) -> None:
        """Write result.json, samples.png and the page, and remove the checkpoint of the training.

        Args:
            result: The result.
            sets: The sets of images, whose pictures are shown.
            page: File name of the page.
            write_page: Function that writes the page.

        Raises:
            UserError: If a file cannot be written.
        """
        folder = self.folder
        pictures = {name: picture_grid([list(row) for row in one.shown.split(GRID)]) for name, one in sets.items()}
        with written_into(folder, ["result.json", "samples.png", page]):
            write_json(folder / "result.json", result)
            pictures["samples"].save(folder / "samples.png")
            write_page(folder / page, result, pictures)
            (folder / "unfinished" / "training.pt").unlink(missing_ok=True)
            if (folder / "unfinished").is_dir():
                (folder / "unfinished").rmdir()

    def save(self, pipeline: DiTPipeline) -> None:
        """Save a pipeline for `DiTPipeline.from_pretrained`, without the first stage if DiTPipeline cannot use it.

        Raises:
            UserError: If it cannot be written.
        """
        try:
            if self.stock:
                pipeline.save_pretrained(self.folder / "pipeline")
            else:
                pipeline.transformer.save_pretrained(self.folder / "pipeline" / "transformer")
                pipeline.scheduler.save_pretrained(self.folder / "pipeline" / "scheduler")
        except OSError as error:
            raise UserError(f"--out: cannot write {self.folder}: {error.strerror or error}") from error

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record the time of a `with` block in `seconds` and `processor_seconds`."""
        started, used = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.processor_seconds[name] = round(time.process_time() - used, 1)

    def bar(self, what: str, total: int) -> tqdm:
        """Return a progress bar over `total` images, named `what`."""
        return progress_bar(what, total, "image", disable=not self.progress)


def fingerprint(cache: LatentCache) -> str:
    """Return the fingerprint of a cache's images."""
    return str(cache.manifest["data"]["fingerprint"])
