"""Changes to the recipe, each against the same baseline: the measurements behind "What was tried".

    python -m benchmarks.tried GROUP --data TRAIN_FOLDER --held-out TEST_FOLDER

A contestant is the recipe `quickstart` in bf16 without its GAN (but for what its line in GROUPS says), trained for
the group's number of steps on one thread. All see the same crops in the same order. PSNR and LPIPS of held-out centre
crops are taken after so many images; what an update costs is measured apart, in turns (`--cost`), because a run's clock
also shows what else the machine did. Writes benchmarks/results/tried-GROUP.json.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.machine import alternate, save
from benchmarks.time_to_quality import DEVICE, Batches, data_name, measure, step_and_average
from latent_ae.config import load_settings
from latent_ae.data import held_out_images, open_images
from latent_ae.images import bicubic_down_up
from latent_ae.models import Reconstructor
from latent_ae.perceptual import LPIPS
from latent_ae_train.config import TrainSettings
from latent_ae_train.step import TrainStep


class Idea(NamedTuple):
    words: str = ""
    """Settings on top of BASE."""
    muon: bool = False
    """Muon for the convolutions between the first and the last, AdamW at the same rate for all else."""
    small_first: float = 0.0
    """For this part of the steps four times as many crops of half the side."""


BASE = "precision=bf16 gan.weight=0"
F8 = "model.block_out_channels=[32,64,64,64] model.latent_channels={}"
GROUPS: dict[str, tuple[int, dict[str, Idea]]] = {
    "baseline": (
        320,
        {
            "baseline": Idea(),
            "another seed": Idea("seed=1"),
            "fp32": Idea("precision=fp32"),
            "default start": Idea("model.init=default"),
        },
    ),
    "optimizer": (
        320,
        {
            "lr 3e-4": Idea("optim.lr=3e-4"),
            "lr 1e-3": Idea("optim.lr=1e-3"),
            "Muon, lr 1e-4": Idea(muon=True),
            "Muon, lr 3e-4": Idea("optim.lr=3e-4", muon=True),
            "Muon, lr 1e-3": Idea("optim.lr=1e-3", muon=True),
            "betas .9, .99": Idea("optim.betas=[0.9,0.99]"),
        },
    ),
    "cheaper": (
        320,
        {
            "LPIPS on every crop": Idea("loss.perceptual_every=1"),
            "LPIPS on every fourth crop": Idea("loss.perceptual_every=4"),
            "half of the steps with four times as many crops of 32 px": Idea(small_first=0.5),
        },
    ),
}
Start = tuple[Callable[[int], None], TrainStep, Reconstructor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--images", type=int, default=16, help="held-out images that are measured")
    parser.add_argument("--points", type=int, default=2, help="measurements after the one before the first step")
    parser.add_argument("--cost", action="store_true", help="only measure what an update costs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    words = [f"data.source={arguments.data}"]
    words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
    steps, ideas = GROUPS[arguments.group]
    perceptual = LPIPS("vgg").to(DEVICE)
    settings = {
        name: load_settings(TrainSettings, "quickstart", [*words, f"steps={steps}", *BASE.split(), *idea.words.split()])
        for name, idea in ideas.items()
    }
    if arguments.cost:
        updates = {name: start(ideas[name], settings[name], perceptual)[0] for name in ideas}
        calls = {name: lambda update=update: update(30) for name, update in updates.items()}
        for call in calls.values():  # the first is slower
            call()
        save(f"tried-{arguments.group}-cost", {"contestants": alternate(calls, 15, DEVICE)})
        return
    first = next(iter(settings.values()))
    crops = held_out_images(open_images(first.data, "held_out"), first.data, channels=3, crop_px=256, multiple_of=8)
    held_out = [image for _, _, image in islice(crops, arguments.images)]
    result: dict[str, Any] = {
        "data": data_name(first.data),
        "held_out_images": len(held_out),
        "bicubic": {str(n): measure(lambda x, n=n: bicubic_down_up(x, n), held_out, perceptual) for n in (4, 8)},
        "base": f"quickstart {BASE}",
        "curves": {},
    }
    for name, idea in ideas.items():
        print(name, file=sys.stderr)
        curve = follow(start(idea, settings[name], perceptual), settings[name], arguments.points, held_out, perceptual)
        result["curves"][name] = {"settings": idea.words, "points": curve}
        save(f"tried-{arguments.group}", result)  # after each: a long group may be cut short


def start(idea: Idea, settings: TrainSettings, perceptual: LPIPS) -> Start:
    step, averaged = step_and_average(settings, perceptual)
    if idea.muon:
        step.optimizer = Muon(step.bare_reconstructor, settings)
    small = settings.model_copy(
        update={
            "batch_size": 4 * settings.batch_size,
            "data": settings.data.model_copy(update={"resolution": settings.data.resolution // 2}),
        }
    )
    batches, small_batches = Batches(settings), Batches(small)

    def update(number: int) -> None:
        step(number, small_batches if number < idea.small_first * settings.steps else batches)

    return update, step, averaged


def follow(
    started: Start, settings: TrainSettings, count: int, held_out: list[torch.Tensor], perceptual: LPIPS
) -> list[dict[str, float]]:
    """Trains and measures before the first step and at `count` points; processor time of the updates beside it."""
    update, _, averaged = started

    def point(done: int) -> dict[str, float]:
        return {"images": float(done * settings.batch_size), "cpu_s": round(used, 1)} | measure(
            lambda images: averaged(images).image, held_out, perceptual
        )

    used, points = 0.0, []
    due = {round(settings.steps * number / count) for number in range(count + 1)}
    for done in range(settings.steps + 1):
        if done in due:
            points.append(point(done))
            print(f"  {points[-1]}", file=sys.stderr, flush=True)
        if done < settings.steps:
            begun = time.process_time()
            update(done)
            used += time.process_time() - begun
    return points


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024 on the convolutions between the first and the last, scaled to AdamW's step (Liu et al. 2025).

    torch's own implementation takes matrices only: it works on views of the channels-last weights, out x (3 3 in).
    """

    def __init__(self, network: nn.Module, settings: TrainSettings):
        ends = ("conv_in.weight", "conv_out.weight")
        inner = [p for name, p in network.named_parameters() if p.ndim == 4 and not name.endswith(ends)]
        rest = [p for p in network.parameters() if not any(p is q for q in inner)]
        super().__init__([{"params": [*inner, *rest]}], {"lr": settings.optim.lr})
        self.inner = inner
        self.views = [nn.Parameter(matrix_view(p.detach())) for p in inner]
        self.muon = torch.optim.Muon(
            self.views, lr=settings.optim.lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, settings.optim.lr, settings.optim.betas, weight_decay=0.0, fused=True)

    def step(self) -> None:  # type: ignore[override]
        for weight, view in zip(self.inner, self.views, strict=True):
            assert weight.grad is not None
            view.grad = matrix_view(weight.grad)
        for optimizer in (self.muon, self.adamw):
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def matrix_view(weight: torch.Tensor) -> torch.Tensor:
    """out x (height width in) of an out x in x height x width tensor; a view where the memory is channels-last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


if __name__ == "__main__":
    main()
