"""Classification from few labels: a label model trained with the first stage (M1 + M2) beside probes and supervision.

    python -m benchmarks.semi_supervised --cifar10 /data/cifar10 --scratch /tmp/scratch

On scikit-learn's 1,797 digits of 8 x 8 px and on CIFAR-10, with 10, 30 and 100 labels of each class. For each random
choice of labels, all contestants see the same ones, and are tested on the same images:

- M1: logistic regression and nearest neighbours on the latents of a variational autoencoder (`eval probe`), which is
  trained once for all choices, without labels and without drawing labelled images more often.
- M1 + M2: the label model on the latents of an autoencoder in whose training it has no part
  (`semi_supervised.weight=0`). A share of this autoencoder's samples is drawn from the labelled images alone, so which
  images are labelled has an influence on it, though their labels have none.
- joint: the label model is the prior and trains the encoder, too (`semi_supervised.weight=1 loss.kl=0`).
- supervised: the same encoder and classifier, from the same initial weights, trained by cross-entropy alone on the
  labelled ones among the samples of each step of the other two, with the recipe's optimizer, schedule and average of
  the weights. (The average is of the classifier, too, which a label model's export does not have.)

The seed of the training is always 0: only the labels differ. Needs scikit-learn. Killed, it goes on when started again
with the same scratch folder. Each choice of labels is added to benchmarks/results/semi-supervised.json.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import earlier, save, with_run
from benchmarks.runs import WORDS, cifar10, evaluate, refuse_others, seconds_of, train
from latent_ae.config import load_settings
from latent_ae.data.held_out import held_out_images
from latent_ae.data.labels import numbered_classes
from latent_ae.data.loader import open_images, training_batches
from latent_ae.data.sources import StreamSource
from latent_ae.models.build import build_autoencoder
from latent_ae.models.label_model import LabelModel
from latent_ae_train.data import labelled_images
from latent_ae_train.optim import Ema, lr_scale_at
from latent_ae_train.settings import TrainSettings

RECIPE, BATCH, TEST_FRACTION = "semi-supervised", 64, 0.3
RESULT = "semi-supervised"
COMMON = [f"batch_size={BATCH}", "checkpoint.every=100000", "validate.every=100000", "validate.images=50"]
UNLABELLED = ["semi_supervised.classes=null", "semi_supervised.labels_per_class=null"]
"""Turns the label model off, and with it the larger share of labelled images."""
JOINT = ["semi_supervised.weight=1", "loss.kl=0"]
SHAPES = {
    "digits": [
        *("data.resolution=8", "data.flip=false", "model.in_channels=1", "model.out_channels=1"),
        *("model.block_out_channels=[32,32,64]", f"data.eval_fraction={TEST_FRACTION}"),
    ],
    "CIFAR-10": [],
}
STEPS = {"digits": 1000, "CIFAR-10": 300}
COMPARED = "accuracies.json"
"""What came of one choice of labels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--draws", type=int, nargs=2, default=[3, 1], help="choices of labels for digits and CIFAR-10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    digits = write_digits(arguments.scratch / "digits")
    data = {"digits": [f"data.source={digits}"], "CIFAR-10": cifar10(arguments.cifar10)}
    place = {"digits": digits, "CIFAR-10": arguments.cifar10}
    facts = {"recipe": RECIPE, "common": COMMON, "steps": STEPS, "shapes": SHAPES, "m1": UNLABELLED}
    earlier(RESULT, facts)  # ends here rather than after a training
    for name, draws in zip(data, arguments.draws, strict=True):
        shared = [*COMMON, *SHAPES[name], *data[name], f"steps={STEPS[name]}"]
        m1 = arguments.scratch / f"{name}-M1"
        if draws:
            train(m1, RECIPE, *shared, *UNLABELLED)
        for labels in arguments.labels:
            for draw in range(draws):
                words = [*shared, f"semi_supervised.labels_per_class={labels}", f"semi_supervised.draw={draw}"]
                folder = arguments.scratch / f"{name}-{labels}-{draw}"
                refuse_others(folder, *words)
                if not (folder / COMPARED).exists():
                    found = compared(folder, m1, place[name], words, labels, draw)
                    (folder / COMPARED).write_text(json.dumps(found))
                    (folder / WORDS).write_text(json.dumps(words))
                rows = earlier(RESULT, facts)
                add(rows.setdefault(name, {}), str(labels), json.loads((folder / COMPARED).read_text()))
                save(RESULT, {**facts, "rows": {name: rows[name] for name in SHAPES if name in rows}}, added=True)


