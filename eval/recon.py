"""How near a first stage's reconstructions come to their images.

from latent_ae_eval.recon import evaluate_reconstruction
result = evaluate_reconstruction("runs/quickstart/export", "photos")
print(result["metrics"])
"""

import json
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.data import (
    HeldOutImages,
    ImageSource,
    held_out_images,
    open_images,
    posterior_noise,
    stop_if_too_many_bad,
)
from latent_ae.images import bicubic_down_up, picture_grid, to_uint8
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.models import Reconstructor, count_parameters, factor_of, load_autoencoder
from latent_ae.sources import StreamSource

from .config import ReconSettings

ERROR_GAIN = 4
PACKAGES = ("latent-ae", "torch", "diffusers", "accelerate", "torchmetrics", "lpips", "numpy", "pillow")


class ImageBatch(NamedTuple):
    """Images of one size."""

    indices: list[int]
    names: list[str]
    images: Tensor
    """NCHW float32 in [-1, 1]."""


def evaluate_reconstruction(
    model: str | Path | AutoencoderKL,
    data: str | Path,
    settings: ReconSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measures `model` on `data` and returns the result, JSON-ready; equal on every process of a distributed run.

    `model` is a folder, a hub id or an autoencoder (which is moved to the device, in evaluation mode); `data` is as on
    the command line. With `out`, the main process writes result.json and pairs.png there. Each image is measured
    once, whatever the number of processes.

    Raises UserError for what cannot be loaded, images whose channels do not fit, or too many unreadable images.
    """
    settings = settings or ReconSettings()
    if out is not None:
        _make_folder(Path(out))
    state, device = _processes(settings)
    location, data = (None if isinstance(model, AutoencoderKL) else str(model)), str(data)
    autoencoder = _loaded(model, settings).to(device)
    factor, channels = _checked_sizes(autoencoder, settings)
    source, num_images = _opened(data, settings)
    images = held_out_images(
        source,
        settings.data(data),
        channels=channels,
        crop_px=settings.crop_px,
        multiple_of=factor,
        rank=state.process_index,
        world_size=state.num_processes,
    )
    metrics = ReconstructionMetrics(device, settings.lpips)
    baseline = ReconstructionMetrics(device, lpips=metrics.lpips)
    bar = tqdm(
        total=num_images if num_images is None else -(-num_images // state.num_processes),
        desc="recon",
        unit="image",
        disable=not (progress and state.is_main_process),
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    reconstructor = Reconstructor(autoencoder)
    pairs: list[list[Tensor]] = []
    with bar, torch.no_grad(), _full_float32():
        for batch in _batches(images, settings.batch_size):
            given = batch.images.to(device)
            made = reconstructor(given, _noise(batch, settings, autoencoder, factor)).image
            metrics.update(batch.indices, batch.names, given, made)
            baseline.update(batch.indices, batch.names, given, bicubic_down_up(given, factor))
            wanted = settings.num_pictures - len(pairs)
            pairs += _pairs(given[:wanted], made[:wanted])
            bar.update(len(batch.indices))
    metrics.gather()
    baseline.gather()
    skipped = sorted(gather_object(images.skipped))
    rows = metrics.rows()
    if not rows:
        reason = f"none of its {len(skipped)} images is readable; {skipped[0]}" if skipped else "it holds no images"
        raise UserError(f"{data}: {reason}")
    _report_skipped(skipped, len(rows), settings, state.is_main_process)
    result = {
        "model": _describe(autoencoder, location, settings, factor),
        "data": {"location": data, "num_images": len(rows), "skipped": skipped},
        "settings": settings.model_dump(mode="json"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": str(device.type),
        "metrics": metrics.summary(),
        "baseline": {"name": f"bicubic /{factor}"} | baseline.summary(),
        "images": rows,
    }
    if out is not None and state.is_main_process:
        _write(Path(out), result, pairs)
    return result


def default_folder(model: str) -> Path:
    """`recon-NAME` after the model; an export or a pipeline's vae is named by the folder that holds it."""
    path = Path(model.rstrip("/")) if not Path(model).exists() else Path(model).resolve()
    name = path.parent.name if path.name in ("export", "vae") and path.parent.name else path.name
    return Path(f"recon-{name}")


def _processes(settings: ReconSettings) -> tuple[PartialState, torch.device]:
    """The distributed state (of one process, when nothing launched several) and this process's device."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but PyTorch sees no GPU here; set device=cpu")
    # PartialState alone overlooks the launcher's choice of the CPU, and would take every process for the only one
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu)
    return state, torch.device("cpu") if on_cpu else state.device


def _loaded(model: str | Path | AutoencoderKL, settings: ReconSettings) -> AutoencoderKL:
    if not isinstance(model, AutoencoderKL):
        model = load_autoencoder(str(model), subfolder=settings.subfolder, revision=settings.revision)
    return model.eval()


def _checked_sizes(autoencoder: AutoencoderKL, settings: ReconSettings) -> tuple[int, int]:
    """The model's factor and number of image channels."""
    factor, config = factor_of(autoencoder), autoencoder.config
    if config.in_channels != config.out_channels:
        raise UserError(
            f"the model takes images of {config.in_channels} channels and gives {config.out_channels}, "
            "so its reconstructions cannot be compared with its inputs"
        )
    if settings.crop_px is not None and settings.crop_px % factor:
        near = max(1, settings.crop_px // factor) * factor
        raise UserError(f"crop_px: {settings.crop_px} is not a multiple of the model's factor {factor}; use {near}")
    return factor, int(config.in_channels)


def _opened(data: str, settings: ReconSettings) -> tuple[ImageSource, int | None]:
    """The images, cut to `limit`, and how many they are (None for a stream without limit)."""
    try:
        source = open_images(settings.data(data), "held_out")
    except UserError as error:
        # the settings have other names here than in training
        message = str(error).replace("data.eval_source", "DATA").replace("data.eval_split", "split")
        raise UserError(message.replace("data.", "")) from error
    if isinstance(source, StreamSource):
        if settings.limit is not None:
            source = replace(source, dataset=source.dataset.take(settings.limit))
        return source, settings.limit
    if settings.limit is not None:
        source = source.subset(np.arange(min(settings.limit, len(source))))
    return source, len(source)


def _batches(images: HeldOutImages, batch_size: int) -> Iterator[ImageBatch]:
    """Runs of images of one size, up to `batch_size` at a time."""
    run: list[tuple[int, str, Tensor]] = []
    for item in images:
        if run and (len(run) == batch_size or item[2].shape != run[0][2].shape):
            yield _stacked(run)
            run = []
        run.append(item)
    if run:
        yield _stacked(run)


def _stacked(run: list[tuple[int, str, Tensor]]) -> ImageBatch:
    indices, names, images = zip(*run, strict=True)
    return ImageBatch(list(indices), list(names), torch.stack(images))


def _noise(batch: ImageBatch, settings: ReconSettings, autoencoder: AutoencoderKL, factor: int) -> Tensor | None:
    if settings.posterior == "mode":
        return None
    height, width = batch.images.shape[-2:]
    shape = (int(autoencoder.config.latent_channels), height // factor, width // factor)
    return posterior_noise(settings.seed, batch.indices, shape).to(autoencoder.device)


def _full_float32() -> Any:
    # TF32 convolutions would move the third digit
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _pairs(given: Tensor, made: Tensor) -> list[list[Tensor]]:
    """Per image: input, reconstruction, and the error's mean over channels in grey; on the CPU."""
    difference = (to_uint8(given).float() - to_uint8(made).float()).abs().mean(1, keepdim=True)
    error = (ERROR_GAIN * difference / 127.5 - 1).clamp(max=1)
    return [list(row) for row in zip(given.cpu(), made.cpu(), error.cpu(), strict=True)]


def _report_skipped(skipped: Iterable[str], num_read: int, settings: ReconSettings, is_main: bool) -> None:
    lines = list(skipped)
    total = num_read + len(lines)
    try:
        stop_if_too_many_bad(len(lines), total, lines, num_images=total, max_bad_fraction=settings.max_bad_fraction)
    except UserError as error:
        raise UserError(str(error).replace("data.", "", 1)) from error
    if lines and is_main:
        print(f"skipped {len(lines)} of {total} images:\n  " + "\n  ".join(lines), file=sys.stderr)


def _describe(autoencoder: AutoencoderKL, location: str | None, settings: ReconSettings, factor: int) -> dict[str, Any]:
    config = autoencoder.config
    return {
        "location": location,
        "subfolder": settings.subfolder,
        "revision": settings.revision,
        "class": type(autoencoder).__name__,
        "channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "factor": factor,
        "parameters": count_parameters(autoencoder),
    }


def _make_folder(folder: Path) -> None:
    """Before the measurement, so that a folder that cannot be written costs no waiting."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from error


def _write(folder: Path, result: dict[str, Any], pairs: list[list[Tensor]]) -> None:
    try:
        (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        if pairs:
            labels = ["input", "reconstruction", f"error x{ERROR_GAIN}"]
            picture_grid(pairs, labels=labels).save(folder / "pairs.png")
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder}: {error.strerror or error}") from error
    print(f"wrote {folder / 'result.json'}" + (f" and {folder / 'pairs.png'}" if pairs else ""), file=sys.stderr)
