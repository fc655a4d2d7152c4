"""The linear start against the default start in a longer training, with the GAN in its last third.

    python -m benchmarks.starts --data TRAIN_FOLDER --held-out TEST_FOLDER --scratch FOLDER

Runs of `latent-ae train quickstart` with an f8 network of 12 M parameters and 16 latent channels, in bf16 on one
thread, batches of 8 crops of 64 px. The default start takes the best of --rates, by LPIPS after --search-steps
without the GAN; the linear start takes the recipe's. Of each run: PSNR, LPIPS and the
Fréchet distance of VGG16 features of the averaged weights on held-out photographs, by images seen and by the minutes
that its median rate takes for them. A run that was killed goes on when this is started again with the same scratch
folder. Writes benchmarks/results/starts.json.
"""

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import save
from benchmarks.runs import events, latent_ae

MODEL = (
    "model.block_out_channels=[64,128,192,192] model.layers_per_block=2 model.latent_channels=16 precision=bf16 "
    "ema.decay=0.99 optim.warmup=50 validate.crop_px=128 checkpoint.keep=1 log.every=20"
)
POINTS = 5
"""Validations of a run after the one before its first step."""
FIGURES = ("psnr", "lpips_vgg", "frechet_vgg16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[3300, 1100, 550], help="lengths of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 1, 3], help="how many runs, for each length")
    parser.add_argument("--images", type=int, default=50, help="held-out images that are measured")
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3", "3e-3"], help="of the default start")
    parser.add_argument("--search-steps", type=int, default=137, help="length of the runs that choose the rate")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    data = f"data.source={arguments.data} data.eval_source={arguments.held_out} validate.images={arguments.images}"

    def run(name: str, steps: int, words: str, every: int) -> list[dict[str, float]]:
        folder = arguments.scratch / name
        settings = f"output_dir={folder} steps={steps} {MODEL} {data} {words}"
        settings += f" validate.every={every} checkpoint.every={every}"
        if not (folder / "export").exists():
            latent_ae("train", "quickstart", *settings.split())
        return points(folder)

    short = arguments.search_steps
    search = {
        rate: run(f"search-{short}-{rate}", short, f"model.init=default optim.lr={rate} gan.weight=0", short)
        for rate in arguments.rates
    }
    best = min(search, key=lambda rate: search[rate][-1]["lpips_vgg"])
    facts: dict[str, Any] = {"data": arguments.data.parent.name, "held_out_images": arguments.images}
    facts |= {"base": f"quickstart {MODEL}", "search_steps": short, "search": search, "rate": best, "lengths": []}
    for steps, seeds in zip(arguments.steps, arguments.seeds, strict=True):
        gan = f"gan.start={steps * 2 // 3} gan.discriminator_warmup=50 gan.warmup=50"
        curves: dict[str, dict[str, list[dict[str, float]]]] = {"linear": {}, "default": {}}
        facts["lengths"].append({"steps": steps, "gan": gan, "curves": curves})
        for seed in range(seeds):
            for start, words in {"linear": "", "default": f"model.init=default optim.lr={best}"}.items():
                name = f"{start}{best if start == 'default' else ''}-{steps}-{seed}"
                settings = f"seed={seed} {gan} {words}"
                curves[start][str(seed)] = run(name, steps, settings, steps // POINTS)
    save("starts", facts)


def points(folder: Path) -> list[dict[str, float]]:
    """The validations of a run: its figures by images seen and minutes of training."""
    rate = median(line["images_per_second"] for line in events(folder, "train") if "images_per_second" in line)
    return [
        {"images": 8.0 * line["step"], "minutes": round(8 * line["step"] / rate / 60, 2)}
        | {name: round(line[name], 4) for name in FIGURES}
        for line in events(folder, "validate")
    ]


if __name__ == "__main__":
    main()
