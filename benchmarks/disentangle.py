"""Beta-VAE, its annealed capacity and FactorVAE on shapes with known factors: the mutual information gap of each.

python -m benchmarks.disentangle --scratch /tmp/scratch
Runs that the scratch folder holds already are not made again; --runs chooses a few. Each takes three minutes
of a processor.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import save
from benchmarks.runs import evaluate, events, folder_name, seconds_of, train
from latent_ae.shapes import FACTORS, write_shapes

RUNS: dict[str, list[str]] = {
    "beta 1": ["loss.kl=1", "loss.kl_warmup=300"],
    "beta 2": ["loss.kl=2", "loss.kl_warmup=300"],
    "beta 4": ["loss.kl=4", "loss.kl_warmup=300"],
    "capacity 8": ["loss.kl=10", "loss.kl_capacity=8"],
    "FactorVAE 10": [
        *("loss.kl=1", "loss.kl_warmup=300", "loss.total_correlation=10", "loss.total_correlation_width=256"),
        "optim.discriminator_lr=1e-3",
    ],
}
"""What sets a run apart."""
SEEDS = (0, 1, 2, 3, 4)
SIDE_PX, STEPS, BATCH = 32, 1500, 32
MODEL = (
    "model={in_channels: 1, out_channels: 1, block_out_channels: [8, 16, 32, 32, 64, 64], layers_per_block: 1, "
    "latent_channels: 6, norm_num_groups: 4, mid_block_add_attention: false}"
)
COMMON = [
    *(f"steps={STEPS}", f"batch_size={BATCH}", MODEL),
    *(f"data.resolution={SIDE_PX}", "data.flip=false", "data.num_workers=0"),
    *("loss.pixel=bernoulli", "loss.perceptual=0", "gan.weight=0", "ema.decay=0.99"),
    *("optim.kind=muon", "optim.lr=2e-3", "optim.warmup=50"),
    *("checkpoint.every=10000", "validate.every=10000", "log.every=10"),
    *(f"validate.crop_px={SIDE_PX}", "validate.images=256"),
]
LAST = 10
"""Lines of the log that the parts of the loss are averaged over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    words = parser.parse_args()
    table = words.scratch / "shapes.parquet"
    if not table.exists():
        words.scratch.mkdir(parents=True, exist_ok=True)
        write_shapes(table)
    for seed in words.seeds:
        for name in words.runs:
            run_once(words.scratch, table, name, seed)
    rows = {}
    for name in RUNS:
        found = [measured(words.scratch, name, seed) for seed in SEEDS]
        if any(found):
            rows[name] = {"settings": RUNS[name], "runs": [run for run in found if run is not None]}
    result = {
        "data": f"{' x '.join(map(str, FACTORS.values()))} shapes ({', '.join(FACTORS)}), {SIDE_PX} px",
        "steps": STEPS,
        "batch_size": BATCH,
        "common": COMMON,
        "rows": rows,
    }
    save("disentangle", result)


def run_once(scratch: Path, table: Path, name: str, seed: int) -> None:
    """Trains and measures, unless that was done."""
    folder = scratch / folder_name(f"{name} {seed}")
    sources = [f"data.source={table}", f"data.eval_source={table}", f"seed={seed}"]
    train(folder, "quickstart", *sources, *COMMON, *RUNS[name])
    framed = [f"crop_px={SIDE_PX}", "batch_size=256", "num_workers=0"]
    evaluate(folder / "factors", "factors", folder, table, *framed)


def measured(scratch: Path, name: str, seed: int) -> dict[str, Any] | None:
    """What a run came to; None where it was not made."""
    folder = scratch / folder_name(f"{name} {seed}")
    if not (folder / "factors/result.json").exists():
        return None
    factors = json.loads((folder / "factors/result.json").read_text())
    lines = events(folder, "train")[-LAST:]
    nats = {key: SIDE_PX**2 * sum(line[key] for line in lines) / len(lines) for key in ("bernoulli", "kl")}
    estimates = [line["total_correlation"] for line in lines if "total_correlation" in line]
    return {
        "seed": seed,
        "mig": {kind: factors[kind]["mig"] for kind in ("mean", "sample")},
        "gaps": factors["sample"]["gaps"],
        "active_dimensions": len(factors["active_dimensions"]),
        "psnr": events(folder, "validate")[-1]["psnr"],
        "reconstruction_nats": nats["bernoulli"],
        "kl_nats": nats["kl"],
        "gaussian_total_correlation": factors["sample"]["total_correlation"],
        "total_correlation": sum(estimates) / len(estimates) if estimates else None,
        "processor_seconds": seconds_of(folder),
    }


if __name__ == "__main__":
    main()
