"""Held-out quality against time: the classic recipe on the classic schedule, and ours.

    python -m benchmarks.time_to_quality --minutes 4 --data TRAIN_FOLDER --held-out TEST_FOLDER

Same model, data, crops (seed and order) and machine, one after the other. Measured beside the clock: PSNR and LPIPS of
held-out centre crops. `classic`: latent-diffusion's two-pass step, Adam (.5, .9) at 4.5e-6 x batch, default
initialisation, L1 + LPIPS + KL, adaptive hinge GAN from a quarter of the run on (published: 50,001 of about 200,000
steps), no average. The published rate is meant for long runs, so the same with our learning rate runs too. `ours`: the
recipe `quickstart` with its schedule stretched to the run. `ours, default start`: the same without the linear start.
Writes benchmarks/results/time-to-quality.json.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.machine import save
from benchmarks.rivals import Networks, latent_diffusion_step
from latent_ae.config import load_settings
from latent_ae.data import open_images, posterior_noise, training_batches
from latent_ae.data_settings import DataSettings
from latent_ae.discriminators import PatchDiscriminator
from latent_ae.held_out import held_out_images
from latent_ae.images import bicubic_down_up
from latent_ae.metrics import ReconstructionMetrics
from latent_ae.models import Reconstructor, build_autoencoder
from latent_ae.perceptual import LPIPS
from latent_ae_train.config import TrainSettings
from latent_ae_train.ema import Ema
from latent_ae_train.networks import starting_autoencoder, starting_discriminator
from latent_ae_train.step import MicroBatch, TrainStep

POINTS = 8
"""Measurements of each run, evenly in time."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Update = Callable[[int], None]
Reconstruct = Callable[[torch.Tensor], torch.Tensor]


class Batches:
    """The same crops and noise for every contestant."""

    def __init__(self, settings: TrainSettings):
        self.settings = settings
        source = open_images(settings.data, "train")
        size = settings.batch_size
        self.stream = training_batches(
            source, settings.data, channels=3, seed=settings.seed, batch_size=size, micro_batch_size=size
        )

    def __next__(self) -> MicroBatch:
        batch, settings = next(self.stream), self.settings
        side = settings.data.resolution // settings.model.factor
        noise = posterior_noise(settings.seed, batch.numbers, (settings.model.latent_channels, side, side))
        every = settings.loss.perceptual_every
        rows = slice(-batch.numbers[0] % every, None, every)
        return MicroBatch(batch.images.to(DEVICE, memory_format=torch.channels_last), noise.to(DEVICE), rows)

    def __iter__(self) -> Iterator[MicroBatch]:
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, for each contestant")
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--images", type=int, default=16, help="held-out images that are measured")
    arguments = parser.parse_args()
    words = [f"data.source={arguments.data}"]
    words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
    recipe = load_settings(TrainSettings, "quickstart", words)
    perceptual = LPIPS("vgg").to(DEVICE)
    data = recipe.data
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=256, multiple_of=4)
    held_out = [image for _, _, image in islice(crops, arguments.images)]
    seconds = 60 * arguments.minutes
    contestants: dict[str, Callable[[int], tuple[Update, Reconstruct]]] = {
        "classic": lambda steps: classic(recipe, perceptual, steps, 4.5e-6 * recipe.batch_size),
        "classic, our learning rate": lambda steps: classic(recipe, perceptual, steps, recipe.optim.lr),
        "ours": lambda steps: ours(recipe, perceptual, steps, "linear"),
        "ours, default start": lambda steps: ours(recipe, perceptual, steps, "default"),
    }
    curves = {
        name: follow(name, start, seconds, recipe.batch_size, held_out, perceptual)
        for name, start in contestants.items()
    }
    last = min((curves[name][-1] for name in curves if name.startswith("classic")), key=lambda point: point["lpips"])
    passed = (p["seconds"] for p in curves["ours"] if p["lpips"] <= last["lpips"] and p["psnr"] >= last["psnr"])
    save(
        "time-to-quality",
        {
            "data": data_name(data),
            "held_out_images": len(held_out),
            "batch": recipe.batch_size,
            "crop_px": data.resolution,
            "bicubic": measure(lambda images: bicubic_down_up(images, 4), held_out, perceptual),
            "ours_passes_the_classic_end_after_s": next(passed, None),
            "best_classic_end": last,
            "curves": curves,
        },
    )


