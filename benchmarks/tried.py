"""Changes to the recipe, each against the same baseline: the measurements behind "What was tried".

    python -m benchmarks.tried GROUP --data TRAIN_FOLDER --held-out TEST_FOLDER

A contestant is the recipe `quickstart` in bf16 without its GAN (but for what its line in GROUPS says), trained for
the group's number of steps on one thread. All see the same crops in the same order. PSNR and LPIPS of held-out centre
crops are taken after so many images; what an update costs is measured apart, in turns (`--cost`), because a run's clock
also shows what else the machine did. Writes benchmarks/results/tried-GROUP.json.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch

from benchmarks.machine import alternate, save
from benchmarks.time_to_quality import DEVICE, Batches, data_name, measure, step_and_average
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.images import bicubic_down_up
from latent_ae.data.loader import open_images
from latent_ae.models.reconstruct import Reconstructor
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.build import starting_autoencoder
from latent_ae_train.settings import TrainSettings


class Idea(NamedTuple):
    words: str = ""
    """Settings on top of the group's."""
    small_first: float = 0.0
    """For this part of the steps four times as many crops of half the side."""


class Group(NamedTuple):
    steps: int
    ideas: dict[str, Idea]
    words: str = ""
    """Settings on top of BASE."""
    crop_px: int = 256
    """Side of the held-out crops."""


BASE = "precision=bf16 gan.weight=0 optim.layerwise=false"
F8 = "model.block_out_channels=[32,64,64,64] model.latent_channels={}"
WIDE = (
    "model.block_out_channels=[128,256,512,512] model.layers_per_block=2 model.norm_num_groups=32 "
    "model.mid_block_add_attention=true model.latent_channels={}"
)
GROUPS = {
    "seed": Group(
        320, {"lr 3e-4": Idea("optim.lr=3e-4"), "Muon, lr 6e-4": Idea("optim.kind=muon optim.lr=6e-4")}, "seed=1"
    ),
    "optimizer": Group(
        320,
        {
            "lr 1e-4": Idea("optim.lr=1e-4"),
            "lr 3e-4": Idea("optim.lr=3e-4"),
            "Muon, lr 3e-4": Idea("optim.kind=muon optim.lr=3e-4"),
            "Muon, lr 1e-3": Idea("optim.kind=muon optim.lr=1e-3"),
            "lr 1e-3": Idea("optim.lr=1e-3"),
        },
    ),
    "between": Group(320, {"lr 6e-4": Idea("optim.lr=6e-4"), "Muon, lr 6e-4": Idea("optim.kind=muon optim.lr=6e-4")}),
    "cheaper": Group(
        320,
        {
            "half of the steps with four times as many crops of 32 px": Idea(small_first=0.5),
            "LPIPS on every fourth crop": Idea("loss.perceptual_every=4"),
        },
        "optim.lr=3e-4",
    ),
    "long": Group(
        1500,
        {
            "linear start, lr 3e-4": Idea("optim.lr=3e-4"),
            "default start, lr 1e-3": Idea("model.init=default optim.lr=1e-3"),
        },
        "model.block_out_channels=[16,32,32] model.norm_num_groups=4 batch_size=4 loss.perceptual_every=4 "
        "ema.decay=0.99",
    ),
    "wide": Group(
        32,
        {"lr 1e-4": Idea("optim.lr=1e-4"), "lr 3e-4": Idea("optim.lr=3e-4")},
        f"{WIDE.format(16)} batch_size=4 optim.warmup=10",
        crop_px=128,
    ),
    "wide-slower": Group(
        32,
        {"lr 3e-5": Idea("optim.lr=3e-5"), "lr 1e-5": Idea("optim.lr=1e-5")},
        f"{WIDE.format(16)} batch_size=4 optim.warmup=10",
        crop_px=128,
    ),
}
FRESH = {
    "f4, 8 latent channels, 0.9 M": "",
    "f8, 4 latent channels, 1.2 M": F8.format(4),
    "f8, 16 latent channels, 1.2 M": F8.format(16),
    "f8, 4 latent channels, 84 M": WIDE.format(4),
    "f8, 16 latent channels, 84 M": WIDE.format(16),
}
Started = tuple[Callable[[int], dict[str, torch.Tensor]], Reconstructor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=[*GROUPS, "fresh"])
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--images", type=int, default=16, help="held-out images that are measured")
    parser.add_argument("--points", type=int, default=2, help="measurements after the one before the first step")
    parser.add_argument("--cost", action="store_true", help="only measure what an update costs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    words = [f"data.source={arguments.data}"]
    words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
    perceptual = LPIPS("vgg").to(DEVICE)

    def recipe(*more: str) -> TrainSettings:
        return load_settings(TrainSettings, "quickstart", [*words, *BASE.split(), *" ".join(more).split()])

    def held_out(crop_px: int) -> list[torch.Tensor]:
        data = recipe().data
        crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=crop_px, multiple_of=8)
        return [image for _, _, image in islice(crops, arguments.images)]

    if arguments.group == "fresh":
        images = held_out(128)
        shapes = {name: fresh(recipe(more), images, perceptual) for name, more in FRESH.items()}
        save("tried-fresh", {"data": data_name(recipe().data), "held_out_images": len(images), "shapes": shapes})
        return
    group = GROUPS[arguments.group]
    settings = {name: recipe(f"steps={group.steps}", group.words, idea.words) for name, idea in group.ideas.items()}
    if arguments.cost:
        updates = {name: start(idea, settings[name], perceptual)[0] for name, idea in group.ideas.items()}
        calls: dict[str, Callable[[], object]] = {name: partial(update, 30) for name, update in updates.items()}
        for call in calls.values():  # the first is slower
            call()
        save(f"tried-cost-{arguments.group}", {"contestants": alternate(calls, 15, DEVICE)})
        return
    images = held_out(group.crop_px)
    result: dict[str, Any] = {
        "data": data_name(recipe().data),
        "held_out_images": len(images),
        "bicubic": {str(n): measure(partial(bicubic_down_up, factor=n), images, perceptual) for n in (4, 8)},
        "base": " ".join(f"quickstart {BASE} {group.words}".split()),
        "curves": {},
    }
    for name, idea in group.ideas.items():
        print(name, file=sys.stderr)
        curve = follow(start(idea, settings[name], perceptual), settings[name], arguments.points, images, perceptual)
        result["curves"][name] = {"settings": idea.words, "points": curve}
        save(f"tried-{arguments.group}", result)  # after each: a long group may be cut short


