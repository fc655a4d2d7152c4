"""Reconstructs the worst, median and best images of an evaluation again, for pictures in the report."""

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
"""Metrics by which images are ranked, with a sign that makes larger values worse."""


def chosen_rows(table: pa.Table, kind: str, count: int) -> dict[str, list[int]]:
    """Return the rows of the worst, median and best images; an image is in one group only.

    Args:
        table: A row per image.
        kind: The kind of reconstruction, prefix of the columns.
        count: Number of images in each group.

    Returns:
        Row numbers by the heading of the group, the most extreme first.
    """
    for key, sign in RANKED_BY:
        name = f"{kind}_{key}"
        if name in table.column_names:
            values = sign * table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            if np.isfinite(values).any() or key == "psnr":
                break
    else:
        return {}
    values = np.where(np.isfinite(values), values, np.inf)  # a reconstruction with NaN is the worst of all
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
    """Return images and their reconstructions at full size, by index.

    Args:
        indices: Indices of the images.
        measurer: Holds the model.
        images: The images of the evaluation.

    Returns:
        (image, reconstruction) by index, (C, H, W) in [-1, 1] on the CPU. Unreadable images are missing.
    """
    pairs = {}
    for item in _items(indices, images):
        if item.image is not None:
            inputs, reconstructions = measurer.reconstruct([item])
            pairs[item.index] = (inputs[0].cpu(), reconstructions[measurer.kinds[0]][0].cpu())
    return pairs


def shown_groups(
    groups: dict[str, list[int]], table: pa.Table, pictures: dict[int, tuple[Tensor, Tensor]]
) -> dict[str, list[Shown]]:
    """Return the images that the report shows under each heading.

    Args:
        groups: Rows by heading, from `chosen_rows`.
        table: A row per image.
        pictures: (image, reconstruction) by index, from `reconstructed`.
    """
    shown: dict[str, list[Shown]] = {}
    for heading, rows in groups.items():
        for row in (table.slice(number, 1).to_pylist()[0] for number in rows):
            if row["index"] in pictures:
                shown.setdefault(heading, []).append(Shown(row["name"], row["index"], row, *pictures[row["index"]]))
    return shown


def _items(indices: Sequence[int], images: HeldOutImages) -> list[HeldOutImage]:
    if isinstance(images.source, StreamSource):  # a stream must be read from its start again
        last, chosen = max(indices), set(indices)
        items = []
        for item in replace(images, part=Part()).items():
            items += [item] if item.index in chosen else []
            if item.index == last:
                break
        return items
    source = images.source.subset(np.array(indices))
    few = replace(images, source=source, part=Part())
    return [replace(item, index=indices[item.index]) for item in few.items()]
