"""Opens the processes, model and images of an evaluation, with errors that name the setting."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from latent_ae.config import UserError
from latent_ae.data.loader import ImageSource, open_images, stop_if_too_many_bad
from latent_ae.data.sources import part_of
from latent_ae.distributed import processes as open_processes
from latent_ae.models.loading import FirstStage, load
from latent_ae.text import printable
from latent_ae_eval.settings import QuestionSettings

GENERATION_FILES = (".npz", ".pt", ".pkl")


def refuse_generation_files(data: str) -> None:
    """Raise UserError if `data` is a reference file of generation benchmarks instead of images."""
    if Path(data).suffix.lower() in GENERATION_FILES:
        raise UserError(
            f"{data} is a reference file of generation benchmarks: images or statistics of another set, cropped "
            "differently. A reconstruction FID compares each reconstruction with its own original; "
            "give the images themselves, for example the folder of a validation set"
        )


def processes(settings: QuestionSettings) -> tuple[PartialState, torch.device]:
    """Return the distributed state (of one process, if none were launched) and this process's device."""
    return open_processes(settings.device)


def opened_model(model: Any, settings: QuestionSettings, device: torch.device) -> FirstStage:
    """Load a model (see `models.loading.load`) as the settings say. Raises UserError if it cannot be loaded."""
    return load(model, device=device, dtype=settings.dtype, **settings.place)


def checked_factor(stage: FirstStage, crop_px: int | None) -> int:
    """Return the model's downsampling factor. Raises UserError if `crop_px` is not a multiple of it."""
    if crop_px is not None and crop_px % stage.factor:
        near = max(1, crop_px // stage.factor) * stage.factor
        raise UserError(f"crop_px: {crop_px} is not a multiple of the model's factor {stage.factor}; use {near}")
    return stage.factor


def opened_data(data: str, settings: QuestionSettings) -> tuple[ImageSource, dict[str, Any]]:
    """Open the images of an evaluation, at most `limit` of them.

    Args:
        data: `photos`, a folder of images, table files, or a hub id.
        settings: The split, the limit and how images are read.

    Returns:
        The images, and how results describe their choice (see `sources.part_of`).

    Raises:
        UserError: If the data cannot be opened.
    """
    try:
        source = open_images(settings.data(data), "held_out")
    except UserError as error:
        # the settings of evaluations have other names than those of training
        message = str(error).replace("data.eval_source", "DATA").replace("data.eval_split", "split")
        raise UserError(message.replace("data.", "")) from error
    return part_of(source, settings.limit, settings.seed)


def stream_notes(choice: Mapping[str, Any]) -> list[str]:
    """Return a note on a limited stream, in a list; an empty list for any other choice."""
    if choice["method"] != "first":
        return []
    return [
        f"a stream is read from its start: these are its first {choice['number']:,} images, not spread over all of it; "
        "if its rows are sorted, for example by class, set streaming=false"
    ]


def report_skipped(skipped: list[str], num_read: int, settings: QuestionSettings, *, shows: bool = True) -> None:
    """Print the unreadable images on stderr.

    Args:
        skipped: `name: reason` of each unreadable image.
        num_read: Number of readable images.
        settings: Holds the accepted fraction.
        shows: Whether this process prints.

    Raises:
        UserError: If too many images were unreadable.
    """
    total = num_read + len(skipped)
    bound = settings.max_bad_fraction
    try:
        stop_if_too_many_bad(len(skipped), total, skipped, num_images=total, max_bad_fraction=bound)
    except UserError as error:
        raise UserError(str(error).replace("data.", "", 1)) from error
    if skipped and shows:
        named = "\n  ".join(map(printable, skipped))
        print(f"skipped {len(skipped)} of {total} images:\n  {named}", file=sys.stderr)
