"""The arithmetic of the interpolated Fréchet distance: near latents, the draw of one of them, and the midpoint.

Source: arXiv 2603.05630, and `evalvae.py` of its authors (tongdaxu/Making-rFID-Predictive-of-Diffusion-gFID, GitHub).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latent_ae_eval.paths import spherical
from latent_ae_eval.storage import FeatureFile

BLOCK_BYTES = 256_000_000
"""Size of the latents among which neighbours are looked for at a time; all others stay on disk."""


class Drawn(NamedTuple):
    """The neighbour that was drawn for each of N latents."""

    position: Tensor
    """Its position among the K candidates, (N,) integers."""
    distances: Tensor
    """Mean squared difference from each candidate, (N, K) float64."""
    probabilities: Tensor
    """Probability of each candidate, (N, K) float64."""


def nearest(latents: Tensor, others: FeatureFile, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the nearest other latents by cosine, in blocks of matrix products that fit into BLOCK_BYTES.

    Args:
        latents: (N, D) float32.
        others: M latents of D values.
        count: Number of nearest ones K; at most M, or M - 1 with `own`.
        own: Row of each latent in `others`, (N,) integers, which is not its own neighbour; None if it is not in there.

    Returns:
        The rows of the nearest others, the nearest first, and their cosines: (N, K) integers and float32 on the device
        of `latents`.
    """
    device, (size, dimensions) = latents.device, latents.shape
    unit = torch.nn.functional.normalize(latents, dim=1)
    rows = torch.zeros(size, 0, dtype=torch.long, device=device)
    cosines = torch.zeros(size, 0, device=device)
    step = max(1, BLOCK_BYTES // (4 * dimensions))
    for first in range(0, others.count, step):
        block = torch.from_numpy(others.block(first, step)).to(device)
        found = unit @ block.T / block.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        if own is not None:
            inside = (own >= first) & (own < first + len(block))
            found[inside.nonzero()[:, 0], own[inside] - first] = -torch.inf
        values, places = found.topk(min(count, len(block)))
        # earlier rows stay in front, so that of equal latents the first in the file is kept
        cosines, rows = torch.cat([cosines, values], 1), torch.cat([rows, places + first], 1)
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        cosines, rows = cosines[:, :count], rows.gather(1, order)[:, :count]
    return rows, cosines


def draw(latents: Tensor, candidates: Tensor, numbers: Tensor) -> Drawn:
    """Draw one candidate for each latent, with the softmax of minus the mean squared difference as probabilities.

    Args:
        latents: (N, D).
        candidates: (N, K, D).
        numbers: Uniform numbers in [0, 1), (N,) float64, which decide.
    """
    distances = (latents[:, None].double() - candidates.double()).square().mean(-1)
    probabilities = torch.softmax(-distances, 1)
    position = (probabilities.cumsum(1) <= numbers.to(latents.device)[:, None]).sum(1)
    return Drawn(position.clamp(max=candidates.shape[1] - 1), distances, probabilities)  # sums may round below 1


def midpoints(latents: Tensor, others: Tensor) -> Tensor:
    """Return the middles of the great circles about the origin between latents, (N, ...); see `paths.spherical`."""
    half = torch.tensor([0.5], dtype=torch.float64)
    return torch.cat([spherical(a, b, half) for a, b in zip(latents, others, strict=True)])


def rows_of(file: FeatureFile, rows: Tensor) -> Tensor:
    """Return latents from the file: (*rows.shape, D) float32 on the device of `rows`."""
    flat = file.rows(np.asarray(rows.flatten().cpu()))
    return torch.from_numpy(flat).to(rows.device).view(*rows.shape, file.dimensions)
