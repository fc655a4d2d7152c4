"""Command line of `python -m benchmarks.tables`."""

from benchmarks.tables import PAGES, render

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page), encoding="utf-8")
