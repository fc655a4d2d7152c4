"""Held-out quality against time: latent-diffusion's step and optimizer, and ours, from both starts.

    python -m benchmarks.time_to_quality --minutes 0.7 --data TRAIN_FOLDER --held-out TEST_FOLDER

On both sides the same model, crops (order by seed), LPIPS on the same crops, averaged weights beside the raw ones, and
one GAN: discriminator, first step, weight and warm-up as parts of the run by the recipe `quickstart`, and the clamp of
the adaptive weight of latent-diffusion's code. `two passes`: latent-diffusion's step, which passes the autoencoder,
LPIPS and the discriminator once for each network, with Adam (.5, .9), without clipping. `ours`: one pass, and the
recipe's optimizer. Both follow the recipe's learning rate over the run. On one thread of a CPU, so that time is the
processor's and other work on the machine does not count. Writes benchmarks/results/time-to-quality.json.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from benchmarks.fresh_step import fresh_step
from benchmarks.machine import save
from benchmarks.rivals import CLAMP, Networks, latent_diffusion_step
from latent_ae.arithmetic import training_memory_format
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.images import bicubic_down_up
from latent_ae.data.loader import open_images, posterior_noise, training_batches
from latent_ae.data.settings import DataSettings
from latent_ae.metrics.similarity import ReconstructionMetrics
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.objectives import GAN
from latent_ae.objectives.base import Batch
from latent_ae.objectives.gan import phase_at
from latent_ae.objectives.reconstruction import every_nth
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.data import drawn_batch
from latent_ae_train.optim import Ema, lr_scale_at
from latent_ae_train.settings import TrainSettings
from latent_ae_train.step import TrainStep

POINTS = 2
"""Measurements of each run, evenly in steps."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUT = training_memory_format(DEVICE)
Reconstruct = Callable[[torch.Tensor], torch.Tensor]


class Contestant(NamedTuple):
    """A run at its beginning."""

    update: Callable[[int], object]
    raw: Reconstruct
    averaged: Reconstruct


class Batches:
    """The same crops and noise for every contestant."""

    def __init__(self, settings: TrainSettings):
        self.settings = settings
        source = open_images(settings.data, "train")
        size = settings.batch_size
        self.stream = training_batches(
            source, settings.data, channels=3, seed=settings.seed, batch_size=size, micro_batch_size=size
        )

    def __next__(self) -> Batch:
        batch, settings = next(self.stream), self.settings
        side = settings.data.resolution // settings.model.factor
        noise = posterior_noise(settings.seed, batch.numbers, (settings.model.latent_channels, side, side))
        images = batch.images.to(DEVICE, memory_format=LAYOUT)
        return drawn_batch(images, noise.to(DEVICE), batch.numbers, ())

    def __iter__(self) -> Iterator[Batch]:
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.7, help="of training, for each contestant and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--images", type=int, default=16, help="held-out images that are measured")
    parser.add_argument("--side", type=int, default=128, help="of their centre crops, px")
    parser.add_argument("--crop", type=int, default=32, help="side of the crops to train on, px")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    words = [f"data.source={arguments.data}", f"data.resolution={arguments.crop}"]
    words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
    recipe = load_settings(TrainSettings, "quickstart", words)
    perceptual = LPIPS("vgg").to(DEVICE)
    data = recipe.data
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=arguments.side, multiple_of=4)
    held_out = [image for _, _, image in islice(crops, arguments.images)]
    sides = {"two passes": two_passes, "ours": ours}
    trial = schedule_of(recipe, 0, "default", 1000)
    steps = {side: steps_in(60 * arguments.minutes, trial, start(trial, perceptual)) for side, start in sides.items()}
    curves: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        for init in ("default", "linear"):
            for side, start in sides.items():
                settings = schedule_of(recipe, seed, init, steps[side])
                curve = follow(settings, start(settings, perceptual), held_out, perceptual)
                curves.setdefault(f"{side}, {init} start", {})[str(seed)] = curve
                print(f"{side}, {init} start, seed {seed}: {curve[-1]}", file=sys.stderr)
        result = {
            "data": data_name(data),
            "held_out_images": len(held_out),
            "held_out_px": arguments.side,
            "batch": recipe.batch_size,
            "crop_px": data.resolution,
            "gan_at_1000_steps": trial.gan.model_dump(mode="json"),
            "bicubic": measure(lambda images: bicubic_down_up(images, 4), held_out, perceptual),
            "curves": curves,
        }
        save("time-to-quality", result)  # after each seed: a long run may be cut short


def data_name(data: DataSettings) -> str:
    return "scikit-image's photographs" if data.source == "photos" else data.source.rstrip("/").split("/")[-2]


