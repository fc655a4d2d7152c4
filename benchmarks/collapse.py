"""A posterior that collapses, and what each cure makes of it: warm-up, free bits, a weaker decoder.

python -m benchmarks.collapse --data /data/cifar10 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import save
from benchmarks.runs import cifar10, cifar10_facts, evaluate, events, folder_name, train

SIDE_PX, BATCH, STEPS = 32, 16, 240
ENCODER = [8, 16, 16, 16, 32, 32]
MODEL: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 6,
    "up_block_types": ["UpDecoderBlock2D"] * 6,
    "down_block_out_channels": ENCODER,
    "layers_per_down_block": 2,
    "up_block_out_channels": ENCODER,
    "layers_per_up_block": 3,
    "latent_channels": 32,
    "norm_num_groups": 8,
}
"""A latent of 32 numbers without height and width, and a decoder whose layers can be chosen apart."""
COMMON = (
    f"steps={STEPS} batch_size={BATCH} seed=0 data.resolution={SIDE_PX} "
    f"validate.crop_px={SIDE_PX} validate.images=500 validate.every={STEPS} checkpoint.every={STEPS} log.every=20 "
    "loss.pixel=logistic loss.scale=0.5 loss.learned_logvar=true loss.perceptual=0 loss.kl=1 gan.weight=0 "
    "ema.decay=0.98 optim.lr=1e-3 optim.warmup=20 optim.schedule=constant"
).split()
RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "none": ([], {}),
    "warm-up over half of the run": ([f"loss.kl_warmup={STEPS // 2}"], {}),
    "free bits, 0.2 nats": (["loss.free_bits=0.2"], {}),
    "a weaker decoder": ([], {"layers_per_up_block": 0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", choices=RUNS, help="make this run and write nothing")
    words = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in [words.only] if words.only else RUNS:
        changes, shape = RUNS[name]
        run, tests = words.scratch / folder_name(name), words.data / "test.parquet"
        model = ["model={}", "model.kind=AsymmetricAutoencoderKL", f"model.config={json.dumps(MODEL | shape)}"]
        train(run, "quickstart", *model, *cifar10(words.data), *COMMON, *changes)
        lines = events(run, "train")
        measured = evaluate(run / "likelihood", "likelihood", run, tests, "limit=500", "samples=1")["metrics"]
        rows[name] = {
            "settings": changes + [f"model.config.{key}={value}" for key, value in shape.items()],
            "bits_per_dimension": measured["elbo"]["bits_per_dimension"],
            "rate_nats_per_image": measured["rate"]["nats_per_image"],
            "active_channels": [[line["step"], line["active_channels"]] for line in lines],
            "psnr": events(run, "validate")[-1]["psnr"],
            "verdict": lines[-1]["verdict"],
        }
    if not words.only:
        save(
            "collapse",
            cifar10_facts(words.data)
            | {"steps": STEPS, "batch_size": BATCH, "images": 500, "model": MODEL, "runs": rows},
        )


if __name__ == "__main__":
    main()
