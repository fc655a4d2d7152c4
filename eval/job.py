"""What an evaluation job is: its settings and words, `evaluate` for all of them, and how results end on stdout."""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from latent_ae import command_line
from latent_ae.config import Settings, UserError, changed_settings, close_word, load_settings, own_key
from latent_ae.metrics.labels import short_name
from latent_ae.text import printable

JOBS = ("recon", "latents", "interpolate", "probe", "anomaly", "likelihood", "sample", "factors", "diffusion")
"""Each is a package with a `JOB`; `eval compare` takes results instead of a model and is apart."""
RECONSTRUCTION_FORMAT = "latent-ae reconstruction 1"
"""What a result of `eval recon` calls itself, and `eval compare` asks for."""
Kind = TypeVar("Kind", bound=Settings)
Shown = Callable[[Mapping[str, Any]], str]
"""A result -> what a terminal shows of it."""


@dataclass(frozen=True)
class Job:
    """One question to a finished first stage, in the package `latent_ae_eval.NAME`."""

    name: str
    settings: type[Settings]
    measure: str
    """Function of the package's module `measure`: (model, data, settings=..., out=..., progress=...) -> result."""
    text: str
    """Function of its module `report`: result -> what a terminal shows."""
    description: str
    examples: str
    needs_data: bool = True
    batch_key: str = "batch_size"
    """Setting to lower where memory is too small."""
    on_command_line: Mapping[str, Any] = field(default_factory=dict)
    """What else `measure` is given there."""

    def function(self, module: str, name: str) -> Callable[..., Any]:
        """A function of the package; its heavy imports happen here."""
        found: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{self.name}.{module}"), name)
        return found

    def main(self, argv: Sequence[str]) -> int:
        """The command `latent-ae eval NAME`. Returns the exit code."""
        words = read_words(self, argv)
        compute, shown = self.function("measure", self.measure), self.function("report", self.text)
        preset = getattr(words.settings, "chosen", None)  # settings with presets
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
    """The job of that name. Raises UserError, with the nearest name, where there is none."""
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
    """Asks one question of a finished first stage, as `latent-ae eval NAME MODEL DATA` does.

    Args:
        name: One of `JOBS`.
        model: Run, checkpoint, diffusers folder, hub id, or an instance of a first stage; `recon` and `anomaly` also
            take a function from NCHW images in [-1, 1] to their reconstructions.
        data: `photos`, a folder of images, Parquet, Arrow or WebDataset files, or a hub id. `sample` needs none.
        settings: The job's settings; None takes its defaults.
        out: Folder for result.json, the report and pictures; None writes nothing.
        progress: Show bars on stderr.
        **changes: Single settings by name, in place of those of `settings`: `limit=100`.

    Returns:
        What result.json holds, JSON-ready.

    Raises:
        UserError: For an unknown job or setting, what cannot be loaded, and what the job refuses.
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
    """The command line of one question asked of a first stage."""

    model: str
    data: str
    """Empty where there is none."""
    settings: Kind
    out: Path
    """Folder for files; made by whoever writes into it."""
    json: bool
    """Print JSON on a terminal, too."""


def read_words(job: Job, argv: Sequence[str]) -> Words[Any]:
    """Reads `MODEL DATA [key=value ...] [--out DIR]`; exits or raises UserError when it makes no sense.

    Without the job's `needs_data`, DATA may be left out.
    """
    command, settings, needs_data = job.name, job.settings, job.needs_data
    parser = command_line.SettingsParser(
        settings, prog=f"latent-ae eval {command}", description=job.description, examples=job.examples
    )
    parser.add_argument("model", help="folder or hub id of a first stage of diffusers, or a run or checkpoint")
    where = "photos, a folder of images, Parquet or WebDataset files, or a hub id"
    parser.add_argument("data", nargs=None if needs_data else "?", default="", help=where)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help=f"where files go; default: {command}-NAME in this folder"
    )
    add_json(parser)
    words = parser.read(argv)
    if not needs_data and own_key(settings, words.data.partition("=")[0]) in settings.model_fields:
        words.data, words.override = "", [words.data, *words.override]
    chosen = load_settings(settings, None, words.override)
    return Words(words.model, words.data, chosen, words.out or default_folder(command, words.model), words.json)


def default_folder(command: str, model: str) -> Path:
    """`COMMAND-NAME` after the model; an export or a pipeline's vae is named by the folder that holds it."""
    path = Path(model.rstrip("/")) if not Path(model).exists() else Path(model).resolve()
    # a run may be called vae, too
    inside = path.name == "export" or (path.name == "vae" and (path.parent / "model_index.json").exists())
    return Path(f"{command}-{path.parent.name if inside and path.parent.name else path.name}")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on a terminal, too, as into a pipe or a file")


def shows_table(json: bool) -> bool:
    """Whether stdout gets a table for people: on a terminal, where `json` does not ask for the whole result."""
    return sys.stdout.isatty() and not json


def print_result(words: Words[Any], compute: Callable[[], dict[str, Any]], batch_size: int, shown: Shown) -> int:
    """Prints what `compute` gives: on a terminal as `shown` makes it, elsewhere as JSON; returns the exit code.

    A folder of `words.out` that this call made and left empty, because something was refused, is taken away again.
    Raises UserError when the device's memory is too small for `batch_size`.
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
        with suppress(OSError):  # what holds anything stays
            for folder in made:
                folder.rmdir()
        raise


def for_stdout(text: str) -> str:
    """The text as a terminal of few characters can show it."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text, lines=True).encode(encoding, "replace").decode(encoding)
