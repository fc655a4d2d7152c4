"""Scales and rotates latents before decoding, and the target images with them (EQ-VAE, Kouzelis et al. 2025)."""

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_ae.config import Fraction, Problem, Settings
from latent_ae.data.rng import equivariance_numbers
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts

LOW_RESOLUTION = 0.25
"""Fraction of the steps without a scaled latent whose images are scaled down instead (p_prior_s of EQ-VAE)."""


class EquivarianceSettings(Settings):
    """Equivariance of the latents."""

    equivariance: Fraction = 0.0
    """Fraction of the steps whose latents are scaled and rotated before decoding, and the target images with them
    (EQ-VAE: 0.5)."""
    equivariance_to: Literal["both", "scaling", "rotation"] = "both"
    """What these steps do: scale and rotate, scale alone (for text and upright subjects) or rotate alone."""


class Change(NamedTuple):
    """How the latent or the image is changed in one step."""

    side_px: int
    """Side of the scaled latent, in latent px."""
    quarter_turns: int
    of_latent: bool
    """True changes the latent and its target image, False the image before it is encoded."""


class Equivariance(Objective[EquivarianceSettings]):
    """Trains the decoder to decode a scaled and rotated latent to the equally scaled and rotated image."""

    name, section, docs = "equivariance", "latents", "docs/latents.md"

    @classmethod
    def enabled(cls, own: EquivarianceSettings) -> bool:
        return own.equivariance > 0

    @classmethod
    def problems(cls, own: EquivarianceSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        key, scales = "latents.equivariance", own.equivariance_to != "rotation"
        if not own.equivariance:
            if own.equivariance_to != "both":
                yield Problem(f"{key}_to", f"{own.equivariance_to}, and {key} is 0: give {key}")
            return
        if run.compile and scales:
            yield Problem(
                key,
                "changes the images' size from step to step, and networks would be compiled again for each size: "
                "set compile=false",
            )
        if any(height != width for height, width in run.crop_sizes):
            yield Problem(key, "turns images and needs squares: give data.buckets squares only, or set it to 0")
        if model is None:
            return
        if not model.one_grid:
            yield Problem(key, model.fixed_latent)
        elif scales and not scaled_sides(run.resolution // model.factor, model.factor, run.smallest_px):
            yield Problem(
                key,
                f"scales images down, and the losses need {run.smallest_px} px of {run.resolution}: raise "
                f"{run.resolution_key}, or lower gan.layers",
            )

    @classmethod
    def describe(cls, own: EquivarianceSettings, run: RunFacts) -> str:
        done = {"both": "scaled and turned", "scaling": "scaled", "rotation": "turned"}[own.equivariance_to]
        return f"{done} in {own.equivariance:.0%} of the steps"

    def prepare(self, batch: Batch, step: int) -> Batch:
        images, side = batch.images, batch.noise.shape[-1]
        factor = images.shape[-1] // side
        change = change_at(step, self.own, self.run, side, factor)
        if change is None:
            return batch
        target = scaled_and_turned(images, change.side_px * factor, change.quarter_turns)
        if change.of_latent:
            transform = partial(scaled_and_turned, side_px=change.side_px, quarter_turns=change.quarter_turns)
            return batch._replace(target=target, transforms=(*batch.transforms, transform))
        # noise for the smaller latent: any part of standard normal noise is standard normal
        noise = batch.noise[..., : change.side_px, : change.side_px]
        return batch._replace(images=target, target=target, noise=noise)

    def backward(self, p: Pass) -> None:
        p.logs["scale"] = torch.full((), p.batch.area**0.5, device=p.image.device)

    def cost(self, step: int) -> float:
        if self.own.equivariance_to == "rotation":
            return 0.0
        of_latent, low, _, _ = equivariance_numbers(self.run.seed, step)
        return -10.0 if of_latent < self.own.equivariance or low < LOW_RESOLUTION else 0.0


def change_at(step: int, own: EquivarianceSettings, run: RunFacts, side_px: int, factor: int) -> Change | None:
    """Return how this step's latents or images are scaled and rotated, or None; depends on seed and step alone.

    As in the authors' code: with probability `latents.equivariance` the latent is scaled by a factor drawn uniformly
    from [1/4, 1) and rotated by 1 to 3 quarter turns; otherwise, with probability 1/4, the image is scaled before it is
    encoded, so that reconstruction at low resolution is kept. Without rotation there are no turns; without scaling the
    side stays, and no image is scaled.

    Args:
        step: Number of the step.
        own: The settings: the fraction of the steps, and what they do.
        run: Facts of the run: seed and smallest image.
        side_px: Side of the whole latent, in latent px.
        factor: The downsampling factor.
    """
    of_latent, low, size, turns = equivariance_numbers(run.seed, step)
    if own.equivariance_to == "rotation":
        return Change(side_px, 1 + int(turns * 3), True) if of_latent < own.equivariance else None
    sides = scaled_sides(side_px, factor, run.smallest_px)
    side = sides[int(size * len(sides))]
    if of_latent < own.equivariance:
        return Change(side, 1 + int(turns * 3) if own.equivariance_to == "both" else 0, True)
    return Change(side, 0, False) if low < LOW_RESOLUTION else None


def scaled_sides(side_px: int, factor: int, smallest_px: int) -> range:
    """Return the sides to which latents are scaled: from a quarter to just below their own, as in EQ-VAE.

    Args:
        side_px: Side of the whole latent, in latent px.
        factor: The downsampling factor.
        smallest_px: Side of the smallest image that the losses can process, px; smaller ones are left out.
    """
    return range(max(-(-side_px // 4), -(-smallest_px // factor)), side_px)


def scaled_and_turned(x: Tensor, side_px: int, quarter_turns: int) -> Tensor:
    """Scale latents or images bilinearly to a square and rotate them, as EQ-VAE does; their own side changes none.

    Args:
        x: (N, C, H, W).
        side_px: Side of the result.
        quarter_turns: Number of quarter turns.
    """
    x = F.interpolate(x, size=(side_px, side_px), mode="bilinear", align_corners=False)
    return torch.rot90(x, quarter_turns, (-1, -2)) if quarter_turns else x
