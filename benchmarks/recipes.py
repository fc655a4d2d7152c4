"""What the full-size recipes need of memory and arithmetic, computed as `latent-ae train NAME --dry-run` does.

    python -m benchmarks.recipes [NAME ...]

With names, only these are computed again. Recipes that need a folder to be built are left out.
"""

import json
import sys
from typing import Any

from benchmarks.machine import RESULTS, save
from latent_ae.config import UserError, recipe_folders
from latent_ae.models.build import count_parameters, factor_of, latent_channels_of
from latent_ae_train.build import planned_autoencoder
from latent_ae_train.cost import step_cost
from latent_ae_train.phases import phases_of
from latent_ae_train.settings import TrainSettings

GPU_GB = 80
WITHOUT_DOWNLOADS = ("init_from=null", "alignment.model=null", "distillation.teacher=null")
"""Shapes of init_from are the default model's; a vision model or a teacher comes on top of what is computed."""

LDM = "protocol=ldm"
TARGETS = {
    "kl-f4": ("rFID 0.27, PSNR 27.53", LDM),
    "kl-f8": ("rFID 0.90, PSNR 24.19", LDM),
    "kl-f16": ("rFID 0.87, PSNR 24.08", LDM),
    "kl-f32": ("rFID 2.04, PSNR 22.27", LDM),
    "vq-f4": ("rFID 0.58, PSNR 27.43", LDM),
    "vq-f8": ("rFID 1.14, PSNR 23.07", LDM),
    "vq-f16": ("rFID 5.15, PSNR 20.83", LDM),
    "sd-vae-ft-ema": ("COCO 2017: rFID 4.42, PSNR 23.8", "on its 5,000 validation images"),
    "sd-vae-ft-mse": ("COCO 2017: rFID 4.70, PSNR 24.5", "on its 5,000 validation images"),
    "va-vae-f16d32-long": ("rFID 0.28, PSNR 27.96, LPIPS 0.096", "protocol=vavae"),
    "eq-vae": ("rFID 0.82, PSNR 25.95, LPIPS 0.141", ""),
    "dc-ae-f32c32": ("rFID 0.69, PSNR 23.85, SSIM 0.66, LPIPS 0.082", "protocol=dcae"),
    "dc-ae-f64c128": ("at 512 px: rFID 0.22, PSNR 26.15, SSIM 0.71, LPIPS 0.080", "protocol=dcae crop_px=512"),
    "llamagen-vq16": ("rFID 2.19", ""),
    "taming-vqgan": ("rFID 4.98", ""),
}
"""Published figures, on ImageNet's validation images at 256 px unless they say otherwise, and how to repeat them."""


def main() -> None:
    wanted, path = sys.argv[1:], RESULTS / "recipes.json"
    old = json.loads(path.read_text())["rows"] if wanted else []
    rows = []
    for folder in ("published", "shapes"):
        for name in recipe_folders()[folder]:
            if wanted and name not in wanted:
                rows += [one for one in old if one["recipe"] == name]
                continue
            try:
                for phase in phases_of(TrainSettings.load(name, *WITHOUT_DOWNLOADS)):
                    rows.append({"recipe": name, "folder": folder, "phase": phase.name, **row(phase.settings)})
                    print(rows[-1], flush=True)
            except UserError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
    save("recipes", {"gpu_gb": GPU_GB, "rows": rows, "targets": TARGETS})


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
