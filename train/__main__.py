"""latent-ae train: settings, plan, then the loop."""

import os
import re
import sys

from latent_ae.command_line import SettingsParser
from latent_ae.config import UserError, load_settings, recipe_folders, to_yaml

from .settings import TrainSettings


def main(argv: list[str] | None = None) -> int:
    """Run the command `latent-ae train` and return its exit code: 0, or 75 if a signal stopped the run.

    Raises:
        UserError: If the settings are wrong, memory is short, compilation fails, or a process of the run is lost.
    """
    parser = SettingsParser(
        TrainSettings,
        prog="latent-ae train",
        description="Train a first stage. The same command again resumes from the newest checkpoint.",
        examples="example: latent-ae train quickstart data.source=/my/photos output_dir=runs/mine steps=2000",
    )
    recipes = "\n".join(f"{folder}: {', '.join(names)}" for folder, names in recipe_folders().items())
    parser.add_argument("config", help=f"a YAML file, or a recipe (docs/recipes.md)\n{recipes}")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and the plan, then stop")
    parser.add_argument(
        "--gpu",
        help="with --dry-run: the GPU for which memory is planned, by name (h100, rtx4090) or in GB; default 80",
    )
    arguments = parser.read(argv)
    settings = load_settings(TrainSettings, arguments.config, arguments.override)
    if arguments.gpu is not None and not arguments.dry_run:
        raise UserError("--gpu: is for a plan: give --dry-run, too")
    if arguments.dry_run:
        from .cost import USUAL, gpu_of
        from .plan import describe_plan

        gpu = gpu_of(arguments.gpu or USUAL)
        print(to_yaml(settings))
        print(describe_plan(settings, gpu))
        return 0
    if os.environ.get("RANK", "0") == "0":
        for warning in settings.warnings():
            print(f"warning: {warning}", file=sys.stderr)
    import torch
    from torch._dynamo.exc import TorchDynamoException

    from .agreement import lost_process
    from .loop import train
    from .signals import EXIT_CODE, Stopped

    try:
        train(settings)
    except Stopped:
        return EXIT_CODE
    except torch.OutOfMemoryError as error:
        size = "" if settings.phases else f" with micro_batch_size {settings.micro_batch}"
        raise UserError(
            f"out of memory{size}: halve micro_batch_size; the batch stays the same, "
            f"it is then accumulated ({str(error).splitlines()[0]})"
        ) from error
    except TorchDynamoException as error:  # for example no C++ compiler
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"compile: torch.compile does not work here: {reason}. Set compile=false") from error
    except RuntimeError as error:
        if settings.processes == 1 or not re.search("closed by peer|reset by peer|Broken pipe", str(error)):
            raise
        raise UserError(lost_process()) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
