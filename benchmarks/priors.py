"""Better priors and posteriors of a variational autoencoder: samples and bits per dimension.

python -m benchmarks.priors --data /data/cifar10 --scratch /tmp/scratch
Killed, it goes on when started again with the same scratch folder. `--until PART` stops after a part.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH = 32
NETWORK: dict[str, Any] = {
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
COMMON = (
    f"batch_size={BATCH} seed=0 data.resolution=32 validate.crop_px=32 validate.images=500 validate.every=1000 "
    "checkpoint.every=1000 loss.perceptual=0 loss.kl=1 loss.pixel=logistic loss.learned_logvar=true gan.weight=0 "
    "ema.decay=0.99 optim.lr=1e-3 optim.warmup=50 log.every=50"
).split()


def train(run: Path, data: Path, steps: int, model: dict[str, Any]) -> None:
    sources = [f"data.source={data / 'train.parquet'}", f"data.eval_source={data / 'test.parquet'}"]
    if not (run / "results.json").exists():
        words = [f"output_dir={run}", f"steps={steps}", f"model={json.dumps(model)}", *sources, *COMMON]
        latent_ae("train", "quickstart", *words)


def latent_ae(*words: str) -> None:
    print("latent-ae", *words, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "latent_ae", *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700, help="of each first stage")
    parser.add_argument("--until", choices=("gaussian", "flow"), help="stop after this first stage")
    words = parser.parse_args()
    train(words.scratch / "gaussian", words.data, words.steps, NETWORK)
    if words.until == "gaussian":
        return
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    flow = {"kind": "FlowAutoencoderKL", "config": NETWORK | blocks}
    train(words.scratch / "flow-posterior", words.data, words.steps, flow)


if __name__ == "__main__":
    main()
