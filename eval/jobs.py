"""What the jobs have in common: one process, a model, images of one shape at a time, LPIPS where it can be had."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.held_out import Framing, HeldOutImage, HeldOutImages
from latent_ae.data.sources import ImageSource
from latent_ae.models.loading import CPU_BATCH_PX, FirstStage
from latent_ae.pretrained.lpips import LPIPS, TRUNKS, Net
from latent_ae.pretrained.weights import briefly
from latent_ae.progress import progress_bar
from latent_ae_eval.inputs import checked_factor, opened_model, processes
from latent_ae_eval.settings import JobSettings

PROCESS_COUNTS = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
"""Where accelerate's, PyTorch's and MPI's launchers say how many processes they start."""


def one_process(job: str, settings: JobSettings) -> torch.device:
    """The device. Raises UserError where several processes were launched."""
    launched = get_int_from_env(PROCESS_COUNTS, 1)
    if launched > 1:
        raise UserError(
            f"eval {job} runs on one process, and {launched} were launched; "
            f"start it without accelerate launch: latent-ae eval {job} ..."
        )
    return processes(settings)[1]


def latent_model(job: str, model: Any, settings: JobSettings, device: torch.device) -> FirstStage:
    """A first stage whose latents can be had. Raises UserError for a plain function of images."""
    stage = opened_model(model, settings, device)
    if stage.module is None:
        raise UserError(f"eval {job} needs latents, and the function {stage.name} has none; give a first stage")
    return stage


def images_for(stage: FirstStage, source: ImageSource, settings: JobSettings, data: str) -> HeldOutImages:
    """The source's images, framed as the settings say and with sides that the model's factor divides."""
    factor = checked_factor(stage, settings.crop_px)
    framing = Framing(settings.resize_px, settings.crop_px)
    return HeldOutImages(source, settings.data(data), stage.channels or 3, framing, factor)


def watched(images: HeldOutImages, total: int, task: str, bad: list[str], progress: bool) -> Iterator[HeldOutImage]:
    """The images, with a bar on stderr; names of those that could not be read go into `bad`, with the reason."""
    with progress_bar(task, total, "image", disable=not progress) as shown:
        for item in images.items():
            if item.image is None:
                bad.append(f"{item.name}: {item.reason}")
            shown.update()
            yield item


def cpu_batch(batch_size: int, image_px: int) -> int:
    """Images at a time on a CPU, where large feature maps are slower than small ones; see CPU_BATCH_PX."""
    return max(1, min(batch_size, CPU_BATCH_PX // image_px))


def batches(
    items: Iterable[HeldOutImage], batch_size: int, device: torch.device
) -> Iterator[tuple[list[HeldOutImage], Tensor]]:
    """Readable neighbours of one shape, at most `batch_size` at a time, and their images as NCHW in [-1, 1].

    The images are on the CPU; `device` is where they will go.
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


def lpips_or_reason(
    net: Net | None, channels: int, side_px: int | None, device: torch.device
) -> tuple[LPIPS | None, str]:
    """LPIPS, or in plain words why there is none; `side_px`: the shortest side, where it is known."""
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
    """What every job of one process begins with: the device, a first stage with latents, and the folder of `out`.

    The folder is made before the work, so that one that cannot be written costs no waiting.
    """
    folder = None if out is None else Path(out)
    if folder is not None:
        make_folder(folder)
    device = one_process(job, settings)
    return device, latent_model(job, model, settings, device), folder


def make_folder(folder: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from error


@contextmanager
def written_into(folder: Path, names: Sequence[str] = ()) -> Iterator[None]:
    """A block that writes the files `names` into the folder of --out; then says so. Raises UserError where it fails.

    Without names nothing is said: below a progress bar `say_written` comes after it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder}: {error.strerror or error}") from error
    if names:
        say_written(folder, names)


def say_written(folder: Path, names: Sequence[str]) -> None:
    """Names on stderr what was written."""
    print(f"wrote {', '.join(names)} into {folder}", file=sys.stderr)


def write_json(path: Path, result: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=2), encoding="utf-8")
    part.replace(path)
