"""Anomalies by small first stages: CIFAR-10, one class normal, and photographs and textures with pasted defects.

    python -m benchmarks.anomaly cifar10 /data      # a folder that holds cifar10/ and bsds500/; or LATENT_AE_TEST_DATA
    python -m benchmarks.anomaly defects /data
    python -m benchmarks.anomaly textures           # scikit-image's: brick, grass and gravel, one of them normal

Each model trains for a few minutes on one CPU core; bicubic resampling, which learned nothing, stands beside it but for
textures, whose images are overlapping windows: those that scores are fitted to and those that give the thresholds are
drawn from the same windows, which overlap. The results of each seed are added to benchmarks/results/anomaly-*.json,
where those before must be of as many steps and images, of the same size, and of the same settings of the density.
"""

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.machine import earlier, save
from benchmarks.runs import folder_name, train

TEXTURES = ("brick", "grass", "gravel")
CLASSES = {1: "automobile", 4: "deer"}
"""Of CIFAR-10; chosen before any result was seen."""
MIXTURE, NEIGHBOURS = 4, 4000
DENSITY = f"density.components={MIXTURE} density.weight=0.1 density.penalty=0.005"
STAGES = {"first stage": "", "trained with a density": DENSITY}
CROP_PX = 64
"""Side of training crops and of judged images, except those of CIFAR-10: a density holds for one size."""
HELD_OUT = 400
"""Training images of a class that give thresholds and train nothing."""
MODEL = [
    "model.block_out_channels=[32,64,64,64]",
    "model.latent_channels=8",
    "loss.perceptual=0",
    "gan.weight=0",
    "validate.every=100000",
    "validate.crop_px=32",
    "checkpoint.every=100000",
    "log.every=50",
]


def trained(data: Path, out: Path, steps: int, *words: str) -> Path:
    """The export of a quickstart with a narrower latent: 8 numbers for 8 x 8 px."""
    train(out, "quickstart", f"data.source={data}", f"steps={steps}", *MODEL, *words)
    return out / "export"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": result["data"]["num_images"],
        "thresholds_from": result["normal"]["thresholds_from"],
        "scores": result["scores"],
        "pixel_auroc": result["pixel_auroc"],
    }


def one_class_out(data: Path, scratch: Path, steps: int, limit: int, seed: int) -> dict[str, Any]:
    from latent_ae.data.images import bicubic_down_up
    from latent_ae_eval.anomaly.measure import find_anomalies
    from latent_ae_eval.anomaly.settings import AnomalySettings

    found: dict[str, Any] = {}
    table = pq.read_table(data / "cifar10/train.parquet")
    for number, name in CLASSES.items():
        own = table.filter(pc.equal(table["label"], number))
        folder = scratch / name
        folder.mkdir()
        pq.write_table(own.slice(HELD_OUT), folder / "seen.parquet")
        pq.write_table(own.slice(0, HELD_OUT), folder / "normal.parquet")
        words = ("data.resolution=32", "batch_size=16", f"seed={seed}")
        normal = str(folder / "normal.parquet")
        settings = AnomalySettings(
            normal=normal,
            normal_class=number,
            limit=limit,
            batch_size=32,
            mixture=MIXTURE,
            neighbours=NEIGHBOURS,
            seed=seed,
        )
        tests = str(data / "cifar10/test.parquet")
        found[name] = {}
        for stage, more in STAGES.items():
            run = scratch / folder_name(f"{name} {stage}")
            model = trained(folder / "seen.parquet", run, steps, *words, *more.split())
            found[name][stage] = figures(find_anomalies(model, tests, settings, progress=True))
        found[name]["bicubic /8"] = figures(
            find_anomalies(lambda images: bicubic_down_up(images, 8), tests, settings, progress=True)
        )
    return found