def add(rows: dict[str, Any], labels: str, found: dict[str, Any]) -> None:
    """Add a choice of labels to the rows, which are by number of labels and have means over their choices."""
    before = rows.pop(labels, {"draws": []})["draws"]
    draws = with_run(before, found, "draw")
    means = {key: statistics.mean(one["accuracy"][key] for one in draws) for key in found["accuracy"]}
    rows[labels] = {"draws": draws, "mean": means}
    for key in sorted(rows, key=int):
        rows[key] = rows.pop(key)


def compared(folder: Path, m1: Path, data: Path, words: list[str], labels: int, draw: int) -> dict[str, Any]:
    """The test accuracies of all contestants with the same labels; `m1` is the run without any."""
    accuracy, seconds = dict[str, float](), {"M1": seconds_of(m1)}
    judged = [f"labels_per_class=[{labels}]", f"draws={max(2, draw + 1)}", f"test_fraction={TEST_FRACTION}"]
    result = evaluate(folder / "probe-M1", "probe", m1 / "export", data, *judged)
    for title, features, kind in (
        ("M1, logistic regression", "latent", "logistic"),
        ("M1, nearest neighbours", "latent", "nearest"),
        ("pixels, logistic regression", "pixels", "logistic"),
    ):
        accuracy[title] = result["features"][features][kind][str(labels)]["draws"][draw]
    for name, more in (("M1 + M2", []), ("joint", JOINT)):
        run = folder / name.replace(" + ", "-")
        train(run, RECIPE, *words, *more)
        found = evaluate(run / "probe", "probe", run / "export", data, *judged)
        accuracy[name], seconds[name] = found["label_model"]["accuracy"], seconds_of(run)
    accuracy["supervised"] = supervised(load_settings(TrainSettings, RECIPE, words))
    return {
        "draw": draw,
        "accuracy": accuracy,
        "processor_seconds": seconds,
        "test_images": result["data"]["test_images"],
    }


def supervised(settings: TrainSettings) -> float:
    """The test accuracy of encoder and classifier, trained on the labelled images alone."""
    train_images, test_images = open_images(settings.data, "train"), open_images(settings.data, "held_out")
    assert not isinstance(train_images, StreamSource) and not isinstance(test_images, StreamSource)
    found = numbered_classes(train_images, test_images, "auto")
    assert found is not None
    tests = images(settings, test_images)
    encoder, optim = (
        build_autoencoder(settings.model, sample_size=settings.data.resolution, seed=settings.seed),
        settings.optim,
    )
    with torch.no_grad():
        shape = encoder.encode(tests[:1]).latent_dist.mean.shape[1:]
    torch.manual_seed(settings.seed + 4)  # as the objective does
    network = nn.ModuleList([encoder, LabelModel(len(found.names), tuple(shape), width=settings.semi_supervised.width)])
    trained = [*encoder.encoder.parameters(), *encoder.quant_conv.parameters(), *network[1].classifier.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    average = Ema(network, settings.ema.decay)
    for step, (batch, labels) in zip(range(settings.steps), labelled_samples(settings), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * lr_scale_at(step, settings.steps, optim)
        optimizer.zero_grad()
        F.nll_loss(log_probabilities(network, batch), labels).backward()
        nn.utils.clip_grad_norm_(trained, optim.clip or float("inf"))
        optimizer.step()
        average.update(network, step)
    with torch.no_grad():
        guesses = torch.cat([log_probabilities(average.module, part).argmax(1) for part in tests.split(256)])
    return float((guesses == torch.from_numpy(found.labels[1])).double().mean())


def log_probabilities(network: Any, batch: Tensor) -> Tensor:
    """log q(y | z) at the posterior's mean, (N, K), by encoder and label model."""
    encoder, label_model = network
    found: Tensor = label_model.classify(encoder.encode(batch).latent_dist.mean)
    return found


def labelled_samples(settings: TrainSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """The labelled ones among the samples of each step of a training, and their labels, without end."""
    fed, labels = labelled_images(settings, open_images(settings.data, "train"), open_images(settings.data, "held_out"))
    sizes = {"batch_size": settings.batch_size, "micro_batch_size": settings.batch_size}
    for batch in training_batches(fed, settings.data, channels=settings.model.in_channels, seed=settings.seed, **sizes):
        classes = torch.from_numpy(labels.of_images[list(batch.indices)])
        yield batch.images[classes >= 0], classes[classes >= 0]


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
