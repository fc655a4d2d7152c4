"""The report of a reconstruction's evaluation: metrics, their distribution, pictures, and how they were measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_ae.data.images import to_uint8, visible
from latent_ae.metrics.labels import ARROWS, in_order, label_of, number, pair, rounded, short_name, span
from latent_ae.pretrained.weights import how_to_get
from latent_ae.report import page
from latent_ae.report.pictures import to_picture
from latent_ae_eval.cost import conditions, cost_lines
from latent_ae_eval.table import Row, aligned

ERROR_GAIN = 4
PICTURE_BYTES = 14_000_000
"""Largest size of all pictures of a page together; base64 adds a third."""
SHOWN_IN = "metrics", "intervals", "baseline", "cost", "notes"
"""Parts of a result that the page shows above its manifest."""

NO_TIMES = "not measured: the first batch of each size is a warm-up, and there was no other"


@dataclass(frozen=True)
class Shown:
    """An image that the page shows."""

    name: str
    index: int
    row: Mapping[str, Any]
    """Its metrics, as in images.parquet."""
    image: Tensor
    """(C, H, W) float in [-1, 1], on the CPU."""
    reconstruction: Tensor
    """The same shape; pixels that are not finite count as the largest error."""


def write_recon_report(
    path: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], shown: Mapping[str, Sequence[Shown]]
) -> None:
    """Write report.html, one self-contained file of at most about 20 MB; a reader never finds a part.

    Args:
        path: The file.
        result: The content of result.json.
        rows: The rows of images.parquet.
        shown: The images under each heading.

    Raises:
        UserError: If it cannot be written.
    """
    model, data = _model_name(result), short_name(result["data"].get("location"), "images")
    sections = [
        _summary(result),
        _cost(result),
        _spread(result, rows),
        *_pictures(result, shown),
        page.section("How this was measured", page.manifest(_manifest(result))),
        page.details("How to get FID and KID", how_to_get("inception")) if _lacks_fid(result) else "",
    ]
    title = f"{model}: reconstructions of {data}"
    page.write(path, page.page(title, sections, subtitle="A first stage, measured by latent-ae eval recon."))


def recon_text(result: Mapping[str, Any]) -> str:
    """Return the metrics of a result as a table for a terminal."""
    columns = _columns(result)
    rows = [Row("images", f"{result['data']['num_images']:,}")]
    for metric in _metrics(columns):
        label = label_of(metric)
        for kind, (values, intervals) in columns.items():
            if (value := number(values.get(metric))) is not None:
                ends = span(metric, pair(intervals.get(metric)))
                rows.append(Row(f"{label.name}{label.arrow}", rounded(metric, value), ends, kind))
    cost = result.get("cost")
    rows += [Row(name, text, of=of) for (name, of), text in cost_lines(cost).items()]
    return aligned(rows) + (f"\n\ntimes: {conditions(cost) or NO_TIMES}" if isinstance(cost, Mapping) else "")


def _manifest(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of the result that the page does not show above; settings of the protocol appear only there."""
    rest = {key: value for key, value in result.items() if key not in SHOWN_IN}
    settings = rest.get("settings") or {}
    return rest | {"settings": {key: value for key, value in settings.items() if value != "protocol"}}


def _lacks_fid(result: Mapping[str, Any]) -> bool:
    """Return whether FID was requested and could not be measured."""
    return any("fid" in values and values["fid"] is None for values in result["metrics"].values() if values)


def _model_name(result: Mapping[str, Any]) -> str:
    model = result["model"]
    return short_name(model.get("location"), str(model.get("class") or "model"))


