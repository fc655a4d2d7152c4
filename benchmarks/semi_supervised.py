"""Classification from few labels: a label model trained with the first stage (M1 + M2) beside probes and supervision.

    python -m benchmarks.semi_supervised --cifar10 /data/cifar10 --scratch /tmp/scratch

On scikit-learn's 1,797 digits of 8 x 8 px and on CIFAR-10, with 10 and 100 labels of each class. For each random choice
of labels, all contestants see the same ones, and are tested on the same images:

- M1: logistic regression and nearest neighbours on the latents of a variational autoencoder (`eval probe`).
- M1 + M2: the label model on the latents of that autoencoder, which sees no labels (`semi_supervised.weight=0`).
- joint: the label model is the prior and trains the encoder, too (`semi_supervised.weight=1 loss.kl=0`).
- supervised: the same encoder and classifier, trained on the labelled images alone by cross-entropy, for as many steps
  of as many labelled images as the others see in a step.

The seed of the training is always 0: only the labels differ. Needs scikit-learn. Killed, it goes on when started again
with the same scratch folder. Each choice of labels is added to benchmarks/results/semi-supervised.json.
"""

import argparse
import json
import statistics
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.machine import earlier, save
from benchmarks.runs import WORDS, cifar10, evaluate, refuse_others, seconds_of, train
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.labels import PROBE_SEED, few_labels, numbered_classes
from latent_ae.data.loader import open_images
from latent_ae.data.sources import StreamSource
from latent_ae.models.build import build_autoencoder
from latent_ae.models.label_model import LabelModel, stored_label_model
from latent_ae_train.settings import TrainSettings

