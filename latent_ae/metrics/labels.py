"""How metrics are named, rounded and ordered wherever people read them."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal, NamedTuple

METRICS = ("psnr", "ssim", "ms_ssim", "lpips_vgg", "lpips_alex")
"""Measured image by image."""


class Label(NamedTuple):
    name: str
    better: Literal["higher", "lower"] | None
    """None: unknown."""
    digits: int | None
    """After the point; None: four significant ones."""

    @property
    def arrow(self) -> str:
        return {"higher": " ↑", "lower": " ↓", None: ""}[self.better]


LABELS = {
    "psnr": Label("PSNR (dB)", "higher", 2),
    "ssim": Label("SSIM", "higher", 4),
    "ms_ssim": Label("MS-SSIM", "higher", 4),
    "lpips_vgg": Label("LPIPS (VGG)", "lower", 4),
    "lpips_alex": Label("LPIPS (Alex)", "lower", 4),
    "fid": Label("rFID", "lower", 3),
    "kid": Label("KID", "lower", 5),
}
NAMES = {
    **{key: LABELS[key].name for key in METRICS},
    "frechet_vgg16": "Fréchet (VGG16)",
    "frechet_alexnet": "Fréchet (AlexNet)",
}
"""What `ReconstructionMetrics` gives, as training and model cards call it."""
ARROWS = "↑ higher is better, ↓ lower is better."
FRECHET, KERNEL = "frechet_", "kernel_"


def label_of(metric: str) -> Label:
    """The label of any metric; one that is not known is named by its key, without a direction."""
    if metric.startswith(FRECHET):
        return Label(f"Fréchet, {metric.removeprefix(FRECHET)} (not FID)", "lower", 3)
    if metric.startswith(KERNEL):
        return Label(f"kernel distance, {metric.removeprefix(KERNEL)} (not KID)", "lower", 5)
    return LABELS.get(metric, Label(metric, None, None))


def in_order(metrics: Iterable[str]) -> list[str]:
    """Each once: the known ones in the order of `LABELS`, then the others by name."""
    known = list(LABELS)
    return sorted(set(metrics), key=lambda metric: (known.index(metric) if metric in LABELS else len(known), metric))


def rounded(metric: str, value: float) -> str:
    digits = label_of(metric).digits
    return (f"{value:.4g}" if digits is None else f"{value:.{digits}f}").replace("-", "−")


def span(metric: str, interval: tuple[float, float] | None) -> str:
    """An interval as text; empty for none."""
    return "" if interval is None else " – ".join(rounded(metric, end) for end in interval)


def difference(metric: str, value: float) -> str:
    """A difference of two values: with its sign, and a digit more, because its interval is the narrower one."""
    digits = label_of(metric).digits
    return (f"{value:+.4g}" if digits is None else f"{value:+.{digits + 1}f}").replace("-", "−")


def difference_span(metric: str, interval: tuple[float, float] | None) -> str:
    return "" if interval is None else " to ".join(difference(metric, end) for end in interval)


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are real ones, too
        return None
    return float(value) if math.isfinite(value) else None


def pair(value: Any) -> tuple[float, float] | None:
    """Both ends of an interval, or None for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = map(number, value)
    return None if low is None or high is None else (low, high)


def short_name(location: Any, otherwise: str = "") -> str:
    """The last part of a folder, file or hub id that says something; `vae`, which is a pipeline's or a run, with the
    part before it."""
    parts = [part for part in str(location or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    while len(parts) > 1 and parts[-1] == "export":
        parts.pop()
    return "/".join(parts[-2:] if parts[-1] == "vae" else parts[-1:]) if parts else otherwise
