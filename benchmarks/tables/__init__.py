"""Rewrites the tables in docs/ from benchmarks/results: a module for each page.

python -m benchmarks.tables
"""

import json
import re
from importlib import import_module
from pathlib import Path

from benchmarks.machine import RESULTS

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = [
    page for page in sorted(DOCS.glob("*.md")) if (Path(__file__).parent / f"{page.stem.replace('-', '_')}.py").exists()
]


def render(page: Path) -> str:
    """The page with each `<!-- table: NAME -->` ... `<!-- end -->` filled from results/NAME.json."""
    makers = import_module(f"{__name__}.{page.stem.replace('-', '_')}").MAKERS

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        table: str = next(make for key, make in makers.items() if name.startswith(key))(result)
        return f"<!-- table: {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", fill, page.read_text(encoding="utf-8"), flags=re.DOTALL)
