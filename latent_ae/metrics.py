"""How near reconstructions come to their inputs: PSNR, SSIM and LPIPS per image, on 8-bit pixels.

Every metric reads what a file would hold: both images rounded to uint8 by `images.to_uint8`. One row per
image is kept and means are formed over the rows of all processes, so they do not depend on the split.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from latent_ae.images import to_uint8
from latent_ae.perceptual import LPIPS, TRUNKS

Net = Literal["vgg", "alex"]
Row = dict[str, Any]

PSNR_CAP_DB = 100.0
"""Given to identical images, whose PSNR is infinite: JSON has no infinity, and one would swallow the mean."""
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB, data range 255, at most `PSNR_CAP_DB`.

    `a`, `b`: uint8 NCHW. Returns float64 (N,). The squared error is summed in integers, so it is exact.
    """
    _check_uint8_pair(a, b)
    squared = (a.long() - b.long()).square().flatten(1).sum(1)
    mse = squared.double() / a[0].numel()
    return (10 * torch.log10(255.0**2 / mse)).clamp(max=PSNR_CAP_DB)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004: Gaussian window of 11 px, sigma 1.5 px).

    `a`, `b`: uint8 NCHW. Returns float64 (N,), the mean over channels and over those positions whose window
    lies inside the image, like scikit-image's with `gaussian_weights=True, use_sample_covariance=False`; nan
    for images smaller than the window.
    """
    _check_uint8_pair(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW_PX:
        return torch.full((a.shape[0],), math.nan, dtype=torch.float64, device=a.device)
    # float64, because variances are differences of nearly equal numbers
    _, similarity = structural_similarity_index_measure(
        a.double() / 255,
        b.double() / 255,
        gaussian_kernel=True,
        sigma=SSIM_SIGMA_PX,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    # torchmetrics' own mean takes in the border, where the window sees mirrored pixels
    border = SSIM_WINDOW_PX // 2
    return similarity[..., border:-border, border:-border].flatten(1).mean(1)


def _check_uint8_pair(a: Tensor, b: Tensor) -> None:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"uint8 images are needed, not {a.dtype} and {b.dtype}; images.to_uint8 makes them")
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"two NCHW batches of one shape are needed, not {tuple(a.shape)} and {tuple(b.shape)}")


class ReconstructionMetrics:
    """PSNR, SSIM and LPIPS of many images: rows per image, and their mean.

        metrics = ReconstructionMetrics("cuda")
        metrics.update(indices, names, inputs, reconstructions)     # as often as there are batches
        metrics.gather()                                            # rows of all processes, each image once
        metrics.summary()                                           # {"n": 500, "psnr": 27.5, ...}

    `lpips_nets` may be empty. Weights are looked up at once, with UserError when they cannot be had; networks that
    exist already, by "vgg" or "alex", can be given as `lpips` instead.
    """

    def __init__(
        self,
        device: torch.device | str,
        lpips_nets: Sequence[Net] = ("vgg", "alex"),
        *,
        lpips: Mapping[Net, nn.Module] | None = None,
    ):
        self.device = torch.device(device)
        self.lpips = dict(lpips) if lpips is not None else {net: LPIPS(net).to(self.device) for net in lpips_nets}
        self._rows: dict[int, Row] = {}

    @torch.no_grad()
    def update(self, indices: Iterable[int], names: Iterable[str], inputs: Tensor, reconstructions: Tensor) -> None:
        """Measures one batch: float NCHW in [-1, 1], any device; `indices` number the images of the whole set.

        An image that was seen already (a padded duplicate) is not counted again.
        """
        # as uint8, a NaN would pass for a dark pixel
        finite = reconstructions.isfinite().flatten(1).all(1).tolist()
        a, b = to_uint8(inputs.to(self.device)), to_uint8(reconstructions.to(self.device))
        columns = {"psnr": psnr(a, b), "ssim": ssim(a, b)} | self._distances(a, b)
        values = {key: column.tolist() for key, column in columns.items()}
        for position, (index, name) in enumerate(zip(indices, names, strict=True)):
            measured = {key: _json_number(column[position], finite[position]) for key, column in values.items()}
            channels, height, width = a.shape[1:]
            row = {"index": int(index), "name": name, "channels": channels, "height": height, "width": width}
            self._rows.setdefault(int(index), row | measured)

    def _distances(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        x, y = a.float() / 127.5 - 1, b.float() / 127.5 - 1
        distances = {}
        for net, distance in self.lpips.items():
            if a.shape[1] in (1, 3) and min(a.shape[-2:]) >= TRUNKS[net].min_px:
                # an ambient autocast is for training; measurements are float32
                with torch.autocast(self.device.type, enabled=False):
                    distances[f"lpips_{net}"] = distance(x, y).double()
            else:
                distances[f"lpips_{net}"] = torch.full((a.shape[0],), math.nan, dtype=torch.float64)
        return distances

    def gather(self) -> None:
        """Brings together the rows of all processes, on every process. Every process must call it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[dict[int, Row]] = [{} for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(parts, self._rows)
        self._rows = {index: row for part in reversed(parts) for index, row in part.items()}

    def rows(self) -> list[Row]:
        """One dict per image, by index. A metric that cannot be had of an image is None."""
        return [self._rows[index] for index in sorted(self._rows)]

    def summary(self) -> dict[str, Any]:
        """`n` (images), each metric's mean over the images that have it, and `notes` on those that lack it."""
        return summarise(self.rows())


METRICS = ("psnr", "ssim", "lpips_vgg", "lpips_alex")


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over rows of `ReconstructionMetrics.rows`, JSON-ready: what cannot be measured is None."""
    summary: dict[str, Any] = {"n": len(rows)}
    notes = []
    for key in METRICS:
        lacking = [row for row in rows if key in row and row[key] is None]
        values = [row[key] for row in rows if row.get(key) is not None]
        if values or lacking:
            # fsum does not depend on the order
            summary[key] = math.fsum(values) / len(values) if values else None
        if lacking:
            notes.append(f"{key}: {len(lacking)} of {len(rows)} images left out, {_reason(key, lacking[0])}")
    return summary | ({"notes": notes} if notes else {})


def _reason(key: str, row: Mapping[str, Any]) -> str:
    if key.startswith("lpips_") and row["channels"] not in (1, 3):
        return f"LPIPS is defined for 1 or 3 channels and they have {row['channels']}"
    least = TRUNKS[key.removeprefix("lpips_")].min_px if key.startswith("lpips_") else SSIM_WINDOW_PX
    if min(row["height"], row["width"]) < least:
        return f"a side is shorter than {least} px"
    return "their reconstruction holds NaN or infinity"


def _json_number(value: float, is_known: bool) -> float | None:
    return value if is_known and math.isfinite(value) else None
