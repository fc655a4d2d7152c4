"""What each part of a deep hierarchical VAE is worth in bits per dimension of held-out images, and one longer run.

    python -m benchmarks.deep_vae --data /data/cifar10 --scratch /tmp/scratch

Contestants have the recipe `deep-vae` but for what their lines say: for each seed the same images, order, steps and
learning rate, and a KL warm-up over the recipe's share of the steps. Bits per dimension are the importance-weighted
bound with the averaged weights. `--only` takes some of the contestants, `--only longer` the longer run alone, whose
samples are a picture in its folder. Each run is added to benchmarks/results/deep-vae.json when it has ended. Killed, it
goes on when started again with the same scratch folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import earlier, save, with_run
from benchmarks.runs import cifar10, cifar10_facts, evaluate, events, folder_name, seconds_of, train
from latent_ae.models.loading import load_first_stage
from latent_ae.report.pictures import picture_grid
from latent_ae_train.settings import TrainSettings

LOGISTIC = "loss.pixel=logistic loss.learned_logvar=true"
SLOWER = "optim.lr=5e-4"
"""A learning rate for cells without normalisation."""
LONGER = "longer"
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "the recipe": ({}, ""),
    "one logistic in place of the mixture": ({"mixtures": 0}, LOGISTIC),
    "one Gaussian in place of the mixture": ({"mixtures": 0}, LOGISTIC.replace("logistic", "gaussian")),
    "posteriors that begin as the priors": ({"open_posteriors": False}, ""),
    "three levels": ({"level_sides": [4, 8, 16], "level_channels": [16] * 3}, ""),
    "seven levels": ({"level_sides": [4, 8, 8, 16, 16, 16, 16], "level_channels": [16] * 7}, ""),
    "a sixth of the learning rate": ({}, SLOWER),
    "bottleneck cells, a sixth of the learning rate": ({"cell": "bottleneck", "blocks": 2, "width": 124}, SLOWER),
    "depthwise cells": ({"cell": "depthwise", "encoder_cell": "residual"}, ""),
    "no learned bias": ({"side_bias": False}, ""),
    "balanced levels": ({}, "loss.kl_balance=true"),
    "spectral regularisation": ({}, "loss.spectral=3.255e-6"),
    "a third of the warm-up of the KL": ({}, "loss.kl_warmup=80"),
    "no warm-up of the KL": ({}, "loss.kl_warmup=0"),
    "no average of weights": ({}, "ema.decay=0"),
}
"""Keys of the model's config and settings that differ from the recipe, by the contestant's name."""
RESULT = "deep-vae"
STEPS, LONGER_STEPS = 400, 12_000
IMAGES, LONGER_IMAGES = 300, 500
"""Held-out images that are measured."""
COMMON = "data.resize_px=null validate.images=200 validate.every=1000000 checkpoint.every=1000 log.every=10"
LIKELIHOOD = ["samples=16", "batch_size=50", "crop_px=32", "num_workers=0", "num_pictures=2"]
SAMPLES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[*PARTS, LONGER], choices=[*PARTS, LONGER], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    words = parser.parse_args()
    torch.set_num_threads(1)
    lengths = {"steps": STEPS, "images": IMAGES, "longer_steps": LONGER_STEPS, "longer_images": LONGER_IMAGES}
    facts = cifar10_facts(words.data, "20,000 images to train on") | {"samples": 16} | lengths
    earlier(RESULT, facts)  # ends here rather than after a training
    recipe = TrainSettings.load("deep-vae")
    for seed in words.seeds:
        for name in words.only:
            run = words.scratch / folder_name(f"{name} {seed}")
            steps, images = (LONGER_STEPS, LONGER_IMAGES) if name == LONGER else (STEPS, IMAGES)
            warmup = steps * recipe.loss.kl_warmup // recipe.steps
            schedule = [f"steps={steps}", f"loss.kl_warmup={warmup}", f"seed={seed}"]
            train(run, "deep-vae", *cifar10(words.data), *schedule, *COMMON.split(), *changes(name))
            measure = [f"limit={images}", *LIKELIHOOD]
            evaluate(run / "likelihood", "likelihood", run / "export", words.data / "test.parquet", *measure)
            if name == LONGER:
                draw_samples(run)
            rows = earlier(RESULT, facts)
            rows[name] = {"runs": with_run(rows.get(name, {"runs": []})["runs"], measured(run, seed))}
            ordered = {name: rows[name] for name in (*PARTS, LONGER) if name in rows}
            save(RESULT, facts | {"rows": ordered}, added=True)


def changes(name: str) -> list[str]:
    """A contestant's settings."""
    if name == LONGER:
        return ["ema.decay=0.999"]
    config, settings = PARTS[name]
    whole = TrainSettings.load("deep-vae").model.config | config
    return [f"model.config={json.dumps(whole)}", *settings.split()]


def measured(run: Path, seed: int) -> dict[str, Any]:
    """Bits per dimension of held-out images and their parts, and the curve of training."""
    result = json.loads((run / "likelihood/result.json").read_text())
    metrics, logged = result["metrics"], events(run, "train")
    part = max(1, len(logged) // 20)
    curve = [logged[first : first + part] for first in range(0, len(logged), part)]
    batch = TrainSettings.load("deep-vae").batch_size
    return {
        "seed": seed,
        "steps": logged[-1]["step"],
        "held_out": result["data"]["num_images"],
        "parameters": result["model"]["parameters"],
        "bits": metrics["importance_bound"]["bits_per_dimension"],
        "elbo": metrics["elbo"]["bits_per_dimension"]["mean"],
        "reconstruction": metrics["distortion"]["bits_per_dimension"]["mean"],
        "levels": [level["bits_per_dimension"]["mean"] for level in metrics.get("rate_levels", [metrics["rate"]])],
        "skipped": logged[-1].get("skipped_steps", 0),
        "curve": [
            [some[-1]["step"] * batch, round(sum(one["bits_per_dimension"] for one in some) / len(some), 3)]
            for some in curve
        ],
        "processor_seconds": seconds_of(run),
    }


def draw_samples(run: Path) -> None:
    """Writes samples.png: images decoded from samples of the prior, means of their mixtures."""
    stage = load_first_stage(str(run / "export"))
    assert stage.module is not None
    noise = torch.randn(SAMPLES, stage.latent_channels or 0, 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = stage.decode(stage.module.sample_prior(noise))
    side = int(SAMPLES**0.5)
    picture_grid(images.clamp(-1, 1).unflatten(0, (side, side)).unbind()).save(run / "samples.png")


if __name__ == "__main__":
    main()