def _summary(result: Mapping[str, Any]) -> str:
    model, data, protocol = result["model"], result["data"], result["protocol"]
    parameters, factor, channels = (number(model.get(key)) for key in ("parameters", "factor", "latent_channels"))
    facts = {
        "images": f"{data['num_images']:,}",
        "protocol": f"{protocol.get('name')}{' (changed)' if protocol.get('changed') else ''}",
        "framing": _framing(protocol),
        "model": model.get("class"),
        "latent": f"1/{factor:g} of each side, {channels:g} channels" if factor and channels else None,
        "parameters": None if parameters is None else _count(parameters),
        "weights": ", ".join(str(model[key]) for key in ("weights", "dtype") if model.get(key)),
        "seed": result.get("seed"),
    }
    columns = _columns(result)
    lines = [{"": f"{label_of(key).name}{label_of(key).arrow}"} | _cells(key, columns) for key in _metrics(columns)]
    remarks = [str(note) for note in result.get("notes") or []]
    has_fid = any(number(values.get("fid")) is not None for values, _ in columns.values())
    if not has_fid and not any("FID" in remark and "missing" in remark for remark in remarks):
        remarks.append("rFID is missing: it was not measured.")
    counts = {name: n for name, (values, _) in columns.items() if (n := number(values.get("n"))) != data["num_images"]}
    remarks += [f"{name}: {n:,.0f} of {data['num_images']:,} images measured." for name, n in counts.items() if n]
    skipped = len(data.get("skipped") or [])
    if skipped:
        remarks.append(f"Unreadable images that were skipped: {skipped:,}. They are listed at the end of this page.")
    below = page.paragraph(f"{ARROWS} Small: 95 % intervals over the images.", soft=True), page.notes(remarks)
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    return page.facts(known) + page.section("Result", page.table(lines), *below)


def _cost(result: Mapping[str, Any]) -> str:
    """Return the section on time, memory and size; an empty string for a result of an older version."""
    cost = result.get("cost") or {}
    if not (lines := cost_lines(cost)):
        return ""
    latent = " x ".join(map(str, cost["latent_shape"])) if cost.get("latent_shape") else None
    facts = {"times": conditions(cost) or NO_TIMES, "batches": cost.get("batches"), "latent": latent}
    rows = [{"": name, "of": of, "value": text} for (name, of), text in lines.items()]
    known = {name: value for name, value in facts.items() if value is not None}
    return page.section("Cost", page.facts(known), page.table(rows))


def _count(parameters: float) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,.0f}"


def _framing(protocol: Mapping[str, Any]) -> str:
    """Return how images were cropped; a protocol of an older version may lack these keys."""
    resize_px, crop_px = protocol.get("resize_px"), protocol.get("crop_px")
    cut = "whole" if crop_px is None else f"{crop_px} px from the middle"
    return cut if resize_px is None else f"{cut}, shorter side resized to {resize_px} px"


