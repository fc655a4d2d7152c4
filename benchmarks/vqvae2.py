"""VQ-VAE-2 beside one level of codes, of equal parameters and bits for each image, and samples of three priors.

    python -m benchmarks.vqvae2 --data /data/cifar10 --scratch /tmp/scratch

80 codes of 256 on two grids and 64 codes of 1,024 on one are 640 bits. Losses, images, order, steps and learning rate
are the same. Killed, it goes on when started again with the same scratch folder.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.runs import cifar10, folder_name, train

SIDE, BATCH, SEED, IMAGES, SAMPLES = 32, 32, 0, 1000, 1000
LEVELS = {
    **{"block_out_channels": [32, 64, 64], "levels": 2, "layers_per_block": 1, "latent_channels": 8},
    **{"num_vq_embeddings": 256, "norm_num_groups": 8},
}
ONE = {
    **{"block_out_channels": [48, 80, 96], "layers_per_block": 1, "latent_channels": 8, "num_vq_embeddings": 1024},
    **{"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
    **{"norm_num_groups": 8, "mid_block_add_attention": False},
}
MODELS = {"VQVAE2": LEVELS, "VQModel": ONE}
COMMON = (
    f"batch_size={BATCH} seed={SEED} data.resolution={SIDE} data.resize_px=null validate.crop_px={SIDE} "
    "validate.images=100 validate.every=100000 checkpoint.every=100000 log.every=50"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="of each first stage")
    words = parser.parse_args()
    torch.set_num_threads(1)
    for name, config in MODELS.items():
        model = f"model={json.dumps({'kind': name, 'config': config})}"
        settings = [f"steps={words.steps}", model, *cifar10(words.data), *COMMON]
        train(words.scratch / folder_name(name), "vqvae2", *settings)


if __name__ == "__main__":
    main()
