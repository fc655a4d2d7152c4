"""How well a diffusion model learns a first stage's latents: a small transformer, trained on a fixed budget.

from latent_ae_eval.diffusion import evaluate_diffusion
result = evaluate_diffusion("runs/mine/export", "/data/cifar10", out="mine")
print(result["metrics"]["samples"])
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiTPipeline
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.data import open_images
from latent_ae.encode import encode_images
from latent_ae.first_stages import FirstStage, open_first_stage
from latent_ae.frechet import RELIABLE_IMAGES
from latent_ae.held_out import Framing, HeldOutImages
from latent_ae.images import ImageError, picture_grid, to_uint8
from latent_ae.latent_cache import LatentCache, open_latents
from latent_ae.perceptual import TRUNKS
from latent_ae.processes import processes
from latent_ae.sources import StoredImages, StreamSource, digest_of

from .config import DiffusionSettings
from .diffusion_page import write_diffusion_page
from .flow import NULL_CLASS, Trivial, Validation, classes_of, some_of
from .flow_training import Trainer, trained
from .manifest import versions
from .sampling import GRID, KINDS, Features, ImageSet, distances, feature_networks, image_set, samples, stock_pipeline

FORMAT = "latent-ae diffusion 1"
LARGE_MEAN, FAR_STD = 0.5, 2.0
Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")


def evaluate_diffusion(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: DiffusionSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a diffusion model on the latents of `data` and returns how well its samples fit, JSON-ready.

    `model` is a folder, a hub id or an instance of a first stage of diffusers; `data` as on the command line. With
    `out`, result.json, diffusion.html, samples.png, the latents and a pipeline for `DiTPipeline.from_pretrained` are
    written there, and a call that was killed goes on from its finished latents and its last checkpoint.

    Raises UserError for what cannot be loaded or encoded, latents of another model, and a training that diverges.
    """
    settings = settings or DiffusionSettings()
    state, device = processes(settings.device)
    if state.num_processes > 1:
        raise UserError(
            "eval diffusion trains in one process; encode on many with `accelerate launch -m latent_ae encode` (once "
            "with part=train, once with part=held_out), then give latents=DIR and held_out_latents=DIR to one process"
        )
    where = {key: getattr(settings, key) for key in ("subfolder", "revision", "variant", "ema")}
    stage = open_first_stage(model, device=device, dtype="fp32", **where)
    _check_stage(stage, settings)
    with ExitStack() as stack:
        # TF32 convolutions would move the third digit of what is encoded and measured
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        stack.enter_context(flags)
        folder = _taken(stack, out)
        job = _Job(stage, str(data), settings, device, folder, progress)
        return job.run(model)


def _check_stage(stage: FirstStage, settings: DiffusionSettings) -> None:
    if stage.module is None or not stage.module.config.get("scaling_factor"):
        raise UserError(
            f"{stage.name} has no scaling_factor, so DiTPipeline cannot decode its latents; known to work are "
            "AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderTiny, AutoencoderDC and VQModel"
        )
    if stage.channels not in (1, 3):
        raise UserError(
            f"images of {stage.channels} channels have no features to compare samples by; 1 or 3 are needed"
        )
    resolution = settings.chosen("resolution")
    if resolution < TRUNKS["vgg"].min_px:
        raise UserError(f"resolution: {resolution} is too small for VGG16's features; {TRUNKS['vgg'].min_px} is enough")
    # encoded and sampled as the saved pipeline will be: convolutions round differently in another layout
    stage.module.to(memory_format=torch.contiguous_format)


def _taken(stack: ExitStack, out: str | Path | None) -> Path:
    """A folder that is nobody else's."""
    if out is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latent-ae-")))
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(FileLock(folder / ".evaluation.lock", timeout=0))
    except Timeout:
        raise UserError(
            f"--out: another evaluation is writing into {folder}; wait for it, or give another folder"
        ) from None
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder}: {error.strerror or error}") from error
    return folder


