"""How close reconstructions are to their inputs: PSNR, SSIM, MS-SSIM and LPIPS per image.

By default every metric compares 8-bit images, as a file would hold them: both are rounded by `images.to_uint8`. One row
is kept per image, and means are taken over the rows of all processes, so they do not depend on how images were split.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latent_ae.config import Bands
from latent_ae.data.images import to_uint8, visible
from latent_ae.metrics.distances import frechet_of_features
from latent_ae.metrics.labels import METRICS
from latent_ae.pretrained.dists import DISTS
from latent_ae.pretrained.dists import MIN_PX as DISTS_MIN_PX
from latent_ae.pretrained.lpips import LPIPS, TRUNKS, Net

Row = dict[str, Any]

PSNR_CAP_DB = 100.0
"""PSNR of identical images in place of infinity: JSON has no infinity, and one would dominate the mean."""
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
UNIFORM_PX = 7
"""Side of the window of scikit-image's SSIM without Gaussian weights."""
Window = Literal["gaussian", "mirrored", "uniform"]
Compares = Literal["levels", "floats", "unit floats"]
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_MIN_PX = SSIM_WINDOW_PX * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
"""176 px: in smaller images the window does not fit at the coarsest scale."""
RESAMPLES = 1000
FEWEST = 20
"""With fewer images a bootstrap interval is much too narrow, so none is given."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, at most `PSNR_CAP_DB` (100).

    The data range is 255. The squared error is summed in integers, so it is exact.

    Args:
        a: (N, C, H, W) uint8.
        b: (N, C, H, W) uint8.

    Returns:
        (N,) float64.

    Raises:
        ValueError: If the images are not uint8 or their shapes differ.
    """
    _check_uint8_pair(a, b)
    squared = (a.long() - b.long()).square().flatten(1).sum(1)
    mse = squared.double() / a[0].numel()
    return (10 * torch.log10(255.0**2 / mse)).clamp(max=PSNR_CAP_DB)


def psnr_of_floats(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, at most `PSNR_CAP_DB` (100), without rounding.

    Args:
        a: (N, C, H, W) float in [-1, 1]; the range is 2.
        b: The same shape.

    Returns:
        (N,) float64.
    """
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(2.0**2 / mse)).clamp(max=PSNR_CAP_DB)


def colour_shift(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of `b - a` over the pixels of each channel, in 8-bit levels.

    It is summed in integers, so it is exact.

    Args:
        a: (N, C, H, W) uint8, the originals.
        b: (N, C, H, W) uint8, their reconstructions.

    Returns:
        (N, C) float64 in [-255, 255].

    Raises:
        ValueError: If the images are not uint8 or their shapes differ.
    """
    _check_uint8_pair(a, b)
    return (b.long() - a.long()).sum((2, 3)).double() / a[0, 0].numel()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004) of each image; `similarities` describes the variant.

    Args:
        a: (N, C, H, W) uint8.
        b: (N, C, H, W) uint8.

    Returns:
        (N,) float64; nan for images with a side under 11 px.

    Raises:
        ValueError: If the images are not uint8 or their shapes differ.
    """
    _check_uint8_pair(a, b)
    return similarities(a.double() / 255, b.double() / 255)[0]


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the multi-scale structural similarity (Wang et al. 2003) of each image; see `similarities`.

    Args:
        a: (N, C, H, W) uint8.
        b: (N, C, H, W) uint8.

    Returns:
        (N,) float64; nan for images with a side under 176 px.

    Raises:
        ValueError: If the images are not uint8 or their shapes differ.
    """
    _check_uint8_pair(a, b)
    return similarities(a.double() / 255, b.double() / 255)[1]


