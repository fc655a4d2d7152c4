"""What the commands of `latent-ae eval MODEL DATA` have in common: their words, and how their result ends on stdout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from latent_ae.command_line import SettingsParser, print_result
from latent_ae.config import Settings, load_settings, own_key

__all__ = ["Words", "default_folder", "print_result", "read_words"]

Kind = TypeVar("Kind", bound=Settings)


@dataclass(frozen=True)
class Words(Generic[Kind]):
    """The command line of one question asked of a first stage."""

    model: str
    data: str
    """Empty where there is none."""
    settings: Kind
    out: Path
    """Folder for files; made by whoever writes into it."""


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
    parser = SettingsParser(settings, prog=f"latent-ae eval {command}", description=description, examples=examples)
    parser.add_argument("model", help="folder or hub id of a first stage of diffusers, or a run or checkpoint")
    where = "photos, a folder of images, Parquet or WebDataset files, or a hub id"
    parser.add_argument("data", nargs=None if needs_data else "?", default="", help=where)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help=f"where files go; default: {command}-NAME in this folder"
    )
    words = parser.read(argv)
    if not needs_data and own_key(settings, words.data.partition("=")[0]) in settings.model_fields:
        words.data, words.override = "", [words.data, *words.override]
    chosen = load_settings(settings, None, words.override)
    return Words(words.model, words.data, chosen, words.out or default_folder(command, words.model))


def default_folder(command: str, model: str) -> Path:
    """`COMMAND-NAME` after the model; an export or a pipeline's vae is named by the folder that holds it."""
    path = Path(model.rstrip("/")) if not Path(model).exists() else Path(model).resolve()
    # a run may be called vae, too
    inside = path.name == "export" or (path.name == "vae" and (path.parent / "model_index.json").exists())
    return Path(f"{command}-{path.parent.name if inside and path.parent.name else path.name}")
