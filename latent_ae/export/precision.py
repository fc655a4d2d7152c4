"""Whether a first stage may run in half precision, and in tiles: tried on real images.

found = probe_precision(vae, images)          # images: NCHW in [-1, 1]
vae.register_to_config(force_upcast=found["force_upcast"])
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.models.build import factor_of
from latent_ae.progress import progress_bar

FP16_MAX = torch.finfo(torch.float16).max
HEADROOM = 2
"""Other images than those tried may reach higher: half precision is trusted up to a half of what it can hold."""
LARGEST = 5
NAMED = 20
"""Layers with values that are not finite, the first of which are named: often all that follow one."""
MOST_DB = 100.0
"""PSNR of equal images."""
TILED_SIDE = 1.5
"""Side of an image on which tiling is tried, in tiles: two tiles each way, which overlap by a quarter."""


@dataclass
class _Watch:
    """What the outputs of a model's layers held, sums and other inner results of its blocks included."""

    progress: tqdm
    """A bar of passes through layers with weights."""
    round_to: torch.dtype | None = None
    """Rounds each output to it: arithmetic in that type, emulated."""
    peaks: dict[str, Tensor] = field(default_factory=dict)
    """Largest absolute output by layer, in the order in which they run."""
    bad: list[tuple[str, Tensor]] = field(default_factory=list)
    """Each output's layer and number of values that are NaN or infinite, in the order in which they were made."""
    last: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(self._look(name))

    def _look(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> Any:
            self.progress.update(has_weights(module))
            # a block often hands on what its last layer gave: that is the layer's
            if not isinstance(output, Tensor) or output is self.last:
                return None
            if self.round_to is not None:
                output = output.to(self.round_to).to(output.dtype)
            self.last, peak = output, output.abs().amax()
            self.peaks[name] = torch.maximum(self.peaks.get(name, peak), peak)
            self.bad.append((name, (~output.isfinite()).sum()))
            return output

        return look


def has_weights(module: nn.Module) -> bool:
    """Whether the module itself holds some, not only the modules in it."""
    return any(True for _ in module.parameters(recurse=False))


@torch.no_grad()
def probe_precision(
    autoencoder: AutoencoderKL, images: Tensor, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Reconstructs `images` (NCHW in [-1, 1], at the posterior's mode) in fp32, bf16 and fp16; JSON-ready.

    `peaks`: the layers with the largest absolute outputs in fp32. For bf16 and fp16: PSNR (dB) against the fp32
    reconstruction (None if that holds no finite numbers only), how many of its values are not finite, the first layer
    that gave such, how many layers did, and how many values each of the first twenty gave, over all images. On a CPU,
    and on a device that lacks the type, it is emulated, which `emulated` says: weights, images and each layer's output
    are rounded to it, and computed with in float32. Many CPUs take minutes where that takes seconds. `force_upcast`, as
    diffusers means it (fp32 even in an fp16 pipeline): something was not finite in fp16, or a layer came within a
    factor of two of 65504. The model is left as it is; `device` None: where it is.
    """
    place = torch.device(device or autoencoder.device)
    layers = sum(map(has_weights, autoencoder.modules()))
    with (
        float32_arithmetic(repeatable=True),
        progress_bar("trial in half precision", 3 * len(images) * layers, "layer") as progress,
    ):
        watch = _Watch(progress)
        expected = _reconstruct(_copy(autoencoder, place, torch.float32), images, watch)
        halves = {
            name: _in_type(autoencoder, images, place, dtype, expected, progress)
            for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        }
    peaks = {name: float(peak) for name, peak in watch.peaks.items()}
    ranked = sorted(peaks, key=lambda name: peaks[name], reverse=True)
    found: dict[str, Any] = {
        "images": len(images),
        "device": place.type,
        "peaks": [{"layer": name, "max_abs": round(peaks[name], 3)} for name in ranked[:LARGEST]],
    }
    found |= halves
    fits = all(peak * HEADROOM <= FP16_MAX for peak in peaks.values())
    found["force_upcast"] = not fits or found["fp16"]["first_not_finite"] is not None
    return found


def verdict(found: dict[str, Any]) -> str:
    """What `probe_precision` found, in a sentence without its full stop."""
    peak, half = found["peaks"][0], found["fp16"]
    largest = f"the largest activation is {peak['max_abs']:,.4g} ({peak['layer']}), fp16 holds {FP16_MAX:,.0f}"
    if half["first_not_finite"] is not None:
        return f"fp16 is not safe: values are not finite from {half['first_not_finite']} on; {largest}"
    if found["force_upcast"]:
        return f"fp16 is not safe: {largest}, and other images may reach higher"
    return f"fp16 is safe: {largest}, and reconstructions are {half['psnr']:.1f} dB from those in fp32"


def _in_type(
    autoencoder: AutoencoderKL,
    images: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    expected: Tensor,
    progress: tqdm,
    emulated: bool | None = None,
) -> dict[str, Any]:
    """`emulated` None: on a CPU."""
    emulated = device.type == "cpu" if emulated is None else emulated
    watch = _Watch(progress, round_to=dtype if emulated else None)
    try:
        model = _copy(autoencoder, device, torch.float32 if emulated else dtype)
        if emulated:
            for tensor in model.state_dict().values():
                tensor.copy_(tensor.to(dtype))
            images = images.to(dtype)
        made = _reconstruct(model, images, watch)
    except (RuntimeError, NotImplementedError) as error:
        if emulated or ("not implemented" not in str(error) and "not support" not in str(error)):
            raise
        return _in_type(autoencoder, images, device, dtype, expected, progress, emulated=True)
    not_finite = int((~made.isfinite()).sum())
    by_layer: dict[str, int] = {}
    for name, count in watch.bad:
        if count:
            by_layer[name] = by_layer.get(name, 0) + int(count)
    return {
        "emulated": emulated,
        "psnr": None if not_finite else round(_psnr(made, expected), 2),
        "not_finite": not_finite,
        "first_not_finite": next(iter(by_layer), None),
        "layers_not_finite": len(by_layer),
        "not_finite_by_layer": dict(list(by_layer.items())[:NAMED]),
    }


@torch.no_grad()
def probe_tiling(
    autoencoder: AutoencoderKL, image: Tensor, device: torch.device | str | None = None
) -> dict[str, Any] | None:
    """How `enable_tiling` changes a decoded image; JSON-ready. The model is left as it is. None where diffusers cannot
    put tiles of that size together: a quarter of a tile, by which they overlap, must be whole latent px.

    `image`: CHW in [-1, 1]; mirrored over and over it makes a square of one and a half tiles, whose side is the
    config's `sample_size`, so that tiling sets in. Decoded from the same latents, whole and in tiles, float32: PSNR
    (dB), the largest difference, and the mean one where tiles are blended and elsewhere (images in [-1, 1]).
    """
    model = _copy(autoencoder, torch.device(device or autoencoder.device), torch.float32)
    factor, tile_px = factor_of(model), int(model.config.sample_size)
    if tile_px // factor * model.tile_overlap_factor % 1:
        return None
    side = math.ceil(TILED_SIDE * tile_px / factor) * factor
    with float32_arithmetic(repeatable=True):
        latents = model.encode(_mirrored(image, side)[None].to(model.device)).latent_dist.mode()
        return {"side_px": side} | compare_tiled(model, latents, tile_px)


@torch.no_grad()
def compare_tiled(model: AutoencoderKL, latents: Tensor, tile_px: int) -> dict[str, Any]:
    """Decodes `latents` (NCHW) whole and in tiles of `tile_px`, as `probe_tiling` says. Sets the model's tiling."""
    model.disable_tiling()
    whole = model.decode(latents).sample
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = tile_px, tile_px // factor_of(model)
    tiled = model.decode(latents).sample
    return tile_differences(whole, tiled, tile_px, model.tile_overlap_factor)


def tile_differences(whole: Tensor, tiled: Tensor, tile_px: int, overlap_factor: float) -> dict[str, Any]:
    """How an image (NCHW in [-1, 1]) decoded whole differs from one decoded in tiles that overlap by that part of their
    side."""
    # each tile but the first begins a stride after the one before, and is blended with it for the overlap's length
    overlap = int(tile_px * overlap_factor)
    stride = tile_px - overlap
    height, width = (
        (torch.arange(side) >= stride) & (torch.arange(side) % stride < overlap) for side in whole.shape[2:]
    )
    seams = (height[:, None] | width).to(whole.device).expand_as(whole)
    difference = (whole - tiled).abs()
    return {
        "tile_px": tile_px,
        "psnr": round(_psnr(tiled, whole), 2),
        "max_abs": round(float(difference.max()), 5),
        "mean_abs_at_seams": round(float(difference[seams].mean()), 6),
        "mean_abs_elsewhere": round(float(difference[~seams].mean()), 6),
    }


def _copy(autoencoder: AutoencoderKL, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    copied: AutoencoderKL = copy.deepcopy(autoencoder)
    copied.disable_tiling()
    copied.disable_slicing()
    nn.Module.to(copied, device, dtype)  # diffusers' own prints a warning about modules that there are none of
    return copied.eval().requires_grad_(False)


def _reconstruct(model: AutoencoderKL, images: Tensor, watch: _Watch) -> Tensor:
    """One image at a time; float32 on the CPU. `model` is watched from then on."""
    watch.attach(model)
    made = []
    with torch.autocast(model.device.type, enabled=False):
        for image in images:
            latent = model.encode(image[None].to(model.device, model.dtype)).latent_dist.mode()
            made.append(model.decode(latent).sample.float().cpu())
    return torch.cat(made)


def _mirrored(image: Tensor, side: int) -> Tensor:
    """CHW -> (C, side, side), continued by its mirror images."""
    for axis in (1, 2):
        while image.shape[axis] < side:
            image = torch.cat([image, image.flip(axis)], axis)
    return image[:, :side, :side]


def _psnr(a: Tensor, b: Tensor) -> float:
    """dB, of images in [-1, 1], clamped to that."""
    error = float((a.clamp(-1, 1).double() - b.clamp(-1, 1).double()).square().mean())
    return min(MOST_DB, 10 * math.log10(4 / error)) if error else MOST_DB
