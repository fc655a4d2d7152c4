"""Text of strangers (names of files and data sets) made safe for a terminal, a page and a log."""

import re

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