def similarities(a: Tensor, b: Tensor, data_range: float = 1.0, window: Window = "gaussian") -> tuple[Tensor, Tensor]:
    """Return SSIM (Wang et al. 2004: Gaussian window of 11 px, sigma 1.5 px) and MS-SSIM (Wang et al. 2003, 5 scales).

    Both are means over channels and over the positions whose window lies inside the image, like scikit-image's SSIM
    with `gaussian_weights=True, use_sample_covariance=False`. SSIM's first factor is a ratio of means, so the same
    images in [-1, 1] with a range of 2 have another SSIM than in [0, 1]. One pass computes both, in float64 because
    variances are differences of nearly equal numbers, and as sums of shifted images because float64 convolutions are
    fifteen times as slow.

    Args:
        a: (N, C, H, W), any type.
        b: (N, C, H, W).
        data_range: Largest minus smallest possible value.
        window: Windows of SSIM; MS-SSIM always has the Gaussian ones inside the image. "mirrored" also counts those
            that extend over mirrored borders, as torchmetrics does; "uniform" are the windows of 7 px that
            scikit-image's `structural_similarity` takes by default, with the sample covariance.

    Returns:
        SSIM and MS-SSIM, (N,) float64 each; nan for images with a side under 11 px and 176 px.
    """
    a, b = a.double(), b.double()
    missing = torch.full((len(a),), math.nan, dtype=torch.float64, device=a.device)
    if min(a.shape[-2:]) < SSIM_WINDOW_PX:
        return missing, missing
    finest = similarity, contrast = _similarity(a, b, data_range)
    if window == "mirrored":
        padding = (SSIM_WINDOW_PX // 2,) * 4
        finest = _similarity(F.pad(a, padding, mode="reflect"), F.pad(b, padding, mode="reflect"), data_range)
    elif window == "uniform":
        finest = _similarity(a, b, data_range, [1 / UNIFORM_PX] * UNIFORM_PX, 1 + 1 / (UNIFORM_PX**2 - 1))
    if min(a.shape[-2:]) < MS_SSIM_MIN_PX:
        return finest[0], missing
    product = torch.ones_like(similarity)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
            similarity, contrast = _similarity(a, b, data_range)
        coarsest = scale == len(MS_SSIM_WEIGHTS) - 1
        # a negative mean has no fractional power
        product = product * (similarity if coarsest else contrast).clamp(min=0) ** weight
    return finest[0], product


def _gaussian_weights() -> list[float]:
    """Return the weights of SSIM's window along a side."""
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=torch.float64) - SSIM_WINDOW_PX // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA_PX**2))
    numbers: list[float] = (weights / weights.sum()).tolist()
    return numbers


def _similarity(
    a: Tensor, b: Tensor, data_range: float, weights: Sequence[float] | None = None, norm: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the means over each image of SSIM and of its contrast-structure factor, (N,) float64 each.

    Args:
        a: (N, C, H, W) float64.
        b: (N, C, H, W) float64.
        data_range: Largest minus smallest possible value.
        weights: Weights of the window along a side; None takes the Gaussian ones.
        norm: Factor of variances and covariance.
    """
    weights = weights or _gaussian_weights()
    c1, c2 = SSIM_C1 * data_range**2, SSIM_C2 * data_range**2
    similarity, contrast = [], []
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):  # by channel: a quarter of the memory
        mean_x, mean_y, squares, product = _windowed(torch.stack([x, y, x * x + y * y, x * y]), weights)
        means, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
        factor = (2 * norm * (product - means) + c2) / (norm * (squares - mean_squares) + c2)
        contrast.append(factor.flatten(1).mean(1))
        factor = factor * (2 * means + c1) / (mean_squares + c1)
        similarity.append(factor.flatten(1).mean(1))
    return torch.stack(similarity).mean(0), torch.stack(contrast).mean(0)


def _windowed(images: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the weighted means of all windows of n px inside the image: (..., H, W) -> (..., H - n + 1, W - n + 1)."""
    for dim in (-1, -2):
        size = images.shape[dim] - len(weights) + 1
        total = torch.zeros_like(images.narrow(dim, 0, size))
        for offset, weight in enumerate(weights):
            total.add_(images.narrow(dim, offset, size), alpha=weight)
        images = total
    return images


def _check_uint8_pair(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"uint8 images are needed, not {a.dtype} and {b.dtype}; images.to_uint8 makes them")
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"two NCHW batches of one shape are needed, not {tuple(a.shape)} and {tuple(b.shape)}")


