"""How strong the adversarial term should be: caps of the adaptive weight, fixed weights, and none.

    python -m benchmarks.gan_weight --data TRAIN_FOLDER --held-out TEST_FOLDER

For each seed one small f8 first stage is trained without a GAN. From its weights and optimizer state each contestant
goes on for as many steps again on the same crops in the same order, with the default discriminator and its own weight
of the adversarial term. Measured on held-out centre crops: PSNR, LPIPS (VGG16) and the Fréchet distance of VGG16's
features. The shared first part is trained twice, with `optim.clip` 1 and 0. Writes
benchmarks/results/gan-weight.json after each contestant, and one picture per seed beside it with --pictures.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import save
from benchmarks.time_to_quality import DEVICE, Batches, data_name, step_and_average
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.loader import open_images
from latent_ae.metrics.similarity import ReconstructionMetrics
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.pretrained.lpips import LPIPS
from latent_ae.report.pictures import picture_grid
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep

BASE = (
    "model.block_out_channels=[16,32,64,64] model.norm_num_groups=4 model.latent_channels=4 batch_size=4 "
    "ema.decay=0.98 optim.lr=3e-4 optim.schedule=constant optim.warmup=20 "
    "gan.channels=64 gan.layers=3 gan.weight=0.5 gan.discriminator_warmup=30 gan.warmup=30"
)
CONTESTANTS = {
    "no GAN": "gan.weight=0",
    "latent-diffusion's clamp at 256 px": "gan.adaptive_cap=0.0509",
    "latent-diffusion's clamp at 64 px": "gan.adaptive_cap=0.814",
    "cap 100": "gan.adaptive_cap=100",
    "cap 100, weight 0.1": "gan.adaptive_cap=100 gan.weight=0.1",
    "not adaptive, weight 0.1": "gan.adaptive=false gan.weight=0.1",
}
SHOWN = 6
FOLLOWED = ("gradient_ratio", "adaptive_weight", "accuracy", "logit_gap", "grad_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--images", type=int, default=200, help="held-out images that are measured")
    parser.add_argument("--crop-px", type=int, default=96, help="side of the held-out crops")
    parser.add_argument("--steps", type=int, default=400, help="of each of the two parts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contestants", nargs="+", default=[*CONTESTANTS], choices=[*CONTESTANTS], metavar="NAME")
    parser.add_argument("--name", default="gan-weight", help="of the file in benchmarks/results")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="where a picture per seed goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    perceptual = LPIPS("vgg").to(DEVICE)

    def recipe(seed: int, *more: str) -> TrainSettings:
        words = [f"data.source={arguments.data}", f"seed={seed}", f"gan.start={arguments.steps}"]
        words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
        words += [f"steps={2 * arguments.steps}", *BASE.split(), *" ".join(more).split()]
        return load_settings(TrainSettings, "quickstart", words)

    data = recipe(0).data
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=arguments.crop_px, multiple_of=8)
    images = [image for _, _, image in crops][: arguments.images]
    result: dict[str, Any] = {
        "data": data_name(data),
        "held_out_images": len(images),
        "crop_px": arguments.crop_px,
        "base": f"quickstart {BASE}",
        "steps_of_each_part": arguments.steps,
        "batch": recipe(0).batch_size,
        "contestants": {name: {"settings": words, "by_seed": {}} for name, words in CONTESTANTS.items()},
        "first_part": {name: {} for name in ("clip 1", "clip 0")},
    }
    for seed in arguments.seeds:
        for name in ("clip 0", "clip 1"):  # the contestants go on from the last
            words = f"optim.clip={name.removeprefix('clip ')}"
            base, averaged = step_and_average(recipe(seed, words))
            batches = Batches(recipe(seed))
            means = train(base, batches, range(arguments.steps))
            result["first_part"][name][seed] = measure(averaged, images, perceptual) | means
            print(seed, name, result["first_part"][name][seed], file=sys.stderr, flush=True)
            save(arguments.name, result)
        shown = {"after the first part": reconstruct(averaged, images[:SHOWN])}
        for name in arguments.contestants:
            words = CONTESTANTS[name]
            step, averaged = step_and_average(recipe(seed, words, "optim.clip=1"))
            take_over(step, base)
            batches = Batches(recipe(seed))
            for _ in range(arguments.steps):
                next(batches)
            means = train(step, batches, range(arguments.steps, 2 * arguments.steps))
            measured = measure(averaged, images, perceptual) | means
            result["contestants"][name]["by_seed"][seed] = measured
            print(seed, name, measured, file=sys.stderr, flush=True)
            save(arguments.name, result)
            shown[name] = reconstruct(averaged, images[:SHOWN])
        if arguments.pictures is not None:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
            columns = [images[:SHOWN], *shown.values()]
            rows = [list(row) for row in zip(*columns, strict=True)]
            picture_grid(rows, labels=["input", *shown]).save(arguments.pictures / f"gan-weight-{seed}.png")


def take_over(step: TrainStep, other: TrainStep) -> None:
    """Gives `step` the weights, averages, state and optimizer states of `other`."""
    step.bare_reconstructor.load_state_dict(other.bare_reconstructor.state_dict())
    assert step.ema is not None and other.ema is not None
    step.ema.module.load_state_dict(other.ema.module.state_dict())
    step.optimizers.autoencoder.load_state_dict(copy.deepcopy(other.optimizers.autoencoder.state_dict()))
    for name, network in step.bare_adversaries.items():
        if name in other.bare_adversaries:
            network.load_state_dict(other.bare_adversaries[name].state_dict())


def train(step: TrainStep, batches: Batches, numbers: range) -> dict[str, float]:
    """Makes the updates; returns the means of what is logged over their last three quarters."""
    sums: dict[str, list[float]] = {}
    for number in numbers:
        means = step(number, batches)
        if number >= numbers.start + len(numbers) // 4 and number % 5 == 0:
            for key in FOLLOWED:
                if key in means:
                    sums.setdefault(key, []).append(float(means[key]))
    return {f"mean_{key}": round(sum(values) / len(values), 4) for key, values in sums.items()} | {
        f"largest_{key}": round(max(values), 4) for key, values in sums.items()
    }


@torch.no_grad()
def reconstruct(network: Reconstructor, images: list[torch.Tensor]) -> list[torch.Tensor]:
    return [network(image[None].to(DEVICE)).image[0].cpu() for image in images]


def measure(network: Reconstructor, images: list[torch.Tensor], perceptual: LPIPS) -> dict[str, float]:
    metrics = ReconstructionMetrics(DEVICE, lpips={"vgg": perceptual})
    for index, (image, made) in enumerate(zip(images, reconstruct(network, images), strict=True)):
        metrics.update([index], [str(index)], image[None].to(DEVICE), made[None].to(DEVICE))
    summary = metrics.summary()
    return {
        "psnr": round(summary["psnr"], 3),
        "lpips": round(summary["lpips_vgg"], 4),
        "frechet_vgg16": round(summary["frechet_vgg16"], 3),
    }


if __name__ == "__main__":
    main()
