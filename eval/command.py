"""What the commands of `latent-ae eval MODEL DATA` have in common: their words, and how their result ends on stdout."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from latent_ae import command_line
from latent_ae.config import Settings, load_settings, own_key
from latent_ae.text import printable
from latent_ae_eval.labels import short_name

Kind = TypeVar("Kind", bound=Settings)
Shown = Callable[[Mapping[str, Any]], str]
"""A result -> what a terminal shows of it."""


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


def read_words(
    command: str,
    settings: type[Kind],
    argv: Sequence[str],
    *,
    description: str,
    examples: str,
    needs_data: bool = True,
) -> Words[Kind]:
    """Reads `MODEL DATA [key=value ...] [--out DIR]`; exits or raises UserError when it makes no sense.

    Without `needs_data`, DATA may be left out.
    """
    parser = command_line.SettingsParser(
        settings, prog=f"latent-ae eval {command}", description=description, examples=examples
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
