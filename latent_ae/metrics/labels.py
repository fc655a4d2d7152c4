"""Names, rounding and order of the metrics in tables and reports."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

from latent_ae.config import Bands

METRICS = ("psnr", "ssim", "ms_ssim", "lpips_vgg", "lpips_alex", "dists", "psnr_alpha")
"""Metrics that are measured for each image."""


class Label(NamedTuple):
    """How a metric is shown."""

    name: str
    better: Literal["higher", "lower"] | None
    """The better direction; None where it is unknown."""
    digits: int | None
    """Digits after the point; None shows four significant digits."""

    @property
    def arrow(self) -> str:
        return {"higher": " ↑", "lower": " ↓", None: ""}[self.better]


LABELS = {
    "psnr": Label("PSNR (dB)", "higher", 2),
    "ssim": Label("SSIM", "higher", 4),
    "ms_ssim": Label("MS-SSIM", "higher", 4),
    "lpips_vgg": Label("LPIPS (VGG)", "lower", 4),
    "lpips_alex": Label("LPIPS (Alex)", "lower", 4),
    "dists": Label("DISTS", "lower", 4),
    "psnr_alpha": Label("PSNR of alpha (dB)", "higher", 2),
    "fid": Label("rFID", "lower", 3),
    "kid": Label("KID", "lower", 5),
    "fd_dinov2": Label("FD-DINOv2", "lower", 2),
    "kd_dinov2": Label("KD-DINOv2", "lower", 4),
    "cmmd": Label("CMMD", "lower", 4),
    "ifid": Label("iFID", "lower", 3),
    **{f"shift_{name}": Label(f"{name} shift (levels)", None, 2) for name in ("red", "green", "blue", "alpha", "grey")},
    # of latents
    "kl_nats_per_dim": Label("KL (nats per value)", None, 3),
    "effective_rank": Label("effective rank", None, 2),
    "dead_channels": Label("dead channels", "lower", 0),
    "noise_share": Label("posterior's share of the variance", None, None),
    "outliers": Label("share of outliers", "lower", None),
    "excess_kurtosis": Label("excess kurtosis", None, 2),
    "frechet_to_normal": Label("Fréchet distance to N(0, I)", "lower", 3),
    "spectrum_slope": Label("slope of the spectrum", None, 2),
    "high_share": Label("share of high frequencies", None, 3),
    "psnr_apart": Label("equivariance (dB)", "higher", 2),
    # of text
    "ned_reconstruction": Label("NED of the text", "higher", 3),
    "ned_lost": Label("NED lost", "lower", 3),
    "ned_agreement": Label("NED of both readings", "higher", 3),
    "exact_reconstruction": Label("share read exactly", "higher", 3),
    # of other evaluations
    "bits_per_dimension": Label("bits per dimension", "lower", 4),
    "bits_per_code": Label("bits per code", "lower", 3),
    "rate": Label("rate (bits per dimension)", None, 4),
    "distortion": Label("distortion (bits per dimension)", None, 4),
    "accuracy": Label("accuracy", "higher", 3),
    "auroc": Label("AUROC", "higher", 3),
    "mig": Label("MIG", "higher", 3),
    "factor_vae_score": Label("FactorVAE score", "higher", 3),
    "dci_disentanglement": Label("disentanglement (DCI)", "higher", 3),
    "dci_completeness": Label("completeness (DCI)", "higher", 3),
    "dci_informativeness": Label("informativeness (DCI)", "higher", 3),
    "total_correlation": Label("total correlation (nats)", "lower", 3),
    "length": Label("length of the path, relative to the direct one", None, 3),
    "largest_step": Label("largest step, relative to the mean", None, 3),
    "middle_from_cross_fade": Label("middle from the cross-fade (levels)", None, 2),
}
NAMES = {
    **{key: LABELS[key].name for key in METRICS},
    "frechet_vgg16": "Fréchet (VGG16)",
    "frechet_alexnet": "Fréchet (AlexNet)",
}
"""Names of the metrics of `ReconstructionMetrics.summary`, as training logs and model cards show them."""
ARROWS = "↑ higher is better, ↓ lower is better."
FRECHET, KERNEL, SHIFT = "frechet_", "kernel_", "shift_"
PRECISION, RECALL = "precision_", "recall_"
PUBLISHED = {"inception": ("fid", "kid"), "dinov2": ("fd_dinov2", "kd_dinov2"), "clip": (f"{FRECHET}clip", "cmmd")}
"""Names of the Fréchet and the kernel distance of features that are those of published numbers."""
CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
"""Names of an image's channels by their number; channels of other images have numbers."""


