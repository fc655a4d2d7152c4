"""Pieces of one self-contained HTML file: no script, no external file, readable in light and dark.

    page("Run 12", [section("Result", table(rows)), section("Losses", line_chart({"l1": points}))])

Every piece is a string of HTML. Text given to them is escaped; only pieces are put together unescaped.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

STYLE = """
:root { color-scheme: light dark;
        --ink: #1c1e21; --soft: #5d646d; --paper: #fff; --line: #dfe3e8; --tint: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --paper: #15181c; --line: #31373e; --tint: #1d2126 }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 64rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
p { max-width: 46rem } .soft, figcaption { color: var(--soft) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left }
th { color: var(--soft); font-weight: 600 } td.number, th.number { text-align: right }
figure { margin: 1rem 0; overflow-x: auto } figure img, figure svg { max-width: 100%; height: auto }
figcaption { font-size: .9rem; margin-top: .3rem }
.zoom img { cursor: zoom-in } .zoom input { position: absolute; opacity: 0 }
.zoom input:checked + img { max-width: none; cursor: zoom-out }
.zoom input:focus-visible + img { outline: 2px solid var(--soft) }
.chart { background: #fff; border-radius: 6px; padding: .5rem }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
      overflow-x: auto; font: .85rem/1.5 ui-monospace, monospace }
"""


def page(title: str, sections: Sequence[str], *, subtitle: str = "") -> str:
    """A whole HTML document out of sections (`section`, or any other pieces)."""
    below = f'<p class="soft">{escape(subtitle)}</p>' if subtitle else ""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{below}\n{body}\n</body></html>\n"
    )


def section(heading: str, *pieces: str) -> str:
    """A heading above pieces."""
    return f"<section><h2>{escape(heading)}</h2>\n" + "\n".join(pieces) + "</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Settings, code: in a fixed-width font, as it stands."""
    return f"<pre>{escape(text)}</pre>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows, the first row's keys as columns. Numbers stand right; None and absent are a dash."""
    if not rows:
        return paragraph("No rows.")
    columns = list(rows[0])
    number = {key: all(_is_number(row.get(key)) or row.get(key) is None for row in rows) for key in columns}

    def cell(tag: str, key: str, text: str) -> str:
        mark = ' class="number"' if number[key] else ""
        return f"<{tag}{mark}>{escape(text)}</{tag}>"

    head = "".join(cell("th", key, key) for key in columns)
    lines = ["".join(cell("td", key, format_value(row.get(key))) for key in columns) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def figure(image: Image.Image, caption: str = "", *, jpeg_quality: int | None = None) -> str:
    """An image, embedded as PNG (or JPEG of the given quality); a click shows it at its full size."""
    buffer = io.BytesIO()
    kind = "png" if jpeg_quality is None else "jpeg"
    if kind == "png":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=jpeg_quality)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
    picture = f'<img src="{uri}" width="{image.width}" height="{image.height}" alt="{escape(caption)}">'
    # browsers refuse links to data URIs, so a checkbox lifts the width limit
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    box = '<input type="checkbox" aria-label="full size">'
    return f'<figure><label class="zoom">{box}{picture}</label>{below}</figure>'


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
) -> str:
    """Lines of (x, y) points by name, as inline SVG. Points that are not finite are gaps."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # text as text can be searched and keeps the file small; with a fixed salt, equal charts are equal bytes
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "latent-ae", "font.family": "sans-serif"}):
        drawing = Figure(figsize=(8, 3.2), layout="constrained")
        axes = drawing.add_subplot()
        for name, points in series.items():
            # matplotlib hides a label that begins with an underscore, and reads $...$ as mathematics
            label = name.replace("$", r"\$").lstrip("_") or "unnamed"
            axes.plot([x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points], label=label)
        if log_y and any(y > 0 for points in series.values() for _, y in points):
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title.replace("$", r"\$"))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if series:
            axes.legend(frameon=False)
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return f'<figure class="chart">{svg[svg.index("<svg") :]}</figure>'


def escape(text: str) -> str:
    """Any text as HTML text or attribute value; characters that no file can hold are shown, not dropped."""
    printable = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(printable, quote=True)


def format_value(value: Any) -> str:
    """A cell's text: four significant digits for fractions, whole numbers in full, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:.4e}"
    return str(value)


def _is_number(value: Any) -> bool:
    """True for numbers and for text that shows one."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return isinstance(value, float)
