"""How near reconstructions come to their inputs: PSNR, SSIM, MS-SSIM and LPIPS per image.

Unless told otherwise every metric reads what a file would hold: both images rounded to uint8 by `images.to_uint8`. One
row per image is kept and means are formed over the rows of all processes, so they do not depend on the split.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_ae.data.images import to_uint8
from latent_ae.metrics.distances import frechet_of_features
from latent_ae.metrics.labels import METRICS
from latent_ae.pretrained.lpips import LPIPS, TRUNKS, Net

Row = dict[str, Any]

PSNR_CAP_DB = 100.0
"""Given to identical images, whose PSNR is infinite: JSON has no infinity, and one would swallow the mean."""
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_MIN_PX = SSIM_WINDOW_PX * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
"""176: smaller images have no room for the window at the coarsest scale."""
RESAMPLES = 1000
FEWEST = 20
"""Images under which a bootstrap's interval is much too narrow to be given."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB, data range 255, at most `PSNR_CAP_DB`.

    `a`, `b`: uint8 NCHW. Returns float64 (N,). The squared error is summed in integers, so it is exact.
    """
    _check_uint8_pair(a, b)
    squared = (a.long() - b.long()).square().flatten(1).sum(1)
    mse = squared.double() / a[0].numel()
    return (10 * torch.log10(255.0**2 / mse)).clamp(max=PSNR_CAP_DB)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image: uint8 NCHW, twice -> float64 (N,). See `similarities`."""
    _check_uint8_pair(a, b)
    return similarities(a.double() / 255, b.double() / 255)[0]


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity of each image: uint8 NCHW, twice -> float64 (N,). See `similarities`."""
    _check_uint8_pair(a, b)
    return similarities(a.double() / 255, b.double() / 255)[1]


def similarities(a: Tensor, b: Tensor, data_range: float = 1.0) -> tuple[Tensor, Tensor]:
    """SSIM (Wang et al. 2004: Gaussian window of 11 px, sigma 1.5 px) and MS-SSIM (Wang et al. 2003, five scales).

    `a`, `b`: NCHW, whose values span `data_range`. SSIM's first factor is a ratio of means, so the same images in
    [-1, 1] with a range of 2 have another SSIM than in [0, 1]. Returns float64 (N,) twice, means over channels and over
    those positions whose window lies inside the image, like scikit-image's SSIM with `gaussian_weights=True,
    use_sample_covariance=False`; nan for images smaller than the window, or than MS_SSIM_MIN_PX. Both come from one
    pass, in float64 because variances are differences of nearly equal numbers, and in sums of shifted images because
    convolutions in float64 are fifteen times as slow.
    """
    a, b = a.double(), b.double()
    missing = torch.full((len(a),), math.nan, dtype=torch.float64, device=a.device)
    if min(a.shape[-2:]) < SSIM_WINDOW_PX:
        return missing, missing
    similarity, contrast = _similarity(a, b, data_range)
    if min(a.shape[-2:]) < MS_SSIM_MIN_PX:
        return similarity, missing
    finest, product = similarity, torch.ones_like(similarity)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
            similarity, contrast = _similarity(a, b, data_range)
        coarsest = scale == len(MS_SSIM_WEIGHTS) - 1
        # a negative mean has no fractional power
        product = product * (similarity if coarsest else contrast).clamp(min=0) ** weight
    return finest, product


def _similarity(a: Tensor, b: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Means over an image of SSIM and of its contrast-structure factor, float64 (N,) each."""
    c1, c2 = SSIM_C1 * data_range**2, SSIM_C2 * data_range**2
    similarity, contrast = [], []
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):  # by channel: a quarter of the memory
        mean_x, mean_y, squares, product = _windowed(torch.stack([x, y, x * x + y * y, x * y]))
        means, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
        factor = (2 * (product - means) + c2) / (squares - mean_squares + c2)
        contrast.append(factor.flatten(1).mean(1))
        factor = factor * (2 * means + c1) / (mean_squares + c1)
        similarity.append(factor.flatten(1).mean(1))
    return torch.stack(similarity).mean(0), torch.stack(contrast).mean(0)


def _windowed(images: Tensor) -> Tensor:
    """Gaussian-weighted means of the windows that lie inside: (..., H, W) -> (..., H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=torch.float64) - SSIM_WINDOW_PX // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA_PX**2))
    for dim in (-1, -2):
        size = images.shape[dim] - SSIM_WINDOW_PX + 1
        total = torch.zeros_like(images.narrow(dim, 0, size))
        for offset, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(images.narrow(dim, offset, size), alpha=weight)
        images = total
    return images


def _check_uint8_pair(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"uint8 images are needed, not {a.dtype} and {b.dtype}; images.to_uint8 makes them")
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"two NCHW batches of one shape are needed, not {tuple(a.shape)} and {tuple(b.shape)}")


class Compared(NamedTuple):
    """What `compare` measures of one batch."""

    metrics: dict[str, dict[str, Tensor]]
    """By kind of reconstruction, then by metric: float64 (N,), nan where it cannot be had or pixels are not finite."""
    features: dict[Net, list[Tensor]]
    """By network of LPIPS: its last stage averaged over the image, float32 (N, D), of the inputs and then of each kind;
    empty where images are too small or of other channels."""


@torch.no_grad()
def compare(
    inputs: Tensor,
    reconstructions: Mapping[str, Tensor],
    lpips: Mapping[Net, LPIPS],
    *,
    rounded: bool = True,
    pixels: Mapping[str, Tensor] | None = None,
) -> Compared:
    """Measures kinds of reconstruction of the same inputs: float NCHW in [-1, 1], all on one device.

    PSNR is of 8-bit pixels always; SSIM and LPIPS are too if `rounded`, else of the floats in [-1, 1] (LPIPS not
    clamped), as some published protocols do. `pixels` gives the 8-bit images of the kinds, and of the inputs as
    "input", where they are made by another rule than `to_uint8`. The trunks of LPIPS see the inputs once for all kinds.
    """
    kinds = list(reconstructions)
    pixels = pixels or {"input": to_uint8(inputs)} | {kind: to_uint8(reconstructions[kind]) for kind in kinds}
    metrics: dict[str, dict[str, Tensor]] = {}
    for kind in kinds:
        a, b = (pixels["input"], pixels[kind])
        if rounded:
            similarity, multi_scale = similarities(a.double() / 255, b.double() / 255)
        else:  # as torchmetrics with data_range=(-1, 1): clamped, not shifted
            similarity, multi_scale = similarities(inputs.clamp(-1, 1), reconstructions[kind].clamp(-1, 1), 2.0)
        metrics[kind] = {"psnr": psnr(a, b), "ssim": similarity, "ms_ssim": multi_scale}
    seen = [inputs, *reconstructions.values()]
    if rounded:
        seen = [pixels[kind].float() / 127.5 - 1 for kind in ("input", *kinds)]
    features: dict[Net, list[Tensor]] = {}
    for net, distance in lpips.items():
        if inputs.shape[1] in (1, 3) and min(inputs.shape[-2:]) >= TRUNKS[net].min_px:
            # an ambient autocast is for training; measurements are float32
            with torch.autocast(inputs.device.type, enabled=False):
                distances, features[net] = distance.compare(seen[0].float(), [image.float() for image in seen[1:]])
        else:
            distances = [torch.full((len(inputs),), math.nan)] * len(kinds)
        for kind, values in zip(kinds, distances, strict=True):
            metrics[kind][f"lpips_{net}"] = values.double().to(inputs.device)
    for position, kind in enumerate(kinds, start=1):  # as 8-bit pixels, a NaN would pass for a dark one
        bad = ~reconstructions[kind].isfinite().flatten(1).all(1)
        metrics[kind] = {key: values.masked_fill(bad, math.nan) for key, values in metrics[kind].items()}
        for parts in features.values():
            parts[position] = parts[position].masked_fill(bad[:, None], math.nan)
    return Compared(metrics, features)


class ReconstructionMetrics:
    """The metrics of many images in memory: rows per image, their means, and a Fréchet distance.

        metrics = ReconstructionMetrics("cuda")
        metrics.update(indices, names, inputs, reconstructions)     # as often as there are batches
        metrics.gather()                                            # rows of all processes, each image once
        metrics.summary()                                           # {"n": 500, "psnr": 27.5, ...}

    `lpips_nets` may be empty. Weights are looked up at once, with UserError when they cannot be had; networks that
    exist already, by "vgg" or "alex", can be given as `lpips` instead. The Fréchet distance is that of the features
    that LPIPS's networks leave behind, named after them: it costs nothing and is not an FID. Sets of fewer than
    `frechet_from` images have none.
    """

    def __init__(
        self,
        device: torch.device | str,
        lpips_nets: Sequence[Net] = ("vgg", "alex"),
        *,
        lpips: Mapping[Net, LPIPS] | None = None,
        frechet_from: int = 2,
    ):
        self.frechet_from = frechet_from
        self.device = torch.device(device)
        self.lpips = dict(lpips) if lpips is not None else {net: LPIPS(net).to(self.device) for net in lpips_nets}
        self._rows: dict[int, Row] = {}
        self._features: dict[int, dict[Net, np.ndarray]] = {}

    def update(self, indices: Iterable[int], names: Iterable[str], inputs: Tensor, reconstructions: Tensor) -> None:
        """Measures one batch: float NCHW in [-1, 1], any device; `indices` number the images of the whole set.

        An image that was seen already (a padded duplicate) is not counted again.
        """
        inputs, reconstructions = inputs.to(self.device), reconstructions.to(self.device)
        compared = compare(inputs, {"": reconstructions}, self.lpips)
        columns = json_columns(compared.metrics[""])
        features = {net: [part.cpu() for part in both] for net, both in compared.features.items()}
        channels, height, width = inputs.shape[1:]
        for position, (index, name) in enumerate(zip(indices, names, strict=True)):
            row = {"index": int(index), "name": name, "channels": channels, "height": height, "width": width}
            self._rows.setdefault(int(index), row | {key: column[position] for key, column in columns.items()})
            pairs = {net: torch.stack([part[position] for part in both]) for net, both in features.items()}
            self._features.setdefault(int(index), {net: pair.numpy() for net, pair in pairs.items()})

    def gather(self) -> None:
        """Brings together the rows of all processes, on every process. Every process must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self._rows, self._features))
        self._rows = {index: row for rows, _ in reversed(parts) for index, row in rows.items()}
        self._features = {index: kept for _, features in reversed(parts) for index, kept in features.items()}

    def rows(self) -> list[Row]:
        """One dict per image, by index. A metric that cannot be had of an image is None."""
        return [self._rows[index] for index in sorted(self._rows)]

    def summary(self) -> dict[str, Any]:
        """`n` (images), each metric's mean over the images that have it, `frechet_vgg16` or `frechet_alexnet` of enough
        images, and `notes` on what images lack."""
        summary = summarise(self.rows())
        for net in self.lpips:
            pairs = [self._features[index].get(net) for index in sorted(self._features)]
            found = np.array([pair for pair in pairs if pair is not None and np.isfinite(pair).all()])
            if len(found) >= max(2, self.frechet_from):
                summary[f"frechet_{TRUNKS[net].weights}"] = frechet_of_features(found[:, 0], found[:, 1])
        return summary


def json_columns(columns: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """A batch's metrics as numbers, None for nan. Waits for the device."""
    return {key: [v if math.isfinite(v) else None for v in column.tolist()] for key, column in columns.items()}


def summarise(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> dict[str, Any]:
    """Means over rows (keys: `prefix` and a metric), JSON-ready: what cannot be measured is None."""
    summary: dict[str, Any] = {"n": len(rows)}
    notes = []
    for key in METRICS:
        column = [(row, row[prefix + key]) for row in rows if prefix + key in row]
        values = [value for _, value in column if value is not None]
        if key == "ms_ssim" and not values:  # of small images, which nobody expects to have it
            continue
        if column:
            # fsum does not depend on the order
            summary[key] = math.fsum(values) / len(values) if values else None
        lacking = [row for row, value in column if value is None]
        if lacking:
            notes.append(f"{key}: {len(lacking)} of {len(rows)} images left out, {missing_reason(key, lacking[0])}")
    return summary | ({"notes": notes} if notes else {})


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95 % percentile bootstrap interval of a mean over images (Efron 1979), the same for the same values and seed."""
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def missing_reason(key: str, row: Mapping[str, Any]) -> str:
    if key.startswith("lpips_") and row["channels"] not in (1, 3):
        return f"LPIPS is defined for 1 or 3 channels and they have {row['channels']}"
    least = {"ssim": SSIM_WINDOW_PX, "ms_ssim": MS_SSIM_MIN_PX}.get(key, 1)
    if key.startswith("lpips_"):
        least = {f"lpips_{net}": trunk.min_px for net, trunk in TRUNKS.items()}[key]
    if min(row["height"], row["width"]) < least:
        return f"a side is shorter than {least} px"
    return "their reconstruction holds NaN or infinity"
