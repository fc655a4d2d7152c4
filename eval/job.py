"""The base of evaluation jobs: their settings and command line, `evaluate` for all of them, and printing of results."""

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from latent_ae import command_line
from latent_ae.config import Settings, UserError, changed_settings, close_word, load_settings, own_key
from latent_ae.metrics.labels import number, pair, short_name, value_at
from latent_ae.text import printable

JOBS = (
    *("recon", "latents", "interpolate", "probe", "anomaly", "likelihood", "sample", "factors", "ifid", "text"),
    "diffusion",
)
"""Packages with a `JOB`. `eval compare` is none of them, because it takes results instead of a model."""
Figures = dict[tuple[str, str], tuple[float, tuple[float, float] | None]]
"""Numbers of a result that are compared between models, each with its 95 % interval if it has one. A key holds what was
measured (a kind of latent, a set of images; empty if there is only one) and the metric, which `label_of` names."""
Kind = TypeVar("Kind", bound=Settings)
Shown = Callable[[Mapping[str, Any]], str]
"""Returns the text that a terminal shows of a result."""


def measured_figures(result: Mapping[str, Any], parts: Sequence[str] | None = None) -> Figures:
    """Return the figures of a result with the sections `metrics` and `intervals`, which hold parts with metrics.

    Args:
        result: The result.
        parts: Those that count; None takes all.
    """
    figures: Figures = {}
    for part, metrics in result["metrics"].items():
        if parts is not None and part not in parts:
            continue
        intervals = (result.get("intervals") or {}).get(part) or {}
        for metric, value in (metrics or {}).items():
            if metric not in ("n", "reference_images") and (known := number(value)) is not None:
                figures[part, metric] = known, pair(intervals.get(metric))
    return figures


def figures_at(result: Mapping[str, Any], places: Mapping[str, str], part: str = "") -> Figures:
    """Return the figures at dotted paths of a result, without intervals; those that it lacks are left out.

    Args:
        result: The result, or a section of it.
        places: Paths such as `health.effective_rank`, by metric.
        part: What was measured.
    """
    figures: Figures = {}
    for metric, path in places.items():
        if (known := number(value_at(result, *path.split(".")))) is not None:
            figures[part, metric] = known, None
    return figures


@dataclass(frozen=True)
class Job:
    """One question to a finished first stage, in the package `latent_ae_eval.NAME`."""

    name: str
    settings: type[Settings]
    measure: str
    """Function in the package's module `measure`: (model, data, settings=..., out=..., progress=...) -> result."""
    text: str
    """Function in its module `report`: result -> text for a terminal."""
    format: str
    """The format that its results state."""
    description: str
    examples: str
    figures: Callable[[Mapping[str, Any]], Figures] = measured_figures
    """Returns what `eval compare` compares of a result."""
    images: str = ""
    """Table in the folder of a result with a row for each image: its digest, and its values of figures. Two results are
    then compared image by image."""
    image_column: str = "{part}_{metric}"
    """Column of a figure's values in that table; without a part there is no underscore in front."""
    needs_data: bool = True
    batch_key: str = "batch_size"
    """Setting to lower if memory is too small."""
    incidental: tuple[str, ...] = ("batch_size",)
    """Settings in which compared results may differ, besides those of every evaluation: see `eval compare`."""
    conditions: tuple[str, ...] = ()
    """Further sections of a result, as dotted paths, in which compared results must agree."""
    on_command_line: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of `measure` when it is called from the command line."""

    def function(self, module: str, name: str) -> Callable[..., Any]:
        """Return a function of the package; this imports its module, which may be slow."""
        function: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{self.name}.{module}"), name)
        return function

    def main(self, argv: Sequence[str]) -> int:
        """Run the command `latent-ae eval NAME` and return its exit code. Raises UserError like `evaluate`."""
        words = read_words(self, argv)
        compute, shown = self.function("measure", self.measure), self.function("report", self.text)
        preset = getattr(words.settings, "chosen", None)  # only settings with presets have this method
        batch_size = preset(self.batch_key) if preset else getattr(words.settings, self.batch_key)
        return print_result(
            words,
            lambda: compute(
                words.model,
                words.data or None,
                settings=words.settings,
                out=words.out,
                progress=True,
                **self.on_command_line,
            ),
            batch_size,
            shown,
        )


def job_of(name: str) -> Job:
    """Return the job of a name. Raises UserError, with the nearest name, if there is none."""
    if name not in JOBS:
        close = close_word(name, list(JOBS))
        raise UserError(f"no such evaluation: {name}{f'; did you mean {close}?' if close else ''} ({', '.join(JOBS)})")
    job: Job = importlib.import_module(f"{__package__}.{name}").JOB
    return job


def evaluate(
    name: str,
    model: Any,
    data: str | Path | None = None,
    settings: Any = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluate a finished first stage, like `latent-ae eval NAME MODEL DATA`.

    Args:
        name: One of `JOBS`.
        model: Run, checkpoint, diffusers folder, hub id, or an instance of a first stage; `recon`, `text`
            and `anomaly` also take a function from NCHW images in [-1, 1] to their reconstructions.
        data: `photos`, a folder of images, Parquet, Arrow or WebDataset files, or a hub id. `sample`
            and `text` need none.
        settings: The job's settings; None takes the defaults.
        out: Folder for result.json, the report and pictures; None writes nothing.
        progress: Show progress bars on stderr.
        **changes: Single settings by name that replace those in `settings`: `limit=100`.

    Returns:
        The content of result.json, JSON-ready.

    Raises:
        UserError: If the job or a setting is unknown, model or data cannot be loaded, or they do not fit the job.
    """
    job = job_of(name)
    if settings is not None and not isinstance(settings, job.settings):
        raise UserError(f"eval {name} takes {job.settings.__name__}, not {type(settings).__name__}")
    settings = changed_settings(job.settings() if settings is None else settings, changes)
    result: dict[str, Any] = job.function("measure", job.measure)(
        model, data, settings=settings, out=out, progress=progress
    )
    return result