def data_name(data: DataSettings) -> str:
    return "scikit-image's photographs" if data.source == "photos" else data.source.rstrip("/").split("/")[-2]


def follow(
    name: str,
    start: Callable[[int], tuple[Update, Reconstruct]],
    seconds: float,
    batch_size: int,
    held_out: list[torch.Tensor],
    perceptual: LPIPS,
) -> list[dict[str, float]]:
    """Trains for about `seconds` and measures on the way; the time of measuring is not counted."""
    update, _ = start(1000)
    # rate from a few updates of a copy that is thrown away, so that the schedules end with the time
    update(0)
    begun = time.perf_counter()
    for number in range(1, 6):
        update(number)
    steps = max(POINTS, int(seconds / ((time.perf_counter() - begun) / 5)))
    update, reconstruct = start(steps)
    points = [{"seconds": 0.0, "images": 0.0} | measure(reconstruct, held_out, perceptual)]
    used, due = 0.0, [round(steps * (point + 1) / POINTS) for point in range(POINTS)]
    for number in range(steps):
        begun = time.perf_counter()
        update(number)
        used += time.perf_counter() - begun
        if number + 1 in due:
            point = {"seconds": round(used, 1), "images": float((number + 1) * batch_size)}
            points.append(point | measure(reconstruct, held_out, perceptual))
            print(f"{name:<22} {points[-1]}", file=sys.stderr)
    return points


def measure(reconstruct: Reconstruct, held_out: list[torch.Tensor], perceptual: LPIPS) -> dict[str, float]:
    metrics = ReconstructionMetrics(DEVICE, lpips={"vgg": perceptual})
    with torch.no_grad():
        for index, image in enumerate(held_out):
            batch = image[None].to(DEVICE)
            metrics.update([index], [str(index)], batch, reconstruct(batch))
    summary = metrics.summary()
    return {"psnr": round(summary["psnr"], 3), "lpips": round(summary["lpips_vgg"], 4)}


def classic(recipe: TrainSettings, perceptual: LPIPS, steps: int, lr: float) -> tuple[Update, Reconstruct]:
    model = recipe.model.model_copy(update={"init": "default"})
    autoencoder = build_autoencoder(model, sample_size=recipe.data.resolution, seed=recipe.seed).to(DEVICE)
    torch.manual_seed(recipe.seed)
    gan = recipe.gan
    discriminator = PatchDiscriminator(3, gan.channels, gan.layers, "batch").to(DEVICE)
    nets = Networks(autoencoder, discriminator, perceptual, lr)
    batches, reconstructor = Batches(recipe), Reconstructor(autoencoder)

    def update(number: int) -> None:
        images = next(batches).images.contiguous()
        latent_diffusion_step(nets, images, gan_factor=float(number >= steps // 4))

    return update, lambda images: reconstructor(images).image


def ours(recipe: TrainSettings, perceptual: LPIPS, steps: int, init: str) -> tuple[Update, Reconstruct]:
    scale = steps / recipe.steps
    gan = {key: round(getattr(recipe.gan, key) * scale) for key in ("start", "discriminator_warmup", "warmup")}
    values: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    values |= {"steps": steps, "gan": values["gan"] | gan, "model": values["model"] | {"init": init}}
    settings = TrainSettings.model_validate(values)
    step, averaged = step_and_average(settings, perceptual)
    batches = Batches(settings)

    def update(number: int) -> None:
        step(number, batches)

    return update, lambda images: averaged(images).image


def step_and_average(settings: TrainSettings, perceptual: LPIPS) -> tuple[TrainStep, Reconstructor]:
    """A run's training step from its beginning, and the averaged network."""
    autoencoder = starting_autoencoder(settings).to(DEVICE)
    ema = Ema(autoencoder, settings.ema.decay)
    step = TrainStep(
        settings,
        Accelerator(cpu=DEVICE.type == "cpu", mixed_precision="no"),
        Reconstructor(autoencoder).to(memory_format=torch.channels_last),
        starting_discriminator(settings, 3).to(DEVICE) if settings.gan.weight else None,
        perceptual,
        ema,
    )
    return step, Reconstructor(ema.module)


if __name__ == "__main__":
    main()
