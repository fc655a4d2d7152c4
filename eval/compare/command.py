"""latent-ae eval compare: compares results of evaluations."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from latent_ae_eval.job import add_json, for_stdout, shows_table

DESCRIPTION = """\
Compare measured first stages with the first of them: differences, their 95 % intervals, and whether they are more than
chance; quality against speed, size and predictions of samples. Takes results of any evaluations, of which those of the
same weights belong together. A terminal gets a table, a pipe JSON; comparison.json and comparison.html are written into
a folder. Results of different protocols, settings, data, N or seeds are refused."""


def main(argv: Sequence[str]) -> int:
    """Run the command `latent-ae eval compare` and return its exit code. Raises UserError like `compare`."""
    parser = argparse.ArgumentParser(
        prog="latent-ae eval compare",
        description=DESCRIPTION,
        epilog="example: latent-ae eval compare recon-ours recon-theirs/result.json --out ours-or-theirs\n"
        "with all evaluations of each: latent-ae eval compare ours/* theirs/*",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULT", help="a result.json, or the folder that holds one")
    parser.add_argument(
        "--anyway", action="store_true", help="also compare results that were not measured in the same way"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("compare"), help="folder for files; default: compare"
    )
    add_json(parser)
    words = parser.parse_intermixed_args(argv)

    from latent_ae_eval.compare.measure import compare
    from latent_ae_eval.compare.report import comparison_text

    comparison = compare(words.results, anyway=words.anyway, out=words.out)
    print(f"wrote {words.out / 'comparison.json'} and {words.out / 'comparison.html'}", file=sys.stderr)
    text = for_stdout(comparison_text(comparison))
    if shows_table(words.json):
        print(text)
    else:
        print(text, file=sys.stderr)
        print(json.dumps(comparison, indent=2))
    return 0
