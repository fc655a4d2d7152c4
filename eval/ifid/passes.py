"""The two passes over the images: one encodes them, the other decodes midpoints between near latents.

Both write shards, so that a killed evaluation resumes, on any number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor

from latent_ae.config import UserError
from latent_ae.data.held_out import HeldOutImage, HeldOutImages, Part
from latent_ae.data.images import to_uint8
from latent_ae.data.rng import decoder_generators, neighbour_numbers, posterior_noise
from latent_ae.data.sources import StoredImages
from latent_ae.files import writing
from latent_ae.models.loading import FirstStage
from latent_ae.models.posterior import draw as draw_posterior
from latent_ae.pretrained.lpips import TRUNKS
from latent_ae.progress import progress_bar
from latent_ae_eval.features import FeatureNetwork
from latent_ae_eval.ifid.neighbours import draw, midpoints, nearest, rows_of
from latent_ae_eval.ifid.settings import IfidSettings
from latent_ae_eval.inputs import report_skipped
from latent_ae_eval.jobs import cpu_batch, refuse_infinite
from latent_ae_eval.storage import FeatureFile, Shard, WorkFolder, shard_size


@dataclass(frozen=True)
class ImageSet:
    """Images that are encoded: DATA, or those among which neighbours are found."""

    location: str
    images: HeldOutImages
    source: StoredImages
    choice: dict[str, Any]
    networks: Mapping[str, FeatureNetwork]
    """Networks whose features of the images and of their reconstructions are measured, by the name of the distance."""
    number: int
    """Number of the draw from the posteriors, so that an image in two sets has independent latents."""

    @property
    def shard(self) -> int:
        """Number of images in a shard."""
        return shard_size(len(self.source), whole_images=False)


class Latents(NamedTuple):
    """The latents of all readable images of a set, in the order of the images."""

    file: FeatureFile
    shape: tuple[int, ...]
    """Shape of one latent, (c, h, w)."""
    starts: dict[int, int]
    """Row of the first image of each shard."""


@dataclass(frozen=True)
class Passes:
    """The model and the settings of an evaluation, and its parts that run on every process."""

    stage: FirstStage
    settings: IfidSettings
    device: torch.device
    state: PartialState
    shows: bool

    @torch.no_grad()
    def encode(self, one: ImageSet, work: WorkFolder, done: frozenset[int]) -> None:
        """Encode this process's unfinished shards of a set, and write their latents and features."""
        part = Part(self.state.process_index, self.state.num_processes, one.shard, done)
        total = sum(part.holds(index) for index in range(len(one.source)))
        what = "encode" if one.networks else "encode neighbours"
        with progress_bar(what, total, "image", disable=not self.shows) as bar:
            for number, group in groupby(
                replace(one.images, part=part).items(), key=lambda item: item.index // one.shard
            ):
                items = list(group)
                work.write(number, self._encoded(items, one))
                bar.update(len(items))

    def _encoded(self, items: Sequence[HeldOutImage], one: ImageSet) -> Shard:
        readable = [item for item in items if item.image is not None]
        rows = [_row(item) for item in readable]
        sizes = {(row["height"], row["width"]) for row in rows}
        _check_sizes(sizes, one.location)
        least = TRUNKS["vgg"].min_px
        if "frechet_vgg16" in one.networks and sizes and min(min(sizes)) < least:
            raise UserError(
                f"frechet: vgg16 needs sides of {least} px, and {rows[0]['name']} of {one.location} is smaller; set "
                "frechet=[inception], or resize_px to enlarge the images"
            )
        parts: dict[str, list[Tensor]] = {}
        for batch in self._batches(readable, sizes):
            images = torch.stack([item.image for item in batch if item.image is not None]).to(self.device)
            numbers = [item.index for item in batch]
            latents = self._latents(images, numbers, one.number)
            refuse_infinite(latents, [item.name for item in batch], self.stage, one.location)
            found = {"latent": latents.cpu()}
            if one.networks:
                begun = decoder_generators(self.settings.seed, numbers)
                kinds = {"input": images, "reconstruction": self.stage.decode(latents, begun)}
                for kind, pictures in kinds.items():
                    found |= _features(one.networks, pictures, kind)
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        skipped = [f"{item.name}: {item.reason}" for item in items if item.image is None]
        return Shard(rows, skipped, {name: torch.cat(values) for name, values in parts.items()})

    def _batches(self, items: Any, sizes: set[tuple[int, int]]) -> Iterator[Any]:
        """Yield batches of items, whose images all have the only one of these sizes."""
        for height, width in sizes:
            most = self.settings.batch_size
            size = cpu_batch(most, height * width) if self.device.type == "cpu" else most
            for first in range(0, len(items), size):
                yield items[first : first + size]

    def _latents(self, images: Tensor, numbers: Sequence[int], draw_number: int) -> Tensor:
        """Return raw latents, as the original takes them: without the scaling of diffusion models."""
        stage = self.stage
        mean, std = stage.encode(images.contiguous(memory_format=torch.channels_last))
        if self.settings.latents == "mode" or not stage.random:
            return mean
        noise = posterior_noise(self.settings.seed, numbers, mean.shape[1:], draw_number).to(self.device)
        if std is not None:
            return mean + std * noise
        assert stage.module is not None
        return draw_posterior(stage.module, images.to(stage.dtype), noise).latent

    @torch.no_grad()
    def decode(
        self,
        own: Latents,
        others: Latents,
        encoded: WorkFolder,
        work: WorkFolder,
        done: frozenset[int],
        networks: Mapping[str, FeatureNetwork],
    ) -> None:
        """Draw neighbours for this process's unfinished shards, decode the midpoints, and write their features.

        Args:
            own: The latents of DATA.
            others: Latents among which neighbours are found; the same object if they are those of DATA.
            encoded: The shards of DATA.
            work: Where the shards go.
            done: The finished shards.
            networks: The feature networks.
        """
        rank, world = self.state.process_index, self.state.num_processes
        mine = [number for number in sorted(own.starts) if number % world == rank and number not in done]
        borders = [*own.starts.values(), own.file.count]
        sizes = {number: end - first for number, (first, end) in zip(own.starts, pairwise(borders), strict=True)}
        with progress_bar("midpoints", sum(map(sizes.__getitem__, mine)), "image", disable=not self.shows) as bar:
            for number in mine:
                shard = encoded.read(number)
                latents = shard.features.pop("latent").to(self.device)
                flat, count = latents.flatten(1), len(latents)
                inside = torch.arange(count, device=self.device) + own.starts[number] if others is own else None
                rows, cosines = nearest(flat, others.file, self.settings.neighbours, inside)
                candidates = rows_of(others.file, rows)
                numbers = [row["index"] for row in shard.rows]
                drawn = draw(flat, candidates, neighbour_numbers(self.settings.seed, numbers))
                at = torch.arange(count, device=self.device), drawn.position
                middles = midpoints(latents, candidates[at].view_as(latents))
                spread = torch.exp(-torch.special.xlogy(drawn.probabilities, drawn.probabilities).sum(1))
                columns = {
                    "neighbour": rows[at],
                    "cosine": cosines[at],
                    "nearest_cosine": cosines[:, 0],
                    "mean_squared_distance": drawn.distances[at],
                    "probability": drawn.probabilities[at],
                    "perplexity": spread,
                }
                listed = {name: column.tolist() for name, column in columns.items()}
                facts = [row | {name: column[i] for name, column in listed.items()} for i, row in enumerate(shard.rows)]
                parts: dict[str, list[Tensor]] = {}
                side = {(shard.rows[0]["height"], shard.rows[0]["width"])}
                for batch, some in zip(self._batches(middles, side), self._batches(numbers, side), strict=True):
                    made = self.stage.decode(batch, decoder_generators(self.settings.seed, some))
                    for name, value in _features(networks, made, "midpoint").items():
                        parts.setdefault(name, []).append(value)
                features = {name: torch.cat(values) for name, values in parts.items()}
                work.write(number, Shard(facts, [], shard.features | features))
                bar.update(count)