class Compared(NamedTuple):
    """Results of `compare` for one batch of N images."""

    metrics: dict[str, dict[str, Tensor]]
    """(N,) float64 by kind of reconstruction, then by metric; nan where it is undefined or pixels are not finite."""
    features: dict[Net, list[Tensor]]
    """Last-stage features of each LPIPS network, averaged over the image: (N, D) float32 of the inputs, then of each
    kind. A network is missing where images are too small for it or do not have 1 or 3 channels."""


@torch.no_grad()
def compare(
    inputs: Tensor,
    reconstructions: Mapping[str, Tensor],
    lpips: Mapping[Net, LPIPS],
    *,
    dists: DISTS | None = None,
    similarity_of: Compares = "levels",
    psnr_of: Literal["levels", "floats"] = "levels",
    window: Window = "gaussian",
    pixels: Mapping[str, Tensor] | None = None,
    alpha: bool = False,
    bands: Bands = (),
) -> Compared:
    """Measure one or more reconstructions of the same images: PSNR, SSIM, MS-SSIM and LPIPS of each image.

    The trunks of LPIPS run once on the inputs for all kinds.

    Args:
        inputs: (N, C, H, W) float in [-1, 1].
        reconstructions: Tensors like `inputs`, on the same device, by kind (a name of the caller's choice).
        lpips: LPIPS networks by name; may be empty.
        dists: The network of DISTS; None does not measure it.
        similarity_of: What SSIM, MS-SSIM, LPIPS and DISTS compare: 8-bit levels, or floats as some published protocols
            do. SSIM is then of clamped "floats" in [-1, 1], or of "unit floats" in [0, 1]; LPIPS and DISTS are of
            floats that are not clamped.
        psnr_of: What PSNR compares: 8-bit levels, or clamped floats.
        window: Windows of SSIM, see `similarities`.
        pixels: uint8 images by kind, and those of the inputs as "input", where they follow another rule than
            `to_uint8`.
        alpha: The fourth channel is alpha and the others are composites, as `images.visible` returns them: `psnr_alpha`
            is measured besides, and all else of the composites.
        bands: Groups of channels; LPIPS is the mean over them, and there are no features. () takes whole images.
    """
    kinds = list(reconstructions)
    pixels = pixels or {"input": to_uint8(inputs)} | {kind: to_uint8(reconstructions[kind]) for kind in kinds}
    opacity = {kind: values[:, 3:] for kind, values in pixels.items()}
    if alpha:
        inputs, reconstructions = inputs[:, :3], {kind: reconstructions[kind][:, :3] for kind in kinds}
        pixels = {kind: values[:, :3] for kind, values in pixels.items()}
    metrics: dict[str, dict[str, Tensor]] = {}
    for kind in kinds:
        a, b = pixels["input"], pixels[kind]
        x, y = inputs.clamp(-1, 1), reconstructions[kind].clamp(-1, 1)
        if similarity_of == "levels":
            similarity, multi_scale = similarities(a.double() / 255, b.double() / 255, 1.0, window)
        elif similarity_of == "floats":  # as torchmetrics with data_range=(-1, 1): clamped, not shifted
            similarity, multi_scale = similarities(x, y, 2.0, window)
        else:
            similarity, multi_scale = similarities((x + 1) / 2, (y + 1) / 2, 1.0, window)
        ratio = psnr(a, b) if psnr_of == "levels" else psnr_of_floats(x, y)
        metrics[kind] = {"psnr": ratio, "ssim": similarity, "ms_ssim": multi_scale}
        if alpha:
            metrics[kind]["psnr_alpha"] = psnr(opacity["input"], opacity[kind])
    images = [inputs, *reconstructions.values()]
    if similarity_of == "levels":
        images = [pixels[kind].float() / 127.5 - 1 for kind in ("input", *kinds)]
    features: dict[Net, list[Tensor]] = {}
    shortest = min(inputs.shape[-2:]) if bands or inputs.shape[1] in (1, 3) else 0
    # an ambient autocast is for training; measurements are float32
    with torch.autocast(inputs.device.type, enabled=False):
        first, *others = (x.float() for x in images)
        groups = [[x[:, list(group)] for x in (first, *others)] for group in bands]
        distances: dict[str, list[Tensor]] = {}
        for net, distance in lpips.items():
            if shortest >= TRUNKS[net].min_px and bands:
                distances[f"lpips_{net}"] = _means([distance.compare(one, rest)[0] for one, *rest in groups])
            elif shortest >= TRUNKS[net].min_px:
                distances[f"lpips_{net}"], features[net] = distance.compare(first, others)
            else:
                distances[f"lpips_{net}"] = [torch.full((len(inputs),), math.nan)] * len(kinds)
        if dists is not None and shortest >= DISTS_MIN_PX:
            distances["dists"] = _means([dists.compare(one, rest) for one, *rest in groups or [[first, *others]]])
        elif dists is not None:
            distances["dists"] = [torch.full((len(inputs),), math.nan)] * len(kinds)
    for key, found in distances.items():
        for kind, values in zip(kinds, found, strict=True):
            metrics[kind][key] = values.double().to(inputs.device)
    for position, kind in enumerate(kinds, start=1):  # rounding to 8 bits turns a NaN into a dark pixel
        bad = ~reconstructions[kind].isfinite().flatten(1).all(1)
        metrics[kind] = {key: values.masked_fill(bad, math.nan) for key, values in metrics[kind].items()}
        for parts in features.values():
            parts[position] = parts[position].masked_fill(bad[:, None], math.nan)
    return Compared(metrics, features)


