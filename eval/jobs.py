"""The common part of jobs: one process, a model, batches of images of one shape, and LPIPS if it is available."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.held_out import Framing, HeldOutImage, HeldOutImages
from latent_ae.data.sources import ImageSource
from latent_ae.distributed import refuse_several_processes
from latent_ae.models.loading import CPU_BATCH_PX, FirstStage
from latent_ae.pretrained.lpips import LPIPS, TRUNKS, Net
from latent_ae.pretrained.weights import briefly
from latent_ae.progress import progress_bar
from latent_ae_eval.inputs import checked_factor, opened_model, processes
from latent_ae_eval.settings import JobSettings


def one_process(job: str, settings: JobSettings) -> torch.device:
    """Return the device of a job that runs on one process. Raises UserError if several were launched."""
    refuse_several_processes(f"eval {job}")
    return processes(settings)[1]


def latent_model(job: str, model: Any, settings: JobSettings, device: torch.device) -> FirstStage:
    """Load a first stage with latents. Raises UserError if it cannot be loaded or is a plain function of images."""
    stage = opened_model(model, settings, device)
    if stage.module is None:
        raise UserError(f"eval {job} needs latents, and the function {stage.name} has none; give a first stage")
    return stage


def images_for(stage: FirstStage, source: ImageSource, settings: JobSettings, data: str) -> HeldOutImages:
    """Return the source's images, framed as the settings say, with sides that are multiples of the model's factor.

    Args:
        stage: The model.
        source: The images.
        settings: The framing, and how images are read.
        data: The location of the images.

    Raises:
        UserError: If `crop_px` is not a multiple of the factor.
    """
    factor = checked_factor(stage, settings.crop_px)
    framing = Framing(settings.resize_px, settings.crop_px)
    return HeldOutImages(source, settings.data(data), stage.channels or 3, framing, factor)


def watched(images: HeldOutImages, total: int, task: str, bad: list[str], progress: bool) -> Iterator[HeldOutImage]:
    """Yield images with a progress bar on stderr.

    Args:
        images: The images.
        total: Their number.
        task: Name of the bar.
        bad: `name: reason` of unreadable images is appended to it.
        progress: Whether to show the bar.
    """
    with progress_bar(task, total, "image", disable=not progress) as shown:
        for item in images.items():
            if item.image is None:
                bad.append(f"{item.name}: {item.reason}")
            shown.update()
            yield item


def cpu_batch(batch_size: int, image_px: int) -> int:
    """Return the number of images of `image_px` pixels at a time on a CPU, where large feature maps are slower than
    small ones; see CPU_BATCH_PX."""
    return max(1, min(batch_size, CPU_BATCH_PX // image_px))


def batches(
    items: Iterable[HeldOutImage], batch_size: int, device: torch.device
) -> Iterator[tuple[list[HeldOutImage], Tensor]]:
    """Yield readable neighbouring images of one shape in batches.

    Args:
        items: The images.
        batch_size: Largest number of images in a batch; a CPU takes fewer large ones.
        device: Where the batches will be used.

    Yields:
        The items, and their images, (N, C, H, W) float32 in [-1, 1] on the CPU.
    """
    batch: list[HeldOutImage] = []
    for item in items:
        if item.image is None:
            continue
        height, width = item.image.shape[-2:]
        most = cpu_batch(batch_size, height * width) if device.type == "cpu" else batch_size
        if batch and (len(batch) >= most or _shape(batch[0]) != _shape(item)):
            yield batch, _stacked(batch)
            batch = []
        batch.append(item)
    if batch:
        yield batch, _stacked(batch)


def _shape(item: HeldOutImage) -> torch.Size:
    assert item.image is not None
    return item.image.shape


def _stacked(batch: Sequence[HeldOutImage]) -> Tensor:
    return torch.stack([item.image for item in batch if item.image is not None])


def refuse_infinite(latents: Tensor, names: Sequence[str], stage: FirstStage, data: str) -> None:
    """Raise UserError if latents are NaN or infinite.

    Args:
        latents: (N, c, h, w).
        names: Names of the N images.
        stage: The model that encoded them.
        data: Their location.
    """
    finite = latents.isfinite().flatten(1).all(1)
    if not finite.all():
        name = names[int(finite.int().argmin())]
        raise UserError(f"{stage.name} encodes {name} of {data} to numbers that are not finite")


def lpips_or_reason(
    net: Net | None, channels: int, side_px: int | None, device: torch.device
) -> tuple[LPIPS | None, str]:
    """Return LPIPS and an empty text, or None and the reason in plain words why there is none.

    Args:
        net: "vgg" or "alex"; None returns None without a reason.
        channels: Channels of the images.
        side_px: The shortest side, px; None if unknown.
        device: Where LPIPS goes.
    """
    if net is None:
        return None, ""
    if channels not in (1, 3):
        return None, f"LPIPS is missing: it is defined for 1 or 3 channels and the images have {channels}"
    if side_px is not None and side_px < TRUNKS[net].min_px:
        return None, f"LPIPS is missing: lpips={net} needs sides of {TRUNKS[net].min_px} px"
    try:
        return LPIPS(net).to(device), ""
    except UserError as error:
        return None, f"LPIPS is missing: {briefly(error)}"


def opened(
    job: str, model: Any, settings: JobSettings, out: str | Path | None
) -> tuple[torch.device, FirstStage, Path | None]:
    """Begin a job that runs on one process.

    The folder is made before the work, so that one that cannot be written is refused at once.

    Args:
        job: Name of the job.
        model: The model, see `evaluate`.
        settings: The job's settings.
        out: The folder of --out; None writes nothing.

    Returns:
        The device, a first stage with latents, and the folder.

    Raises:
        UserError: If the folder cannot be made, several processes were launched, or the model cannot be loaded.
    """
    folder = None if out is None else Path(out)
    if folder is not None:
        make_folder(folder)
    device = one_process(job, settings)
    return device, latent_model(job, model, settings, device), folder


def make_folder(folder: Path) -> None:
    """Make the folder of --out. Raises UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from error


@contextmanager
def written_into(folder: Path, names: Sequence[str] = ()) -> Iterator[None]:
    """Turn an OSError of a `with` block that writes into the folder of --out into a UserError.

    Args:
        folder: The folder.
        names: Files that are reported on stderr at the end of the block. A caller that shows a progress bar passes
            none and calls `say_written` after the bar.

    Raises:
        UserError: If a file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder}: {error.strerror or error}") from error
    if names:
        say_written(folder, names)


def say_written(folder: Path, names: Sequence[str]) -> None:
    """Report the written files on stderr."""
    print(f"wrote {', '.join(names)} into {folder}", file=sys.stderr)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result as indented JSON; a reader never finds a part. Raises OSError if it cannot be written."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=2), encoding="utf-8")
    part.replace(path)
