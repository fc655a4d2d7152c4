"""Which figures of a first stage tell how good the samples of a diffusion model on its latents are.

    python -m benchmarks.ifid --data /data/cifar10 --scratch /tmp/scratch

Nine small first stages of one recipe differ in KL weight, noise, equivariance, channels and width. Of each are measured
the interpolated distance (`eval ifid`), the distance of reconstructions (`eval recon`), rank, spectrum and KL of the
latents (`eval latents`), and for each seed the samples of a diffusion model (`eval diffusion`) on a fixed budget, with
VGG16's features throughout. The rank correlations with the samples' distance, mean over the seeds, tell which figure
predicts it; the correlation of one seed with the other is the most that can be expected.

The whole takes about an hour of one thread: 400 processor seconds for each first stage, of which its own training takes
a quarter and the two diffusion models take half. Killed, it goes on when started again with the same scratch folder.
Writes benchmarks/results/ifid.json after each first stage, and at the end docs/images/ifid.png.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet
from scipy.stats import spearmanr

from benchmarks.machine import save
from benchmarks.runs import cifar10, evaluate, folder_name, seconds_of, train

matplotlib.use("Agg")
from matplotlib import pyplot

STAGES = {
    "as it is": [],
    "KL 0.01": ["loss.kl=0.01"],
    "KL 1": ["loss.kl=1"],
    "noise 3": ["latents.noise=3"],
    "equivariance 0.5": ["latents.equivariance=0.5"],
    "4 channels": ["model.latent_channels=4"],
    "16 channels": ["model.latent_channels=16"],
    "16 channels, KL 0.1": ["model.latent_channels=16", "loss.kl=0.1"],
    "half as wide": ["model.block_out_channels=[16,32,32]", "model.norm_num_groups=4"],
}
"""What sets a first stage apart from the recipe below."""
BATCH = 16
COMMON = (
    f"batch_size={BATCH} seed=0 data.resolution=32 validate.crop_px=32 validate.images=50 validate.every=100000 "
    "checkpoint.every=100000 loss.perceptual_every=8 gan.weight=0 ema.decay=0.99 optim.warmup=50 log.every=50"
).split()
DIFFUSION = {"width": 128, "depth": 4, "batch_size": 64, "sampling_steps": 15, "validations": 2}
FIGURES = {
    "ifid": "midpoints (iFID-like)",
    "rfid": "reconstructions (rFID-like)",
    "psnr": "PSNR (dB)",
    "kl": "KL (nats per value)",
    "rank": "effective rank",
    "rank_share": "rank / channels",
    "slope": "slope of the spectrum",
    "high_share": "power at high frequencies",
}
"""Figures whose rank correlation with the samples' distance is measured, and how tables name them."""
PLOTTED = ("ifid", "rfid", "psnr", "slope")
MARKERS = "osD^v"
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as train.parquet, test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--steps", type=int, default=200, help="of each first stage")
    parser.add_argument("--diffusion-steps", type=int, default=500)
    parser.add_argument("--images", type=int, default=500, help="samples, and held-out images that are measured")
    parser.add_argument("--trained-on", type=int, default=5000, help="images, which are also the neighbours")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the diffusion models")
    parser.add_argument("--name", default="ifid", help="of the result and of the picture")
    words = parser.parse_args()
    data = words.scratch / "data"
    for part, count in (("train", words.trained_on), ("test", words.images)):
        first_rows(words.data / f"{part}.parquet", data / f"{part}.parquet", count)
    result: dict[str, Any] = {
        "data": f"CIFAR-10, {words.trained_on:,} images to train on and {words.images:,} held out",
        "first_stage_steps": words.steps,
        "first_stage_batch": BATCH,
        "diffusion": DIFFUSION | {"steps": words.diffusion_steps, "samples": words.images},
        "seeds": words.seeds,
        "figures": FIGURES,
        "first_stages": {},
    }
    for name in words.stages:
        run = words.scratch / folder_name(name)
        train(run, "quickstart", f"steps={words.steps}", *cifar10(data), *COMMON, *STAGES[name])
        result["first_stages"][name] = measured(run, data, words.seeds, words.diffusion_steps, words.images)
        result["correlations"] = correlations(result["first_stages"])
        save(words.name, result)
    if len(result["first_stages"]) > 2:
        plot(result, IMAGES / f"{words.name}.png")