def schedule_of(recipe: TrainSettings, seed: int, init: str, steps: int) -> TrainSettings:
    """The recipe for so many steps: its GAN's at the same parts of the run, under latent-diffusion's clamp."""
    scale, side = steps / recipe.steps, recipe.data.resolution
    gan: dict[str, Any] = {
        key: round(getattr(recipe.gan, key) * scale) for key in ("start", "discriminator_warmup", "warmup")
    }
    gan["adaptive_cap"] = CLAMP / (3 * side**2)  # theirs is of sums over the image, ours of means
    values: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    values |= {"steps": steps, "seed": seed, "gan": values["gan"] | gan, "model": values["model"] | {"init": init}}
    return TrainSettings.model_validate(values)


def clock() -> float:
    """Seconds: the processor's on a CPU."""
    return time.process_time() if DEVICE.type == "cpu" else time.perf_counter()


def steps_in(seconds: float, settings: TrainSettings, contestant: Contestant) -> int:
    """How many steps take so long, from a few without and with the GAN, of a copy that is thrown away."""
    costs = []
    for first in (0, settings.steps - 4):
        contestant.update(first)
        begun = clock()
        for number in range(1, 4):
            contestant.update(first + number)
        costs.append((clock() - begun) / 3)
    without = settings.gan.start / settings.steps
    return max(POINTS, round(seconds / (without * costs[0] + (1 - without) * costs[1])))


def follow(
    settings: TrainSettings, contestant: Contestant, held_out: list[torch.Tensor], perceptual: LPIPS
) -> list[dict[str, float]]:
    """Trains and measures on the way; the time of measuring is not counted."""
    points: list[dict[str, float]] = []
    used, due = 0.0, [round(settings.steps * point / POINTS) for point in range(POINTS + 1)]
    for done in range(settings.steps + 1):
        if done in due:
            point = {"seconds": round(used, 1), "images": float(done * settings.batch_size)}
            point |= measure(contestant.averaged, held_out, perceptual)
            raw = measure(contestant.raw, held_out, perceptual) if done else point
            points.append(point | {"psnr_raw": raw["psnr"], "lpips_raw": raw["lpips"]})
        if done < settings.steps:
            begun = clock()
            contestant.update(done)
            used += clock() - begun
    return points


def measure(reconstruct: Reconstruct, held_out: list[torch.Tensor], perceptual: LPIPS) -> dict[str, float]:
    metrics = ReconstructionMetrics(DEVICE, lpips={"vgg": perceptual})
    with torch.no_grad():
        for index, image in enumerate(held_out):
            batch = image[None].to(DEVICE)
            metrics.update([index], [str(index)], batch, reconstruct(batch))
    summary = metrics.summary()
    return {"psnr": round(summary["psnr"], 3), "lpips": round(summary["lpips_vgg"], 4)}


def two_passes(settings: TrainSettings, perceptual: LPIPS) -> Contestant:
    autoencoder = starting_autoencoder(settings).to(DEVICE)
    nets = Networks(
        autoencoder, GAN.network(settings.gan, 3, settings.data.resolution).to(DEVICE), perceptual, settings.optim.lr
    )
    average = Ema(autoencoder, settings.ema.decay)
    torch.manual_seed(settings.seed)  # of the posterior's noise
    batches, every = Batches(settings), settings.loss.perceptual_every

    def update(number: int) -> None:
        batch, phase = next(batches), phase_at(number, settings.gan)
        for optimizer in (nets.optimizer, nets.discriminator_optimizer):
            optimizer.param_groups[0]["lr"] = settings.optim.lr * lr_scale_at(number, settings.steps, settings.optim)
        images, rows = batch.images.contiguous(), every_nth(batch, every)
        latent_diffusion_step(nets, images, float(phase.discriminator), phase.generator, every, rows)
        average.update(autoencoder, number)

    raw, averaged = Reconstructor(autoencoder), Reconstructor(average.module)
    return Contestant(update, lambda images: raw(images).image, lambda images: averaged(images).image)


def ours(settings: TrainSettings, perceptual: LPIPS) -> Contestant:
    step, averaged = step_and_average(settings)
    batches, raw = Batches(settings), step.bare_reconstructor
    return Contestant(
        lambda number: step(number, batches), lambda images: raw(images).image, lambda images: averaged(images).image
    )


def step_and_average(settings: TrainSettings) -> tuple[TrainStep, Reconstructor]:
    """A run's training step from its beginning, and the averaged network."""
    step = fresh_step(settings, Accelerator(cpu=DEVICE.type == "cpu", mixed_precision="no"))
    assert step.ema is not None
    return step, Reconstructor(step.ema.module)


if __name__ == "__main__":
    main()
