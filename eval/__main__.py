"""latent-ae eval: one subcommand per question. Settings are checked before anything heavy is imported."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from latent_ae.config import UserError, load_settings

from .config import ReconSettings


def main(argv: list[str] | None = None) -> int:
    """The command `latent-ae eval`."""
    parser = argparse.ArgumentParser(
        prog="latent-ae eval",
        description="Measure a finished first stage.",
        epilog="example: latent-ae eval recon runs/quickstart/export photos",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    recon = commands.add_parser(
        "recon",
        help="how near reconstructions come to their images: FID, KID, LPIPS, PSNR, SSIM, MS-SSIM",
        description="Measure reconstructions of the posterior's mean and of a sample, overall with intervals and per\n"
        "image, by a named protocol, beside bicubic resampling. JSON goes to stdout; result.json, images.parquet,\n"
        "report.html and pairs.png into a folder. A run that was killed goes on when started again.",
        epilog="example: latent-ae eval recon runs/quickstart/export photos\n"
        "as VA-VAE measures: latent-ae eval recon MODEL /data/imagenet/val protocol=vavae\n"
        "on many GPUs: accelerate launch -m latent_ae eval recon MODEL DATA",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recon.add_argument("model", help="folder or hub id of a first stage of diffusers, or a run or checkpoint")
    recon.add_argument("data", help="photos, a folder of images, Parquet or WebDataset files, or a hub id")
    recon.add_argument(
        "override", nargs="*", metavar="key=value", help=f"changes a setting: {', '.join(ReconSettings.model_fields)}"
    )
    recon.add_argument("--out", metavar="DIR", type=Path, help="where files go; default: recon-NAME in this folder")
    _add_compare(commands)
    arguments, rest = parser.parse_known_args(argv)
    # key=value words after an option are left over by argparse
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command == "compare":
        return _compare(arguments.results + rest, arguments.anyway, arguments.out)
    return _recon(arguments.model, arguments.data, arguments.override + rest, arguments.out)


def _recon(model: str, data: str, overrides: list[str], out: Path | None) -> int:
    settings = load_settings(ReconSettings, None, overrides)

    import torch
    from accelerate import PartialState

    from .recon import default_folder, evaluate_reconstruction

    try:
        out = out or default_folder(model)
        result = evaluate_reconstruction(model, data, settings, out=out, progress=True, rows=False)
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"out of memory with batch_size {settings.batch_size}: lower batch_size or crop_px ({first_line})"
        ) from error
    if PartialState().is_main_process:
        print(json.dumps(result, indent=2))
    PartialState().destroy_process_group()
    return 0


def _add_compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare",
        help="which of several measured first stages is better, beyond chance",
        description="Compare results of `eval recon` with the first of them: differences, their 95 % intervals, and\n"
        "whether they are more than chance. JSON goes to stdout, a table to stderr; comparison.json and\n"
        "comparison.html go into a folder. Results of different protocols, data, N or seeds are refused.",
        epilog="example: latent-ae eval compare recon-ours recon-theirs/result.json --out ours-or-theirs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("results", nargs="+", metavar="RESULT", help="a result.json, or the folder that holds one")
    command.add_argument("--anyway", action="store_true", help="compare what was not measured in the same way, too")
    command.add_argument("--out", metavar="DIR", type=Path, help="where files go; default: compare in this folder")


def _compare(results: list[str], anyway: bool, out: Path | None) -> int:
    from .compare import compare
    from .compare_page import comparison_text

    out = out or Path("compare")
    comparison = compare(results, anyway=anyway, out=out)
    print(comparison_text(comparison), file=sys.stderr)
    print(f"wrote {out / 'comparison.json'} and {out / 'comparison.html'}", file=sys.stderr)
    print(json.dumps(comparison, indent=2))
    return 0


if __name__ == "__main__":
    from latent_ae.__main__ import main as door

    sys.exit(door(["eval", *sys.argv[1:]]))
