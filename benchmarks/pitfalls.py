"""Four pitfalls of first stages, each made on purpose and mended: the figures and pictures of docs/pitfalls.md.

    python -m benchmarks.pitfalls --data /data/bsds500/train --held-out /data/bsds500/test --scratch /tmp/pitfalls

The trainings are those whose commands the page shows, and two more of blurry images: on the photographs that
scikit-image ships, for blurry images on those of --data, and on the synthetic shapes; --held-out is a folder of other
photographs, on which the first two are measured. Killed, it goes on when started again with the same scratch folder.
Writes benchmarks/results/pitfall-*.json and docs/images/pitfall-*.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import save
from benchmarks.runs import evaluate, events, folder_name, train
from latent_ae.data.images import to_tensor
from latent_ae.data.synthetic import write_shapes
from latent_ae.data.transforms import center_crop, resize_shorter
from latent_ae.models.loading import load_first_stage
from latent_ae.report.pictures import picture_grid

PHOTOS = "vae steps=300 validate.every=300"
SHAPES = f"{PHOTOS} model.in_channels=1 model.out_channels=1 data.flip=false validate.images=200"
F8 = (
    "quickstart model.block_out_channels=[32,64,64,64] model.latent_channels=16 loss.pixel=l2 steps=1000 gan.start=700 "
    "validate.every=1000 validate.images=20 checkpoint.every=1000"
)
"""A first stage with a twelfth of an image's values as latents; one with 4 channels has a 48th."""
FIXED = f"{SHAPES} loss.scale=1 loss.learned_logvar=false"
"""A likelihood whose scale is fixed above the error that the model reaches."""
RUNS = {
    "collapse": {
        "random start": f"{PHOTOS} model.init=default",
        "and warm-up": f"{PHOTOS} model.init=default loss.kl_warmup=200",
        "linear start": PHOTOS,
    },
    "beta": {
        "beta 0.01": f"{SHAPES} loss.kl=0.01",
        "beta 1": SHAPES,
        "beta 30": f"{SHAPES} loss.kl=30",
        "beta 1, scale fixed": FIXED,
        "and a target rate": f"{FIXED} loss.kl_target=0.4",
    },
    "blur": {
        "4 channels": f"{F8} loss.perceptual=0 gan.weight=0".replace("channels=16", "channels=4"),
        "16 channels": f"{F8} loss.perceptual=0 gan.weight=0",
        "and 0.1 LPIPS": f"{F8} loss.perceptual=0.1 gan.weight=0",
        "and LPIPS": f"{F8} gan.weight=0",
        "and a GAN": F8,
    },
}
"""Words after `latent-ae train`, by pitfall."""
PRIOR_OF = "beta 0.01"
"""The run on whose latents priors are tried."""
PRIORS = {"N(0, I)": "prior=normal", "a Gaussian of the latents": "prior=gaussian", "a flow": "prior=flow"}
SHOWN = 8
SHEET = (6, 128)
"""Gap and cell of such a sheet, px."""
IMAGES = Path(__file__).parent.parent / "docs/images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="a folder of photographs to measure on")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS, help="priors are tried with beta")
    words = parser.parse_args()
    torch.set_num_threads(1)
    shapes = words.scratch / "shapes.parquet"
    if not shapes.exists():
        words.scratch.mkdir(parents=True, exist_ok=True)
        write_shapes(shapes)
    runs: dict[str, Path] = {}
    own = {"beta": (shapes, shapes), "blur": (words.data, words.held_out)}
    for pitfall in words.only:
        for name, command in RUNS[pitfall].items():
            recipe, *settings = command.split()
            if pitfall in own:
                settings += [f"data.source={own[pitfall][0]}", f"data.eval_source={own[pitfall][1]}"]
            runs[name] = words.scratch / folder_name(name)
            train(runs[name], recipe, *settings)
    if "collapse" in words.only:
        keep("collapse", {name: of_vae(runs[name], words.held_out) for name in RUNS["collapse"]})
        small = photographs(words.held_out, 32, SHOWN, resize_px=64)
        draw("collapse", small, {name: runs[name] for name in RUNS["collapse"]})
    if "beta" in words.only:
        keep("beta", {name: of_vae(runs[name], shapes) for name in RUNS["beta"]})
        draw("beta", shape_images(shapes), {name: runs[name] for name in RUNS["beta"]})
        try_priors(runs[PRIOR_OF], shapes, words.scratch)
    if "blur" in words.only:
        keep("blur", {name: of_photographs(runs[name], words.held_out) for name in RUNS["blur"]})
        draw("blur", photographs(words.held_out, 128, 5), {name: runs[name] for name in RUNS["blur"]})