RECIPE, BATCH, TEST_FRACTION = "semi-supervised", 64, 0.3
RESULT = "semi-supervised"
COMMON = [f"batch_size={BATCH}", "checkpoint.every=100000", "validate.every=100000", "validate.images=50"]
JOINT = ["semi_supervised.weight=1", "loss.kl=0"]
SHAPES = {
    "digits": [
        *("data.resolution=8", "data.flip=false", "model.in_channels=1", "model.out_channels=1"),
        *("model.block_out_channels=[32,32,64]", f"data.eval_fraction={TEST_FRACTION}"),
    ],
    "CIFAR-10": [],
}
STEPS = {"digits": 1000, "CIFAR-10": 300}
COMPARED = "compared.json"
"""What came of one choice of labels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--draws", type=int, nargs=2, default=[3, 1], help="choices of labels for digits and CIFAR-10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits = write_digits(arguments.scratch / "digits")
    data = {"digits": [f"data.source={digits}"], "CIFAR-10": cifar10(arguments.cifar10)}
    place = {"digits": digits, "CIFAR-10": arguments.cifar10}
    facts = {"recipe": RECIPE, "common": COMMON, "steps": STEPS, "shapes": SHAPES}
    earlier(RESULT, facts)  # ends here rather than after a training
    for name, draws in zip(data, arguments.draws, strict=True):
        for labels in arguments.labels:
            for draw in range(draws):
                words = [*COMMON, *SHAPES[name], *data[name], f"steps={STEPS[name]}"]
                words += [f"semi_supervised.labels_per_class={labels}", f"semi_supervised.draw={draw}"]
                folder = arguments.scratch / f"{name}-{labels}-{draw}"
                refuse_others(folder, *words)
                if not (folder / COMPARED).exists():
                    found = compared(folder, place[name], words, labels, draw)
                    (folder / COMPARED).write_text(json.dumps(found))
                    (folder / WORDS).write_text(json.dumps(words))
                rows = earlier(RESULT, facts)
                add(rows.setdefault(name, {}), str(labels), json.loads((folder / COMPARED).read_text()))
                save(RESULT, {**facts, "rows": {name: rows[name] for name in SHAPES if name in rows}}, added=True)


def add(rows: dict[str, Any], labels: str, found: dict[str, Any]) -> None:
    """Add a choice of labels to the rows, which are by number of labels and have means over their choices."""
    before = rows.pop(labels, {"draws": []})["draws"]
    others = [one for one in before if one["draw"] != found["draw"]]
    draws = sorted([*others, found], key=itemgetter("draw"))
    means = {key: statistics.mean(one["accuracy"][key] for one in draws) for key in found["accuracy"]}
    rows[labels] = {"draws": draws, "mean": means}
    for key in sorted(rows, key=int):
        rows[key] = rows.pop(key)


def compared(folder: Path, data: Path, words: list[str], labels: int, draw: int) -> dict[str, Any]:
    """The test accuracies of all contestants with the same labels."""
    accuracy, seconds = dict[str, float](), dict[str, float]()
    for name, more in (("M1 + M2", []), ("joint", JOINT)):
        run = folder / name.replace(" + ", "-")
        train(run, RECIPE, *words, *more)
        judged = [f"labels_per_class=[{labels}]", f"draws={max(2, draw + 1)}", f"test_fraction={TEST_FRACTION}"]
        result = evaluate(run / "probe", "probe", run / "export", data, *judged)
        accuracy[name], seconds[name] = result["label_model"]["accuracy"], seconds_of(run)
        if name == "M1 + M2":
            for kind, title in (("logistic", "M1, logistic regression"), ("nearest", "M1, nearest neighbours")):
                accuracy[title] = result["features"]["latent"][kind][str(labels)]["draws"][draw]
            accuracy["pixels, logistic regression"] = result["features"]["pixels"]["logistic"][str(labels)]["draws"][
                draw
            ]
    settings = load_settings(TrainSettings, RECIPE, words)
    accuracy["supervised"] = supervised(settings, stored_label_model(folder / "M1-M2/export"), labels, draw)
    return {
        "draw": draw,
        "accuracy": accuracy,
        "processor_seconds": seconds,
        "test_images": result["data"]["test_images"],
    }


def supervised(settings: TrainSettings, like: LabelModel | None, labels: int, draw: int) -> float:
    """The test accuracy of encoder and classifier, trained on the labelled images alone."""
    assert like is not None
    train_images, test_images = open_images(settings.data, "train"), open_images(settings.data, "held_out")
    assert not isinstance(train_images, StreamSource) and not isinstance(test_images, StreamSource)
    found = numbered_classes(train_images, test_images, "auto")
    assert found is not None
    rows = few_labels(found.labels[0], found.names, [labels], PROBE_SEED, draw)[0]
    x, y = images(settings, train_images.subset(rows)), torch.from_numpy(found.labels[0][rows])
    encoder = build_autoencoder(settings.model, sample_size=settings.data.resolution, seed=settings.seed)
    torch.manual_seed(settings.seed)
    classifier = LabelModel(**{key: like.config[key] for key in ("num_classes", "latent_shape", "width")}).classifier

    def logits(batch: torch.Tensor) -> torch.Tensor:
        return classifier(F.layer_norm(latent := encoder.encode(batch).latent_dist.mean.flatten(1), latent.shape[1:]))

    optimizer = torch.optim.AdamW(
        [*encoder.encoder.parameters(), *encoder.quant_conv.parameters(), *classifier.parameters()],
        lr=settings.optim.lr,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        chosen = torch.randint(len(x), (round(BATCH * settings.semi_supervised.share),), generator=generator)
        batch = x[chosen]
        if settings.data.flip:
            turned = torch.rand(len(batch), generator=generator) < 0.5
            batch = torch.where(turned[:, None, None, None], batch.flip(3), batch)
        optimizer.zero_grad()
        F.cross_entropy(logits(batch), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guesses = torch.cat([logits(part).argmax(1) for part in images(settings, test_images).split(256)])
    return float((guesses == torch.from_numpy(found.labels[1])).double().mean())


def images(settings: TrainSettings, source: Any) -> torch.Tensor:
    """Return all images of a source as the autoencoder gets them, (N, C, H, W)."""
    side, channels = settings.data.resolution, settings.model.in_channels
    return torch.stack(
        [image for _, _, image in held_out_images(source, settings.data, channels=channels, crop_px=side)]
    )


def write_digits(folder: Path) -> Path:
    """Write scikit-learn's digits as image files, a folder for each class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(place / f"{number:04d}.png")
    return folder


if __name__ == "__main__":
    main()
