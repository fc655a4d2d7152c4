"""The worst, median and best images of an evaluation, made again to be looked at."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latent_ae.data.held_out import HeldOutImage, HeldOutImages, Part
from latent_ae.data.sources import StreamSource
from latent_ae_eval.recon.report import Shown
from latent_ae_eval.recon.shard import Measurer

RANKED_BY = (("lpips_vgg", 1), ("lpips_alex", 1), ("psnr", -1))
"""Metric and sign: larger is worse."""


def chosen_rows(table: pa.Table, kind: str, count: int) -> dict[str, list[int]]:
    """Rows of the table by group, the most telling first; an image is in one group only."""
    for key, sign in RANKED_BY:
        name = f"{kind}_{key}"
        if name in table.column_names:
            values = sign * table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            if np.isfinite(values).any() or key == "psnr":
                break
    else:
        return {}
    values = np.where(np.isfinite(values), values, np.inf)  # what holds NaN is the worst of all
    ranked = [int(row) for row in np.argsort(values, kind="stable")]
    count = min(count, max(1, len(ranked) // 3))
    worst, best = ranked[::-1][:count], ranked[:count]
    rest = [row for row in ranked if row not in worst and row not in best]
    middle = max(0, (len(rest) - count) // 2)
    groups = {"Worst": worst, "Median": rest[middle : middle + count], "Best": best}
    if len(ranked) < 3:  # best and worst would be the same image
        groups = {"Worst": ranked[::-1]}
    return {name: rows for name, rows in groups.items() if rows and count}


@torch.no_grad()
def reconstructed(
    indices: Sequence[int], measurer: Measurer, images: HeldOutImages
) -> dict[int, tuple[Tensor, Tensor]]:
    """(image, reconstruction), CHW in [-1, 1] on the CPU, of images by index, at their full size."""
    found = {}
    for item in _items(indices, images):
        if item.image is not None:
            given, made = measurer.reconstruct([item])
            found[item.index] = (given[0].cpu(), made[measurer.kinds[0]][0].cpu())
    return found


def shown_groups(
    groups: dict[str, list[int]], table: pa.Table, pictures: dict[int, tuple[Tensor, Tensor]]
) -> dict[str, list[Shown]]:
    """What the report shows under each heading."""
    shown: dict[str, list[Shown]] = {}
    for heading, rows in groups.items():
        for row in (table.slice(number, 1).to_pylist()[0] for number in rows):
            if row["index"] in pictures:
                shown.setdefault(heading, []).append(Shown(row["name"], row["index"], row, *pictures[row["index"]]))
    return shown


def _items(indices: Sequence[int], images: HeldOutImages) -> list[HeldOutImage]:
    if isinstance(images.source, StreamSource):  # must be read from its start once more
        last, wanted = max(indices), set(indices)
        items = []
        for item in replace(images, part=Part()).items():
            items += [item] if item.index in wanted else []
            if item.index == last:
                break
        return items
    source = images.source.subset(np.array(indices))
    few = replace(images, source=source, part=Part())
    return [replace(item, index=indices[item.index]) for item in few.items()]