def fresh(settings: TrainSettings, images: list[torch.Tensor], perceptual: LPIPS) -> dict[str, Any]:
    """PSNR and LPIPS before any training, in both precisions, and with a sampled posterior of some spreads."""
    network = Reconstructor(starting_autoencoder(settings)).eval()
    generator = torch.Generator().manual_seed(0)

    def through(image: torch.Tensor, precision: str, logvar: float | None) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            if logvar is None:
                return network(image).image
            mean = network.autoencoder.encode(image).latent_dist.mean.float()
            noise = torch.randn(mean.shape, generator=generator) * math.exp(logvar / 2)
            return network.autoencoder.decode(mean + noise.to(mean)).sample.float()

    rows: dict[str, tuple[str, float | None]] = {"fp32": ("fp32", None), "bf16": ("bf16", None)}
    rows |= {f"sampled, log-variance {logvar}": ("bf16", float(logvar)) for logvar in (-8, -6, -4, -2)}
    return {
        name: measure(partial(through, precision=precision, logvar=logvar), images, perceptual)
        for name, (precision, logvar) in rows.items()
    }


def start(idea: Idea, settings: TrainSettings, perceptual: LPIPS) -> Started:
    step, averaged = step_and_average(settings)
    small = settings.model_copy(
        update={
            "batch_size": 4 * settings.batch_size,
            "data": settings.data.model_copy(update={"resolution": settings.data.resolution // 2}),
        }
    )
    batches, small_batches = Batches(settings), Batches(small)

    def update(number: int) -> dict[str, torch.Tensor]:
        return step(number, small_batches if number < idea.small_first * settings.steps else batches)

    return update, averaged


def follow(
    started: Started, settings: TrainSettings, count: int, images: list[torch.Tensor], perceptual: LPIPS
) -> list[dict[str, float]]:
    """Trains and measures before the first step and at `count` points; processor time of the updates beside it."""
    update, averaged = started
    used, points, means = 0.0, list[dict[str, float]](), dict[str, torch.Tensor]()
    due = {round(settings.steps * number / count) for number in range(count + 1)}
    for done in range(settings.steps + 1):
        if done in due:
            point = {"images": float(done * settings.batch_size), "cpu_s": round(used, 1)}
            point |= measure(lambda image: averaged(image).image, images, perceptual)
            point |= {
                name: round(float(means[name]), 4) for name in ("kl_per_dimension", "latent_std") if name in means
            }
            points.append(point)
            print(f"  {point}", file=sys.stderr, flush=True)
        if done < settings.steps:
            begun = time.process_time()
            means = update(done)
            used += time.process_time() - begun
    return points


if __name__ == "__main__":
    main()
