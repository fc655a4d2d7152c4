"""Measures held-out images with the averaged weights.

If there are more than `validate.images`, the measured images are spread over all of them. They are the same at every
step, on any number of processes and for every seed of a run, so that runs can be compared.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.config import UserError
from latent_ae.data.held_out import HeldOutImages, held_out_images
from latent_ae.data.images import bicubic_down_up
from latent_ae.data.loader import ImageSource, stop_if_too_many_bad
from latent_ae.data.rng import decoder_generators, spread
from latent_ae.data.sources import StreamSource, part_of
from latent_ae.files import replacing, writing
from latent_ae.metrics.similarity import ReconstructionMetrics
from latent_ae.models.stored_encoder import encoder_in_memory
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.report.pictures import picture_grid

from .agreement import Agreed, gathered
from .report import at_side
from .settings import TrainSettings

BATCH_PIXELS = 1_000_000
"""Number of pixels measured at once, which limits memory."""
FRECHET_FROM = 50
"""The Fréchet distance of fewer held-out images is meaningless, so it is not computed."""
Reconstruct = Callable[[Tensor, Sequence[int]], Tensor]
CHOICE_SEED = 0
"""The seed of `latent-ae eval recon`, too: with the same `limit` it measures the same images."""


def figures(summary: dict[str, Any]) -> str:
    """Return PSNR and LPIPS of a summary in a few words."""
    words = [f"{summary['psnr']:.2f} dB"] if summary.get("psnr") is not None else []
    distance = summary.get("lpips_vgg", summary.get("lpips_alex"))
    return ", ".join([*words, f"LPIPS {distance:.3f}"] if distance is not None else words) or "no figures"


@dataclass(frozen=True)
class Validator:
    """Measures held-out images, with the same pixels at every call.

    Args:
        settings: The run's settings.
        accelerator: Connects the processes.
        source: The held-out images.
        channels: Channels of the images.
        factor: The model's downsampling factor.
        perceptual: LPIPS, or None.
        named: Unreadable files that were reported, once each.
    """

    settings: TrainSettings
    accelerator: Accelerator
    source: ImageSource
    channels: int
    factor: int
    perceptual: LPIPS | None
    named: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> tuple[ImageSource, dict[str, Any]]:
        """The measured images, and how results describe the choice."""
        return part_of(self.source, self.settings.validation.images, CHOICE_SEED)

    def some(self, number: int) -> Tensor:
        """Return `number` of the measured images that are readable, spread over them: (number, C, H, W) in [-1, 1]."""
        source, _ = self.chosen
        if not isinstance(source, StreamSource):  # the other images follow, to replace unreadable ones
            first = spread(CHOICE_SEED, len(source), number)
            source = source.subset(np.concatenate([first, np.delete(np.arange(len(source)), first)]))
        return torch.stack([image for _, _, image in islice(self._crops(source, self.sides[0]), number)])

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the centre crops that are measured, px."""
        return self.settings.validation_sides

    def crops(self, rank: int = 0, world_size: int = 1, crop_px: int | None = None) -> HeldOutImages:
        """Return an iterator over (index, name, (C, H, W) image in [-1, 1]) of a rank's measured images.

        Args:
            rank: Number of the process.
            world_size: Number of processes.
            crop_px: Side of the centre crops; None takes the first of the `sides`.
        """
        return self._crops(self.chosen[0], crop_px or self.sides[0], rank, world_size)

    def _crops(self, source: ImageSource, crop_px: int, rank: int = 0, world_size: int = 1) -> HeldOutImages:
        return held_out_images(
            source,
            self.settings.data,
            channels=self.channels,
            crop_px=crop_px,
            multiple_of=self.factor,
            rank=rank,
            world_size=world_size,
        )

    def measure(self, reconstruct: Reconstruct, preview: Path | None = None) -> dict[str, Any]:
        """Return the mean metrics of a reconstruction over the measured images. Every process calls this.

        Args:
            reconstruct: Maps images, (N, C, H, W) in [-1, 1], and their numbers among the measured ones to their
                reconstructions.
            preview: Where the main process saves a picture of `validate.preview_images` images, spread over all: input
                | reconstruction | bicubic. None saves none.

        Returns:
            Means at the first of the `sides` as `ReconstructionMetrics.summary` returns them, those at the others under
            names that end in the side, such as `psnr_512px`, and "choice", which describes the choice of images.

        Raises:
            UserError: On all processes, if too many images are unreadable or the preview cannot be written.
        """
        summary = self._measure(reconstruct, self.sides[0], preview)
        for side in self.sides[1:]:
            more = self._measure(reconstruct, side)
            summary |= {at_side(key, side): value for key, value in more.items() if key != "choice"}
        return summary

    def _measure(self, reconstruct: Reconstruct, crop_px: int, preview: Path | None = None) -> dict[str, Any]:
        """Return the mean metrics over crops of one side; arguments and errors as in `measure`."""
        metrics = self._metrics()
        choice, pictures = self.chosen[1], dict[int, list[Tensor]]()
        number = self.settings.validation.preview_images if preview is not None else 0
        shown = range(number) if choice["of"] is None else spread(CHOICE_SEED, choice["number"], number)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        crops, failure = self.crops(rank, world_size, crop_px), ""
        try:
            for indices, names, images in self._batches(crops, crop_px):
                reconstructions = reconstruct(images, indices)
                metrics.update(indices, names, images, reconstructions)
                for position, index in enumerate(indices):
                    if index in shown:
                        image = images[position]
                        low = bicubic_down_up(image[None], self.factor, self._alpha)[0]
                        pictures[index] = [self._shown(x).cpu() for x in (image, reconstructions[position], low)]
        except UserError as error:  # a reader that died on one process must not leave the others waiting
            failure = str(error)
        self._report_unreadable(crops.skipped, failure, crops.num_read)
        metrics.gather()
        summary = metrics.summary() | {"choice": choice}
        if number:
            pictures = {index: row for part in gathered(pictures) for index, row in part.items()}
        with Agreed(self.accelerator):
            if preview is not None and pictures and self.accelerator.is_main_process:
                rows = [pictures[index] for index in sorted(pictures)]
                labels = ["input", f"reconstruction, {figures(summary)}", f"bicubic /{self.factor}"]
                with writing(preview.parent):
                    preview.parent.mkdir(parents=True, exist_ok=True)
                with replacing(preview) as part:
                    picture_grid(rows, labels=labels).save(part, format="PNG")
        if not summary["n"]:
            raise UserError(f"none of the held-out images of {self.settings.data.title} is readable")
        return summary

    def _metrics(self) -> ReconstructionMetrics:
        perceptual = {self.settings.loss.perceptual_net: self.perceptual} if self.perceptual is not None else {}
        return ReconstructionMetrics(
            self.accelerator.device,
            lpips=perceptual,
            frechet_from=FRECHET_FROM,
            background=self.settings.data.background if self._alpha else None,
            bands=self.settings.loss.bands,
        )

    @property
    def _alpha(self) -> bool:
        """Whether the fourth channel is known to be alpha."""
        return bool(self.settings.loss.backgrounds)

    def _shown(self, image: Tensor) -> Tensor:
        """Return an image, (C, H, W), as previews show it: of bands the first group of `loss.bands`."""
        bands = self.settings.loss.bands
        return image[list(bands[0])] if bands else image

    def try_one_batch(self, model: nn.Module) -> None:
        """Run this rank's first batch of the largest held-out crops through model and metrics.

        It waits for no other process.
        """
        metrics, training = self._metrics(), model.training
        model.eval()
        crop_px, rank, world_size = max(self.sides), self.accelerator.process_index, self.accelerator.num_processes
        with torch.no_grad(), encoder_in_memory(model.autoencoder):
            for indices, names, images in self._batches(self.crops(rank, world_size, crop_px), crop_px):
                metrics.update(indices, names, images, model(images).image)
                break
        model.train(training)

    def _report_unreadable(self, skipped: list[str], failure: str, num_read: int) -> None:
        """Print the unreadable images of all processes once; raise UserError on all processes if there are too many."""
        reports = gathered((skipped, failure, num_read))
        lines = [line for skipped, _, _ in reports for line in skipped]
        for line in lines:
            if line not in self.named:
                self.named.append(line)
                if self.accelerator.is_main_process:
                    tqdm.write(f"held-out image left out: {line}", file=sys.stderr)
        for _, failure, _ in reports:
            if failure:
                raise UserError(failure)
        total = sum(num_read for _, _, num_read in reports)
        bound = self.settings.data.max_bad_fraction
        try:
            stop_if_too_many_bad(len(lines), total, lines, num_images=total, max_bad_fraction=bound)
        except UserError as error:
            raise UserError(f"{error}\nThese are held-out images.") from None

    def _batches(self, crops: HeldOutImages, crop_px: int) -> Iterator[tuple[list[int], list[str], Tensor]]:
        """Yield this rank's images in batches of one shape, on the device."""
        size = max(1, BATCH_PIXELS // crop_px**2)
        waiting: list[tuple[int, str, Tensor]] = []
        for item in crops:
            if waiting and (len(waiting) == size or waiting[0][2].shape != item[2].shape):
                yield self._stack(waiting)
                waiting = []
            waiting.append(item)
        if waiting:
            yield self._stack(waiting)

    def _stack(self, items: list[tuple[int, str, Tensor]]) -> tuple[list[int], list[str], Tensor]:
        indices, names, images = zip(*items, strict=True)
        batch = torch.stack(images).to(self.accelerator.device, memory_format=torch.channels_last)
        return list(indices), list(names), batch

    def measure_model(self, model: nn.Module, preview: Path | None = None) -> dict[str, Any]:
        """Return the metrics of a Reconstructor at the posterior's mode; arguments and errors as in `measure`."""
        training = model.training
        model.eval()
        with torch.no_grad(), encoder_in_memory(model.autoencoder):
            summary = self.measure(
                lambda images, numbers: model(images, generators=decoder_generators(CHOICE_SEED, numbers)).image,
                preview,
            )
        model.train(training)
        return summary

    def measure_baseline(self) -> dict[str, Any]:
        """Return the metrics of bicubic down- and upsampling by the model's downsampling factor."""
        return self.measure(lambda images, _: bicubic_down_up(images, self.factor, self._alpha))
