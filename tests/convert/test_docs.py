"""docs/convert.md shows the layouts and the published scaling that the code has."""

from pathlib import Path

import pytest

from latent_ae.convert.known import KNOWN
from latent_ae.convert.registry import LAYOUTS, WRITTEN

PAGE = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")


def rows(title: str) -> list[str]:
    """The table under a heading that begins with `title`, without its head."""
    (part,) = [part for part in PAGE.split("\n## ") if part.startswith(title)]
    return [line for line in part.splitlines() if line.startswith("|")][2:]


def test_the_table_of_layouts_is_that_of_the_registry() -> None:
    expected = []
    for name, layout in LAYOUTS.items():
        ends = ", ".join(f"NAME{end}" for end in layout.files)
        word = f"`{name}`" if name in WRITTEN else f"({name}: read only)"
        expected.append(f"| {word} | {layout.title} | {layout.kind} | {ends} |")
    assert rows("Layouts") == expected, "\n".join(expected)


def test_the_table_of_published_scaling_is_that_of_the_code() -> None:
    expected = [f"| {row.model} | {row.factor} | {row.channels} | `{row.words}` | {row.source} |" for row in KNOWN]
    assert rows("Scaling is asked for") == expected, "\n".join(expected)


def test_the_help_names_each_layout(capsys: pytest.CaptureFixture[str]) -> None:
    from latent_ae.convert.command import main

    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name:<10} {layout.title}" in text for name, layout in LAYOUTS.items())
