"""Whether an evaluation's memory grows with the number of images.

    python -m benchmarks.evaluate_memory --data PARQUET

The whole of evaluate_reconstruction over 500 and over 5,000 images of 32 px (PSNR, SSIM, the Fréchet distance of
AlexNet's features; the quickstart's autoencoder as it starts; the posterior's mode), report included; and what follows
the pass at the size of Inception's features, over shards of random ones: collecting, Fréchet distance, kernel distance,
intervals. Each in a process of its own with one thread; its peak resident memory. Writes
benchmarks/results/evaluate-memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import peak_memory_gb, save

FEATURES, SHARD = 2048, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DATA", help="5,000 small images or more")
    parser.add_argument("--images", type=int, nargs="+", default=[500, 5000], help="of the whole evaluation")
    parser.add_argument("--vectors", type=int, nargs="+", default=[2500, 10000], help="of the statistics alone")
    parser.add_argument("--worker", nargs=2, metavar=("PART", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        part, count = arguments.worker
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            before = peak_memory_gb()
            (whole if part == "whole" else statistics)(Path(scratch), int(count), arguments.data)
        figures = {"seconds": round(time.perf_counter() - started, 1), "peak_memory_gb": round(peak_memory_gb(), 3)}
        print(json.dumps(figures | {"before_gb": round(before, 3)}))
        return
    if arguments.data is None:
        parser.error("--data is needed")
    parts = [("whole", count) for count in arguments.images] + [("statistics", count) for count in arguments.vectors]
    rows = []
    for part, count in parts:
        rows.append({"part": part, "images": count} | launch(part, count, arguments.data))
        print(rows[-1], file=sys.stderr)
    save("evaluate-memory", {"runs": rows})


def launch(part: str, count: int, data: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.evaluate_memory", "--data", data, "--worker", part, str(count)]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, env=os.environ | one_thread, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{part}, {count}: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def whole(scratch: Path, count: int, data: str) -> None:
    from latent_ae.config import load_settings
    from latent_ae.models.build import build_autoencoder
    from latent_ae_eval.recon.measure import evaluate_reconstruction
    from latent_ae_eval.recon.settings import ReconSettings
    from latent_ae_train.settings import TrainSettings

    model = build_autoencoder(load_settings(TrainSettings, "quickstart", []).model, sample_size=32)
    # 16 is what a shard of few images holds: with more, the longer evaluation would also take larger batches
    settings = ReconSettings(
        resize_px=None, crop_px=32, lpips=(), frechet=("alexnet",), latents=("mode",), limit=count, batch_size=16
    )
    evaluate_reconstruction(model, data, settings, out=scratch / "out", rows=False)


def statistics(scratch: Path, count: int, data: str) -> None:
    """Random features, a few of them in common, in shards as an evaluation leaves them."""
    from latent_ae_eval.features import collect
    from latent_ae_eval.recon.summary import distances
    from latent_ae_eval.storage import Shard, WorkFolder

    work = WorkFolder(scratch / "work", None)
    work.begin()
    for first in range(0, count, SHARD):
        generator = torch.Generator().manual_seed(first)
        size = min(SHARD, count - first)
        originals = torch.rand(size, FEATURES, generator=generator)
        made = originals + 0.1 * torch.randn(size, FEATURES, generator=generator)
        rows = [{"index": first + i, "name": f"{first + i:08}.png", "mode_psnr": 30.0} for i in range(size)]
        work.write(first // SHARD, Shard(rows, [], {"inception.input": originals, "inception.mode": made}))
    _, _, files = collect(work, work.done())
    distances(files, "mode", "inception", "inception", print)


if __name__ == "__main__":
    main()