def try_priors(run: Path, shapes: Path, scratch: Path) -> None:
    """Samples of one model from several priors: figures and a picture."""
    rows, measured = {"images": list(shape_images(shapes))}, dict[str, Any]()
    for name, prior in PRIORS.items():
        out = scratch / folder_name(f"prior {name}")
        result = evaluate(out, "sample", run, shapes, prior, "samples=500", "frechet=[vgg16]", "steps=600")
        measured[name] = {key: result[key] for key in ("metrics", "intervals")}
        rows[name] = cut(out / "samples.png")
    picture("priors", rows)
    keep("priors", measured)


def keep(pitfall: str, rows: dict[str, Any]) -> None:
    """Write the result of one pitfall."""
    save(f"pitfall-{pitfall}", {"commands": RUNS.get(pitfall, {}), "rows": rows})


def of_vae(run: Path, data: Path) -> dict[str, Any]:
    """What the log and the evaluations say of a variational autoencoder for images of 32 px."""
    framing = ["limit=200", "crop_px=32", f"resize_px={64 if data.is_dir() else 'null'}"]
    likelihood = evaluate(run / "likelihood", "likelihood", run, data, *framing, "samples=1")["metrics"]
    health = evaluate(run / "latents", "latents", run, data, *framing, "lpips=null", "num_decoded=0")["health"]
    recon = ["lpips=[]", "frechet=[]", "latents=[mode]", "baseline=false"]
    return {
        "psnr": evaluate(run / "recon", "recon", run, data, *framing, *recon)["metrics"]["mode"]["psnr"],
        "rate_nats": likelihood["rate"]["nats_per_image"],
        "bits_per_dimension": likelihood["elbo"]["bits_per_dimension"],
        "dead_channels": len(health["dead_channels"]),
        "channels": len(health["channels"]),
        "verdict": [[line["step"], line["verdict"]] for line in events(run, "train")],
    }


def of_photographs(run: Path, held_out: Path) -> dict[str, Any]:
    """What `eval recon` says of a run on photographs."""
    settings = "limit=100 crop_px=128 resize_px=null latents=[mode] lpips=[vgg] frechet=[vgg16] baseline=false"
    result = evaluate(run / "recon", "recon", run, held_out, *settings.split())
    keys = ("psnr", "ssim", "lpips_vgg", "frechet_vgg16")
    figures, intervals = result["metrics"]["mode"], result["intervals"]["mode"]
    return {key: figures[key] for key in keys} | {"intervals": {key: intervals.get(key) for key in keys}}


def shape_images(shapes: Path) -> Tensor:
    """Shapes that are far from each other in the table, (SHOWN, 1, 32, 32) in [-1, 1]."""
    table = datasets.Dataset.from_parquet(str(shapes))
    chosen = np.linspace(0, len(table) - 1, SHOWN).astype(int)
    return torch.stack([to_tensor(np.array(table[int(number)]["image"].convert("L"))[..., None]) for number in chosen])


def photographs(folder: Path, side_px: int, number: int, resize_px: int | None = None) -> Tensor:
    """Middles of the first photographs, (number, 3, side, side) in [-1, 1]."""
    arrays = [np.array(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))[:number]]
    arrays = arrays if resize_px is None else [resize_shorter(array, resize_px) for array in arrays]
    return torch.stack([to_tensor(center_crop(array, side_px)) for array in arrays])


def draw(pitfall: str, images: Tensor, runs: Mapping[str, Path]) -> None:
    """Save a picture of images and what each run makes of them."""
    rows = {"images": list(images)}
    for name, run in runs.items():
        stage = load_first_stage(str(run))
        rows[name] = list(stage.decode(stage.encode(images).mean))
    picture(pitfall, rows)


def picture(pitfall: str, rows: Mapping[str, list[Tensor]]) -> None:
    sheet = picture_grid(list(rows.values()), row_labels=list(rows), largest_px=128)
    kind = "jpg" if pitfall == "blur" else "png"  # photographs
    sheet.save(IMAGES / f"pitfall-{pitfall}.{kind}", optimize=True, quality=88)


def cut(sheet: Path) -> list[Tensor]:
    """The first row of samples on a sheet of `eval sample`, (1, 32, 32) each."""
    picture, (gap, cell) = Image.open(sheet).convert("L"), SHEET
    boxes = ((left, gap, left + cell, gap + cell) for left in range(gap, gap + SHOWN * (gap + cell), gap + cell))
    small = (picture.crop(box).resize((32, 32), Image.Resampling.BOX) for box in boxes)
    return [to_tensor(np.array(one)[..., None]) for one in small]


if __name__ == "__main__":
    main()
