"""Better posteriors and priors of a variational autoencoder, in bits per dimension and by its samples.

python -m benchmarks.priors --data /data/cifar10 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder; `--until PART` stops after a part.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import save
from latent_ae.config import DataSettings
from latent_ae.data import open_images
from latent_ae.first_stages import load_first_stage
from latent_ae.held_out import Framing, HeldOutImages
from latent_ae.likelihoods import log_likelihood
from latent_ae.order import posterior_noise
from latent_ae.posterior import draw
from latent_ae.sources import StreamSource

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
        train(words.scratch / name, words.data, words.steps, model)
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
    better = found["gaussian"]["importance_bound"] - found["flow-posterior"]["importance_bound"]
    gained = found["gaussian"]["elbo"] - found["flow-posterior"]["elbo"]
    save(
        "priors",
        {
            "data": "CIFAR-10, 20,000 images to train on",
            "steps": words.steps,
            "batch": BATCH,
            "parameters": {name: found[name]["parameters"] for name in MODELS},
            "priors": drawn,
            "held_out_images": IMAGES,
            "draws": SAMPLES,
            "bits_per_dimension": {
                name: {key: estimate(rows[key]) for key in ("elbo", "importance_bound", "rate")}
                for name, rows in found.items()
            },
            "gained_by_the_flow": {"elbo": estimate(gained), "importance_bound": estimate(better)},
        },
    )


def train(run: Path, data: Path, steps: int, model: dict[str, Any]) -> None:
    sources = [f"data.source={data / 'train.parquet'}", f"data.eval_source={data / 'test.parquet'}"]
    if not (run / "results.json").exists():
        words = [f"output_dir={run}", f"steps={steps}", f"model={json.dumps(model)}", *sources, *COMMON]
        latent_ae("train", "quickstart", *words)


def sampled(export: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    """What `eval sample` finds."""
    if not (out / "result.json").exists():
        latent_ae("eval", "sample", str(export), str(data), *more, "--out", str(out))
    result = json.loads((out / "result.json").read_text())
    return {key: result[key] for key in ("metrics", "intervals", "recipe", "processor_seconds") if key in result}


@torch.no_grad()
def bits(export: Path, data: Path) -> dict[str, Any]:
    """Of each held-out image, bits per dimension: minus the ELBO (mean over draws), its rate, and minus the bound of
    all draws weighted by importance (Burda et al. 2016, eq. 8)."""
    stage = load_first_stage(str(export))
    assert stage.module is not None and stage.likelihood is not None and stage.likelihood.scale is not None
    logvar, kind = torch.tensor(2.0 * math.log(stage.likelihood.scale)), stage.likelihood.kind
    settings = DataSettings(eval_source=str(data), num_workers=0)
    source = open_images(settings, "held_out")
    assert not isinstance(source, StreamSource)
    found = HeldOutImages(source.subset(np.arange(IMAGES)), settings, 3, Framing(SIDE, SIDE), stage.factor)
    images = torch.stack([image for _, _, image in found])
    nats = math.log(2.0) * images[0].numel()
    elbos, rates, bounds = [], [], []
    for first in range(0, IMAGES, 100):
        batch = images[first : first + 100]
        likelihoods, ratios, costs = [], [], []
        for number in range(SAMPLES):
            shape = (int(stage.latent_channels or 0), SIDE // stage.factor, SIDE // stage.factor)
            noise = posterior_noise(number, range(first, first + len(batch)), shape)
            drawn = draw(stage.module, batch, noise)
            made = stage.decode(drawn.latent)
            likelihoods.append(log_likelihood(kind, made, batch, logvar).flatten(1).double().sum(1))
            ratios.append(drawn.log_ratio.double())
            costs.append(sum(rate.flatten(1).double().sum(1) for rate in drawn.rates))
        likelihood, ratio, rate = torch.stack(likelihoods), torch.stack(ratios), torch.stack(costs)
        elbos.append((rate - likelihood).mean(0) / nats)
        rates.append(rate.mean(0) / nats)
        bounds.append((math.log(SAMPLES) - torch.logsumexp(likelihood + ratio, 0)) / nats)
    values = {"elbo": elbos, "rate": rates, "importance_bound": bounds}
    parameters = sum(parameter.numel() for parameter in stage.module.parameters())
    return {key: torch.cat(parts).numpy() for key, parts in values.items()} | {"parameters": parameters}


def estimate(values: np.ndarray) -> list[float]:
    """Mean and its 95 % interval."""
    mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def latent_ae(*words: str) -> None:
    print("latent-ae", *words, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "latent_ae", *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