@dataclass
class _Job:
    """One evaluation; its parts in the order in which they run."""

    stage: FirstStage
    data: str
    settings: DiffusionSettings
    device: torch.device
    folder: Path
    progress: bool
    seconds: dict[str, float] = field(default_factory=dict)
    processor_seconds: dict[str, float] = field(default_factory=dict)
    """Of this process, not of those that decode images."""

    def run(self, model: str | Path | nn.Module) -> dict[str, Any]:
        settings, stage = self.settings, self.stage
        # what can be missing is looked for before anything that takes long
        networks, notes = feature_networks(settings, self.device)
        if min(len(self._source(part)) for part in PARTS) < 2:
            raise UserError(f"DATA: {self.data} holds too few images to hold out two of them")
        with self._timed("encode"):
            train, held_out = (self._latents(model, part) for part in PARTS)
        self._check_latents(train, held_out)
        trivial = Trivial.of(train, settings.seed)
        validation = Validation(held_out, trivial, settings)
        trainer = Trainer(train, settings, self.device)
        with self._timed("train"):
            unfinished = self.folder / "unfinished" / "training.pt"
            unfinished.parent.mkdir(exist_ok=True)
            with self._bar("train", trainer.steps * settings.chosen("batch_size")) as bar:
                curve = trained(trainer, validation, unfinished, self._key(train, held_out), bar)
        pipeline = stock_pipeline(trainer.average, stage.module)
        _saved(pipeline, self.folder / "pipeline")
        count = min(settings.chosen("samples"), len(train))
        classes = classes_of(train, some_of(len(train), count)).tolist()
        with self._timed("sample"):
            sets = {"samples": self._set(samples(pipeline, classes, settings), networks, count, "samples")}
        with self._timed("measure"):
            sets["reference"] = self._set(self._images("train", count), networks, count, "images")
            count = min(count, len(self._source("held_out")))
            sets["held_out"] = self._set(self._images("held_out", count), networks, count, "held-out images")
            made = (self._reconstructed(images) for images in self._images("held_out", count))
            sets["reconstructions"] = self._set(made, networks, count, "reconstructions")
            metrics, intervals = distances(sets)
        latents = {
            "shape": list(train.shape),
            "train": len(train),
            "held_out": len(held_out),
            "classes": train.num_classes,
            "scaling_factor": train.scaling_factor,
            "scaled_mean": float(trivial.mean.mean()),
            "scaled_std": float((trivial.variance.mean() + trivial.mean.var(correction=0)).sqrt()),
            "shift_left_out": train.shift_factor * train.scaling_factor,
        }
        notes += _notes(latents, metrics, settings)
        result = {
            "format": FORMAT,
            "model": stage.describe() | {"subfolder": settings.subfolder, "revision": settings.revision},
            "data": {"location": self.data, "fingerprints": [_fingerprint(cache) for cache in (train, held_out)]},
            "latents": latents,
            "recipe": settings.recipe() | {"parameters": sum(p.numel() for p in trainer.model.parameters())},
            "metrics": metrics,
            "intervals": intervals,
            "loss": {"trivial": float(validation.trivial.mean())} | {key: curve[-1][key] for key in LOSSES},
            "curve": curve,
            "notes": notes,
            "seed": settings.seed,
            "settings": settings.model_dump(mode="json"),
            "versions": versions(),
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
        }
        self._write(result, sets)
        return result

    def _latents(self, model: str | Path | nn.Module, part: Part) -> LatentCache:
        """Those that were given, or those of the folder, which are encoded where they are missing."""
        given = self.settings.latents if part == "train" else self.settings.held_out_latents
        folder = Path(given).expanduser() if given else self.folder / "latents" / part
        if not given:
            source = model if isinstance(model, nn.Module) else str(model)
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

    def _holds_images_of(self, cache: LatentCache, part: Part) -> bool:
        """Whether there are as many files, and most of a few of DATA's are among those encoded, by their content."""
        source = self._source(part)
        if len(source) != cache.manifest["data"]["num_files"]:
            return False
        encoded = set(cache.dataset.data.column("digest").to_pylist())
        drawn = [int(row) for row in some_of(len(source), COMPARED)]
        found = 0
        for row in drawn:
            with suppress(ImageError):
                found += digest_of(source.read(row)) in encoded
        return 2 * found > len(drawn)

    def _check_latents(self, train: LatentCache, held_out: LatentCache) -> None:
        patch = self.settings.chosen("patch_size")
        if train.shape[1] % patch:
            raise UserError(f"patch_size: {patch} does not divide the latents' side of {train.shape[1]}")
        digests = [cache.dataset.data.column("digest").to_pylist() for cache in (train, held_out)]
        shared = len(set(digests[0]) & set(digests[1]))
        if 2 * shared > len(held_out):  # some are twice in many data sets
            raise UserError(
                f"held_out_latents: {shared} of its {len(held_out)} images are among those trained on; encode with "
                "part=train and part=held_out"
            )
        parts: tuple[tuple[str, LatentCache, Part], ...] = (
            ("latents", train, "train"),
            ("held_out_latents", held_out, "held_out"),
        )
        for key, cache, part in parts:
            if getattr(self.settings, key) and not self._holds_images_of(cache, part):
                location = cache.manifest["data"]["location"]
                raise UserError(f"{key}: {cache.folder} holds latents of other images ({location}) than {self.data}")
        if train.num_classes > NULL_CLASS:
            raise UserError(
                f"{self.data} has {train.num_classes} classes, DiTPipeline knows {NULL_CLASS}; set label_column=null"
            )

    def _source(self, part: Part) -> StoredImages:
        try:
            source = open_images(self.settings.encoding(part).data(self.data), part)
        except UserError as error:
            # the settings have other names here than in training
            raise UserError(str(error).replace("data.source", "DATA").replace("data.", "")) from error
        assert not isinstance(source, StreamSource)
        return source

    def _images(self, part: Part, count: int) -> Iterator[Tensor]:
        """Batches of `count` images, drawn once for all, framed as the latents' were: uint8 NCHW."""
        encoding, source = self.settings.encoding(part), self._source(part)
        images = HeldOutImages(
            source.subset(some_of(len(source), count)),
            encoding.data(self.data),
            self.stage.channels or 3,
            Framing(**encoding.framing()),
            self.stage.factor,
        )
        batch: list[Tensor] = []
        for _, _, image in images:
            batch.append(to_uint8(image))
            if len(batch) == self.settings.images_at_a_time:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    @torch.no_grad()
    def _reconstructed(self, images: Tensor) -> Tensor:
        return to_uint8(self.stage.reconstruct(images.to(self.device).float() / 127.5 - 1).cpu())

    def _set(self, batches: Iterable[Tensor], networks: dict[str, Features], count: int, what: str) -> ImageSet:
        with self._bar(what, count) as bar:
            return image_set(batches, networks, count, bar.update)

    def _key(self, train: LatentCache, held_out: LatentCache) -> str:
        """All that the trained weights depend on."""
        parts = [self.settings.recipe(), self.settings.seed, self.settings.validations, versions(), self.stage.sha256]
        made = [(_fingerprint(cache), cache.manifest["made_from"]["settings"]) for cache in (train, held_out)]
        return hashlib.sha256(json.dumps([parts, made], sort_keys=True).encode()).hexdigest()

    def _write(self, result: dict[str, Any], sets: dict[str, ImageSet]) -> None:
        folder = self.folder
        pictures = {name: picture_grid([list(row) for row in one.shown.split(GRID)]) for name, one in sets.items()}
        try:
            part = folder / "result.json.part"
            part.write_text(json.dumps(result, indent=2), encoding="utf-8")
            os.replace(part, folder / "result.json")
            pictures["samples"].save(folder / "samples.png")
            write_diffusion_page(folder / "diffusion.html", result, pictures)
            (folder / "unfinished" / "training.pt").unlink(missing_ok=True)
            (folder / "unfinished").rmdir()
        except OSError as error:
            raise UserError(f"--out: cannot write into {folder}: {error.strerror or error}") from error

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started, used = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.processor_seconds[name] = round(time.process_time() - used, 1)

    def _bar(self, what: str, total: int) -> tqdm:
        interval = 0.5 if sys.stderr.isatty() else 30
        return tqdm(total=total, desc=what, unit="image", disable=not self.progress, mininterval=interval)


