"""Tries on real images whether a first stage may run in half precision, and in tiles.

result = probe_precision(vae, images)          # images: NCHW in [-1, 1]
vae.register_to_config(force_upcast=result["force_upcast"])
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
"""Other images may reach higher activations, so fp16 is trusted up to its largest number divided by this."""
LARGEST = 5
"""Number of layers with the largest outputs that are reported."""
NAMED = 20
"""Number of layers with non-finite outputs that are reported; often all layers after the first one have them."""
MOST_DB = 100.0
"""PSNR of equal images."""
TILED_SIDE = 1.5
"""Side of the image on which tiling is tried, in tiles: two tiles each way, which overlap by a quarter."""


@dataclass
class _Watch:
    """Records the outputs of a model's layers, including those of whole blocks."""

    progress: tqdm
    """Progress bar that counts passes through layers with weights."""
    round_to: torch.dtype | None = None
    """Type to which each output is rounded, which emulates arithmetic in that type."""
    peaks: dict[str, Tensor] = field(default_factory=dict)
    """Largest absolute output by layer, in the order in which the layers run."""
    bad: list[tuple[str, Tensor]] = field(default_factory=list)
    """Layer and number of non-finite values of each output, in the order of computation."""
    last: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(self._look(name))

    def _look(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> Any:
            self.progress.update(has_weights(module))
            # a block often returns the output of its last layer, which is recorded under the layer
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
    """Return whether the module itself has parameters, apart from those of its submodules."""
    return any(True for _ in module.parameters(recurse=False))


@torch.no_grad()
def probe_precision(
    autoencoder: AutoencoderKL, images: Tensor, device: torch.device | str | None = None
) -> dict[str, Any]:
    """Reconstruct images in fp32, bf16 and fp16, at the posterior's mode, and compare. The model is left unchanged.

    On a CPU, and on a device that lacks a type, that type is emulated: weights, images and each layer's output are
    rounded to it, and computed with in float32. (Many CPUs take minutes in half precision where emulation takes
    seconds.)

    Args:
        autoencoder: The model.
        images: (N, C, H, W) float in [-1, 1], sides multiples of the downsampling factor.
        device: Where to run; None takes the model's device.

    Returns:
        JSON-ready: `images` (N), `device`, `peaks` (the layers with the largest absolute outputs in fp32), `bf16` and
        `fp16`, and `force_upcast`. The latter is true, as diffusers means it (fp32 even in an fp16 pipeline), if a
        value was not finite in fp16 or a layer's output came within a factor of two of 65504. `bf16` and `fp16` hold
        `emulated`, the `psnr` in dB against fp32 (None if a pixel is not finite), `not_finite` (pixels),
        `first_not_finite` (layer), `layers_not_finite` (their number) and `not_finite_by_layer` (values of the first
        twenty).
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
    result: dict[str, Any] = {
        "images": len(images),
        "device": place.type,
        "peaks": [{"layer": name, "max_abs": round(peaks[name], 3)} for name in ranked[:LARGEST]],
    }
    result |= halves
    fits = all(peak * HEADROOM <= FP16_MAX for peak in peaks.values())
    result["force_upcast"] = not fits or result["fp16"]["first_not_finite"] is not None
    return result


def verdict(result: dict[str, Any]) -> str:
    """Return a result of `probe_precision` as a sentence without its full stop."""
    peak, half = result["peaks"][0], result["fp16"]
    largest = f"the largest activation is {peak['max_abs']:,.4g} ({peak['layer']}), fp16 holds {FP16_MAX:,.0f}"
    if half["first_not_finite"] is not None:
        return f"fp16 is not safe: values are not finite from {half['first_not_finite']} on; {largest}"
    if result["force_upcast"]:
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
    """Return the comparison in one type; `emulated` None emulates it on a CPU only."""
    emulated = device.type == "cpu" if emulated is None else emulated
    watch = _Watch(progress, round_to=dtype if emulated else None)
    try:
        model = _copy(autoencoder, device, torch.float32 if emulated else dtype)
        if emulated:
            for tensor in model.state_dict().values():
                tensor.copy_(tensor.to(dtype))
            images = images.to(dtype)
        reconstructions = _reconstruct(model, images, watch)
    except (RuntimeError, NotImplementedError) as error:
        if emulated or ("not implemented" not in str(error) and "not support" not in str(error)):
            raise
        return _in_type(autoencoder, images, device, dtype, expected, progress, emulated=True)
    not_finite = int((~reconstructions.isfinite()).sum())
    by_layer: dict[str, int] = {}
    for name, count in watch.bad:
        if count:
            by_layer[name] = by_layer.get(name, 0) + int(count)
    return {
        "emulated": emulated,
        "psnr": None if not_finite else round(_psnr(reconstructions, expected), 2),
        "not_finite": not_finite,
        "first_not_finite": next(iter(by_layer), None),
        "layers_not_finite": len(by_layer),
        "not_finite_by_layer": dict(list(by_layer.items())[:NAMED]),
    }


@torch.no_grad()
def probe_tiling(
    autoencoder: AutoencoderKL, image: Tensor, device: torch.device | str | None = None
) -> dict[str, Any] | None:
    """Measure how `enable_tiling` changes a decoded image. The model is left unchanged.

    The image is continued by its mirror images to a square of one and a half tiles, so that tiling sets in; the side of
    a tile is the config's `sample_size`. The same latents are decoded whole and in tiles, in float32.

    Args:
        autoencoder: The model.
        image: (C, H, W) float in [-1, 1].
        device: Where to run; None takes the model's device.

    Returns:
        `side_px` and the values of `tile_differences`, JSON-ready. None if diffusers cannot put tiles of that size
        together, because the overlap of a quarter tile is not a whole number of latent px.
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
    """Decode latents whole and in tiles and return their `tile_differences`. Leaves tiling enabled in the model.

    Args:
        model: The model.
        latents: (N, C, h, w) raw latents.
        tile_px: Side of a tile in image px.
    """
    model.disable_tiling()
    whole = model.decode(latents).sample
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = tile_px, tile_px // factor_of(model)
    tiled = model.decode(latents).sample
    return tile_differences(whole, tiled, tile_px, model.tile_overlap_factor)


def tile_differences(whole: Tensor, tiled: Tensor, tile_px: int, overlap_factor: float) -> dict[str, Any]:
    """Return how images decoded in tiles differ from the same images decoded whole.

    Args:
        whole: (N, C, H, W) float in [-1, 1].
        tiled: The same decoded in tiles.
        tile_px: Side of a tile in image px.
        overlap_factor: Fraction of a tile's side by which tiles overlap.

    Returns:
        `tile_px`, `psnr` (dB), `max_abs`, and the mean absolute difference where tiles are blended
        (`mean_abs_at_seams`) and elsewhere (`mean_abs_elsewhere`), JSON-ready.
    """
    # each tile but the first begins one stride after the one before, and is blended with it over the overlap
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
    nn.Module.to(copied, device, dtype)  # the method of diffusers prints a warning that does not apply here
    return copied.eval().requires_grad_(False)


def _reconstruct(model: AutoencoderKL, images: Tensor, watch: _Watch) -> Tensor:
    """Reconstruct images one at a time and return float32 on the CPU. `watch` stays attached to the model."""
    watch.attach(model)
    reconstructions = []
    with torch.autocast(model.device.type, enabled=False):
        for image in images:
            latent = model.encode(image[None].to(model.device, model.dtype)).latent_dist.mode()
            reconstructions.append(model.decode(latent).sample.float().cpu())
    return torch.cat(reconstructions)


def _mirrored(image: Tensor, side: int) -> Tensor:
    """Return a (C, H, W) image as (C, side, side), continued by its mirror images."""
    for axis in (1, 2):
        while image.shape[axis] < side:
            image = torch.cat([image, image.flip(axis)], axis)
    return image[:, :side, :side]


def _psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR in dB of images clamped to [-1, 1]."""
    error = float((a.clamp(-1, 1).double() - b.clamp(-1, 1).double()).square().mean())
    return min(MOST_DB, 10 * math.log10(4 / error)) if error else MOST_DB
