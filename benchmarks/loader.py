"""What the input pipeline delivers: images/s of the loader alone, decode, crop and flip included.

    python -m benchmarks.loader

JPEG files in a folder and the same bytes in Parquet, made of scikit-image's photographs: 256 px crops of 512 px images.
Then files of 1024 px whose shorter side is resized to 256 px, with and without data.scaled_decoding. Each with 1 and 2
workers, and with and without the quick ways (simplejpeg, shared memory), in turns, medians. Images per processor second
count the processor time of the workers and of the process that they feed. Writes benchmarks/results/loader.json.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import psutil
from PIL import Image
from skimage import data

from benchmarks.machine import save
from latent_ae.data import fast_jpeg, shared_pixels
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.settings import DataSettings

NUM_FILES, SIDE_PX, LARGE_PX, CROP_PX, BATCH = 256, 512, 1024, 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, parquet, large = (Path(scratch) / name for name in ("jpeg", "images.parquet", "large"))
        write_sources(folder, SIDE_PX, parquet)
        write_sources(large, LARGE_PX)
        cases: dict[str, dict[str, Any]] = {
            "JPEG folder": {"source": str(folder)},
            "Parquet": {"source": str(parquet)},
            "1024 px, resize_px=256": {"source": str(large), "resize_px": CROP_PX},
            "1024 px, resize_px=256, scaled_decoding": {
                "source": str(large),
                "resize_px": CROP_PX,
                "scaled_decoding": True,
            },
        }
        rates: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.rounds):
            for name, values in cases.items():
                for workers in arguments.workers:
                    for way, context in (("plain", plain_ways()), ("", contextlib.nullcontext())):
                        with context:
                            found = images_per_second(values, workers, arguments.batches)
                        row = ", ".join(filter(None, (name, f"{workers} worker(s)", way)))
                        rates.setdefault(row, []).append(found)
    medians = [{name: statistics.median(one[i] for one in found) for name, found in rates.items()} for i in (0, 1)]
    for name in rates:
        print(f"{name:<60} {medians[0][name]:8.1f} images/s {medians[1][name]:8.1f} per processor second")
    result = {"images_per_second": medians[0], "images_per_processor_second": medians[1], "all": rates}
    save("loader", {"image_px": SIDE_PX, "crop_px": CROP_PX} | result)


@contextlib.contextmanager
def plain_ways() -> Iterator[None]:
    """Let Pillow decode all files, and workers send their pixels through pipes."""
    with mock.patch.object(fast_jpeg, "simplejpeg", None), mock.patch.object(shared_pixels.mmap, "mmap", no_memory):
        yield


def no_memory(*arguments: object) -> None:
    raise OSError


def write_sources(folder: Path, side_px: int, parquet: Path | None = None) -> None:
    folder.mkdir()
    photographs = [Image.fromarray(photograph()) for photograph in (data.astronaut, data.chelsea, data.coffee)]
    encoded: list[bytes] = []
    for number in range(NUM_FILES):
        image = photographs[number % len(photographs)]
        # another part of the photograph each time, so that no two files are alike
        left, top = (number * 7) % 40, (number * 11) % 40
        picture = image.crop((left, top, image.width, image.height)).resize((side_px, side_px))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
        (folder / f"{number:04}.jpg").write_bytes(encoded[-1])
    if parquet is not None:
        rows = {"image": [{"bytes": content, "path": None} for content in encoded]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(parquet))


def images_per_second(values: dict[str, Any], workers: int, batches: int) -> tuple[float, float]:
    """Return images per second, and per second of processor time."""
    settings = DataSettings(resolution=CROP_PX, num_workers=workers, **values)
    source = open_images(settings, "train")
    stream = training_batches(source, settings, channels=3, seed=0, batch_size=BATCH, micro_batch_size=BATCH)
    try:
        for _ in range(2 * workers + 2):  # past the workers' start and what they hold ready
            next(stream)
        started, busy = time.perf_counter(), processor_seconds()
        for _ in range(batches):
            next(stream)
        count = batches * BATCH
        return count / (time.perf_counter() - started), count / (processor_seconds() - busy)
    finally:
        stream.close()


def processor_seconds() -> float:
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))


if __name__ == "__main__":
    main()
