"""Shows the cost of a first stage from the section `cost` of a result of `eval recon`."""

from collections.abc import Mapping
from typing import Any

from latent_ae.metrics.labels import number, value_at

PLACES = {
    ("time (ms per image)", "encode"): (("seconds_per_image", "encode"), 1e3, "{:,.4g}"),
    ("time (ms per image)", "decode"): (("seconds_per_image", "decode"), 1e3, "{:,.4g}"),
    ("time (ms per image)", "whole"): (("seconds_per_image", "whole"), 1e3, "{:,.4g}"),
    ("peak memory (MB)", "encode"): (("peak_memory_bytes", "encode"), 1e-6, "{:,.0f}"),
    ("peak memory (MB)", "decode"): (("peak_memory_bytes", "decode"), 1e-6, "{:,.0f}"),
    ("latent (bits per pixel)", "fp16"): (("bits_per_pixel", "fp16"), 1, "{:.4g}"),
    ("latent (bits per pixel)", "indices"): (("bits_per_pixel", "indices"), 1, "{:.4g}"),
}
"""Keys in the section, factor and format of each number, by the name of its line and the part it applies to."""


def number_at(section: Any, *path: str) -> float | None:
    """Return the number under nested keys; None if there is none, because a result file may hold anything.

    Args:
        section: The section `cost`.
        *path: The keys, from the outermost.
    """
    return number(value_at(section, *path))


def cost_lines(section: Any) -> dict[tuple[str, str], str]:
    """Return the known numbers of a section as text, by the name of the line and the part it applies to.

    Args:
        section: The section `cost`; anything else gives no lines.
    """
    if not isinstance(section, Mapping):
        return {}
    lines = {
        line: form.format(factor * value)
        for line, (path, factor, form) in PLACES.items()
        if (value := number_at(section, *path)) is not None
    }
    sides = section.get("parameters")
    for side, parameters in sides.items() if isinstance(sides, Mapping) else ():
        if (count := number(parameters)) is not None:
            lines["parameters", str(side)] = f"{count:,.0f}"
    return lines


def conditions(section: Any) -> str:
    """Return device, precision and batches of the measured times as text; an empty string without times.

    Args:
        section: The section `cost`; anything else gives an empty string.
    """
    if number_at(section, "seconds_per_image", "whole") is None:
        return ""
    sides = section.get("image_px")
    pixels = " x ".join(str(side) for side in sides) if isinstance(sides, list) else "?"
    batch = f"batches of {section.get('batch_size')}, {pixels} px"
    return f"{section.get('device')}, {section.get('dtype')}, {batch}"
