"""The command `latent-ae convert`: converts checkpoints of original repositories into diffusers folders, and back."""

import sys
from collections.abc import Sequence
from typing import Any

from latent_ae.command_line import SettingsParser, as_json, print_result
from latent_ae.config import load_settings
from latent_ae.convert.registry import LAYOUTS, WRITTEN
from latent_ae.convert.settings import ConvertSettings
from latent_ae.export.pipelines import PIPELINES
from latent_ae.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run `latent-ae convert` and return the exit code."""
    layouts = "\n".join(f"  {name:<10} {layout.title}" for name, layout in LAYOUTS.items())
    parser = SettingsParser(
        ConvertSettings,
        prog="latent-ae convert",
        description="Convert a first stage between the file of its original repository and a diffusers folder,\n"
        "offline. The architecture is read from the shapes of the tensors; the scaling of the latents is in no shape\n"
        "and is never guessed. What was written is read again and compared. A terminal gets a table, a pipe JSON.\n\n"
        f"layouts:\n{layouts}",
        examples="example: latent-ae convert vae-ft-mse-840000-ema-pruned.ckpt sd-vae scaling_factor=0.18215 "
        "shift_factor=0\n"
        "back:    latent-ae convert runs/mine vae.safetensors --to ldm\n"
        "measure: latent-ae convert vavae.pt va-vae --measure /my/photos",
    )
    parser.add_argument("source", metavar="IN", help="file (.safetensors, .ckpt, .pt, .pth) or diffusers folder")
    parser.add_argument("out", metavar="OUT", help="folder to write, or with --to a file")
    parser.add_argument("--to", choices=WRITTEN, metavar="LAYOUT", help="write a file of this layout")
    parser.add_argument("--encoder", metavar="FILE", help="the encoder, where IN holds the decoder alone")
    parser.add_argument("--statistics", metavar="FILE", help="mean and std (or var) of the latents, as tensors")
    parser.add_argument("--measure", metavar="DATA", help="measure scaling and shift on these images")
    parser.add_argument(
        "--for",
        dest="pipeline",
        choices=list(PIPELINES),
        metavar="FAMILY",
        help=f"refuse what pipelines of this family cannot use: {', '.join(PIPELINES)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on a terminal, too")
    words = parser.read(argv)
    settings = load_settings(ConvertSettings, None, words.override)

    def convert() -> dict[str, Any]:
        from latent_ae.convert.convert import convert_first_stage

        return convert_first_stage(
            words.source,
            words.out,
            settings,
            to=words.to,
            encoder=words.encoder,
            statistics=words.statistics,
            measure=words.measure,
            pipeline=words.pipeline,
        )

    as_table = sys.stdout.isatty() and not words.json
    return print_result(convert, settings.batch_size, table if as_table else as_json)


def table(result: dict[str, Any]) -> str:
    """Return a result as text for a terminal, with a line for each fact."""
    shown = list[tuple[str, str]]()
    for key, value in result.items():
        inside = {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        shown += [(name, printable(_short(inner))) for name, inner in inside.items() if inner is not None]
    width = max(len(name) for name, _ in shown)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value[:8])) + (f", ... ({len(value)})" if len(value) > 8 else "")
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
