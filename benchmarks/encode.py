"""Latents into files and out of them, beside a plain loop of Pillow, diffusers and torch.save.

    python -m benchmarks.encode --small PARQUET --large FOLDER

Writing: the first images of CIFAR-10's Parquet file at 32 px and of a folder of photographs at 256 px; the quickstart's
autoencoder as it starts (linear; 0.9 M parameters); mean and log-variance of each image and of its mirror image. `plain
loop`: one image at a time, one file of torch.save for each, float32. `ours`: encode_images, to the last file. From the
call to its end, the loading of weights and images included, imports not. Each in a process of its own with one thread
and no loader workers, in turns. Images per second are of the fastest round, those per second of processor time, which
other work on the machine changes less, the median.

Reading: batches of 256 random latents of the small set, as samples of the posterior: torch.load of each file,
`datasets` with the torch format, and open_latents.

Rounding: PSNR of the mean's reconstructions, from fp16 and from fp32, on 8-bit pixels. Writes
benchmarks/results/encode.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import save

SIDES = {"small": 32, "large": 256}
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path, metavar="PARQUET", required=True)
    parser.add_argument("--large", type=Path, metavar="FOLDER", required=True)
    parser.add_argument("--images", type=int, nargs=2, default=[500, 32], metavar=("SMALL", "LARGE"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=3, metavar=("WHO", "SET", "SCRATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        work(*arguments.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepare(scratch, arguments)
        rows = {}
        for which, count in zip(SIDES, arguments.images, strict=True):
            runs: dict[str, list[dict[str, float]]] = {"plain loop": [], "ours": []}
            for _ in range(arguments.rounds):
                for who, many in runs.items():
                    many.append(launch(who, which, scratch, arguments))
                    print(f"{which} {who:<12} {many[-1]}", file=sys.stderr)
            rows[which] = {"images": count, "side_px": SIDES[which]} | {
                who: {
                    "images_per_second": round(count / min(one["seconds"] for one in many), 2),
                    "images_per_cpu_second": round(count / statistics.median(one["cpu_s"] for one in many), 2),
                    "bytes_per_image": size(scratch, which, who, count),
                    "all": many,
                }
                for who, many in runs.items()
            }
            rows[which]["psnr"] = rounding(scratch, which)
        save("encode", {"rounds": arguments.rounds, "writing": rows, "latents_per_second": reading(scratch)})


def prepare(scratch: Path, arguments: argparse.Namespace) -> None:
    """The model, and both sets of images as folders of PNG files."""
    import datasets

    from latent_ae.config import load_settings
    from latent_ae.models.build import build_autoencoder
    from latent_ae_train.settings import TrainSettings

    build_autoencoder(load_settings(TrainSettings, "quickstart", []).model, sample_size=32).save_pretrained(
        scratch / "model"
    )
    small = datasets.load_dataset("parquet", data_files=str(arguments.small), split="train").select_columns("image")
    pictures = {
        "small": (row["image"] for row in small.select(range(arguments.images[0]))),
        "large": (Image.open(path) for path in sorted(arguments.large.rglob("*.jpg"))[: arguments.images[1]]),
    }
    for which, images in pictures.items():
        (scratch / which).mkdir()
        for number, image in enumerate(images):
            image.save(scratch / which / f"{number:05}.png")


def launch(who: str, which: str, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    words = [
        sys.executable,
        "-m",
        "benchmarks.encode",
        "--small",
        str(arguments.small),
        "--large",
        str(arguments.large),
    ]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | one_thread | {"HF_DATASETS_CACHE": str(scratch / "datasets")}
    done = subprocess.run(
        [*words, "--worker", who, which, str(scratch)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{who}: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def work(who: str, which: str, scratch_folder: str) -> None:
    from benchmarks.plain_evaluation import center_crop_arr

    scratch, side = Path(scratch_folder), SIDES[which]
    out = scratch / f"{which}-{who}"
    if who == "ours":
        from latent_ae.latents.encode import encode_images
        from latent_ae.latents.settings import EncodeSettings

        for path in out.rglob("*"):  # of the round before
            if path.is_file():
                path.unlink()
        for folder in (out / "data", out):
            if folder.exists():
                folder.rmdir()
        started, used = time.perf_counter(), time.process_time()
        encode_images(scratch / "model", scratch / which, out, EncodeSettings(resolution=side, num_workers=0))
    else:
        from diffusers import AutoencoderKL

        out.mkdir(exist_ok=True)
        started, used = time.perf_counter(), time.process_time()
        vae = AutoencoderKL.from_pretrained(scratch / "model").eval()
        for path in sorted((scratch / which).iterdir()):
            pixels = center_crop_arr(Image.open(path).convert("RGB"), side)
            image = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)[None]
            found = dict[str, torch.Tensor]()
            for suffix, view in (("", image), ("_flip", image.flip(3))):
                with torch.no_grad():
                    posterior = vae.encode(view).latent_dist
                found |= {f"mean{suffix}": posterior.mean[0], f"logvar{suffix}": posterior.logvar[0]}
            torch.save(found, out / f"{path.stem}.pt")
    took, cpu_s = time.perf_counter() - started, time.process_time() - used
    print(json.dumps({"seconds": round(took, 2), "cpu_s": round(cpu_s, 2)}))


def size(scratch: Path, which: str, who: str, count: int) -> int:
    files = [path for path in (scratch / f"{which}-{who}").rglob("*") if path.is_file()]
    return round(sum(path.stat().st_size for path in files) / count)


@torch.no_grad()
def rounding(scratch: Path, which: str) -> dict[str, float]:
    """Mean PSNR of the images in the cache (fp16) and in the loop's files (fp32), against the images."""
    from diffusers import AutoencoderKL

    from benchmarks.plain_evaluation import center_crop_arr, levels
    from latent_ae.latents.cache import open_latents

    vae, cache = AutoencoderKL.from_pretrained(scratch / "model").eval(), open_latents(scratch / f"{which}-ours")
    found: dict[str, list[float]] = {"fp32": [], "fp16": []}
    for number, path in enumerate(sorted((scratch / which).iterdir())[:32]):
        given = center_crop_arr(Image.open(path).convert("RGB"), SIDES[which]).astype(np.float64)
        means = {"fp32": torch.load(scratch / f"{which}-plain loop" / f"{path.stem}.pt")["mean"][None]}
        means["fp16"] = cache.batch([number])
        for name, mean in means.items():
            made = levels(vae.decode(mean).sample)[0].permute(1, 2, 0).numpy()
            found[name].append(10 * np.log10(255**2 / np.mean((given - made) ** 2)))
    return {name: round(float(np.mean(values)), 5) for name, values in found.items()}


