"""Training on crops of one size and on crops of several, with as many pixels in all; both are measured at 256 px.

    python -m benchmarks.buckets --scratch /tmp/scratch

The quickstart's shape and photographs, a few steps without the adversarial term. Killed, it goes on when started again
with the same scratch folder. Writes benchmarks/results/buckets.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import save
from benchmarks.runs import evaluate, events, folder_name, train
from latent_ae.config import load_settings
from latent_ae.data.rng import buckets_at
from latent_ae_train.settings import TrainSettings

WEIGHTS = {48: 24, 64: 9, 96: 6, 128: 1}
"""Sides of the buckets, px, and their weights, by which crops have 64 x 64 pixels on average."""
BUCKETS = ", ".join(f"{{width: {side}, height: {side}, weight: {weight}}}" for side, weight in WEIGHTS.items())
RUNS = {
    "64 px": [],
    "48, 64, 96 and 128 px": [f"data.buckets=[{BUCKETS}]"],
}
PX = 256
JUDGED = (f"crop_px={PX}", "frechet=[]", "latents=[mode]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    words = parser.parse_args()
    common = [f"steps={words.steps}", "seed=0", "gan.weight=0", f"validate.every={words.steps}", "optim.warmup=10"]
    rows: dict[str, Any] = {}
    for name, own in RUNS.items():
        run = words.scratch / folder_name(name)
        train(run, "quickstart", *common, *own)
        settings = load_settings(TrainSettings, "quickstart", [*common, *own])
        measured = {}
        for framing in ("null", str(PX)):
            result = evaluate(run / f"recon-{framing}", "recon", run, Path("photos"), f"resize_px={framing}", *JUDGED)
            measured[framing] = {key: result["metrics"]["mode"][key] for key in ("psnr", "ssim", "lpips_vgg")}
        rows[name] = {
            "settings": own,
            "pixels": pixels(settings),
            "before": {key: events(run, "validate")[0][key] for key in ("psnr", "lpips_vgg")},
            "cut_from_the_whole": measured["null"],
            "resized_first": measured[str(PX)],
        }
    save("buckets", {"base": " ".join(["quickstart", *common]), "steps": words.steps, "crop_px": PX, "runs": rows})


def pixels(settings: TrainSettings) -> int:
    """The pixels of all training crops of a run."""
    sizes = [height * width for height, width in settings.data.crop_sizes]
    weights = [bucket.weight for bucket in settings.data.buckets] or [1.0]
    return settings.batch_size * int(np.array(sizes)[buckets_at(settings.seed, range(settings.steps), weights)].sum())


if __name__ == "__main__":
    main()
