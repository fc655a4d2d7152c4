"""Results of `eval recon` made up from numbers, and the files that hold them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HOSTILE = "<script>alert('x')</script> & \"quotes\" größe_日本.png"


def interval(values: np.ndarray) -> list[float]:
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean() - half), float(values.mean() + half)]


def table(num_images: int = 60, shift: float = 0.0, noise: float = 0.0, seed: int = 0, kinds=("mode", "sample")):
    """Rows of images whose difficulty is the same for every model; `shift` and `noise` are the model's own."""
    difficulty = np.random.default_rng(7).normal(0, 3, num_images)
    own = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = [
        {"index": i, "name": f"{i}.png", "digest": f"{i:064x}", "channels": 3, "height": 24, "width": 32}
        for i in range(num_images)
    ]
    for prefix, lower in [*((kind, 0.5 * (kind == "sample")) for kind in kinds), ("baseline", 5.0)]:
        psnr = 28 + difficulty + (shift - lower + noise * own.normal(size=num_images)) * (prefix != "baseline")
        for row, value in zip(rows, psnr, strict=True):
            row[f"{prefix}_psnr"] = float(value)
            row[f"{prefix}_ssim"] = float(value) / 40
            row[f"{prefix}_lpips_vgg"] = 0.5 - float(value) / 80
    return rows


def result(rows: list[dict[str, Any]], name: str = "model", **changes: Any) -> dict[str, Any]:
    """What result.json holds for these rows; `part={...}` changes keys of a part."""
    prefixes = [p for p in ("mode", "sample", "baseline") if f"{p}_psnr" in rows[0]]
    columns = {
        p: {k: np.array([row[f"{p}_{k}"] for row in rows], float) for k in ("psnr", "ssim", "lpips_vgg")}
        for p in prefixes
    }
    means = {p: {"n": len(rows)} | {k: float(v.mean()) for k, v in part.items()} for p, part in columns.items()}
    spans = {p: {k: interval(v) for k, v in part.items()} for p, part in columns.items()}
    baseline = {"name": "bicubic /8", "metrics": means.pop("baseline"), "intervals": spans.pop("baseline")}
    for p in means:
        means[p] |= {"fid": 1.0, "kid": 0.0003}
        spans[p]["fid"] = [0.9, 1.1]
    document: dict[str, Any] = {
        "format": "latent-ae reconstruction 1",
        "model": {"location": f"/m/{name}/export", "class": "AutoencoderKL", "factor": 8, "parameters": 83653863},
        "protocol": {"name": "default", "changed": {}, "crop_px": 256, "rounding": "up", "latents": list(means)},
        "data": {"location": "/d/holiday", "num_images": len(rows), "fingerprint": "f" * 64, "skipped": []},
        "seed": 0,
        "settings": {"batch_size": 8},
        "versions": {"torch": "2.15.0"},
        "device": "cpu",
        "cost": {
            **{"device": "a processor", "dtype": "float32", "batch_size": 1, "image_px": [256, 256], "batches": 9},
            "seconds_per_image": {"encode": 0.25, "decode": 0.5, "whole": 0.75},
            "peak_memory_bytes": None,
            "parameters": {"encoder": 34163664, "decoder": 49490199},
            "latent_shape": [4, 32, 32],
            "bits_per_pixel": {"fp16": 1.0, "indices": None},
        },
        "metrics": means,
        "intervals": spans,
        "baseline": baseline,
        "notes": [],
    }
    for key, value in changes.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    return document


def write(folder: Path, document: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Path:
    """A folder as `eval recon` leaves it; no rows: without images.parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(document))
    if rows is not None:
        pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    return folder
