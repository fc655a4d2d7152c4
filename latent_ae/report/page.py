"""Pieces of one self-contained HTML file: no script, no external file, readable in light and dark.

    page("Run 12", [section("Result", table(rows)), section("Losses", line_chart({"l1": points}))])

Every piece is a string of HTML. Functions escape the text that they are given; only pieces are joined unescaped.
"""

import base64
import html
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from latent_ae.files import replacing
from latent_ae.report.charts import bar_chart as bar_chart
from latent_ae.report.charts import heat_map as heat_map
from latent_ae.report.charts import histogram as histogram
from latent_ae.report.charts import interval_chart as interval_chart
from latent_ae.report.charts import line_chart as line_chart
from latent_ae.report.charts import scatter_chart as scatter_chart
from latent_ae.text import printable

State = Literal["fine", "look", "problem"]


class Finding(NamedTuple):
    """A sentence of a page on one measured property, and whether it is fine."""

    name: str
    state: State
    text: str


STYLE = """
:root { color-scheme: light dark;
        --ink: #1c1e21; --soft: #5d646d; --paper: #fff; --line: #dfe3e8; --tint: #f5f7f9; --mark: #966118;
        --bad: #b3372f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --paper: #15181c; --line: #31373e; --tint: #1d2126; --mark: #d9a441;
          --bad: #e8776c }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 64rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; overflow-wrap: anywhere } h3 small { font-weight: 400 }
article p { font-size: .85rem; margin: .3rem 0; max-width: none; font-variant-numeric: tabular-nums }
p { max-width: 46rem } .soft, figcaption, small { color: var(--soft) }
.scroll { overflow-x: auto;
          /* a shadow at a side says that there is more; it lies under a cover that moves with the table */
          background: linear-gradient(to right, var(--paper) 1rem, transparent 2rem) local,
                      linear-gradient(to left, var(--paper) 1rem, transparent 2rem) local,
                      linear-gradient(to right, var(--line), transparent .6rem),
                      linear-gradient(to left, var(--line), transparent .6rem) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.number, th.number { text-align: right }
.estimate { white-space: nowrap } td b { font-weight: 600 }
.best { font-size: .75rem; color: var(--mark); border: 1px solid; border-radius: 4px; padding: 0 .3rem }
.scroll td:first-child { min-width: 6.5rem }
.scroll th, .scroll td:first-child { max-width: 16rem; overflow-wrap: anywhere } .scroll th { min-width: 6.2rem }
td small { display: inline-block; margin-left: .4rem }
.pairs { width: 100%; font-size: .85rem } .pairs th { font-weight: 400; width: 30% }
.pairs td, .pairs th { overflow-wrap: anywhere; white-space: pre-line }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0 } .facts dd { margin: 0 }
.facts dt { font-size: .85rem; color: var(--soft) }
.notes { background: var(--tint); border-left: 3px solid var(--mark); margin: 1rem 0; padding: .6rem 1rem .6rem 2rem }
.findings > div { border-left: 3px solid var(--line); padding: .1rem 0 .1rem .9rem; margin: .9rem 0 }
.findings dt { font-weight: 600 } .findings dd { margin: 0; max-width: 46rem }
.findings .state { font-size: .75rem; font-weight: 400; color: var(--soft); margin-left: .4rem }
.findings .look { border-color: var(--mark) } .findings .look .state { color: var(--mark) }
.findings .problem { border-color: var(--bad) } .findings .problem .state { color: var(--bad) }
.beside, .grid { display: grid; gap: .5rem .8rem; align-items: start }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.beside figure, .grid figure { margin: 0 }
figure { margin: 1rem 0; overflow-x: auto } figure img { outline: 1px solid var(--line) }
figure img, figure svg { max-width: 100%; height: auto } details { margin-top: 2rem } summary { cursor: pointer }
figcaption { font-size: .9rem; margin-top: .3rem }
.zoom img { cursor: zoom-in; display: block } .zoom input { position: absolute; opacity: 0 }
.zoom input:focus-visible + .frame img { outline: 2px solid var(--soft) } .enlarged { image-rendering: pixelated }
@media screen {
  .zoom input:checked + .frame { position: fixed; inset: 0; z-index: 1; overflow: auto; display: flex;
                                 background: #181a1d }
  .zoom input:checked + .frame img { max-width: none; flex: none; margin: auto; cursor: zoom-out }
}
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem;
      white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, monospace }
@media (max-width: 40rem) {
  body { margin-top: 1.2rem; padding: 0 .9rem } h1 { font-size: 1.35rem } th, td { padding: .3rem .35rem }
  table { font-size: .82rem } .scroll td:first-child { min-width: 5rem } td small { display: block; margin: 0 }
  .beside figcaption { font-size: .75rem } .pairs th { font-size: .68rem }
  .pairs tr, .pairs th, .pairs td { display: block; width: auto; border: 0; padding: 0 }
  .pairs tr { border-bottom: 1px solid var(--line); padding: .3rem 0 }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --tint: #fff; --mark: #000;
          --bad: #000 }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0 } h2, h3 { break-after: avoid }
  figure, tr, .beside, .notes { break-inside: avoid } figure img { max-height: 20cm; width: auto }
}
"""
JPEG_QUALITIES = (95, 90, 80, 70)
SMALLEST_SHOWN_PX = 128


