"""First stages that differ in one setting, judged by the diffusion model that each allows.

python -m benchmarks.diffusion --data /data/cifar10 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.machine import save
from benchmarks.runs import cifar10, evaluate, events, folder_name, train

STAGES = {
    "as it is": [],
    "KL weight 1": ["loss.kl=1"],
    "equivariance 0.5": ["latents.equivariance=0.5"],
}
"""What sets a first stage apart from the recipe below."""
BATCH = 32
COMMON = (
    f"batch_size={BATCH} seed=0 data.resolution=32 validate.crop_px=32 validate.images=500 validate.every=1000 "
    "checkpoint.every=1000 loss.perceptual_every=4 gan.weight=0 ema.decay=0.99 optim.warmup=50 log.every=50"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--steps", type=int, default=500, help="of each first stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    words = parser.parse_args()
    rows: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for name in words.stages:
        run = words.scratch / folder_name(name)
        train(run, "quickstart", f"steps={words.steps}", *cifar10(words.data), *COMMON, *STAGES[name])
        row: dict[str, Any] = {
            "psnr": events(run, "validate")[-1]["psnr"],
            "kl": events(run, "train")[-1]["kl_per_dimension"],
            "samples": [],
            "relative_loss": [],
        }
        for seed in words.seeds:
            first = run / f"diffusion-{words.seeds[0]}" / "latents"
            given = [f"latents={first / 'train'}", f"held_out_latents={first / 'held_out'}"] if row["samples"] else []
            out = run / f"diffusion-{seed}"
            result = evaluate(out, "diffusion", run / "export", words.data, f"seed={seed}", *given)
            metrics, intervals = result["metrics"], result["intervals"]
            row["samples"].append([metrics["samples"]["frechet_vgg16"], intervals["samples"]["frechet_vgg16"]])
            row["relative_loss"].append(result["loss"]["relative_loss"])
            # the floors do not depend on the seed
            row |= {kind: metrics[kind]["frechet_vgg16"] for kind in ("reconstructions", "held_out")}
            row["own_distance"] = metrics["reconstructions_of_originals"]["frechet_vgg16"]
            row["latents"] = result["latents"]
            row["processor_seconds"] = result["processor_seconds"]
            recipe = result["recipe"]
        rows[name] = row
    result = {
        "data": "CIFAR-10, 20,000 images to train on and 4,000 held out",
        "first_stage_steps": words.steps,
        "first_stage_batch": BATCH,
        "seeds": words.seeds,
        "recipe": recipe,
        "first_stages": rows,
    }
    save("diffusion", result)


if __name__ == "__main__":
    main()
