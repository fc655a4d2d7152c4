"""Measures the cost of a first stage: times of the calls that the evaluation makes anyway, parameters, latent size."""

import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from latent_ae.models.borrowed_encoder import borrowed_encoder
from latent_ae.models.family import SIDES
from latent_ae.models.loading import FirstStage

Size = tuple[int, int, int]
"""Number of images in a batch, and their height and width, px."""
STORED_BITS = 16
"""Bits of each number of a latent that is stored in fp16."""


@dataclass
class Costs:
    """The measurements of one process; they can be sent to another process."""

    seconds: dict[tuple[str, Size], list[float]] = field(default_factory=dict)
    """Seconds of each call, by its name and the size of its batch, without the first batch of each size."""
    latents: dict[Size, tuple[int, ...]] = field(default_factory=dict)
    """Shape of the latent of one image, (c, h, w), by the size of the batch."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Largest memory that a call added to the memory in use before it, by the call's name; empty on a CPU."""


class Stopwatch:
    """Times calls on batches of images. On a GPU, events in its queue measure the time, so that no call waits.

    Args:
        device: Where the calls compute.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._laps: dict[tuple[str, Size], list[Callable[[], float]]] = {}
        self._costs = Costs()

    @contextmanager
    def lap(self, name: str, images: Tensor) -> Iterator[None]:
        """Time a `with` block.

        Args:
            name: Name of the call: encode, decode, or whole.
            images: The batch, (N, C, H, W).
        """
        size = (len(images), images.shape[-2], images.shape[-1])
        laps = self._laps.setdefault((name, size), [])
        if self.device.type == "cuda":
            queue = torch.cuda.current_stream(self.device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            begin.record(queue)
            yield
            end.record(queue)
            needed = torch.cuda.max_memory_allocated(self.device) - before
            self._costs.peak_bytes[name] = max(needed, self._costs.peak_bytes.get(name, 0))
            laps.append(lambda: _seconds_between(begin, end))
        else:
            started = time.perf_counter()
            yield
            seconds = time.perf_counter() - started
            laps.append(lambda: seconds)

    def encoded(self, images: Tensor, latents: Tensor) -> None:
        """Note the shape of the latents, (N, c, h, w), of a batch of images, (N, C, H, W)."""
        self._costs.latents[len(images), images.shape[-2], images.shape[-1]] = tuple(latents.shape[1:])

    def costs(self) -> Costs:
        """Wait for the device and return the measurements; the first batch of each size is a warm-up."""
        for (name, size), laps in self._laps.items():
            batches = min(len(others) for (_, other), others in self._laps.items() if other == size)
            warm_up = len(laps) // batches  # each batch is encoded once and may be decoded twice
            self._costs.seconds[name, size] = [lap() for lap in laps[warm_up:]]
        return self._costs


def _seconds_between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def cost(stage: FirstStage, device: torch.device, parts: Sequence[Costs]) -> dict[str, Any]:
    """Return the section `cost` of a result, JSON-ready.

    Times belong to the most frequent size of batches. A function has no parameters, no latents and no separate encoding
    and decoding, and an evaluation that resumed after its last batch has no times: those values are None.

    Args:
        stage: The model.
        device: The device of the computations.
        parts: The measurements of each process.
    """
    batches = Counter({size: 0 for part in parts for size in part.latents})
    for part in parts:
        for (name, size), seconds in part.seconds.items():
            batches[size] += len(seconds) if name in ("encode", "whole") else 0
    common = max(batches, key=lambda size: (batches[size], size), default=None)
    times: dict[str, float | None] = {}
    for name in ("encode", "decode", "whole"):
        laps = [lap / common[0] for part in parts for lap in part.seconds.get((name, common), ())] if common else []
        times[name] = median(laps) if laps else None
    if times["encode"] is not None and times["decode"] is not None:
        times["whole"] = times["encode"] + times["decode"]
    shape = next((part.latents[common] for part in parts if common in part.latents), None) if common else None
    peaks = {name: max(part.peak_bytes.get(name, 0) for part in parts) for part in parts for name in part.peak_bytes}
    family, module = stage.family, stage.module
    return {
        "device": device_name(device),
        "dtype": str(stage.dtype).removeprefix("torch."),
        "batch_size": common[0] if common else None,
        "image_px": list(common[1:]) if common else None,
        "batches": batches[common] if common else 0,
        "seconds_per_image": times,
        "peak_memory_bytes": peaks or None,
        "parameters": parameters_by_side(module) if family and module is not None else None,
        "latent_shape": list(shape) if shape else None,
        "bits_per_pixel": bits_per_pixel(
            shape, common[1:], family.codes(module.config), family.codes_per_position(module.config)
        )
        if common and shape and family and module is not None
        else None,
    }


def parameters_by_side(module: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each side: encoder, decoder, and modules that belong to neither."""
    counts = {"encoder": 0, "decoder": 0}
    for name, parameter in module.named_parameters():
        part = name.split(".")[0]
        side = next((side for side, modules in SIDES.items() if part in modules), part)
        counts[side] = counts.get(side, 0) + parameter.numel()
    if (borrowed := borrowed_encoder(module)) is not None:
        counts["encoder"] = parameters_by_side(borrowed.original)["encoder"]
    return counts


def bits_per_pixel(
    latent: Sequence[int], image_px: Sequence[int], codes: int | None, codes_per_position: int = 1
) -> dict[str, float | None]:
    """Return the bits of a stored latent for each pixel of its image.

    Args:
        latent: Shape of the latent, (c, h, w).
        image_px: Height and width of the image.
        codes: Number of codes of a codebook, or None.
        codes_per_position: Number of codes at each position of the latent.

    Returns:
        `fp16` for the values of the latent in fp16; `indices` for the indices of its codes in whole bits, None without
        a codebook.
    """
    pixels = math.prod(image_px)
    places = math.prod(latent[1:]) * codes_per_position
    indices = None if codes is None else places * (codes - 1).bit_length() / pixels
    return {"fp16": math.prod(latent) * STORED_BITS / pixels, "indices": indices}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the name of the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{next(named, platform.processor()) or platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