@dataclass(frozen=True)
class Words(Generic[Kind]):
    """The parsed command line of an evaluation."""

    model: str
    data: str
    """Empty if there is none."""
    settings: Kind
    out: Path
    """Folder for files; it is made by the function that writes into it."""
    json: bool
    """Whether to print JSON on a terminal, too."""


def read_words(job: Job, argv: Sequence[str]) -> Words[Any]:
    """Parse `MODEL DATA [key=value ...] [--out DIR]`; exits the process if the words are not understood.

    Args:
        job: The job. DATA may be left out if it has no `needs_data`.
        argv: The words.

    Raises:
        UserError: If the settings are wrong.
    """
    command, settings, needs_data = job.name, job.settings, job.needs_data
    parser = command_line.SettingsParser(
        settings, prog=f"latent-ae eval {command}", description=job.description, examples=job.examples
    )
    parser.add_argument("model", help="folder or hub id of a first stage of diffusers, or a run or checkpoint")
    where = "photos, a folder of images, Parquet or WebDataset files, or a hub id"
    parser.add_argument("data", nargs=None if needs_data else "?", default="", help=where)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help=f"folder for files; default: {command}-NAME in this folder"
    )
    add_json(parser)
    words = parser.read(argv)
    if (
        not needs_data
        and "=" in words.data
        and own_key(settings, words.data.partition("=")[0]) in settings.model_fields
    ):
        words.data, words.override = "", [words.data, *words.override]
    chosen = load_settings(settings, None, words.override)
    return Words(
        words.model, words.data, chosen, words.out or default_folder(command, words.model, words.data), words.json
    )


def default_folder(command: str, model: str, data: str) -> Path:
    """Return `COMMAND-NAME` after the model, with a number if a result of another model or other data is there.

    An export or a pipeline's vae is named after the folder that holds it.
    """
    path = Path(model.rstrip("/")) if not Path(model).exists() else Path(model).resolve()
    # a run may be called vae, too
    inside = path.name == "export" or (path.name == "vae" and (path.parent / "model_index.json").exists())
    name = f"{command}-{path.parent.name if inside and path.parent.name else path.name}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in map(Path, names) if not _is_of_others(folder, model, data))


def _is_of_others(folder: Path, model: str, data: str) -> bool:
    """Return whether the folder holds the result of another model or of other data."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        locations = [str(result[part].get("location") or "") for part in ("model", "data")]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return [_place(location) for location in locations] != [_place(model), _place(data)]


def _place(location: str) -> str:
    """Return a location as it is compared: the same folder may be written in several ways."""
    path = Path(location).expanduser()
    return str(path.resolve()) if location and path.exists() else location.rstrip("/")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json to a parser."""
    parser.add_argument("--json", action="store_true", help="print JSON on a terminal, too, as into a pipe or a file")


def shows_table(json: bool) -> bool:
    """Return whether stdout gets a table for people: on a terminal, unless `json` requests the whole result."""
    return sys.stdout.isatty() and not json


def print_result(words: Words[Any], compute: Callable[[], dict[str, Any]], batch_size: int, shown: Shown) -> int:
    """Compute a result and print it: on a terminal as a table, elsewhere as JSON.

    If `compute` fails, folders of `words.out` that this call made are removed again if they are empty.

    Args:
        words: The parsed command line.
        compute: Returns the result.
        batch_size: Named in the message if memory is too small.
        shown: Returns the table of a result.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If the device has too little memory, or `compute` raises it.
    """

    def as_table(result: dict[str, Any]) -> str:
        model, data = result["model"], result.get("data") or {}
        of = short_name(data.get("location"))
        title = short_name(model.get("location"), str(model.get("class"))) + (f" on {of}" if of else "")
        notes = [f"note: {note}" for note in result.get("notes") or ()]
        text = "\n".join([title, "", shown(result), *([""] if notes else []), *notes])
        return for_stdout(text)

    made = [folder for folder in (words.out, *words.out.parents) if not folder.exists()]
    try:
        return command_line.print_result(
            compute, batch_size, as_table if shows_table(words.json) else command_line.as_json
        )
    except BaseException:
        with suppress(OSError):  # folders that are not empty stay
            for folder in made:
                folder.rmdir()
        raise


def for_stdout(text: str) -> str:
    """Return the text with characters replaced that the encoding of stdout lacks, and control characters escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text, lines=True).encode(encoding, "backslashreplace").decode(encoding)
