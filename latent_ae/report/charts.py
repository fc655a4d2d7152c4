"""Charts as inline SVG in the colours of their page. matplotlib is imported when the first one is drawn."""

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latent_ae.text import printable

LETTERS = 46
"""Number of letters in a line of a chart."""
INK = "#0a0b0c"
"""Placeholder for the page's text colour while a chart is drawn."""
COLOURS = ("#3f8fd2", "#e8833a", "#57a773", "#c65b7c", "#8a78c9", "#8c8f94")
"""Colours of a chart's series, which differ visibly on white and on black."""
WIDTH, HEIGHT = 4.4, 2.6
"""Size in inches: a chart fits on a telephone, and two fit beside each other on a screen."""
LEGEND_LINE = 0.2
"""Height of a line of the legend, inches."""
FONT_PT, SMALL_PT = 11, 10
"""Font sizes; a telephone of 320 px shows a chart at 0.7 of its size."""


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Return lines as inline SVG. Points that are not finite are gaps.

    Args:
        series: (x, y) points of each line by name.
        title: Title of the chart.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        log_x: Use a logarithmic x axis if any x is positive.
        log_y: Use a logarithmic y axis if any y is positive.
    """

    def draw(axes: Any) -> None:
        for name, points in series.items():
            xs, ys = [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]
            axes.plot(xs, ys, marker="o" if len(xs) == 1 else None, label=_label(name))  # one point makes no line
        if log_y and any(y > 0 for points in series.values() for _, y in points):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        if log_x and any(x > 0 for points in series.values() for x, _ in points):
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)

    return _chart(draw, HEIGHT, title, x_label, y_label, legend=len(series) > 1)


def bar_chart(values: Mapping[str, float], *, title: str = "", x_label: str = "") -> str:
    """Return a bar for each value as inline SVG. Values that are not finite have no bar.

    Args:
        values: Values by name.
        title: Title of the chart.
        x_label: Label of the x axis.
    """

    def draw(axes: Any) -> None:
        names = list(values)
        axes.bar(range(len(names)), [value if math.isfinite(value) else math.nan for value in values.values()])
        step = -(-len(names) // 16)  # more names than that do not fit
        axes.set_xticks(range(0, len(names), step or 1), [_label(name) for name in names[:: step or 1]])
        axes.margins(x=0.02)

    return _chart(draw, HEIGHT, title, x_label, "", legend=False)


def histogram(
    values: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "images",
    mark: float | None = None,
) -> str:
    """Return histograms over each other with common bins, as inline SVG. Values that are not finite are left out.

    An empty series keeps its colour, so that a name has the same colour in several charts.

    Args:
        values: Series of values by name.
        title: Title of the chart.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        mark: A value at which a vertical line is drawn.
    """
    finite = {name: [value for value in series if math.isfinite(value)] for name, series in values.items()}
    pooled = [value for series in finite.values() for value in series]
    low, high = min(pooled, default=0.0), max(pooled, default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all equal, or nearly: too narrow to be cut into bins
        margin = 0.5 * abs(low) or 0.5
        low, high = low - margin, high + margin
    most = max(map(len, finite.values()), default=0)
    bins = min(40, max(8, 2 * math.isqrt(most)))

    def draw(axes: Any) -> None:
        for position, (name, series) in enumerate(finite.items()):
            colour = COLOURS[position % len(COLOURS)]
            if series:
                common = {"bins": bins, "range": (low, high), "color": colour}
                axes.hist(series, histtype="stepfilled", alpha=0.22, **common)
                axes.hist(series, histtype="step", linewidth=1.4, label=_label(name), **common)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=1, linestyle="--")

    return _chart(draw, HEIGHT, title, x_label, y_label, legend=sum(map(bool, finite.values())) > 1)


def heat_map(rows: Mapping[str, Sequence[float]], columns: Sequence[str], *, title: str = "", y_label: str = "") -> str:
    """Return a table of numbers from 0 to 1 as inline SVG, each in percent on a colour of that depth.

    Args:
        rows: A number for each column, by the name of the row.
        columns: Names of the columns.
        title: Title of the chart.
        y_label: Label of the y axis.
    """

    def draw(axes: Any) -> None:
        for y, values in enumerate(rows.values()):
            for x, value in enumerate(values):
                area = {"color": COLOURS[0], "linewidth": 0, "alpha": min(1.0, max(0.0, value))}
                axes.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, **area)
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=SMALL_PT)
        axes.set_xticks(range(len(columns)), [_label(name) for name in columns])
        axes.set_yticks(range(len(rows)), [_label(name) for name in rows])
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)

    return _chart(draw, 1.2 + 0.3 * len(rows), title, "", y_label, legend=False)


def interval_chart(
    series: Mapping[str, Mapping[str, tuple[float, float | None, float | None]]],
    *,
    title: str = "",
    x_label: str = "",
) -> str:
    """Return estimates with their intervals as inline SVG.

    Args:
        series: For each series by name its (value, low, high) by the name of the line; equal names share a line. An end
            that is None or not finite draws no interval.
        title: Title of the chart.
        x_label: Label of the x axis.
    """
    lines = list(dict.fromkeys(name for points in series.values() for name in points))

    def draw(axes: Any) -> None:
        for position, (name, points) in enumerate(series.items()):
            colour, offset = COLOURS[position % len(COLOURS)], 0.22 * (position - (len(series) - 1) / 2)
            label: str | None = _label(name)
            for line, (value, low, high) in points.items():
                y = lines.index(line) + offset
                axes.plot([value], [y], "o", color=colour, label=label, markersize=5)
                if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
                    axes.plot([low, high], [y, y], "-", color=colour, linewidth=2, solid_capstyle="butt")
                label = None
        names = [_label(line) for line in lines]
        axes.set_yticks(range(len(names)), [name if len(name) <= 24 else f"{name[:23]}…" for name in names])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.margins(x=0.12)

    return _chart(draw, 1.2 + 0.42 * len(lines), title, x_label, "", legend=len(series) > 1)


def scatter_chart(
    points: Mapping[str, tuple[float, float]],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    intervals: Mapping[str, tuple[float, float]] | None = None,
    everyone: Sequence[str] = (),
) -> str:
    """Return named points as inline SVG; the name is written beside its point, clear of the others where there is room.

    The x axis is logarithmic if all x are positive and one is more than ten times another.

    Args:
        points: Finite (x, y) by name.
        title: Title of the chart.
        x_label: Label of the x axis.
        y_label: Label of the y axis.
        intervals: Interval of y by name, drawn as a line.
        everyone: Names in all charts of a page, whose order gives the colours; empty takes those of the points.
    """
    xs = [x for x, _ in points.values()]
    low, high = min(xs, default=1.0), max(xs, default=1.0)
    log_x = 0 < 10 * low < high
    middle = math.sqrt(low * high) if log_x else (low + high) / 2
    names = {name: label if len(label := _label(name)) <= 24 else f"{label[:23]}…" for name in points}

    def draw(axes: Any) -> None:
        order = list(everyone or points)
        for name, (x, y) in points.items():
            colour = COLOURS[order.index(name) % len(COLOURS)]
            axes.plot([x], [y], "o", color=colour, markersize=6)
            if intervals and name in intervals:
                axes.plot([x, x], intervals[name], color=colour, linewidth=1)
        axes.margins(x=0.12, y=0.2)
        if log_x:
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        axes.autoscale_view()
        # boxes of the names in points, by an estimate of their width: the browser has fonts of its own
        scale = 72 / axes.figure.dpi
        at = {name: axes.transData.transform(point) * scale for name, point in points.items()}
        taken: list[tuple[float, float, float, float]] = []
        for name, (x, y) in points.items():
            inward = -1 if x > middle else 1
            width = 0.65 * SMALL_PT * len(names[name])
            offsets = [(6 * side, up) for up in (5, -12, 17, -24, 29, -36) for side in (inward, -inward)]
            boxes = [
                (
                    left := at[name][0] + dx - (width if dx < 0 else 0),
                    bottom := at[name][1] + dy,
                    left + width,
                    bottom + 11,
                )
                for dx, dy in offsets
            ]
            chosen = next((n for n, box in enumerate(boxes) if not any(_meet(box, other) for other in taken)), 0)
            taken.append(boxes[chosen])
            dx, dy = offsets[chosen]
            axes.annotate(
                names[name],
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=SMALL_PT,
            )

    return _chart(draw, HEIGHT, title, x_label, y_label, legend=False)


def _meet(box: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two boxes (left, bottom, right, top) overlap."""
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _chart(
    draw: Callable[[Any], None],
    height: float,
    title: str,
    x_label: str,
    y_label: str,
    *,
    legend: bool,
) -> str:
    """Return axes that `draw` fills as inline SVG in the colours of the page; `height` is in inches."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[str, Any] = {
        # text stays text, so that it can be searched and files are small; a fixed salt makes equal charts equal bytes
        "svg.fonttype": "none",
        "svg.hashsalt": "latent-ae",
        "font.family": "sans-serif",
        "font.size": FONT_PT,
        "xtick.labelsize": SMALL_PT,
        "ytick.labelsize": SMALL_PT,
        "text.parse_math": False,
        "axes.prop_cycle": cycler(color=COLOURS),
    }
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    with rc_context(settings | dict.fromkeys(inked, INK)):
        drawing = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
        axes = drawing.add_subplot(facecolor="none")
        draw(axes)
        axes.set_xlabel(_label(x_label))
        axes.set_ylabel(_label(y_label))
        axes.set_title("\n".join(textwrap.wrap(_label(title), LETTERS)), fontsize=FONT_PT)
        axes.grid(alpha=0.18)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if isinstance(axes.xaxis.get_major_locator(), MaxNLocator):
            axes.locator_params(axis="x", nbins=6)
        if legend:  # below the chart, because there is no room inside
            labels = axes.get_legend_handles_labels()[1]
            columns = max(1, min(3, LETTERS // (max(map(len, labels)) + 6)))
            drawing.set_figheight(height + LEGEND_LINE * (-(-len(labels) // columns)))
            drawing.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=SMALL_PT)
        text = io.StringIO()
        with warnings.catch_warnings():  # a browser has fonts that matplotlib lacks
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            drawing.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return f'<figure class="chart">{svg[svg.index("<svg") :].replace(INK, "currentColor")}</figure>'


def _plain_ticks(axis: Any) -> None:
    """Write powers of ten as numbers: matplotlib's own formatter writes TeX, which these charts do not parse."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter("")


def _label(name: str) -> str:
    """Return a name that matplotlib shows: it hides names that begin with an underscore, and fails on surrogates."""
    return printable(name).lstrip("_")
