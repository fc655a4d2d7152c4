"""latent-ae data check: reads every image once and reports what is wrong."""

import json
import sys
from collections.abc import Sequence

from latent_ae.command_line import SettingsParser
from latent_ae.config import UserError, close_word, load_settings
from latent_ae.data.settings import CheckSettings, without_section
from latent_ae.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run `latent-ae data check DATA`: JSON on stdout, a summary on stderr.

    Raises:
        UserError: If the words are not understood, there is no such data, or training would stop at these files.
    """
    parser = SettingsParser(
        CheckSettings,
        prog="latent-ae data",
        description="Reads every image once, in parallel, as training would: counts, sizes, kinds, duplicates, and\n"
        "every file that would be skipped with the reason. Findings go to stdout as JSON, a summary to stderr.",
        examples="example: latent-ae data check /my/photos resolution=256 max_bad_fraction=0.001",
    )
    parser.add_argument("action", metavar="check")
    parser.add_argument("data", help="photos, a folder of images, Parquet or WebDataset files, or a hub id")
    words = parser.read(argv)
    if words.action != "check":
        hint = "; did you mean check?" if close_word(words.action, ["check"]) else ""
        raise UserError(f"no such action: {words.action}{hint} (latent-ae data check DATA)")
    settings = load_settings(CheckSettings, None, words.override)

    from latent_ae.data.check import check, summary, wrong_channels
    from latent_ae.distributed import refuse_several_processes

    refuse_several_processes("data check")
    result = check(words.data, settings, channels=settings.channels, progress=True)
    print(printable(without_section(summary(result)), lines=True), file=sys.stderr)
    print(json.dumps(result, indent=2))
    if result["skipped_fraction"] > result["max_bad_fraction"] or not result["num_readable"]:
        wrong = wrong_channels(result["skipped"])
        advice = "mend or remove them, or raise max_bad_fraction"
        if wrong.total() == len(result["skipped"]):
            advice = f"give {' or '.join(f'channels={has}' for has, _ in wrong)}"
        raise UserError(f"{words.data}: training would stop at these files; {advice}")
    return 0
