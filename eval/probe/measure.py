"""Measures how well simple classifiers read classes from latents with few labels, beside raw pixels and their PCA.

from latent_ae_eval.probe.measure import probe
result = probe("runs/cifar/export", "cifar10")
print(result["features"]["latent"]["logistic"]["100"])
"""

import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from latent_ae.arithmetic import float32_arithmetic
from latent_ae.config import UserError
from latent_ae.data.labels import few_labels, numbered_classes
from latent_ae.data.loader import open_images
from latent_ae.data.rng import choice_facts, spread
from latent_ae.data.sources import StoredImages, StreamSource, fingerprint
from latent_ae.models.codes import has_codes, latent_of_codes, nearest_codes
from latent_ae.models.label_model import stored_label_model
from latent_ae.models.loading import FirstStage
from latent_ae.progress import progress_bar
from latent_ae.provenance import versions
from latent_ae_eval.inputs import report_skipped
from latent_ae_eval.jobs import opened, write_json, written_into
from latent_ae_eval.probe import JOB
from latent_ae_eval.probe.classifiers import BLOCK, logistic_regression, nearest
from latent_ae_eval.probe.features import FEATURES, ImageFeatures, Scaled, add_components, several_sizes
from latent_ae_eval.probe.report import write_probe_report
from latent_ae_eval.probe.settings import ProbeSettings
from latent_ae_eval.storage import FeatureFile

VALIDATION = 5
"""One in this many labels is held back to choose l2 and k."""
MOST_LABELS = 20_000
ALGORITHM = {
    "latent": "the posterior's mean (of deterministic models the latent), raw, flattened",
    "latent_pooled": "its mean over height and width",
    "pixels": "values in [-1, 1], flattened",
    "pixels_pca": "principal components of the pixels, as many as the latent has numbers where there are enough images",
    "logistic": "multinomial logistic regression, L2 on the weights, to the optimum (L-BFGS in float64)",
    "nearest": "majority of the k nearest labelled images, Euclidean; ties to the class of the nearest",
    "centred": "by the mean over all training images that were drawn, whatever their class",
    "choice": f"l2 and k by accuracy on one in {VALIDATION} of the labels themselves, then fitted to all of them",
}


class Labelled(NamedTuple):
    """Images and their classes."""

    source: StoredImages
    labels: np.ndarray
    """(N,) integers 0, 1, ..."""