def _columns(result: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return metrics and intervals of each kind of reconstruction and of the baseline."""
    intervals = result.get("intervals") or {}
    columns = {kind: (values or {}, intervals.get(kind) or {}) for kind, values in result["metrics"].items()}
    if baseline := result.get("baseline"):
        columns[str(baseline.get("name"))] = baseline.get("metrics") or {}, baseline.get("intervals") or {}
    return columns


def _metrics(columns: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """Return the measured metrics, and always FID, so that its absence is visible."""
    return in_order(
        {metric for values, _ in columns.values() for metric in values if metric not in ("n", "notes")} | {"fid"}
    )


def _cells(metric: str, columns: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    cells = {}
    for name, (values, intervals) in columns.items():
        value = number(values.get(metric))
        interval = span(metric, pair(intervals.get(metric)))
        cells[name] = None if value is None else page.estimate(rounded(metric, value), interval)
    return cells


def _prefixes(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the prefixes of the rows' columns with the names that the page shows."""
    prefixes = {kind: kind for kind in result["metrics"]}
    return prefixes | ({"baseline": str(result["baseline"].get("name"))} if result.get("baseline") else {})


def _spread(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    prefixes = _prefixes(result)
    columns = {column for row in rows for column in row}
    metrics = {
        metric
        for prefix in prefixes
        for column in columns
        if column.startswith(f"{prefix}_") and (metric := column.removeprefix(f"{prefix}_"))
    }
    charts = []
    for metric in in_order(metrics):
        values = {
            name: [value for row in rows if (value := number(row.get(f"{prefix}_{metric}"))) is not None]
            for prefix, name in prefixes.items()
        }
        if any(values.values()):
            label = label_of(metric)
            charts.append(page.histogram(values, title=f"{label.name}{label.arrow}"))
    return page.section("Spread over the images", page.grid(*charts)) if charts else ""


def _pictures(result: Mapping[str, Any], shown: Mapping[str, Sequence[Shown]]) -> list[str]:
    count = 3 * sum(map(len, shown.values()))
    help_text = page.paragraph(
        "A click shows a picture at its full size, another closes it. The error is the absolute difference, mean "
        f"over channels, enlarged {ERROR_GAIN} times: black is none, white is {255 // ERROR_GAIN} of 255 or more."
    )
    sections = []
    for heading, images in shown.items():
        if images:
            cards = [_card(result, item, PICTURE_BYTES // count) for item in images]
            sections.append(page.section(f"{heading} images", help_text, *cards))
            help_text = ""
    return sections


def _card(result: Mapping[str, Any], item: Shown, max_bytes: int) -> str:
    """Return an image's input, reconstruction and error side by side, and its metrics."""
    channels, height, width = item.image.shape
    size = f"{width} x {height} px"
    bands = result["settings"].get("bands") or ()
    if bands:
        size += f", {channels} channels, of which {', '.join(map(str, bands[0]))} shown"
    elif channels not in (1, 3, 4):
        size += f", {channels} channels, of which {'the first three are' if channels > 3 else 'the first is'} shown"
    pictures = panels(item, bands)
    figures = [page.figure(to_picture(tensor), caption, max_bytes=max_bytes) for caption, tensor in pictures.items()]
    lines = []
    for prefix, name in _prefixes(result).items():
        columns = {column.removeprefix(f"{prefix}_"): column for column in item.row if column.startswith(f"{prefix}_")}
        values = {key: value for key, column in columns.items() if (value := number(item.row[column])) is not None}
        known = ", ".join(f"{label_of(key).name} {rounded(key, values[key])}" for key in in_order(values))
        lines += [page.paragraph(f"{name}: {known}", soft=True)] if known else []
    return page.card(item.name, f"no. {item.index}, {size}", page.beside(*figures), *lines)


def panels(item: Shown, bands: Sequence[Sequence[int]] = ()) -> dict[str, Tensor]:
    """Return what is shown of an image, side by side: input, reconstruction and error, by their captions.

    Args:
        item: The image.
        bands: Groups of channels, of which the first is shown; the error is the mean over all channels. Without them 4
            channels are RGBA, and colours count in the error as much as they are visible.
    """
    compared = [item.image, item.reconstruction.float()]
    shown = [x[list(bands[0])] if bands else x for x in compared]
    if len(item.image) == 4 and not bands:
        compared = [visible(x[None], (0, 0, 0))[0] for x in compared]
    return {
        "input": shown[0],
        "reconstruction": shown[1].nan_to_num(nan=-1),
        f"error x{ERROR_GAIN}": error_map(*compared),
    }


def error_map(image: Tensor, reconstruction: Tensor, gain: float = ERROR_GAIN) -> Tensor:
    """Return the absolute error of 8-bit pixels, mean over channels, times `gain`.

    Args:
        image: (C, H, W) in [-1, 1].
        reconstruction: The same shape.
        gain: Factor of the error.

    Returns:
        (1, H, W) in [-1, 1]: -1 is no error, 1 is 255 / gain levels or more, or a pixel that is not finite.
    """
    levels = (to_uint8(image).float() - to_uint8(reconstruction).float()).abs().mean(0, keepdim=True)
    bad = ~reconstruction.isfinite().all(0, keepdim=True)
    return torch.where(bad, 1.0, (gain * levels / 127.5 - 1).clamp(max=1))
