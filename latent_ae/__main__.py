"""The command `latent-ae`: finds a subcommand by its name and imports its package only then."""

import importlib
import io
import os
import sys
from typing import NamedTuple

from latent_ae.config import ToldElsewhere, UserError, close_word
from latent_ae.data.settings import without_section
from latent_ae.files import ADVICE, TROUBLE
from latent_ae.text import printable


class Command(NamedTuple):
    """A subcommand."""

    module: str
    """Module whose `main` takes the words and returns an exit code."""
    summary: str
    """A line of the usage text."""


COMMANDS = {
    "train": Command("latent_ae_train.__main__", "train a first stage; the same command again resumes it"),
    "export": Command("latent_ae_train.export", "write a run's weights as a diffusers folder"),
    "eval": Command("latent_ae_eval.__main__", "measure a finished first stage"),
    "encode": Command("latent_ae.latents.command", "write the latents of a data set into files, to train on them"),
    "convert": Command("latent_ae.convert.command", "turn an original checkpoint into a diffusers folder, or back"),
    "data": Command("latent_ae.data.command", "read every image of a source once and report what is wrong"),
    "weights": Command("latent_ae.pretrained.weights", "fetch the pretrained weights that LPIPS and FID need"),
}


def usage() -> str:
    """Return the usage text with a line for each command."""
    lines = [f"  {name:<8} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: latent-ae COMMAND ...",
            "",
            *lines,
            "",
            "latent-ae COMMAND --help says more. Example: latent-ae train quickstart",
            "On many GPUs: accelerate launch --multi_gpu --num_processes 8 -m latent_ae COMMAND ...",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0; 2 for a user's mistake; 75 for a stopped run; 130 if interrupted.

    A UserError is printed without a traceback; any other exception is a bug and keeps its traceback.
    """
    words = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may have letters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from latent_ae import __version__

        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        close = close_word(words[0], list(COMMANDS))
        hint = f"; did you mean {close}?" if close else ""
        print(f"latent-ae: no such command: {printable(words[0])}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        code = importlib.import_module(COMMANDS[words[0]].module).main(words[1:])
        sys.stdout.flush()  # the disk to which results are redirected may be full
    except ToldElsewhere:
        return 2
    except UserError as error:
        text = str(error) if words[0] in ("train", "export") else without_section(str(error))
        print(f"latent-ae {words[0]}: {printable(text, lines=True)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"latent-ae {words[0]}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the results has ended, as in `latent-ae ... | head`
        _close_stdout()
        return 0
    except OSError as error:
        if error.errno not in TROUBLE:
            raise
        place = printable(str(error.filename or "what it writes"))
        print(f"latent-ae {words[0]}: {place}: {error.strerror}. {ADVICE}", file=sys.stderr)
        _close_stdout()
        return 2
    return int(code or 0)


def _close_stdout() -> None:
    """Discard unwritten output, so that the interpreter does not try again, with another error, when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_the_others() -> None:
    """End gloo's threads, wherever the command stopped: the interpreter aborts at exit if they still run.

    See pytorch/pytorch#190489. An NCCL group is not ended, because that waits for processes that may be gone.
    """
    distributed = sys.modules.get("torch.distributed")
    started = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if distributed is not None and started and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


if __name__ == "__main__":
    code = main()
    _leave_the_others()
    sys.exit(code)
