"""Command line of `python -m benchmarks.tables`."""

from benchmarks.tables import PAGES, figures, render

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page), encoding="utf-8")
        for path, chart in figures(page).items():
            path.write_text(chart, encoding="utf-8")
