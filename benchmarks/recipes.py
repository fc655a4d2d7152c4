"""What the full-size recipes need of memory and arithmetic, computed as `latent-ae train NAME --dry-run` does.

    python -m benchmarks.recipes [NAME ...]

With names, only these are computed again. Vision models and teachers that recipes need are made here, without training,
in the sizes of the published ones.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import transformers

from benchmarks.machine import RESULTS, save
from latent_ae.config import recipe_folders
from latent_ae.models.build import count_parameters, factor_of, latent_channels_of
from latent_ae_train.build import planned_autoencoder
from latent_ae_train.cost import step_cost
from latent_ae_train.phases import phases_of
from latent_ae_train.settings import TrainSettings

GPU_GB = 80
PATCHES = {"patch_size": 14, "image_size": 518}
VISION = {
    "dinov2-large": (
        "Dinov2",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
    ),
    "dinov2-base": ("Dinov2WithRegisters", PATCHES),
    "dino-vits8": ("ViT", {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 8}),
}
"""Classes of transformers and their sizes, by the folder that stands for the published weights."""
NEEDS = {
    "va-vae-f16d32": {"alignment.model": "dinov2-large"},
    "va-vae-f16d32-long": {"alignment.model": "dinov2-large"},
    "rae-dinov2-b": {"model.encoder": "dinov2-base", "gan.dino_model": "dino-vits8"},
    "taesd": {"distillation.teacher": "sd-vae"},
}
"""Settings that name a folder, by recipe. Shapes of init_from are the default model's."""

LDM = "protocol=ldm"
OWN = "no protocol: theirs was not read"
TARGETS = {
    "kl-f4": ("rFID 0.27, PSNR 27.53", LDM),
    "kl-f8": ("rFID 0.90, PSNR 24.19", LDM),
    "kl-f16": ("rFID 0.87, PSNR 24.08", LDM),
    "kl-f32": ("rFID 2.04, PSNR 22.27", LDM),
    "vq-f4": ("rFID 0.58, PSNR 27.43", LDM),
    "vq-f8": ("rFID 1.14, PSNR 23.07", LDM),
    "vq-f16": ("rFID 5.15, PSNR 20.83", LDM),
    "sd-vae-ft-ema": ("COCO 2017: rFID 4.42, PSNR 23.8", "protocol=coco5k"),
    "sd-vae-ft-mse": ("COCO 2017: rFID 4.70, PSNR 24.5", "protocol=coco5k"),
    "va-vae-f16d32-long": ("rFID 0.28, PSNR 27.96, LPIPS 0.096", "protocol=vavae"),
    "eq-vae": ("rFID 0.82, PSNR 25.95, LPIPS 0.141", OWN),
    "dc-ae-f32c32": ("rFID 0.69, PSNR 23.85, SSIM 0.66, LPIPS 0.082", "protocol=dcae resize_px=256 crop_px=256"),
    "dc-ae-f64c128": ("at 512 px: rFID 0.22, PSNR 26.15, SSIM 0.71, LPIPS 0.080", "protocol=dcae"),
    "llamagen-vq16": ("rFID 2.19", OWN),
    "rae-dinov2-b": ("rFID 0.57, PSNR 18.9", "protocol=rae"),
    "taming-vqgan": ("rFID 4.98", OWN),
    "vdvae-cifar10": ("CIFAR-10: 2.87 bits per dimension", "`eval likelihood`"),
    "nvae-cifar10": ("CIFAR-10: 2.93 bits per dimension", "`eval likelihood`"),
}
"""Published figures, on ImageNet's validation images at 256 px unless they say otherwise, and how to repeat them."""


def main() -> None:
    wanted, path = sys.argv[1:], RESULTS / "recipes.json"
    old = json.loads(path.read_text())["rows"] if wanted else []
    rows = []
    with tempfile.TemporaryDirectory() as place:
        make_models(Path(place))
        for folder in ("published", "shapes"):
            for name in recipe_folders()[folder]:
                if wanted and name not in wanted:
                    rows += [one for one in old if one["recipe"] == name]
                    continue
                words = [f"{key}={place}/{model}" for key, model in NEEDS.get(name, {}).items()]
                for phase in phases_of(TrainSettings.load(name, "init_from=null", *words)):
                    rows.append({"recipe": name, "folder": folder, "phase": phase.name, **row(phase.settings)})
                    print(rows[-1], flush=True)
    save("recipes", {"gpu_gb": GPU_GB, "rows": rows, "targets": TARGETS})


def make_models(place: Path) -> None:
    """Save untrained models of the sizes of those that recipes need."""
    for name, (kind, sizes) in VISION.items():
        config = getattr(transformers, f"{kind}Config")(**sizes)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(place / name)
        values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (place / name / "preprocessor_config.json").write_text(json.dumps(values))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    diffusers.AutoencoderKL(**blocks, **widths).save_pretrained(place / "sd-vae")


def row(settings: TrainSettings) -> dict[str, Any]:
    """One recipe, or one of its phases."""
    started_fresh = settings.model_copy(update={"init_from": None})
    autoencoder = planned_autoencoder(started_fresh)
    cost = step_cost(started_fresh, autoencoder)
    return {
        "factor": factor_of(autoencoder),
        "latent_channels": latent_channels_of(autoencoder),
        "parameters": count_parameters(autoencoder),
        "resolution": settings.data.resolution,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "micro_batch": settings.micro_batch,
        "precision": settings.precision,
        "peak_gb": round(cost.peak(settings.micro_batch) / 1e9, 2),
        "gb_per_image": round(cost.per_image / 1e9, 3),
        "largest_micro_batch": cost.largest_micro_batch(GPU_GB * 1e9),
        "tflops_per_image": round(cost.flops_per_image / 1e12, 3),
    }


if __name__ == "__main__":
    main()