@torch.no_grad()
@float32_arithmetic(repeatable=True)
def probe(
    model: str | Path | nn.Module,
    data: str | Path,
    settings: ProbeSettings | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure test accuracies of classifiers with few labels, over several random choices. Runs on one process.

    Args:
        model: A folder, a hub id, or a first stage of diffusers as a module.
        data: A table with a column of classes, a hub id, or a folder of images with a folder for each class.
        settings: The settings; None takes the defaults.
        out: Folder for result.json and report.html; None writes nothing.
        progress: Show progress bars.

    Returns:
        The result, JSON-ready; accuracies are from 0 to 1.

    Raises:
        UserError: If data have no labels, too few images of a class or several sizes, a training image is unreadable,
            or several processes were launched.
    """
    settings = settings or ProbeSettings()
    device, stage, folder = opened("probe", model, settings, out)
    train, test, names, column = _labelled(str(data), settings)
    test, choice = _limited(test, settings)
    drawn = _draws(train.labels, names, settings)
    pool = np.unique(np.concatenate([rows for draw in drawn for rows in draw]))
    with tempfile.TemporaryDirectory(prefix="latent-ae-") as scratch:
        where = stage, settings, device, str(data), progress
        read = [ImageFeatures(Path(scratch) / name, *where) for name in ("train", "test")]
        bad = read[0].write(train.source.subset(pool), "training images")
        if bad:
            raise UserError(
                f"{data}: a training image that was drawn cannot be read: {bad[0]}; see latent-ae data check"
            )
        skipped = read[1].write(test.source, "test images")
        report_skipped(skipped, len(read[1].rows), settings)
        if read[0].shape != read[1].shape:
            raise UserError(several_sizes(read[0].shape, read[1].shape))
        labels = test.labels[read[1].rows]
        if not len(labels):
            raise UserError(f"{data}: none of its test images is readable; {(skipped or ['there are none'])[0]}")
        files = [dict(part.files) for part in read]
        add_components(Path(scratch), files)
        fits = len(FEATURES) * settings.draws * len(settings.labels_per_class)
        bar = progress_bar(
            "probe: classifiers",
            fits,
            "classifier",
            disable=not progress,
        )
        own, notes = _own_accuracy(
            model, settings.revision, stage, files[1]["latent"], read[1].latent_shape, labels, names, device
        )
        if shared := len(set(read[0].digests) & set(read[1].digests)):
            notes.append(
                f"{shared:,} of the test images are among the training images, which makes accuracies too good"
            )
        features = {}
        with bar:
            for kind in FEATURES:
                scaled = Scaled(files[0][kind], files[1][kind], settings.scale, device)
                features[kind] = {"dimensions": files[0][kind].dimensions} | _accuracies(
                    scaled, train.labels[pool], pool, drawn, labels, len(names), settings, bar
                )
    result = {
        "format": JOB.format,
        "model": stage.describe(),
        "data": {
            "location": str(data),
            "labels_from": column,
            "classes": names,
            "num_images": len(labels),
            "test_images": len(labels),
            "choice": choice,
            "training_images_drawn": len(pool),
            "fingerprints": [fingerprint(part.digests) for part in read],
            "size_px": list(read[0].shape[1:]),
            "skipped": skipped,
        },
        "method": ALGORITHM | {"scaled": _scaling(settings.scale)},
        "chance": max(Counter(labels.tolist()).values()) / len(labels),
        "features": features,
        "label_model": own,
        "notes": notes,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    if folder is not None:
        with written_into(folder, ["result.json", "report.html"]):
            write_json(folder / "result.json", result)
            write_probe_report(folder / "report.html", result)
    return result


def _scaling(scale: str) -> str:
    if scale == "global":
        return "by one number, so that the mean squared norm is 1: directions keep their relative sizes"
    return "each feature to the same standard deviation, so that the mean squared norm is 1"


def _labelled(data: str, settings: ProbeSettings) -> tuple[Labelled, Labelled, list[str], str]:
    """Return training and test images, the classes' names, and the column from which they come."""
    try:
        opened = settings.data(data)
        train, test = open_images(opened, "train"), open_images(opened, "held_out")
    except UserError as error:
        # the settings of a probe have other names than those of training
        named = {"data.source": "DATA", "data.eval_split": "split", "data.eval_fraction": "test_fraction"}
        message = str(error).replace("data.split", "train_split")
        for theirs, ours in named.items():
            message = message.replace(theirs, ours)
        raise UserError(message.replace("data.", "")) from error
    assert not isinstance(train, StreamSource) and not isinstance(test, StreamSource)
    found = numbered_classes(train, test, settings.label_column)
    if found is None:
        raise UserError(
            f"label_column: {data} has no labels, and a probe needs them: give tables with a column of classes, "
            "integers or names (label_column=NAME), or a folder of images with a folder for each class"
        )
    if len(found.names) < 2:
        raise UserError(f"label_column: {data} has images of {len(found.names)} class(es); a probe needs two")
    parts = []
    for source, labels in zip((train, test), found.labels, strict=True):
        kept = np.flatnonzero(labels >= 0)
        parts.append(Labelled(source.subset(kept), labels[kept]))
    return parts[0], parts[1], found.names, found.column


def _limited(test: Labelled, settings: ProbeSettings) -> tuple[Labelled, dict[str, Any]]:
    """Return at most `limit` test images, from each class in proportion, and how they were chosen."""
    by_class = np.argsort(test.labels, kind="stable")
    size = len(by_class)
    rows = np.sort(by_class[spread(settings.seed, size, settings.limit or size)])
    return Labelled(test.source.subset(rows), test.labels[rows]), choice_facts(
        rows, size, settings.seed, "spread over classes"
    )


def _draws(labels: np.ndarray, names: Sequence[str], settings: ProbeSettings) -> list[list[np.ndarray]]:
    """Return the rows for each draw and number of labels, ascending; smaller sets are parts of the larger ones."""
    sizes = sorted(settings.labels_per_class)
    if sizes[-1] * len(names) > MOST_LABELS:
        raise UserError(
            f"labels_per_class: {sizes[-1]} labels of {len(names)} classes are more than the {MOST_LABELS:,} that fit "
            f"into a probe; use at most {MOST_LABELS // len(names)}"
        )
    return [few_labels(labels, names, sizes, settings.seed, number) for number in range(settings.draws)]


def _own_accuracy(
    model: str | Path | nn.Module,
    revision: str | None,
    stage: FirstStage,
    latents: FeatureFile,
    shape: Sequence[int],
    truth: np.ndarray,
    names: Sequence[str],
    device: torch.device,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return how well the label model in an export classifies the test images.

    Args:
        model: The model as the user gave it.
        revision: Commit or tag, if it is a hub id.
        stage: The same, loaded.
        latents: Latents of the test images.
        shape: (c, h, w) of a latent.
        truth: (N,) classes of the test images.
        names: Names of the classes.
        device: Where the label model runs.

    Returns:
        Its accuracy, and the labels that it was trained with; None if there is none for such latents and classes. And
        a note on why it cannot be measured, in a list; an empty list if there is no reason.
    """
    network = None if isinstance(model, nn.Module) else stored_label_model(model, revision)
    if network is None:
        return None, []
    own_names, why = list(network.config.class_names or ()), ""
    if network.latent_shape != tuple(shape):
        sizes = [" x ".join(map(str, one)) for one in (network.latent_shape, shape)]
        why = f"is for latents of {sizes[0]}, and these have {sizes[1]}; set resize_px or crop_px"
    elif own_names != list(names):
        why = f"was trained with other classes: {', '.join(own_names)}"[:300]
    if why:
        return None, [f"the model's own label model is not measured: it {why}"]
    network, guesses = network.to(device), []
    for first in range(0, len(truth), BLOCK):
        block = torch.from_numpy(latents.rows(np.arange(first, min(first + BLOCK, len(truth)))))
        z = block.unflatten(1, tuple(shape)).to(device)
        if stage.module is not None and has_codes(stage.module):  # as in training; a VQModel encodes to latents before
            z = latent_of_codes(stage.module, nearest_codes(stage.module, z)).float()
        guesses.append(network.classify(z).argmax(1).cpu())
    return {
        "accuracy": float((torch.cat(guesses).numpy() == truth).mean()),
        "labels_per_class": network.config.labels_per_class,
        "draw": network.config.draw,
    }, []


def _accuracies(
    features: Scaled,
    pool_labels: np.ndarray,
    pool: np.ndarray,
    drawn: Sequence[Sequence[np.ndarray]],
    test_labels: np.ndarray,
    classes: int,
    settings: ProbeSettings,
    bar: tqdm,
) -> dict[str, Any]:
    """Return the accuracies of both classifiers by number of labels per class."""
    sizes = sorted(settings.labels_per_class)
    runs: dict[str, dict[str, list[tuple[float, float]]]] = {
        kind: {str(size): [] for size in sizes} for kind in ("logistic", "nearest")
    }
    for draw in drawn:
        for size, rows in zip(sizes, draw, strict=True):
            places = np.searchsorted(pool, rows)
            x = features.rows(0, places)
            y = torch.from_numpy(pool_labels[places]).to(x.device)
            held = torch.arange(len(y), device=x.device) % size < max(1, size // VALIDATION)
            runs["logistic"][str(size)].append(_logistic(x, y, held, classes, settings, features, test_labels))
            runs["nearest"][str(size)].append(_nearest(x, y, held, classes, settings, features, test_labels))
            bar.update()
    return {
        kind: {
            size: {
                "mean": statistics.mean(accuracy for accuracy, _ in values),
                "sd": statistics.stdev(accuracy for accuracy, _ in values),
                "draws": [accuracy for accuracy, _ in values],
                "l2" if kind == "logistic" else "k": [chosen for _, chosen in values],
            }
            for size, values in by_size.items()
        }
        for kind, by_size in runs.items()
    }


def _logistic(
    x: Tensor, y: Tensor, held: Tensor, classes: int, settings: ProbeSettings, features: Scaled, truth: np.ndarray
) -> tuple[float, float]:
    """Return the accuracy on the test images, and the best l2 on the held-back labels (the largest of equals)."""
    best, weights = (-1.0, 0.0), None
    for l2 in sorted(settings.l2, reverse=True):
        weights = logistic_regression(x[~held], y[~held], classes, l2, weights)
        accuracy = float((_classes(x[held], weights) == y[held]).double().mean())
        best = max(best, (accuracy, l2))
    fitted = logistic_regression(x, y, classes, best[1])
    return _tested(lambda block: _classes(block, fitted), features, truth), best[1]


def _classes(x: Tensor, weights: Tensor) -> Tensor:
    return (x.double() @ weights[:-1] + weights[-1]).argmax(1)


def _nearest(
    x: Tensor, y: Tensor, held: Tensor, classes: int, settings: ProbeSettings, features: Scaled, truth: np.ndarray
) -> tuple[float, int]:
    """Return the accuracy on the test images, and the best k on the held-back labels (the smallest of equals)."""
    guesses = nearest(x[~held], y[~held], classes, x[held], settings.neighbours)
    accuracies = {k: float((guess == y[held]).double().mean()) for k, guess in guesses.items()}
    k = min(accuracies, key=lambda k: (-accuracies[k], k))
    return _tested(lambda block: nearest(x, y, classes, block, (k,))[k], features, truth), k


def _tested(classify: Callable[[Tensor], Tensor], features: Scaled, truth: np.ndarray) -> float:
    right = 0
    for first in range(0, len(truth), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(truth)))
        right += int((classify(features.rows(1, rows)).cpu().numpy() == truth[rows]).sum())
    return right / len(truth)
