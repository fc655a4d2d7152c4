"""Levels of latents against one level, in networks of one class and size, by bits per dimension of held-out images.

    python -m benchmarks.hierarchical --data /data/cifar10 --scratch /tmp/scratch

All contestants have the recipe `hierarchical-vae` but for what their lines say: the same images, order, steps and
learning rate, and parameters within 2 % of each other. Bits per dimension are minus the evidence lower bound, from one
sample of the posterior of each held-out image, with the averaged weights. Killed, it goes on when started again with
the same scratch folder. `--only` takes some of the contestants, `--steps` another length; the file holds all that were
measured in that folder.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import save
from benchmarks.runs import cifar10, cifar10_facts, evaluate, folder_name, seconds_of, train

SHAPE = "model.config={{width: {}, level_sides: {}, level_channels: {}, blocks: {}, norm_num_groups: 2}}"
THREE = SHAPE.format(48, [4, 8, 16], [16, 8, 4], 1)
CONTESTANTS = {
    "three levels: 4, 8, 16 px": [THREE],
    "three levels, no warm-up": [THREE, "loss.kl_warmup=0"],
    "one level: 16 px": [SHAPE.format(54, [16], [8], 4)],
    "one level: 8 px": [SHAPE.format(54, [8, 16], [32, 0], 2)],
}
BATCH, IMAGES = 32, 4000
COMMON = (
    f"batch_size={BATCH} seed=0 data.resolution=32 data.resize_px=null validate.images=500 "
    "validate.every=1000000 checkpoint.every=200"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=600)
    words = parser.parse_args()
    torch.set_num_threads(1)
    tests = words.data / "test.parquet"
    for name in words.only:
        warm = f"loss.kl_warmup={words.steps // 4}"
        settings = [*cifar10(words.data), f"steps={words.steps}", *COMMON, warm, *CONTESTANTS[name]]
        train(place(words.scratch, words.steps, name), "hierarchical-vae", *settings)
    rows = []
    lengths = sorted(int(folder.name) for folder in words.scratch.iterdir() if folder.name.isdigit())
    for steps, (name, settings) in itertools.product(lengths, CONTESTANTS.items()):
        if (run := place(words.scratch, steps, name)).exists():
            rows.append({"name": name, "steps": steps, "settings": " ".join(settings)} | measured(run, tests))
    facts = cifar10_facts(words.data, "20,000 images to train on and 4,000 held out")
    save("hierarchical", facts | {"batch": BATCH, "contestants": rows})


def place(scratch: Path, steps: int, name: str) -> Path:
    return scratch / str(steps) / folder_name(name)


def measured(run: Path, tests: Path) -> dict[str, Any]:
    """Bits per dimension of the first held-out images, and their parts."""
    settings = [f"limit={IMAGES}", "samples=1", "batch_size=50", "crop_px=32", "num_workers=0"]
    result = evaluate(run / "likelihood", "likelihood", run / "export", tests, *settings)
    metrics = result["metrics"]
    levels = metrics.get("rate_levels", [metrics["rate"]])
    config = json.loads((run / "export/config.json").read_text())
    sides = [side for side, count in zip(config["level_sides"], config["level_channels"], strict=True) if count]
    return {
        "parameters": result["model"]["parameters"],
        "bits": metrics["elbo"]["bits_per_dimension"],
        "reconstruction": metrics["distortion"]["bits_per_dimension"]["mean"],
        "levels": [level["bits_per_dimension"]["mean"] for level in levels],
        "level_sides": sides,
        "scale": result["likelihood"]["scale"],
        "processor_seconds": seconds_of(run),
    }


if __name__ == "__main__":
    main()
