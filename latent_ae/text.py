"""Text for people: that of strangers (names of files and data sets) made safe for a terminal, a page and a log, and
which images a figure is of."""

import re
from collections.abc import Mapping
from typing import Any

# C0 and C1 controls (terminals obey them), direction overrides and line separators (they make text look like another),
# surrogates (no file can hold them); line feeds and tabs apart
_LINE = re.compile("[\t\n]")
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""The text with characters that are obeyed instead of shown, or that no file can hold, as `\x1b` or `\u202e`.

    A name is one line; of a text of many `lines` the line feeds and tabs stay.
    """
    text = _OBEYED.sub(_shown, text)
    return text if lines else _LINE.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def choice_in_words(facts: Mapping[str, Any] | None) -> str:
    """Which images were chosen, for a person; None is a choice that was not recorded."""
    if not facts:
        return "a choice that is not recorded"
    number, size = facts["number"], facts["of"]
    if facts["method"] == "first":
        return f"the first {number:,} images of a stream"
    if facts["method"] == "all":
        return "all images" if size is None else f"all {size:,} images"
    over = "every class" if facts["method"] == "spread over classes" else "all of them"
    return f"{number:,} of {size:,} images, spread over {over} (seed {facts['seed']})"
