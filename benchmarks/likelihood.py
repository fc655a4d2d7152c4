"""Variational autoencoders that differ in the likelihood of their pixels, by the bits that each needs for CIFAR-10.

python -m benchmarks.likelihood --data /data/cifar10 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.machine import save
from benchmarks.runs import cifar10, cifar10_facts, evaluate, events, folder_name, seconds_of, train

RUNS = {
    "logistic, learned scale": [],
    "gaussian, learned scale": ["loss.pixel=gaussian"],
    "gaussian, scale 0.1": ["loss.pixel=gaussian", "loss.scale=0.1", "loss.learned_logvar=false"],
    "bernoulli": ["loss.pixel=bernoulli", "loss.learned_logvar=false", "loss.scale=0.1"],
    "logistic, latent of 4 x 4 x 4": ["model.block_out_channels=[16,16,32,64]", "model.latent_channels=4"],
    "logistic, default start": ["model.init=default"],
}
"""What sets a run apart from the recipe `vae`."""
STEPS, BATCH = 200, 32
COMMON = (
    f"seed=0 steps={STEPS} batch_size={BATCH} validate.images=200 validate.every=1000 checkpoint.every=1000".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--images", type=int, default=300, help="of the test images, to measure")
    parser.add_argument("--samples", type=int, default=32)
    words = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in words.runs:
        run = words.scratch / folder_name(name)
        train(run, "vae", *cifar10(words.data), *COMMON, *RUNS[name])
        settings = [f"limit={words.images}", f"samples={words.samples}", "batch_size=64"]
        result = evaluate(run / "likelihood", "likelihood", run, words.data / "test.parquet", *settings)
        rows[name] = {
            "likelihood": result["likelihood"],
            "metrics": result["metrics"],
            "curve": result["curve"],
            "effective_samples": result["effective_samples"],
            "latent_dimensions": result["latent_dimensions"],
            "parameters": result["model"]["parameters"],
            "psnr": events(run, "validate")[-1]["psnr"],
            "processor_seconds": seconds_of(run),
        }
    about = cifar10_facts(words.data, "20,000 images to train on") | {"steps": STEPS, "batch_size": BATCH}
    save("likelihood", about | {"images": words.images, "samples": words.samples, "runs": rows})


if __name__ == "__main__":
    main()
