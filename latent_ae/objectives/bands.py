"""How images of other than one or three channels are shown to frozen networks, which see one or three."""

from collections.abc import Iterator
from functools import partial
from typing import Annotated

from torch import Tensor

from latent_ae.config import FIXED, Bands, Problem, Settings
from latent_ae.models.settings import ModelFacts
from latent_ae.objectives.base import Batch, Objective, RunFacts


class BandSettings(Settings):
    """How frozen networks and previews see images of n channels."""

    bands: Annotated[Bands, FIXED] = ()
    """Groups of one or three channels, counted from 0, as [[2, 1, 0], [3], [4]]: LPIPS, ConvNeXt and DINO compare each
    group as a gray or RGB picture, and their losses are means over groups. Previews show the first group, also where
    these losses are off. [] shows images as they are, and previews take four channels for RGBA."""


class BandViews(Objective[BandSettings]):
    """Shows groups of one or three channels to frozen networks and in previews; pixel losses compare all channels."""

    name, section, docs = "bands", "loss", "docs/channels.md"
    plan_line = "losses"

    @classmethod
    def enabled(cls, own: BandSettings) -> bool:
        return bool(own.bands)

    @classmethod
    def problems(cls, own: BandSettings, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
        if not own.bands:
            return
        key = "loss.bands"
        if "alpha" in run.enabled:
            yield Problem(key, "loss.backgrounds shows composites of RGBA already: give one of the two")
        most = max(map(max, own.bands))
        if model is not None and most >= model.channels:
            yield Problem(key, f"{most}, and the channels of {model.name} are 0 to {model.channels - 1}")

    @classmethod
    def describe(cls, own: BandSettings, run: RunFacts) -> str:
        groups = " and ".join(f"[{', '.join(map(str, group))}]" for group in own.bands)
        return f"the channels {groups} as pictures"

    def prepare(self, batch: Batch, step: int) -> Batch:
        return batch._replace(seen=partial(groups_of, bands=self.own.bands))


def groups_of(images: Tensor, bands: Bands) -> list[Tensor]:
    """Return groups of channels as images.

    Args:
        images: (N, C, H, W).
        bands: The channels of each group.

    Returns:
        A tensor (N, len(group), H, W) for each group.
    """
    return [images[:, list(group)] for group in bands]


def unseen(key: str, network: str, run: RunFacts, model: ModelFacts | None) -> Iterator[Problem]:
    """Yield why a network that sees one or three channels does not go with the images.

    Args:
        key: The weight of its loss.
        network: Its name.
        run: Facts of the run.
        model: Facts of the autoencoder; None before they are known.
    """
    if model is None or model.channels in (1, 3) or run.enabled & {"alpha", "bands"}:
        return
    alpha = "loss.backgrounds=[black,white] if the fourth is alpha, " if model.channels == 4 else ""
    yield Problem(
        key,
        f"{network} sees 1 or 3 channels, {model.name} has {model.channels}: set {alpha}loss.bands to groups of one or "
        f"three of them, such as [[0,1,2]], or {key}=0",
    )
