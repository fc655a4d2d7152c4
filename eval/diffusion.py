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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers import DiTPipeline
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.data import open_images
from latent_ae.encode import encode_images
from latent_ae.first_stages import FirstStage, open_first_stage
from latent_ae.held_out import Framing, HeldOutImages
from latent_ae.images import picture_grid, to_uint8
from latent_ae.latent_cache import LatentCache, open_latents
from latent_ae.perceptual import TRUNKS
from latent_ae.processes import processes
from latent_ae.sources import StreamSource

from .config import DiffusionSettings
from .diffusion_page import write_diffusion_page
from .flow import NULL_CLASS, Trainer, Trivial, Validation, classes_of
from .manifest import versions
from .sampling import distance, feature_networks, features_of, samples, stock_pipeline

FORMAT = "latent-ae diffusion 1"
CHECKPOINT_SECONDS = 60
LARGE_MEAN, FAR_STD = 0.5, 2.0
GRID = 8
Item = TypeVar("Item")


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

    def run(self, model: str | Path | nn.Module) -> dict[str, Any]:
        settings, stage = self.settings, self.stage
        networks, notes = feature_networks(settings, self.device)  # before anything that takes long
        with self._timed("encode"):
            train, held_out = (self._latents(model, part) for part in ("train", "held_out"))
        self._check_latents(train, held_out)
        trivial = Trivial.of(train, settings.seed)
        validation = Validation(held_out, trivial, settings)
        trainer = Trainer(train, settings, self.device)
        with self._timed("train"):
            curve = self._trained(trainer, validation, self._key(train, held_out))
        pipeline = stock_pipeline(trainer.average, stage.module)
        _saved(pipeline, self.folder / "pipeline")
        count = min(settings.chosen("samples"), len(train))
        classes = classes_of(train, [number * len(train) // count for number in range(count)]).tolist()
        with self._timed("sample"):
            drawn = torch.cat(list(self._shown(samples(pipeline, classes, settings), "sample", count)))
        with self._timed("measure"):
            sets = {"samples": drawn, "reference": self._images("train", count)}
            sets |= self._reconstructed(self._images("held_out", count))
            metrics, intervals = self._distances(sets, networks)
        shift = train.shift_factor * train.scaling_factor
        latents = {
            "shape": list(train.shape),
            "train": len(train),
            "held_out": len(held_out),
            "classes": train.num_classes,
            "scaling_factor": train.scaling_factor,
            "scaled_mean": float(trivial.mean.mean()),
            "scaled_std": float((trivial.variance.mean() + trivial.mean.var(correction=0)).sqrt()),
            "shift_left_out": shift,
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
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }
        self._write(result, sets)
        return result

    def _latents(self, model: str | Path | nn.Module, part: Literal["train", "held_out"]) -> LatentCache:
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

    def _check_latents(self, train: LatentCache, held_out: LatentCache) -> None:
        settings, patch = self.settings, self.settings.chosen("patch_size")
        if train.shape[1] % patch:
            raise UserError(f"patch_size: {patch} does not divide the latents' side of {train.shape[1]}")
        if _fingerprint(train) == _fingerprint(held_out):
            raise UserError("latents, held_out_latents: both are of the same images; encode with part=held_out")
        if train.num_classes > NULL_CLASS:
            raise UserError(
                f"{self.data} has {train.num_classes} classes, DiTPipeline knows {NULL_CLASS}; set label_column=null"
            )
        if len(train) < settings.chosen("batch_size"):
            raise UserError(
                f"batch_size: {settings.chosen('batch_size')} is more than the {len(train)} images; lower it"
            )

    def _trained(self, trainer: Trainer, validation: Validation, key: str) -> list[dict[str, Any]]:
        """Trains to the end, from the checkpoint where there is one; the points of the loss curve."""
        path, curve, total = self.folder / "unfinished" / "training.pt", [], torch.zeros((), device=self.device)
        path.parent.mkdir(exist_ok=True)
        if (found := _loaded(path, key, self.device)) is not None:
            trainer.load(found["trainer"])
            curve, total = found["curve"], found["total"]
            print(f"going on from step {trainer.step:,}", file=sys.stderr)
        steps, size = trainer.steps, self.settings.chosen("batch_size")
        points = np.linspace(0, steps, min(self.settings.validations, steps + 1)).round().astype(int).tolist()

        def measure() -> None:
            behind = curve[-1]["step"] if curve else trainer.step
            own = float(total) / (trainer.step - behind) if trainer.step > behind else None
            if own is not None and not np.isfinite(own):
                raise UserError(f"lr: the diffusion model diverged before step {trainer.step:,}; lower lr")
            measured = validation.measure(trainer.average, self.device)
            curve.append({"step": trainer.step, "images": trainer.step * size, "train_loss": own} | measured)
            total.zero_()

        saved = time.monotonic()
        if not curve:
            measure()
        with self._bar("train", steps * size, trainer.step * size) as bar:
            for loss in trainer.losses():
                total += loss
                bar.update(size)
                if trainer.step in points:
                    measure()
                    bar.set_postfix({"relative loss": f"{curve[-1]['relative_loss']:.3f}"})
                if time.monotonic() - saved > CHECKPOINT_SECONDS or trainer.step == steps:
                    state = {"key": key, "trainer": trainer.state(), "curve": curve, "total": total}
                    _save(state, path)
                    saved = time.monotonic()
        return curve

    def _images(self, part: Literal["train", "held_out"], most: int) -> Tensor:
        """Up to `most` images, spread over all, as the latents' were framed: uint8 NCHW."""
        encoding = self.settings.encoding(part)
        opened = encoding.data(self.data)
        source = open_images(opened, part)
        assert not isinstance(source, StreamSource)
        count = min(most, len(source))
        few = source.subset(np.arange(count) * len(source) // count)
        images = HeldOutImages(
            few, opened, self.stage.channels or 3, Framing(**encoding.framing()), multiple_of=self.stage.factor
        )
        return torch.stack([to_uint8(image) for _, _, image in self._shown(images, f"read {part}", count)])

    @torch.no_grad()
    def _reconstructed(self, held_out: Tensor) -> dict[str, Tensor]:
        made = []
        for part in self._shown(held_out.split(self.settings.images_at_a_time), "reconstruct", len(held_out)):
            images = part.to(self.device).float() / 127.5 - 1
            made.append(to_uint8(self.stage.reconstruct(images).cpu()))
        return {"held_out": held_out, "reconstructions": torch.cat(made)}

    def _distances(self, sets: dict[str, Tensor], networks: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of each set to images trained on, and of reconstructions to their originals; values and intervals."""
        metrics: dict[str, dict[str, Any]] = {name: {"n": len(images)} for name, images in sets.items()}
        reference = metrics.pop("reference")["n"]
        metrics = {name: metrics[name] | {"reference_images": reference} for name in KINDS}
        metrics["reconstructions_of_originals"] = {
            "n": len(sets["held_out"]),
            "reference_images": len(sets["held_out"]),
        }
        intervals: dict[str, dict[str, list[float]]] = {name: {} for name in metrics}
        for name, network in networks.items():
            size = self.settings.images_at_a_time
            found = {kind: self._features(images, network, size, f"{name} of {kind}") for kind, images in sets.items()}
            pairs = {kind: (found[kind], found["reference"]) for kind in KINDS}
            pairs["reconstructions_of_originals"] = (found["reconstructions"], found["held_out"])
            for kind, (a, b) in pairs.items():
                metrics[kind][name], interval = distance(a, b)
                if interval is not None:
                    intervals[kind][name] = interval
        return metrics, intervals

    def _features(self, images: Tensor, network: Any, size: int, what: str) -> np.ndarray:
        parts = self._shown(images.split(size), what, len(images))
        return np.concatenate([features_of(part, network, size) for part in parts])

    def _key(self, train: LatentCache, held_out: LatentCache) -> str:
        """All that the trained weights depend on."""
        parts = [self.settings.recipe(), self.settings.seed, self.settings.validations, versions(), self.stage.sha256]
        made = [(_fingerprint(cache), cache.manifest["made_from"]["settings"]) for cache in (train, held_out)]
        return hashlib.sha256(json.dumps([parts, made], sort_keys=True).encode()).hexdigest()

    def _write(self, result: dict[str, Any], sets: dict[str, Tensor]) -> None:
        folder = self.folder
        # spread over all, which may be sorted by class
        rows = {name: torch.linspace(0, len(images) - 1, min(GRID**2, len(images))) for name, images in sets.items()}
        shown = {name: sets[name][numbers.round().long()].float() / 127.5 - 1 for name, numbers in rows.items()}
        pictures = {name: picture_grid([list(row) for row in images.split(GRID)]) for name, images in shown.items()}
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
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _bar(self, what: str, total: int, initial: int = 0) -> tqdm:
        interval = 0.5 if sys.stderr.isatty() else 30
        return tqdm(
            total=total, initial=initial, desc=what, unit="image", disable=not self.progress, mininterval=interval
        )

    def _shown(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        """The items, counted in a bar: batches by their length, anything else as one."""
        with self._bar(what, total) as bar:
            for item in items:
                yield item
                bar.update(len(item) if isinstance(item, Tensor) else 1)


KINDS = ("samples", "reconstructions", "held_out")
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


def _save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    try:
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error


def _loaded(path: Path, key: str, device: torch.device) -> dict[str, Any] | None:
    """A checkpoint of the same training; None for none, another's or a broken one."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception:  # torch raises many kinds for a file that is not whole
        return None
    return state if state.get("key") == key else None