def shift_keys(channels: int, bands: Bands = ()) -> list[str]:
    """Return the metric of each channel's mean shift, for images of this many channels.

    Args:
        channels: Number of channels.
        bands: Groups of channels that are looked at together; with any, channels are no colours but have numbers.
    """
    names = () if bands else CHANNELS.get(channels, ())
    return [f"{SHIFT}{name}" for name in names or [f"{number:02d}" for number in range(channels)]]


def distance_names(features: str) -> tuple[str, str]:
    """Return the names of the Fréchet and the kernel distance of features.

    Args:
        features: `inception`, `dinov2` or `clip` if they are those of published numbers; else any other name, such as
            `dinov2_CHECKSUM`.
    """
    return PUBLISHED.get(features, (f"{FRECHET}{features}", f"{KERNEL}{features}"))


def label_of(metric: str, job: str = "recon") -> Label:
    """Return the label of any metric; an unknown metric is named by its key and has no direction.

    Args:
        metric: The metric.
        job: The evaluation. An FID is called rFID only where it compares reconstructions with their originals.
    """
    if metric == "fid" and job in ("diffusion", "sample"):
        return LABELS["fid"]._replace(name="FID")
    if metric in LABELS:
        return LABELS[metric]
    if metric.startswith(FRECHET):
        return Label(f"Fréchet, {metric.removeprefix(FRECHET)} (not FID)", "lower", 3)
    if metric.startswith(KERNEL):
        return Label(f"kernel distance, {metric.removeprefix(KERNEL)} (not KID)", "lower", 5)
    for prefix in (PRECISION, RECALL):
        if metric.startswith(prefix):
            return Label(f"{prefix.rstrip('_')}, {metric.removeprefix(prefix)}", "higher", 4)
    if metric.startswith(SHIFT):
        return Label(f"channel {metric.removeprefix(SHIFT)} shift (levels)", None, 2)
    return Label(metric, None, None)


def in_order(metrics: Iterable[str]) -> list[str]:
    """Return the metrics without duplicates: known ones in the order of `LABELS`, then the others by name."""
    known = list(LABELS)
    return sorted(set(metrics), key=lambda metric: (known.index(metric) if metric in LABELS else len(known), metric))


def rounded(metric: str, value: float) -> str:
    """Return a value of the metric as text, with as many digits as its label says."""
    digits = label_of(metric).digits
    # adding zero turns minus zero into zero
    return (f"{value:.4g}" if digits is None else f"{round(value, digits) + 0.0:.{digits}f}").replace("-", "−")


def span(metric: str, interval: tuple[float, float] | None) -> str:
    """Return an interval as text; an empty string for None."""
    return "" if interval is None else " – ".join(rounded(metric, end) for end in interval)


def difference(metric: str, value: float) -> str:
    """Return the difference of two values of a metric as text.

    It has its sign, and one digit more than the values, because its interval is narrower than theirs.
    """
    digits = label_of(metric).digits
    return (f"{value:+.4g}" if digits is None else f"{value:+.{digits + 1}f}").replace("-", "−")


def difference_span(metric: str, interval: tuple[float, float] | None) -> str:
    """Return the interval of a difference as text; an empty string for None."""
    return "" if interval is None else " to ".join(difference(metric, end) for end in interval)


def number(value: Any) -> float | None:
    """Return `value` as a float if it is a finite number, else None (a result file may hold anything in its place)."""
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are real ones, too
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def value_at(document: Any, *keys: str) -> Any:
    """Return what stands under nested keys, from the outermost on, or None (a result file may hold anything)."""
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def pair(value: Any) -> tuple[float, float] | None:
    """Return `value` as the two ends of an interval, or None if it is not a pair of finite numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = map(number, value)
    return None if low is None or high is None or low > high else (low, high)


def short_name(location: Any, otherwise: str = "") -> str:
    """Return the last meaningful part of a folder, file or hub id, or `otherwise` if there is none.

    A last part `export` is dropped, and `vae` (a pipeline's or a run's) is shown with the part before it.
    """
    parts = [part for part in str(location or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
    while len(parts) > 1 and parts[-1] == "export":
        parts.pop()
    return "/".join(parts[-2:] if parts[-1] == "vae" else parts[-1:]) if parts else otherwise
