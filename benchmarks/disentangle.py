"""Beta-VAE, its annealed capacity, FactorVAE and beta-TCVAE on images with known factors: MIG, DCI, FactorVAE's score.

    python -m benchmarks.disentangle --data blobs --scratch /tmp/scratch
    python -m benchmarks.disentangle --data shapes64 --scratch /tmp/scratch

Each run takes three to five minutes of a processor; --runs and --seeds choose a few. After each seed they are added to
benchmarks/results/disentangle-*.json. Killed, it goes on when started again with the same scratch folder.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.machine import earlier, save, with_run
from benchmarks.runs import evaluate, events, folder_name, seconds_of, train
from latent_ae.data.synthetic import KINDS, write_shapes

WARMUP = "loss.kl_warmup=300"
SIDES_PX = {"shapes": 32, "shapes64": 64, "blobs": 16}
SHORT_WARMUP = "loss.kl_warmup=120"
METHODS = {
    "beta 1": ["loss.kl=1", SHORT_WARMUP],
    "beta 4": ["loss.kl=4", SHORT_WARMUP],
    "capacity 10": ["loss.kl=10", "loss.kl_capacity=10"],
    "FactorVAE 10": [
        *("loss.kl=1", SHORT_WARMUP, "loss.total_correlation=10", "loss.total_correlation_width=256"),
        "optim.discriminator_lr=1e-3",
    ],
    "beta-TCVAE 6": [
        *("loss.kl=1", SHORT_WARMUP, "loss.total_correlation=5", "loss.total_correlation_estimate=minibatch"),
    ],
}
STARTS = ("default", "linear")
RUNS: dict[str, dict[str, list[str]]] = {
    "shapes": {
        **{f"beta {beta}": [f"loss.kl={beta}", WARMUP] for beta in (1, 2, 4)},
        "capacity 8": ["loss.kl=10", "loss.kl_capacity=8"],
        "FactorVAE 10": [
            *("loss.kl=1", WARMUP, "loss.total_correlation=10", "loss.total_correlation_width=256"),
            "optim.discriminator_lr=1e-3",
        ],
    },
    "shapes64": {
        f"{name}, {start} start": [*settings, f"model.init={start}"]
        for start in STARTS
        for name, settings in METHODS.items()
    },
    "blobs": {f"beta {beta}": [f"loss.kl={beta}"] for beta in (1, 16, 64, 256)},
}
"""Of each set of images, what sets a run apart."""
SEEDS = (0, 1, 2, 3, 4)
STEPS, SHORT_STEPS = 1500, 600
"""Of most runs, and of those at 64 px, whose steps take four times as long."""
MODEL = (
    "model={{in_channels: 1, out_channels: 1, block_out_channels: {}, layers_per_block: 1, latent_channels: {}, "
    "norm_num_groups: 4, mid_block_add_attention: false, init: {}}}"
)
MODEL64 = MODEL.format([8, 8, 16, 32, 32, 64, 64], 10, "default").replace("groups: 4", "groups: 2")
"""The linear start needs four channels or a multiple in each group."""
BATCH = {"shapes": 32, "shapes64": 32, "blobs": 64}
OWN = {
    "shapes": [MODEL.format([8, 16, 32, 32, 64, 64], 6, "default"), "loss.pixel=bernoulli"],
    "shapes64": [MODEL64, f"steps={SHORT_STEPS}", "loss.pixel=bernoulli"],
    # levels up to a single place, as for the shapes. The linear start: from noise, a deep network folds several
    # factors into the one dimension that it finds first
    "blobs": [MODEL.format([16, 16, 32, 32, 64], 10, "linear"), "loss.pixel=gaussian", "loss.scale=0.05"],
}
"""What the runs on a set of images have in common, beside what all have."""
COMMON = [
    *(f"steps={STEPS}", "data.flip=false", "data.num_workers=0"),
    *("loss.perceptual=0", "gan.weight=0", "ema.decay=0.99"),
    *("optim.kind=muon", "optim.lr=2e-3", "optim.warmup=50"),
    *("checkpoint.every=10000", "validate.every=10000", "log.every=10", "validate.images=256"),
]
DCI = ("disentanglement", "completeness", "informativeness")
LAST = 10
"""Lines of the log that the parts of the loss are averaged over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--data", default="shapes", choices=SIDES_PX)
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="a few of the runs (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    words = parser.parse_args()
    kind, runs, side = words.data, RUNS[words.data], SIDES_PX[words.data]
    drawn = kind.removesuffix("64")
    if unknown := set(words.runs or runs) - set(runs):
        parser.error(f"--runs: {', '.join(sorted(unknown))}: choose from {', '.join(runs)}")
    scratch = words.scratch / kind
    table = scratch / "images.parquet"
    if not table.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        write_shapes(table.with_suffix(".part"), kind=drawn, side_px=side)
        table.with_suffix(".part").rename(table)
    common = [*COMMON, *OWN[kind], f"batch_size={BATCH[kind]}", f"data.resolution={side}", f"validate.crop_px={side}"]
    framed = [f"crop_px={side}", "batch_size=256", "num_workers=0"]
    factors = KINDS[drawn].factors
    facts = {
        "data": f"{' x '.join(map(str, factors.values()))} {drawn} ({', '.join(factors)}), {side} px",
        "steps": SHORT_STEPS if kind == "shapes64" else STEPS,
        "batch_size": BATCH[kind],
        "common": common,
        "settings": runs,
    }
    result_name = f"disentangle-{kind}"
    earlier(result_name, facts)  # ends here rather than after an hour
    for seed in words.seeds:
        found: dict[str, dict[str, Any]] = {}
        for name in words.runs or runs:
            folder = scratch / folder_name(f"{name} {seed}")
            sources = [f"data.source={table}", f"data.eval_source={table}", f"seed={seed}"]
            train(folder, "quickstart", *sources, *common, *runs[name])
            result = evaluate(folder / "factors", "factors", folder, table, *framed)
            found[name] = measured(folder, result, seed, side**2)
        rows = earlier(result_name, facts)
        for name, run in found.items():
            rows[name] = {"runs": with_run(rows.get(name, {"runs": []})["runs"], run)}
        save(result_name, {**facts, "rows": {name: rows[name] for name in runs if name in rows}}, added=True)


def measured(folder: Path, factors: dict[str, Any], seed: int, pixels: int) -> dict[str, Any]:
    """What a run came to, with its factors' evaluation."""
    lines = events(folder, "train")[-LAST:]
    likelihood = next(key for key in ("bernoulli", "gaussian") if key in lines[0])
    nats = {key: pixels * sum(line[key] for line in lines) / len(lines) for key in (likelihood, "kl")}
    estimates = [line["total_correlation"] for line in lines if "total_correlation" in line]
    return {
        "seed": seed,
        "mig": {kind: factors[kind]["mig"] for kind in ("mean", "sample")},
        "factor_vae_score": factors["mean"]["factor_vae_score"],
        # with no active dimension nothing is represented
        "dci": {key: factors["mean"]["dci"][key] if factors["active_dimensions"] else 0.0 for key in DCI},
        "gaps": factors["sample"]["gaps"],
        "active_dimensions": len(factors["active_dimensions"]),
        "psnr": events(folder, "validate")[-1]["psnr"],
        "reconstruction_nats": nats[likelihood],
        "kl_nats": nats["kl"],
        "gaussian_total_correlation": factors["sample"]["total_correlation"],
        "total_correlation": sum(estimates) / len(estimates) if estimates else None,
        "processor_seconds": seconds_of(folder),
    }


if __name__ == "__main__":
    main()
