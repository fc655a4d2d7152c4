"""Interpolates between images: through latent space on a line and on a sphere, and between their pixels.

from latent_ae_eval.interpolate.measure import interpolate
result = interpolate("runs/quickstart/export", "photos", out="paths")
print(result["means"])
"""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.images import to_uint8
from latent_ae.data.rng import choice_facts, spread
from latent_ae.data.sources import StoredImages, StreamSource, fingerprint
from latent_ae.models.loading import FirstStage
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.progress import progress_bar
from latent_ae.provenance import versions
from latent_ae.report.pictures import picture_grid
from latent_ae_eval.inputs import opened_data
from latent_ae_eval.interpolate import JOB
from latent_ae_eval.interpolate.report import write_interpolation_report
from latent_ae_eval.interpolate.settings import InterpolateSettings
from latent_ae_eval.jobs import (
    cpu_batch,
    images_for,
    lpips_or_reason,
    opened,
    refuse_infinite,
    say_written,
    write_json,
    written_into,
)
from latent_ae_eval.paths import angle, is_spherical, linear, spherical

PATHS = ("linear", "spherical", "cross-fade")
GRID_PX, FRAME_PX = 160, 256
FRAME_MS = 50


@torch.no_grad()
@float32_arithmetic(repeatable=True)
def interpolate(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: InterpolateSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Interpolate between images of `data` and measure how straight and even the paths look. Runs on one process.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module.
        data: `photos`, a folder of images, Parquet or Arrow files, or a hub id.
        settings: The settings; None takes the defaults.
        out: Folder for result.json, grid.png, animation.webp (or .gif) and report.html; None writes nothing.
        progress: Show a progress bar.

    Returns:
        The result, JSON-ready.

    Raises:
        UserError: If model or data cannot be loaded, images are missing or unreadable, or several processes were
            launched.
    """
    settings = settings or InterpolateSettings()
    device, stage, folder = opened("interpolate", model, settings, out)
    names, images, facts = _chosen(stage, str(data), settings)
    height, width = images.shape[-2:]
    lpips, why_not = lpips_or_reason(settings.lpips, images.shape[1], min(height, width), device)
    size = cpu_batch(settings.batch_size, height * width) if device.type == "cpu" else settings.batch_size
    latents = torch.cat([stage.encode(image[None].to(device)).mean for image in images])
    refuse_infinite(latents, names, stage, str(data))
    centre = torch.zeros_like(latents[:1])
    if settings.centre == "channels":
        centre = latents.mean(dim=(0, 2, 3), keepdim=True)
    latents = latents - centre

    count = len(names)
    legs = [(i, (i + 1) % count) for i in range(count)]
    pairs = legs[:1] if count == 2 else legs
    frames = settings.frames * len(legs) if out is not None and settings.animation else 0
    work = 2 * (settings.steps * len(pairs) + frames)
    animation = f"animation.{settings.animation or 'webp'}" if frames else None
    files = ["result.json", "grid.png", "report.html", *([animation] if animation else [])]
    with progress_bar("interpolate", work, "image", disable=not progress) as bar:

        def walk(leg: tuple[int, int], t: Tensor) -> dict[str, Tensor]:
            """Return the images at `t` on each path of a leg, by the kind of path."""
            a, b = latents[leg[0]], latents[leg[1]]
            images = {}
            for kind, path in (("linear", linear), ("spherical", spherical)):
                points = (path(a, b, t) + centre).split(size)
                decoded = []
                for part in points:
                    decoded.append(stage.decode(part).clamp(-1, 1))
                    bar.update(len(part))
                images[kind] = torch.cat(decoded)
            return images

        ends = {}
        measured: list[dict[str, Any]] = []
        grids = []
        t = torch.linspace(0, 1, settings.steps, dtype=torch.float64)
        for leg in pairs:
            paths = walk(leg, t)
            ends[leg[0]], ends[leg[1]] = paths["linear"][0], paths["linear"][-1]
            paths["cross-fade"] = linear(ends[leg[0]], ends[leg[1]], t)
            figures = {kind: _measures(kind, paths, lpips, size) for kind in PATHS}
            about = {"from": names[leg[0]], "to": names[leg[1]], "latents": _geometry(latents[leg[0]], latents[leg[1]])}
            measured.append(about | {"paths": figures})
            grids.append(picture_grid([list(paths[kind]) for kind in PATHS], row_labels=PATHS, largest_px=GRID_PX))
        result: dict[str, Any] = {
            "format": JOB.format,
            "model": stage.describe(),
            "data": {
                "location": str(data),
                "split": settings.split,
                "images": names,
                **facts,
                "size_px": [height, width],
            },
            "latent": list(latents.shape[1:]),
            "method": {
                "latents": "raw: the posterior's mean" if stage.has_posterior else "raw: deterministic",
                "linear": "(1 - t) a + t b",
                "spherical": "sin((1 - t) w) / sin w a + sin(t w) / sin w b, flattened, after subtracting the centre",
                "centre": "each channel's mean over these images" if settings.centre == "channels" else "the origin",
                "cross-fade": "of the pixels of the two reconstructions",
                "lpips": settings.lpips if lpips is not None else None,
            },
            "pairs": measured,
            "means": {kind: _means([pair["paths"][kind] for pair in measured]) for kind in PATHS},
            "settings": settings.model_dump(mode="json"),
            "versions": versions(),
            "notes": [why_not] if why_not else [],
        }
        if folder is not None:
            moving = _frames(walk, legs, ends, settings.frames) if frames else None
            with written_into(folder):
                _write(folder, result, grids, moving, settings)
    if folder is not None:  # below the bar, which has ended
        say_written(folder, files)
    return result


def _chosen(stage: FirstStage, data: str, settings: InterpolateSettings) -> tuple[list[str], Tensor, dict[str, Any]]:
    """Return names and images, (N, C, H, W) on the CPU, how they were chosen, and the fingerprint of their files.

    Images of several sizes are cropped to the largest square that fits into all of them.
    """
    source, _ = opened_data(data, settings)
    assert not isinstance(source, StreamSource), "jobs do not open streams"
    rows = np.array(_rows(source, settings, data))
    method = "spread" if settings.images is None else "named"
    images, digests = [], []
    for item in images_for(stage, source.subset(rows), settings, data).items():
        if item.image is None:
            raise UserError(f"{data}: {item.name} cannot be read: {item.reason}")
        images.append(item.image)
        digests.append(item.digest)
    if len({image.shape for image in images}) > 1:
        side = min(min(image.shape[-2:]) for image in images) // stage.factor * stage.factor
        images = [_middle(image, side) for image in images]
    facts = {"choice": choice_facts(rows, len(source), settings.seed, method), "fingerprint": fingerprint(digests)}
    return [source.name(int(row)) for row in rows], torch.stack(images), facts


def _middle(image: Tensor, side: int) -> Tensor:
    top, left = ((whole - side) // 2 for whole in image.shape[-2:])
    return image[:, top : top + side, left : left + side]


def _rows(source: StoredImages, settings: InterpolateSettings, data: str) -> list[int]:
    """Return the numbers of the images that the path visits."""
    if settings.images is None:
        if len(source) < 2:
            raise UserError(f"{data} holds one image; a path needs two")
        return [int(row) for row in spread(settings.seed, len(source), settings.num_images)]
    rows, names = [], None
    for image in settings.images:
        if isinstance(image, int):
            if image >= len(source):
                raise UserError(f"images: there is no number {image}; {data} holds {len(source)}, counted from 0")
            rows.append(image)
            continue
        names = names or [source.name(row) for row in range(len(source))]
        matches = [row for row, name in enumerate(names) if image in (name, Path(name).name)]
        if len(matches) != 1:
            near = difflib.get_close_matches(image, names, n=3, cutoff=0.4) or names[:3]
            several = f"{len(matches)} images are called {image}" if matches else f"{data} holds no {image}"
            raise UserError(f"images: {several}; give a number, or a name like {', '.join(near)}")
        rows.append(matches[0])
    if len(set(rows)) < len(rows):
        raise UserError("images: has the same image twice; give each once")
    return rows


def _geometry(a: Tensor, b: Tensor) -> dict[str, Any]:
    """Return angle and norms of the centred ends, and how much closer to the centre the middle of a line is."""
    norms = [float(x.double().norm()) for x in (a, b)]
    omega, mean = angle(a, b), sum(norms) / 2
    return {
        "angle_degrees": math.degrees(omega),
        "norms": norms,
        "linear_middle_norm": float(((a + b) / 2).double().norm()) / mean if mean else None,
        "spherical_is_linear": not is_spherical(omega),
    }


def _measures(kind: str, paths: dict[str, Tensor], lpips: LPIPS | None, size: int) -> dict[str, float | None]:
    """Return the measures of a path that docs/jobs.md describes; None without LPIPS, or if both ends look the same."""
    images = paths[kind]
    middle = len(images) // 2
    figures: dict[str, float | None] = {"length": None, "largest_step": None}
    if lpips is not None:
        pairs = zip(images[:-1].split(size), images[1:].split(size), strict=True)
        # LPIPS is a squared distance of features: its root obeys the triangle inequality
        steps = torch.cat([lpips(a, b) for a, b in pairs]).double().clamp(min=0).sqrt()
        direct = float(lpips(images[:1], images[-1:])) ** 0.5
        if direct > 0:
            figures = {"length": float(steps.sum()) / direct, "largest_step": float(steps.max() / steps.mean())}
    if kind != "cross-fade":
        levels = to_uint8(images[middle]).double() - to_uint8(paths["cross-fade"][middle]).double()
        figures["middle_from_cross_fade"] = float(levels.square().mean().sqrt())
    return figures


def _means(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for key in rows[0]:
        known = [value for row in rows if (value := row[key]) is not None]
        means[key] = sum(known) / len(known) if known else None
    return means


def _frames(
    walk: Callable[[tuple[int, int], Tensor], dict[str, Tensor]],
    legs: Sequence[tuple[int, int]],
    ends: dict[int, Tensor],
    count: int,
) -> Iterator[Image.Image]:
    """Yield pictures of all paths side by side, from image to image and back to the first, slower near the images."""
    times = (1 - torch.cos(math.pi * torch.arange(count, dtype=torch.float64) / count)) / 2
    for leg in legs:
        for part in times.split(8):
            paths = walk(leg, part)
            paths["cross-fade"] = linear(ends[leg[0]], ends[leg[1]], part)
            for images in zip(*(paths[kind] for kind in PATHS), strict=True):
                yield picture_grid([images], PATHS, largest_px=FRAME_PX)


def _write(
    folder: Path,
    result: dict[str, Any],
    grids: Sequence[Image.Image],
    frames: Iterator[Image.Image] | None,
    settings: InterpolateSettings,
) -> None:
    kind = settings.animation or "webp"
    file = folder / f"animation.{kind}"
    if frames is not None:
        first, options = next(frames), {"quality": 80, "method": 2} if kind == "webp" else {"optimize": False}
        part = file.with_name(f"{file.name}.part")
        first.save(part, kind, save_all=True, append_images=frames, duration=FRAME_MS, loop=0, **options)
        part.replace(file)
    sheet = Image.new("RGB", (max(grid.width for grid in grids), sum(grid.height for grid in grids)), "white")
    top = 0
    for grid in grids:
        sheet.paste(grid, (0, top))
        top += grid.height
    sheet.save(folder / "grid.png")
    write_json(folder / "result.json", result)
    write_interpolation_report(folder / "report.html", result, grids, file if frames is not None else None)
