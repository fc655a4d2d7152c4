"""Rewrites the tables and charts in docs/ from benchmarks/results: a module for each page.

python -m benchmarks.tables
"""

import json
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import stdev

from scipy.special import stdtrit

from benchmarks.machine import RESULTS

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = [
    page for page in sorted(DOCS.glob("*.md")) if (Path(__file__).parent / f"{page.stem.replace('-', '_')}.py").exists()
]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of two or more values, by Student's t distribution."""
    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5


def with_interval(value: float, interval: Sequence[float] | None, digits: int) -> str:
    """A figure as text, with the ends of its interval if there is one."""
    ends = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{value:.{digits}f}{ends}"


def render(page: Path) -> str:
    """The page with each `<!-- table: NAME -->` ... `<!-- end -->` filled from results/NAME.json."""
    makers = import_module(f"{__name__}.{page.stem.replace('-', '_')}").MAKERS

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        table: str = next(make for key, make in makers.items() if name.startswith(key))(result)
        return f"<!-- table: {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", fill, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def figures(page: Path) -> dict[Path, str]:
    """The SVG charts of a page by their files: docs/images/NAME-curves.svg from results/NAME.json."""
    makers = getattr(import_module(f"{__name__}.{page.stem.replace('-', '_')}"), "FIGURES", {})
    return {
        DOCS / f"images/{name}-curves.svg": make(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        for name, make in makers.items()
    }
