"""Decodes only the first channels of a latent (Rippel et al. 2014; DC-AE 1.5, Chen et al. 2025)."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from latent_ae.config import Positive, Problem, Settings
from latent_ae.data.rng import kept_channels
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts


class ChannelMaskingSettings(Settings):
    """Masking of the latents' last channels."""

    min_channels: Positive | None = None
    """Smallest number of first channels that are kept in a sample; the others are masked (DC-AE 1.5: an eighth)."""


class ChannelMasking(Objective[ChannelMaskingSettings]):
    """Keeps the first n channels of each sample, n uniform from `min_channels` to all, and masks the others."""

    name, section, docs = "channel_masking", "latents", "docs/latents.md"

    @classmethod
    def enabled(cls, own: ChannelMaskingSettings) -> bool:
        return own.min_channels is not None

    @classmethod
    def problems(cls, own: ChannelMaskingSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.min_channels is None or model is None:
            return
        if not model.one_grid:
            yield Problem("latents.min_channels", model.fixed_latent)
        elif own.min_channels >= model.latent_channels:
            yield Problem(
                "latents.min_channels",
                f"{own.min_channels} of {model.latent_channels} latent channels masks none: use fewer",
            )

    @classmethod
    def describe(cls, own: ChannelMaskingSettings, run: RunFacts) -> str:
        return f"{own.min_channels} channels or more kept"

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        assert self.own.min_channels is not None
        return (kept_channels(self.run.seed, numbers, self.own.min_channels, latent_shape[0]),)

    def prepare(self, batch: Batch, step: int) -> Batch:
        (kept,) = batch.draws[self.name]
        return batch._replace(transforms=(*batch.transforms, partial(first_channels, kept=kept)))

    def backward(self, p: Pass) -> None:
        p.logs["kept_channels"] = p.batch.draws[self.name][0].float().mean()


def first_channels(latent: Tensor, kept: Tensor) -> Tensor:
    """Set all but the first channels of each sample to 0.

    Args:
        latent: (N, c, h, w).
        kept: (N,) integers, number of channels that are kept.
    """
    channels = torch.arange(latent.shape[1], device=latent.device)
    return latent * (channels < kept[:, None])[:, :, None, None]
