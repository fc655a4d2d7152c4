"""Text for people: foreign text (names of files and data sets) made safe for a terminal, a page and a log, and the
description of a choice of images."""

import re
from collections.abc import Mapping
from typing import Any

# C0 and C1 controls (terminals obey them), direction overrides and line separators (they disguise text), surrogates (no
# file can hold them); line feeds and tabs are treated separately
_LINE = re.compile("[\t\n]")
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return the text with control characters, and characters that no file can hold, escaped as `\x1b` or `\u202e`.

    Args:
        text: The text.
        lines: Keep line feeds and tabs; False escapes them, too, so that a name stays on one line.
    """
    text = _OBEYED.sub(_shown, text)
    return text if lines else _LINE.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def choice_in_words(facts: Mapping[str, Any] | None) -> str:
    """Return a choice of images (see `rng.choice_facts`) in words; None is a choice that was not recorded."""
    if not facts:
        return "a choice that is not recorded"
    number, size = facts["number"], facts["of"]
    if facts["method"] == "first":
        return f"the first {number:,} images of a stream"
    if facts["method"] == "all":
        return "all images" if size is None else f"all {size:,} images"
    over = "every class" if facts["method"] == "spread over classes" else "all of them"
    return f"{number:,} of {size:,} images, spread over {over} (seed {facts['seed']})"
