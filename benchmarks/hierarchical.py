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
import math
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import save
from latent_ae.config import DataSettings
from latent_ae.data import open_images, posterior_noise
from latent_ae.first_stages import load_first_stage
from latent_ae.held_out import held_out_images
from latent_ae.images import picture_grid
from latent_ae.likelihoods import log_likelihood
from latent_ae.posterior import draw

SHAPE = "model.config={{width: {}, level_sides: {}, level_channels: {}, blocks: {}, norm_num_groups: 2}}"
THREE = SHAPE.format(48, [4, 8, 16], [16, 8, 4], 1)
CONTESTANTS = {
    "three levels: 4, 8, 16 px": [THREE],
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
    train, test = (words.data / f"{part}.parquet" for part in ("train", "test"))
    for name in words.only:
        run = place(words.scratch, words.steps, name)
        changes = [f"output_dir={run}", f"steps={words.steps}", f"data.source={train}", f"data.eval_source={test}"]
        changes.append(f"loss.kl_warmup={words.steps // 4}")
        if not (run / "results.json").exists():
            command = ["train", "hierarchical-vae", *changes, *COMMON, *CONTESTANTS[name]]
            print("latent-ae", *command, file=sys.stderr)
            before = processor_seconds()
            subprocess.run([sys.executable, "-m", "latent_ae", *command], check=True, stdout=subprocess.DEVNULL)
            (run / "cost.json").write_text(json.dumps({"cpu_s": round(processor_seconds() - before, 1)}))
        if not (run / "bound.json").exists():
            (run / "bound.json").write_text(json.dumps(bound(run, DataSettings(source=str(test), resolution=32))))
    rows = []
    lengths = sorted(int(folder.name) for folder in words.scratch.iterdir() if folder.name.isdigit())
    for steps, (name, settings) in itertools.product(lengths, CONTESTANTS.items()):
        run = place(words.scratch, steps, name)
        if (run / "bound.json").exists():
            row = {"name": name, "steps": steps, "settings": " ".join(settings)}
            rows.append(
                row | json.loads((run / "bound.json").read_text()) | json.loads((run / "cost.json").read_text())
            )
    data = "CIFAR-10, 20,000 images to train on and 4,000 held out"
    save("hierarchical", {"data": data, "batch": BATCH, "contestants": rows})


def processor_seconds() -> float:
    """Of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def place(scratch: Path, steps: int, name: str) -> Path:
    return scratch / str(steps) / "".join(letter if letter.isalnum() else "-" for letter in name)


@torch.no_grad()
def bound(run: Path, data: DataSettings) -> dict[str, Any]:
    """Bits per dimension of the first held-out images, and their parts; pictures of the prior into the run's folder."""
    stage = load_first_stage(str(run / "export"))
    assert stage.module is not None and stage.likelihood is not None and stage.likelihood.scale is not None
    logvar = torch.tensor(2.0 * math.log(stage.likelihood.scale))
    crops = held_out_images(open_images(data, "all"), data, channels=3, crop_px=32, multiple_of=32)
    whole = torch.stack([image for _, _, image in islice(crops, IMAGES)])
    shape, bits = (stage.latent_channels or 0, 1, 1), 1.0 / (math.log(2.0) * whole[0].numel())
    bounds, nats, rates = [], [], []
    for first in range(0, len(whole), 50):
        images = whole[first : first + 50]
        drawn = draw(stage.module, images, posterior_noise(0, range(first, first + len(images)), shape))
        made = stage.decode(drawn.latent)
        likely = log_likelihood(stage.likelihood.kind, made, images, logvar, discretised=True).double().sum((1, 2, 3))
        bounds.append(-(likely + drawn.log_ratio) * bits)
        nats.append(-likely * bits)
        rates.append(torch.stack([rate.double().sum((1, 2, 3)) * bits for rate in drawn.rates], 1))
    values, parts = torch.cat(bounds), torch.cat(rates).mean(0)
    noise = posterior_noise(1, range(32), shape)
    samples = stage.decode(stage.module.sample_prior(noise)).clamp(-1, 1)
    images, mode = whole[:8], stage.reconstruct(whole[:8])
    rows = [list(images), list(mode.clamp(-1, 1)), *(list(samples[8 * row : 8 * row + 8]) for row in range(4))]
    picture_grid(rows, row_labels=["held out", "mode", *["prior"] * 4]).resize((900, 680)).save(run / "samples.png")
    return {
        "parameters": sum(parameter.numel() for parameter in stage.module.parameters()),
        "bits_per_dimension": round(values.mean().item(), 4),
        "interval": round(1.96 * values.std().item() / math.sqrt(len(values)), 4),
        "reconstruction": round(torch.cat(nats).mean().item(), 4),
        "levels": [round(part, 4) for part in parts.tolist()],
        "level_sides": [shape[1] for shape in stage.module.shapes],
        "scale": round(stage.likelihood.scale, 5),
    }


if __name__ == "__main__":
    main()