def pasted_defects(data: Path, scratch: Path, steps: int, limit: int, seed: int) -> dict[str, Any]:
    from latent_ae.data.images import bicubic_down_up
    from latent_ae_eval.anomaly.measure import find_anomalies
    from latent_ae_eval.anomaly.settings import AnomalySettings

    photos = data / "bsds500"
    settings = AnomalySettings(
        normal=str(photos / "val"),
        crop_px=CROP_PX,
        limit=limit,
        defects=True,
        mixture=MIXTURE,
        neighbours=NEIGHBOURS,
        seed=seed,
    )
    found = {}
    for stage, more in STAGES.items():
        words = (f"data.resolution={CROP_PX}", "batch_size=8", f"seed={seed}", *more.split())
        model = trained(photos / "train", scratch / folder_name(stage), steps, *words)
        found[stage] = figures(find_anomalies(model, photos / "test", settings, progress=True))
    found["bicubic /8"] = figures(
        find_anomalies(lambda images: bicubic_down_up(images, 8), photos / "test", settings, progress=True)
    )
    return found


def textures(data: Path, scratch: Path, steps: int, limit: int, seed: int) -> dict[str, Any]:
    """One texture is normal: its left half trains, the next quarter gives thresholds, and the last one is judged."""
    import skimage.data

    from latent_ae_eval.anomaly.measure import find_anomalies
    from latent_ae_eval.anomaly.settings import AnomalySettings

    found: dict[str, Any] = {}
    for name in TEXTURES:
        pixels, folder = getattr(skimage.data, name)(), scratch / name
        for part, left, right in (("train", 0, 256), ("normal", 256, 384), ("test", 384, 512)):
            (folder / part).mkdir(parents=True)
            side = 256 if part == "train" else CROP_PX
            tops = range(0, 513 - side, 256 if part == "train" else 26)
            for x, y in itertools.product(range(left, right - side + 1, 32), tops):
                Image.fromarray(pixels[y : y + side, x : x + side]).convert("RGB").save(
                    folder / part / f"{y:03d}-{x}.png"
                )
        settings = AnomalySettings(
            normal=str(folder / "normal"),
            limit=limit,
            defects=True,
            mixture=MIXTURE,
            neighbours=NEIGHBOURS,
            seed=seed,
        )
        found[name] = {}
        for stage, more in STAGES.items():
            words = (f"data.resolution={CROP_PX}", "batch_size=8", "data.eval_source=photos", f"seed={seed}")
            model = trained(folder / "train", folder / folder_name(stage), steps, *words, *more.split())
            found[name][stage] = figures(find_anomalies(model, folder / "test", settings, progress=True))
    return found


WHAT = {"cifar10": (one_class_out, 1000), "defects": (pasted_defects, 50), "textures": (textures, 54)}
"""How each is measured, and how many images are judged."""
OF = {"cifar10": "CIFAR-10, {} normal", "defects": "BSDS500, pasted defects", "textures": "{}, pasted defects"}
"""What a table calls its sets of images."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("data", nargs="?", type=Path, default=os.environ.get("LATENT_AE_TEST_DATA"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, help="to judge; default: 1000, 50, 54")
    words = parser.parse_args()
    if words.data is None and words.what != "textures":
        parser.error("give the folder that holds cifar10/ and bsds500/, or set LATENT_AE_TEST_DATA")
    measure, images = WHAT[words.what]
    name, folder = f"anomaly-{words.what}", Path(words.data or "")
    crop_px = 32 if words.what == "cifar10" else CROP_PX
    facts: dict[str, Any] = {"of": OF[words.what], "crop_px": crop_px, "stages": STAGES}
    facts |= {"steps": words.steps, "images": words.images or images}
    earlier(name, facts, "seeds")  # ends here rather than after a training
    for seed in words.seeds:
        with tempfile.TemporaryDirectory(prefix="latent-ae-") as scratch:
            found = measure(folder, Path(scratch), words.steps, words.images or images, seed)
        seeds = earlier(name, facts, "seeds") | {str(seed): found}
        save(name, {**facts, "seeds": dict(sorted(seeds.items()))}, added=True)


if __name__ == "__main__":
    main()