def first_rows(source: Path, target: Path, count: int) -> None:
    """Writes the first rows of a table, whose classes are mixed, as a table of its own."""
    if not target.exists() or pyarrow.parquet.read_metadata(target).num_rows != count:
        target.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(source).slice(0, count), target)


def measured(run: Path, data: Path, seeds: list[int], steps: int, count: int) -> dict[str, Any]:
    """The figures of one first stage, and the distances of the samples on its latents."""
    export, held_out = run / "export", data / "test.parquet"
    whole = ("resize_px=null", "crop_px=null", "batch_size=64", "num_workers=0")
    pairs = evaluate(
        run / "ifid",
        "ifid",
        export,
        held_out,
        *whole,
        "frechet=[vgg16]",
        f"neighbours_from={data / 'train.parquet'}",
    )
    recon = evaluate(
        run / "recon",
        "recon",
        export,
        held_out,
        *whole,
        "frechet=[vgg16]",
        "latents=[mode]",
        "lpips=[]",
        "baseline=false",
    )["metrics"]["mode"]
    health = evaluate(run / "latents", "latents", export, held_out, *whole, "lpips=null", "num_decoded=0")["health"]
    channels = len(health["channels"])
    row: dict[str, Any] = {
        "ifid": pairs["metrics"]["midpoints"]["frechet_vgg16"],
        "ifid_interval": pairs["intervals"]["midpoints"].get("frechet_vgg16"),
        "neighbours": pairs["neighbours"],
        "rfid": recon["frechet_vgg16"],
        "psnr": recon["psnr"],
        "kl": health["kl_nats_per_dim"],
        "channels": channels,
        "rank": health["effective_rank"],
        "rank_share": health["effective_rank"] / channels,
        **{key: health["spectrum"]["latents"][key] for key in ("slope", "high_share")},
        "samples": [],
        "relative_loss": [],
        "training_seconds": seconds_of(run),
    }
    budget = [f"{key}={value}" for key, value in DIFFUSION.items()]
    budget += [f"steps={steps}", f"samples={count}", f"validation_images={min(count, 500)}", "num_workers=0"]
    for seed in seeds:
        first = run / f"diffusion-{seeds[0]}" / "latents"
        given = [f"latents={first / 'train'}", f"held_out_latents={first / 'held_out'}"] if seed != seeds[0] else []
        result = evaluate(run / f"diffusion-{seed}", "diffusion", export, data, f"seed={seed}", *budget, *given)
        row["samples"].append(result["metrics"]["samples"]["frechet_vgg16"])
        row["relative_loss"].append(result["loss"]["relative_loss"])
    return row


def correlations(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation of each figure with the samples' distance, mean over the seeds, and its p-value."""
    if len(rows) < 3:
        return {}
    samples = [statistics.mean(row["samples"]) for row in rows.values()]
    found = {key: spearman([row[key] for row in rows.values()], samples) for key in FIGURES}
    by_seed = list(zip(*(row["samples"] for row in rows.values()), strict=True))
    return found | ({"another seed": spearman(by_seed[0], by_seed[1])} if len(by_seed) > 1 else {})


def spearman(x: Any, y: Any) -> dict[str, float | None]:
    found = spearmanr(x, y)
    known = found.statistic == found.statistic  # nan where a figure is the same for all
    return {"rho": float(found.statistic), "p": float(found.pvalue)} if known else {"rho": None, "p": None}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws a few figures of each first stage against the samples' distance."""
    rows = result["first_stages"]
    figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(4 * len(PLOTTED), 4), sharey=True, layout="constrained")
    for axis, key in zip(axes, PLOTTED, strict=True):
        for number, (name, row) in enumerate(rows.items()):
            middle = statistics.mean(row["samples"])
            axis.plot([row[key]] * len(row["samples"]), row["samples"], color="0.7", zorder=1)
            axis.scatter(
                [row[key]], [middle], color=f"C{number}", marker=MARKERS[number % len(MARKERS)], label=name, zorder=2
            )
        rho = result["correlations"][key]["rho"]
        axis.set_xlabel(FIGURES[key] + ("" if rho is None else f"\nrank correlation {rho:.2f}"))
        axis.margins(x=0.1)
    axes[0].set_ylabel("Fréchet distance of samples (VGG16)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