def reading(scratch: Path) -> dict[str, float]:
    import datasets

    from latent_ae.latents.cache import open_latents

    cache, files = open_latents(scratch / "small-ours"), sorted((scratch / "small-plain loop").iterdir())
    table = datasets.load_dataset(str(scratch / "small-ours"), split="train").with_format("torch")

    def plain(rows: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        found = [torch.load(files[row]) for row in rows]
        mean, logvar = (torch.stack([one[name] for one in found]) for name in ("mean", "logvar"))
        return mean + torch.exp(0.5 * logvar) * noise

    def by_datasets(rows: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        found = table[rows]
        return found["mean"] + torch.exp(0.5 * found["logvar"]) * noise

    ways: dict[str, Callable[[np.ndarray, torch.Tensor], torch.Tensor]] = {
        "torch.load of each file": plain,
        "datasets, torch format": by_datasets,
        "open_latents": lambda rows, noise: cache.batch(rows, noise=noise),
    }
    return {name: round(rate(way, len(cache), cache.shape)) for name, way in ways.items()}


def rate(way: Callable[[np.ndarray, torch.Tensor], torch.Tensor], count: int, shape: tuple[int, ...]) -> float:
    def batches() -> Iterator[float]:
        rng = np.random.default_rng(0)
        for _ in range(11):
            rows, noise = rng.integers(0, count, BATCH), torch.zeros(BATCH, *shape)
            started = time.perf_counter()
            way(rows, noise)
            yield time.perf_counter() - started

    return BATCH / min(list(batches())[1:])  # the first one opens


if __name__ == "__main__":
    main()