def joined(one: ImageSet, work: WorkFolder, known: Shard, settings: IfidSettings) -> Latents:
    """Join the latents of all shards in a file.

    Args:
        one: The set.
        work: Its shards.
        known: The rows of all readable images and the unreadable ones are appended to it.
        settings: Holds the accepted fraction of unreadable images.
    """
    file, starts = FeatureFile(work.folder / f"{work.token}-latents.f32"), dict[int, int]()
    shape: tuple[int, ...] = ()
    rows, skipped = known.rows, known.skipped
    with writing(work.folder):
        for number in sorted(work.done()):
            shard = work.read(number)
            skipped.extend(shard.skipped)
            if shard.rows:
                starts[number] = file.count
                latents, shape = shard.features["latent"], tuple(shard.features["latent"].shape[1:])
                rows.extend(shard.rows)
                _check_sizes({(row["height"], row["width"]) for row in (rows[0], rows[-1])}, one.location)
                file.append(latents.flatten(1).numpy())
    if not rows:
        reason = f"none of its {len(skipped)} images is readable; {skipped[0]}" if skipped else "it holds no images"
        raise UserError(f"{one.location}: {reason}")
    report_skipped(skipped, len(rows), settings)
    return Latents(file, shape, starts)


def _check_sizes(sizes: set[tuple[int, int]], location: str) -> None:
    """Raise UserError if images have several sizes."""
    several = sorted(sizes)
    if len(several) > 1:
        named = " and ".join(f"{width} x {height}" for height, width in several[:2])
        raise UserError(
            f"{location} has images of several sizes ({named} px), whose latents cannot be compared: set crop_px, and "
            "resize_px if some images are smaller"
        )


def _row(item: HeldOutImage) -> dict[str, Any]:
    assert item.image is not None
    height, width = item.image.shape[-2:]
    name = item.name.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that are no valid UTF-8
    return {"index": item.index, "name": name, "digest": item.digest, "height": height, "width": width}


def _features(networks: Mapping[str, FeatureNetwork], images: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the features of images in [-1, 1] on the CPU by `network.kind`; nan where an image is not finite."""
    bad = ~images.isfinite().flatten(1).all(1, keepdim=True).cpu()
    levels = to_uint8(images)
    return {f"{name}.{kind}": network(levels).cpu().masked_fill(bad, torch.nan) for name, network in networks.items()}
