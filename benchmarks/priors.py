"""Better posteriors and priors of a variational autoencoder, in bits per dimension and by its samples.

python -m benchmarks.priors --data /data/cifar10 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder; `--until PART` stops after a part.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.machine import save
from benchmarks.runs import cifar10, cifar10_facts, evaluate, train

PARTS = ("gaussian", "flow-posterior", "samples", "bits")
BATCH, SIDE = 32, 32
NETWORK: dict[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
MODELS: dict[str, dict[str, Any]] = {
    "gaussian": NETWORK,
    "flow-posterior": {"kind": "FlowAutoencoderKL", "config": NETWORK | BLOCKS},
}
"""Of equal first weights, save the flow's, which begins as the identity."""
COMMON = (
    f"batch_size={BATCH} seed=0 data.resolution={SIDE} validate.crop_px={SIDE} validate.images=500 validate.every=1000 "
    "checkpoint.every=1000 loss.perceptual=0 loss.kl=1 loss.pixel=logistic loss.learned_logvar=true gan.weight=0 "
    "ema.decay=0.99 optim.lr=1e-3 optim.warmup=50 log.every=50"
).split()
IMAGES, SAMPLES = 500, 8
"""Held out, and draws for each of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700, help="of each first stage")
    parser.add_argument("--until", choices=PARTS, default=PARTS[-1])
    words = parser.parse_args()
    for name, model in MODELS.items():
        settings = [f"steps={words.steps}", f"model={json.dumps(model)}", *cifar10(words.data), *COMMON]
        train(words.scratch / name, "quickstart", *settings)
        if words.until == name:
            return
    exports = {name: words.scratch / name / "export" for name in MODELS}
    where, latents = (exports["gaussian"], words.data), words.scratch / "flow" / "latents" / "train"
    drawn = {
        "N(0, I)": sampled(*where, words.scratch / "normal", "prior=normal"),
        "flow matching": sampled(*where, words.scratch / "flow", "prior=flow"),
        "Gaussian of the latents": sampled(*where, words.scratch / "fitted", "prior=gaussian", f"latents={latents}"),
    }
    if words.until == "samples":
        return
    found = {name: bits(export, words.data / "test.parquet") for name, export in exports.items()}
    gaussian, flow = (found[name][1] for name in MODELS)
    gained = {key: estimate(gaussian[key] - flow[key]) for key in ("elbo", "importance_bound")}
    save(
        "priors",
        cifar10_facts(words.data, "20,000 images to train on")
        | {
            "steps": words.steps,
            "batch": BATCH,
            "parameters": {name: count for name, (count, _) in found.items()},
            "priors": drawn,
            "held_out_images": IMAGES,
            "draws": SAMPLES,
            "bits_per_dimension": {
                name: {key: estimate(rows[key]) for key in ("elbo", "importance_bound", "rate")}
                for name, (_, rows) in found.items()
            },
            "gained_by_the_flow": gained,
        },
    )


def sampled(export: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    """What `eval sample` finds."""
    result = evaluate(out, "sample", export, data, *more)
    return {key: result[key] for key in ("metrics", "intervals", "recipe", "processor_seconds") if key in result}


def bits(export: Path, tests: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Parameters; and of each held-out image, bits per dimension: minus the ELBO, its rate, minus the bound."""
    out = export.parent / "likelihood"
    settings = [f"limit={IMAGES}", f"samples={SAMPLES}", f"crop_px={SIDE}", "batch_size=100", "num_workers=0"]
    result = evaluate(out, "likelihood", export, tests, *settings)
    table = pq.read_table(out / "images.parquet")
    columns = {key: table[f"{key}_bits"].to_numpy() for key in ("elbo", "rate", "importance_bound")}
    return result["model"]["parameters"], columns


def estimate(values: np.ndarray) -> list[float]:
    """Mean and its 95 % interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


if __name__ == "__main__":
    main()
