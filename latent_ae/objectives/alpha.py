"""Losses of images with an alpha channel: composites over backgrounds are compared in place of the four channels."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator
from torch import Tensor

from latent_ae.config import SWITCH, Byte, Problem, Settings, Weight
from latent_ae.data.images import over_background
from latent_ae.data.rng import background_numbers
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, Pass, RunFacts

LEVELS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
"""Backgrounds that have a name."""


def _known(value: Any) -> Any:
    levels = isinstance(value, (list, tuple)) and len(value) == 3
    if value not in (*LEVELS, "random") and not (levels and all(type(x) is int and 0 <= x <= 255 for x in value)):
        raise ValueError("give black, gray, white, random or [red, green, blue] in 0 to 255")
    return value


def _one_or_several(value: Any) -> Any:
    """Return a list of backgrounds, also of one that is written without a list."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and value and all(isinstance(level, (int, float)) for level in value):
        return (value,)
    return value


Background = Annotated[Literal["black", "gray", "white", "random"] | tuple[Byte, Byte, Byte], BeforeValidator(_known)]


class AlphaSettings(Settings):
    """Losses of images whose fourth channel is alpha."""

    backgrounds: Annotated[tuple[Background, ...], BeforeValidator(_one_or_several), SWITCH] = ()
    """Backgrounds over which losses compare images of four channels, RGBA: black, gray, white, [red, green, blue] in 0
    to 255, or random, a colour drawn for each sample; the losses are means over them. One needs no list around it.
    [] compares channels as they are. [black, white] is a good choice (docs/channels.md)."""
    alpha: Weight = 0.0
    """Weight of the mean absolute error of alpha itself, beside loss.backgrounds."""


class Alpha(Objective[AlphaSettings]):
    """Lays RGBA images on backgrounds for pixel loss and frozen networks, and compares alpha itself.

    In pixel losses, colours then count as much as they are visible. With `loss.pixel: l2` and backgrounds m - s and
    m + s the loss is AlphaVAE's expectation over backgrounds of mean m and standard deviation s (Wang et al. 2025,
    arXiv:2507.09308, RGBAVAELoss in train/losses.py of o0o0o00o0/AlphaVAE), which is
    D^2 - 2 E[b] D A + E[b^2] A^2 with D = a x - a' x' and A = a - a'. It takes LPIPS over two backgrounds, too.
    Wan-Alpha (Dong et al. 2025, arXiv:2509.24979) renders over a random colour and compares alpha by itself besides.
    """

    name, section, docs = "alpha", "loss", "docs/channels.md"
    plan_line = "losses"
    charts = {"Error of alpha": ("alpha",)}

    @classmethod
    def enabled(cls, own: AlphaSettings) -> bool:
        return bool(own.backgrounds)

    @classmethod
    def problems(cls, own: AlphaSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if own.alpha and not own.backgrounds:
            yield Problem("loss.alpha", "is for RGBA images over loss.backgrounds: give them, such as [black, white]")
        if own.backgrounds and model is not None and model.channels != 4:
            keys = " ".join(f"{key}=4" for key in model.channel_keys)
            cure = f"set {keys}" if keys else "start from a first stage of four"
            yield Problem(
                "loss.backgrounds",
                f"is for images of four channels, RGBA, and {model.name} has {model.channels}: leave it out, or {cure}",
            )

    @classmethod
    def describe(cls, own: AlphaSettings, run: RunFacts) -> str:
        names = (name if isinstance(name, str) else f"[{', '.join(map(str, name))}]" for name in own.backgrounds)
        alpha = f", error of alpha with weight {own.alpha:g}" if own.alpha else ""
        return f"composites over {' and '.join(names)}{alpha}"

    def draw(self, numbers: Sequence[int], latent_shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the colours of the backgrounds, (N, K, 3) in [-1, 1]."""
        drawn = background_numbers(self.run.seed, numbers, len(self.own.backgrounds))
        for index, name in enumerate(self.own.backgrounds):
            if name != "random":
                drawn[:, index] = torch.tensor(LEVELS[name] if isinstance(name, str) else name) / 255
        return (2 * drawn - 1,)

    def prepare(self, batch: Batch, step: int) -> Batch:
        views = partial(composites, colours=batch.draws[self.name][0])
        return batch._replace(compared=views, seen=views)

    def backward(self, p: Pass) -> None:
        if not self.own.alpha:
            return
        loss = F.l1_loss(p.image[:, 3:], p.batch.target[:, 3:])
        (gradient,) = torch.autograd.grad(loss, p.image)
        p.logs["alpha"] = loss.detach()
        p.send_reconstruction(gradient, self.own.alpha * p.batch.area)


def composites(images: Tensor, colours: Tensor) -> list[Tensor]:
    """Return RGBA images over K backgrounds each.

    Args:
        images: (N, 4, H, W), straight alpha, all channels in [-1, 1].
        colours: (N, K, 3) in [-1, 1].

    Returns:
        K tensors (N, 3, H, W).
    """
    return [over_background(images, colour) for colour in colours.unbind(1)]