COMPARED = 16
"""Files of DATA that are looked for among given latents."""
LOSSES = ("loss", "relative_loss", "loss_by_time", "relative_loss_by_time")


def _fingerprint(cache: LatentCache) -> str:
    return str(cache.manifest["data"]["fingerprint"])


def _notes(latents: dict[str, Any], metrics: dict[str, Any], settings: DiffusionSettings) -> list[str]:
    notes = []
    if abs(latents["scaled_mean"]) > LARGE_MEAN:
        notes.append(
            f"the scaled latents' mean is {latents['scaled_mean']:.2f}, not 0: DiTPipeline scales and does not shift, "
            "so the diffusion model has to learn it; a pipeline that shifts may do better"
        )
    if not 1 / FAR_STD < latents["scaled_std"] < FAR_STD:
        notes.append(
            f"the scaled latents' standard deviation is {latents['scaled_std']:.3g}, not 1: measure the model's "
            "scaling_factor (`latent-ae export` does)"
        )
    if "fid" in metrics["samples"] and metrics["samples"]["n"] < RELIABLE_IMAGES:
        notes.append(
            f"fid: {metrics['samples']['n']:,} images are fewer than Inception has features ({RELIABLE_IMAGES:,}): "
            "biased upwards, and not to be compared with values at another number"
        )
    for kind in KINDS:
        if metrics[kind]["n"] < settings.chosen("samples"):
            notes.append(
                f"{kind}: {metrics[kind]['n']:,} images, fewer than samples={settings.chosen('samples'):,}; a Fréchet "
                "distance of fewer images is larger"
            )
    return notes


def _saved(pipeline: DiTPipeline, folder: Path) -> None:
    try:
        pipeline.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"--out: cannot write {folder}: {error.strerror or error}") from error
