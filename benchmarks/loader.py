"""What the input pipeline delivers: images/s of the loader alone, decode, crop and flip included.

    python -m benchmarks.loader

JPEG files in a folder and the same bytes in Parquet, made of scikit-image's photographs; 256 px crops of 512 px images,
with 1 and 2 workers, in turns, medians. Writes benchmarks/results/loader.json.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import datasets
from PIL import Image
from skimage import data

from benchmarks.machine import save
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.settings import DataSettings

NUM_FILES, SIDE_PX, CROP_PX, BATCH = 256, 512, 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"JPEG folder": Path(scratch) / "jpeg", "Parquet": Path(scratch) / "images.parquet"}
        write_sources(*sources.values())
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for name, path in sources.items():
                for workers in (1, 2):
                    rate = images_per_second(path, workers, arguments.batches)
                    rates.setdefault(f"{name}, {workers} worker(s)", []).append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:<28} {rate:8.1f} images/s")
    save("loader", {"image_px": SIDE_PX, "crop_px": CROP_PX, "images_per_second": medians, "all": rates})


def write_sources(folder: Path, parquet: Path) -> None:
    folder.mkdir()
    photographs = [Image.fromarray(photograph()) for photograph in (data.astronaut, data.chelsea, data.coffee)]
    encoded: list[bytes] = []
    for number in range(NUM_FILES):
        image = photographs[number % len(photographs)]
        # another part of the photograph each time, so that no two files are alike
        left, top = (number * 7) % 40, (number * 11) % 40
        picture = image.crop((left, top, image.width, image.height)).resize((SIDE_PX, SIDE_PX))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
        (folder / f"{number:04}.jpg").write_bytes(encoded[-1])
    rows = {"image": [{"bytes": content, "path": None} for content in encoded]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(parquet))


def images_per_second(path: Path, workers: int, batches: int) -> float:
    settings = DataSettings(source=str(path), resolution=CROP_PX, num_workers=workers)
    source = open_images(settings, "train")
    stream = training_batches(source, settings, channels=3, seed=0, batch_size=BATCH, micro_batch_size=BATCH)
    try:
        for _ in range(2 * workers + 2):  # past the workers' start and what they hold ready
            next(stream)
        started = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return batches * BATCH / (time.perf_counter() - started)
    finally:
        stream.close()


if __name__ == "__main__":
    main()