class Html(str):
    """Text that is HTML already, which a table does not escape."""


def page(title: str, sections: Sequence[str], *, subtitle: str = "") -> str:
    """Return a whole HTML document.

    Args:
        title: Title and first heading.
        sections: Pieces, for example of `section`.
        subtitle: A line below the heading.
    """
    below = f'<p class="soft">{escape(subtitle)}</p>' if subtitle else ""
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{below}\n{body}\n</body></html>\n"
    )


def section(heading: str, *pieces: str) -> str:
    """Return pieces under a heading."""
    return f"<section><h2>{escape(heading)}</h2>\n" + "\n".join(pieces) + "</section>"


def card(heading: str, detail: str, *pieces: str) -> str:
    """Return pieces under a smaller heading with a detail in a softer colour."""
    return f"<article><h3>{escape(heading)} <small>{escape(detail)}</small></h3>{''.join(pieces)}</article>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """Return text as a paragraph, in a softer colour if `soft`."""
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Return text such as settings or code in a fixed-width font, with its line breaks."""
    return f"<pre>{escape(text)}</pre>"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with the first row's keys as columns.

    Numbers are aligned right; None and missing values are a dash.
    """
    if not rows:
        return paragraph("No rows.")
    columns = list(rows[0])
    number = {key: all(_is_number(row.get(key)) or row.get(key) is None for row in rows) for key in columns}

    def cell(tag: str, key: str, value: Any) -> str:
        mark = ' class="number"' if number[key] else ""
        return f"<{tag}{mark}>{value if isinstance(value, Html) else escape(format_value(value))}</{tag}>"

    head = "".join(cell("th", key, key) for key in columns)
    lines = ["".join(cell("td", key, row.get(key)) for key in columns) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def estimate(value: str, interval: str = "", *, best: bool = False) -> Html:
    """Return a table cell with a number and its interval in small print; `best` marks it."""
    mark = ' <span class="best">best</span>' if best else ""
    small = f" <small>{escape(interval)}</small>" if interval else ""
    return Html(f'<span class="estimate"><b>{escape(value)}</b>{mark}{small}</span>')


def facts(pairs: Mapping[str, Any]) -> str:
    """Return a few short values, each under its name, in a line that wraps."""
    items = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(format_value(value))}</dd></div>" for name, value in pairs.items()
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def notes(lines: Sequence[str]) -> str:
    """Return important notes as a list; an empty string if there are none."""
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def findings(lines: Sequence[tuple[str, str, str, str]]) -> str:
    """Return named sentences with marks, from (name, state, text of the mark, sentence); see `State`."""
    items = "\n".join(
        f'<div class="{escape(state)}"><dt>{escape(name)} <span class="state">{escape(mark)}</span></dt>'
        f"<dd>{escape(text)}</dd></div>"
        for name, state, mark, text in lines
    )
    return f'<dl class="findings">{items}</dl>'


def manifest(values: Mapping[str, Any]) -> str:
    """Return all values of a nested JSON object as a table of two columns: path (`data.location`) and value."""
    rows = "\n".join(
        f'<tr><th scope="row">{_breakable(path)}</th><td>{escape(text)}</td></tr>' for path, text in flattened(values)
    )
    return f'<table class="pairs"><tbody>\n{rows}\n</tbody></table>'


def _breakable(path: str) -> str:
    """Return a path that a narrow page breaks after points and underscores, and inside words only if it must."""
    return escape(path).replace(".", ".<wbr>").replace("_", "_<wbr>")


def details(summary: str, text: str) -> str:
    """Return text that is shown on a click, with its line breaks."""
    return f"<details><summary>{escape(summary)}</summary>{preformatted(text)}</details>"


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and value of a nested JSON object as text; the items of a list are on separate lines."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and value:
            yield f"{prefix}{key}", "\n".join(map(_as_text, value))
        else:
            yield f"{prefix}{key}", _as_text(value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def beside(*pieces: str) -> str:
    """Return pieces side by side; on a telephone up to three, or two of four."""
    count = len(pieces)
    least = f"max({8 if count == 4 else 5.2}rem, (100% - {count - 1} * .8rem) / {count})"
    columns = f"grid-template-columns: repeat(auto-fit, minmax({least}, 1fr))"
    return f'<div class="beside" style="{columns}">{"".join(pieces)}</div>'


def grid(*pieces: str) -> str:
    """Return pieces in as many columns as fit."""
    return f'<div class="grid">{"".join(pieces)}</div>'


def figure(
    image: Image.Image, caption: str = "", *, jpeg_quality: int | None = None, max_bytes: int | None = None
) -> str:
    """Return an image, embedded in the page; a click shows it at its full size.

    Args:
        image: The image.
        caption: Text below it.
        jpeg_quality: Embed a JPEG of this quality; None embeds a PNG.
        max_bytes: An image whose PNG is larger becomes a JPEG of the best quality that fits, and if none fits it is
            made smaller, which the caption then says.
    """
    kind, data, step = _encoded(image, jpeg_quality, max_bytes)
    if step > 1:
        caption = f"{caption} (1/{step} of its size)".strip()
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    width, height = -(-image.width // step), -(-image.height // step)
    # whole steps, so that the pixels of a small image stay squares
    scale = max(1, -(-SMALLEST_SHOWN_PX // max(width, height)))
    size = f'width="{width * scale}" height="{height * scale}"' + (' class="enlarged"' if scale > 1 else "")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    # browsers refuse links to data URIs, so a checkbox lifts the limits on the size
    box = f'<input type="checkbox" aria-label="{escape(caption)}: full size">'
    picture = f'<span class="frame"><img src="{uri}" {size} alt="{escape(caption)}"></span>'
    return f'<figure><label class="zoom">{box}{picture}</label>{below}</figure>'


def animation(data: bytes, kind: str, caption: str) -> str:
    """Return an animated file, `kind` webp or gif, embedded unchanged."""
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _encoded(image: Image.Image, jpeg_quality: int | None, max_bytes: int | None) -> tuple[str, bytes, int]:
    """Return the format, the bytes of the file and the factor by which its sides were divided."""
    limit = math.inf if max_bytes is None else max_bytes

    def saved(picture: Image.Image, quality: int | None) -> bytes:
        buffer = io.BytesIO()
        if quality is None:
            picture.save(buffer, "PNG", optimize=True)
        else:
            gray = picture.mode == "L"
            # colour at full resolution, because its loss would look like an error of the model
            picture.convert("L" if gray else "RGB").save(buffer, "JPEG", quality=quality, subsampling=0)
        return buffer.getvalue()

    if jpeg_quality is not None:
        return "jpeg", saved(image, jpeg_quality), 1
    # a photograph's PNG takes more than a byte per pixel, so larger images are not tried
    if image.width * image.height <= limit and len(data := saved(image, None)) <= limit:
        return "png", data, 1
    step = 1
    while True:
        small = image.reduce(step) if step > 1 else image
        for quality in JPEG_QUALITIES:
            data = saved(small, quality)
            if len(data) <= limit or max(small.size) <= SMALLEST_SHOWN_PX:
                return "jpeg", data, step
        step *= 2


def write(path: Path, text: str) -> None:
    """Write a page; a reader finds the old file or the new one, never a part. Raises UserError if that fails."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def escape(text: str) -> str:
    """Escape any text for HTML text or an attribute value; control characters are shown escaped, see `printable`."""
    return html.escape(printable(str(text), lines=True), quote=True)


def format_value(value: Any) -> str:
    """Return the text of a cell: floats with four significant digits, other values in full, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:.4e}"
    return str(value)


def _is_number(value: Any) -> bool:
    """Return True for numbers and for text that is a number."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return isinstance(value, float)
