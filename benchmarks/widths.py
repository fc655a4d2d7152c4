"""The linear start at several widths and learning rates, with steps by layer (optim.layerwise) and with plain AdamW.

    python -m benchmarks.widths --data TRAIN_FOLDER --held-out TEST_FOLDER --width 84M --rates 1e-4 3e-4 1e-3

The quickstart's step without its GAN, in bf16 on one thread, f8 with 16 latent channels unless others are given,
batches of 8 crops of 64 px and a constant rate after 20 steps of warm-up, or others. PSNR and LPIPS of held-out crops
are those of the averaged weights, and of the weights themselves. Rows are added to benchmarks/results/widths.json, so
that a long table can be made in parts.
"""

import argparse
import json
import sys
from itertools import islice
from typing import Any

import torch

from benchmarks.machine import RESULTS, save
from benchmarks.time_to_quality import Batches, data_name, measure, step_and_average
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.loader import open_images
from latent_ae.pretrained.lpips import LPIPS
from latent_ae_train.settings import TrainSettings

WIDTHS = {
    "1.2M": "model.block_out_channels=[32,64,64,64]",
    "12M": "model.block_out_channels=[64,128,192,192] model.layers_per_block=2",
    "84M": "model.block_out_channels=[128,256,512,512] model.layers_per_block=2 model.norm_num_groups=32 "
    "model.mid_block_add_attention=true",
}
BASE = "precision=bf16 gan.weight=0 optim.schedule=constant"
CROP_PX = 128
NAME = "widths"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--held-out", metavar="DATA", help="default: photographs held out of --data")
    parser.add_argument("--images", type=int, default=8, help="held-out images that are measured")
    parser.add_argument("--width", choices=WIDTHS, default="1.2M")
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--crops", type=int, nargs="+", default=[0, 64, 256], help="when it is measured")
    parser.add_argument("--latent-channels", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--plain", action="store_true", help="plain AdamW")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    perceptual = LPIPS("vgg")
    for rate in arguments.rates:
        for seed in arguments.seeds:
            words = [*BASE.split(), *WIDTHS[arguments.width].split(), f"data.source={arguments.data}"]
            words += [f"data.eval_source={arguments.held_out}"] if arguments.held_out else []
            words += [
                f"model.latent_channels={arguments.latent_channels}",
                f"optim.lr={rate}",
                f"seed={seed}",
                f"optim.layerwise={str(not arguments.plain).lower()}",
            ]
            words.append(f"optim.warmup={arguments.warmup}")
            settings = load_settings(TrainSettings, "quickstart", words)
            key = f"{arguments.width}, lr {rate}, {'AdamW' if arguments.plain else 'by layer'}, seed {seed}"
            key += "" if arguments.latent_channels == 16 else f", {arguments.latent_channels} latent channels"
            key += "" if arguments.warmup == 20 else f", warm-up {arguments.warmup}"
            add(key, curve(settings, arguments.crops, arguments.images, perceptual), settings, arguments.images)


def curve(settings: TrainSettings, due: list[int], count: int, perceptual: LPIPS) -> list[dict[str, float]]:
    """Trains, and measures after so many crops."""
    data = settings.data
    crops = held_out_images(open_images(data, "held_out"), data, channels=3, crop_px=CROP_PX, multiple_of=8)
    images = [image for _, _, image in islice(crops, count)]
    step, averaged = step_and_average(settings)
    batches, raw, points = Batches(settings), step.bare_reconstructor, list[dict[str, float]]()
    for number in range(max(due) // settings.batch_size + 1):
        if (done := number * settings.batch_size) in due:
            now = measure(lambda x: raw(x).image, images, perceptual)
            point = measure(lambda x: averaged(x).image, images, perceptual)
            points.append({"crops": done, **point, "psnr_raw": now["psnr"], "lpips_raw": now["lpips"]})
            print(f"  {points[-1]}", file=sys.stderr, flush=True)
        if done < max(due):
            step(number, batches)
    return points


def add(key: str, points: list[dict[str, float]], settings: TrainSettings, count: int) -> None:
    path = RESULTS / f"{NAME}.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    facts = {"base": f"quickstart {BASE}", "data": data_name(settings.data), "held_out_images": count}
    print(key, points[-1], file=sys.stderr, flush=True)
    save(NAME, {**facts, "widths": WIDTHS, "rows": {**rows, key: points}})


if __name__ == "__main__":
    main()