def _means(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the mean over groups of channels of each kind's distances."""
    return [torch.stack(values).mean(0) for values in zip(*groups, strict=True)]


class ReconstructionMetrics:
    """Collects the metrics of many images in memory: rows per image, their means, and a Fréchet distance.

        metrics = ReconstructionMetrics("cuda")
        metrics.update(indices, names, inputs, reconstructions)     # once per batch
        metrics.gather()                                            # rows of all processes, each image once
        metrics.summary()                                           # {"n": 500, "psnr": 27.5, ...}

    The Fréchet distance uses the features of the LPIPS networks and is named after them (`frechet_vgg16`): it costs
    nothing extra and is not an FID.

    Args:
        device: Where the metrics are computed.
        lpips_nets: LPIPS networks to load, "vgg" and "alex"; may be empty.
        lpips: Loaded networks by name, in place of `lpips_nets`.
        frechet_from: Smallest number of images for which the Fréchet distance is computed.
        background: Images of four channels are RGBA and are compared over this colour, 0 to 255, and `psnr_alpha` is
            measured besides; None compares their channels as they are.
        bands: Groups of channels over which LPIPS is a mean; () takes whole images.

    Raises:
        UserError: If the weights of an LPIPS network are not available.
    """

    def __init__(
        self,
        device: torch.device | str,
        lpips_nets: Sequence[Net] = ("vgg", "alex"),
        *,
        lpips: Mapping[Net, LPIPS] | None = None,
        frechet_from: int = 2,
        background: tuple[int, int, int] | None = None,
        bands: Bands = (),
    ):
        self.frechet_from, self.background, self.bands = frechet_from, background, bands
        self.device = torch.device(device)
        self.lpips = dict(lpips) if lpips is not None else {net: LPIPS(net).to(self.device) for net in lpips_nets}
        self._rows: dict[int, Row] = {}
        self._features: dict[int, dict[Net, np.ndarray]] = {}

    def update(self, indices: Iterable[int], names: Iterable[str], inputs: Tensor, reconstructions: Tensor) -> None:
        """Measure one batch. An image whose index was measured before (a padded duplicate) is not counted again.

        Args:
            indices: Numbers of the images in the whole set.
            names: Names of the images.
            inputs: (N, C, H, W) float in [-1, 1], on any device.
            reconstructions: Like `inputs`.
        """
        inputs, reconstructions = inputs.to(self.device), reconstructions.to(self.device)
        alpha = self.background is not None and inputs.shape[1] == 4
        if self.background is not None and alpha:
            inputs, reconstructions = visible(inputs, self.background), visible(reconstructions, self.background)
        compared = compare(inputs, {"": reconstructions}, self.lpips, alpha=alpha, bands=self.bands)
        columns = json_columns(compared.metrics[""])
        features = {net: [part.cpu() for part in both] for net, both in compared.features.items()}
        channels, height, width = inputs.shape[1:]
        for position, (index, name) in enumerate(zip(indices, names, strict=True)):
            row = {"index": int(index), "name": name, "channels": channels, "height": height, "width": width}
            self._rows.setdefault(int(index), row | {key: column[position] for key, column in columns.items()})
            pairs = {net: torch.stack([part[position] for part in both]) for net, both in features.items()}
            self._features.setdefault(int(index), {net: pair.numpy() for net, pair in pairs.items()})

    def gather(self) -> None:
        """Merge the rows of all processes, on every process. Every process must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self._rows, self._features))
        self._rows = {index: row for rows, _ in reversed(parts) for index, row in rows.items()}
        self._features = {index: kept for _, features in reversed(parts) for index, kept in features.items()}

    def rows(self) -> list[Row]:
        """Return one dict per image, sorted by index. A metric that is undefined for an image is None."""
        return [self._rows[index] for index in sorted(self._rows)]

    def summary(self) -> dict[str, Any]:
        """Return the means over images, JSON-ready.

        Returns:
            `n` (images), the mean of each metric over the images that have it, `frechet_vgg16` and `frechet_alexnet`
            where there are enough images, and `notes` about images that lack a metric.
        """
        summary = summarise(self.rows(), bands=self.bands)
        for net in self.lpips:
            pairs = [self._features[index].get(net) for index in sorted(self._features)]
            features = np.array([pair for pair in pairs if pair is not None and np.isfinite(pair).all()])
            if len(features) >= max(2, self.frechet_from):
                summary[f"frechet_{TRUNKS[net].weights}"] = frechet_of_features(features[:, 0], features[:, 1])
        return summary


def json_columns(columns: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """Return tensors of metrics, (N,) each, as lists of numbers with None for nan or infinity. Waits for the device."""
    return {key: [v if math.isfinite(v) else None for v in column.tolist()] for key, column in columns.items()}


def summarise(rows: Sequence[Mapping[str, Any]], prefix: str = "", bands: Bands = ()) -> dict[str, Any]:
    """Return `n` and the mean of each metric over rows, JSON-ready; a metric that no row has is None.

    Args:
        rows: One mapping per image, as `ReconstructionMetrics.rows` returns them.
        prefix: What precedes each metric's name in the keys of the rows.
        bands: Groups of channels over which LPIPS is a mean; () took whole images.

    Returns:
        Means by metric, and `notes` about images that lack one.
    """
    summary: dict[str, Any] = {"n": len(rows)}
    notes = []
    for key in METRICS:
        column = [(row, row[prefix + key]) for row in rows if prefix + key in row]
        values = [value for _, value in column if value is not None]
        if key == "ms_ssim" and not values:  # all images are small, and nobody expects MS-SSIM of those
            continue
        if column:
            # fsum does not depend on the order
            summary[key] = math.fsum(values) / len(values) if values else None
        lacking = [row for row, value in column if value is None]
        if lacking:
            notes.append(
                f"{key}: {len(lacking)} of {len(rows)} images left out, {missing_reason(key, lacking[0], bands)}"
            )
    return summary | ({"notes": notes} if notes else {})


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """Return the 95 % percentile bootstrap interval (Efron 1979), [low, high], of the mean of values, one per image.

    The interval is the same for the same values and seed.
    """
    array, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return [float(low), float(high)]


def missing_reason(key: str, row: Mapping[str, Any], bands: Bands = ()) -> str:
    """Return in words why the image of a row has no value of the metric `key`, measured over groups `bands`."""
    alpha = any(name.endswith("psnr_alpha") for name in row)
    if key.startswith(("lpips_", "dists")) and row["channels"] not in (1, 3) and not alpha and not bands:
        name, channels = key[:5].upper(), row["channels"]
        return f"{name} is defined for 1 or 3 channels and they have {channels}: bands=[[0,1,2]] names a group"
    least = {"ssim": SSIM_WINDOW_PX, "ms_ssim": MS_SSIM_MIN_PX, "dists": DISTS_MIN_PX}.get(key, 1)
    if key.startswith("lpips_"):
        least = {f"lpips_{net}": trunk.min_px for net, trunk in TRUNKS.items()}[key]
    if min(row["height"], row["width"]) < least:
        return f"a side is shorter than {least} px"
    return "their reconstruction holds NaN or infinity"
