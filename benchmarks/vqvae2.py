"""VQ-VAE-2 beside one level of codes, of equal parameters and bits for each image, and samples of two priors of each.

    python -m benchmarks.vqvae2 --data /data/cifar10 --scratch /tmp/scratch

80 codes of 256 on two grids, and 64 codes of 1,024 on one, are 640 bits. Losses, images, order, steps and learning rate
are the same. Killed, it goes on when started again with the same scratch folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import save
from benchmarks.runs import cifar10, evaluate, folder_name, latent_ae, seconds_of, train
from latent_ae.latents.cache import open_latents
from latent_ae.models.codes import nearest_codes
from latent_ae.models.loading import load_first_stage
from latent_ae.models.registry import family_of
from latent_ae.objectives.codebook import code_counts, perplexity

SIDE, BATCH, SEED, SAMPLES = 32, 32, 0, 500
LEVELS: dict[str, Any] = {
    **{"block_out_channels": [32, 64, 64], "levels": 2, "layers_per_block": 1, "latent_channels": 8},
    **{"num_vq_embeddings": 256, "norm_num_groups": 8},
}
ONE: dict[str, Any] = {
    **{"block_out_channels": [48, 80, 96], "layers_per_block": 1, "latent_channels": 8, "num_vq_embeddings": 1024},
    **{"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
    **{"norm_num_groups": 8, "mid_block_add_attention": False},
}
MODELS = {"VQVAE2": LEVELS, "VQModel": ONE}
COMMON = (
    f"batch_size={BATCH} seed={SEED} data.resolution={SIDE} validate.crop_px={SIDE} validate.images=100 "
    "validate.every=100000 checkpoint.every=100000 log.every=50"
).split()
RECON = f"resize_px=null crop_px={SIDE} limit=1000 frechet=[] lpips=[] batch_size=50 num_workers=0".split()
FITTED = ["batch_size=32", "validation_images=1000", "validations=5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="of each first stage")
    parser.add_argument("--prior-steps", type=int, default=400, help="of each transformer over codes")
    words = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, config in MODELS.items():
        run = words.scratch / folder_name(name)
        model = f"model={json.dumps({'kind': name, 'config': config})}"
        train(run, "vqvae2", f"steps={words.steps}", model, *cifar10(words.data), *COMMON)
        rows[name] = measured(run, words.data, words.prior_steps)
    save(
        "vqvae2",
        {
            "data": "CIFAR-10, 20,000 images to train on",
            **{"steps": words.steps, "batch": BATCH, "px": SIDE, "seed": SEED, "samples": SAMPLES},
            **{"prior_steps": words.prior_steps, "contestants": rows},
        },
    )


def measured(run: Path, data: Path, steps: int) -> dict[str, Any]:
    """Reconstructions, use of codes, and samples of two priors."""
    export, encoded = run / "export", {part: run / "latents" / part for part in ("train", "held_out")}
    for part, folder in encoded.items():
        words = f"part={part} resolution={SIDE} flips=false label_column=null batch_size=64 stored=fp32".split()
        if not (folder / "manifest.json").exists():
            latent_ae("encode", str(export), str(data), str(folder), *words, "num_workers=0")
    recon = evaluate(run / "recon", "recon", export, data / "test.parquet", *RECON)
    given = [f"latents={encoded['train']}", f"held_out_latents={encoded['held_out']}"]
    given += [f"samples={SAMPLES}", "num_workers=0"]
    codes = evaluate(run / "codes", "sample", export, data, "prior=codes", f"steps={steps}", *FITTED, *given)
    gaussian = evaluate(run / "gaussian", "sample", export, data, "prior=gaussian", *given)
    module: Any = load_first_stage(str(export)).module
    latents = open_latents(encoded["held_out"])
    with torch.no_grad():
        levels = nearest_codes(module, latents.batch(range(1000)))
    counts = [code_counts(one, int(family_of(module).codes(module.config) or 0)) for one in levels]
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "sides": codes["codes"]["sides"],
        "codes": codes["codes"]["number"],
        "perplexity": [float(perplexity(one)) for one in counts],
        "used": [int((one > 0).sum()) for one in counts],
        "metrics": {key: recon["metrics"]["mode"][key] for key in ("psnr", "ssim")},
        "rate": {key: [codes["metrics"]["codes"][key], *codes["intervals"]["codes"][key]] for key in RATES},
        "transformer": {"parameters": codes["recipe"]["parameters"], "relative_loss": codes["loss"]["relative_loss"]},
        "frechet_vgg16": {
            "samples": distance(codes, "samples"),
            "gaussian": distance(gaussian, "samples"),
            "reconstructions": distance(codes, "reconstructions"),
            "held_out": distance(codes, "held_out"),
        },
        "processor_seconds": {"training": seconds_of(run), "transformer": codes["processor_seconds"]["train"]},
    }


RATES = ("bits_per_code", "bits_per_dimension")


def distance(result: dict[str, Any], kind: str) -> list[float]:
    """To training images, with its interval."""
    return [result["metrics"][kind]["frechet_vgg16"], *result["intervals"][kind]["frechet_vgg16"]]


if __name__ == "__main__":
    main()
