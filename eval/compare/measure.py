"""Compares measured first stages: which one is better, and which differences are more than chance.

from latent_ae_eval.compare.measure import compare
comparison = compare(["runs/a/recon", "runs/b/recon/result.json"])
print(comparison["differences"])
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from latent_ae.config import UserError
from latent_ae.files import write_json, writing
from latent_ae.metrics.labels import in_order, label_of
from latent_ae.report import page
from latent_ae_eval.compare.results import (
    ImageTable,
    NoPairs,
    Result,
    differing,
    paired_differences,
    read_images,
    read_result,
)
from latent_ae_eval.cost import conditions, number_at

Figure = tuple[str, str]
"""A latent kind and a metric."""

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
CHUNK = 1 << 22
"""Number of random numbers drawn at a time, so that memory does not grow with resamples x images."""
FEWEST_IMAGES = 20
"""With fewer images a bootstrap interval is much too narrow, so no verdict is given."""

DIFFERS, CHANCE, UNKNOWN = "differs", "no difference beyond chance", "cannot be told"
PAIRED, INDEPENDENT, NONE = "paired bootstrap", "independent intervals", "no interval"


def compare(results: Sequence[str | Path], *, anyway: bool = False, out: str | Path | None = None) -> dict[str, Any]:
    """Compare each result with the first one.

    A difference has a 95 % interval: from a paired bootstrap over images if both results have images.parquet of the
    same images, and otherwise from the two results' own intervals. Its verdict is "differs" if the interval does not
    contain zero.

    Args:
        results: At least two files that `eval recon` wrote, or their folders.
        anyway: Also compare results of different protocols, data, N or seeds.
        out: Folder for comparison.json and comparison.html; None writes nothing.

    Returns:
        The comparison, JSON-ready.

    Raises:
        UserError: If a file is no such result, the results were not measured in the same way, or `out` cannot be
            written.
    """
    if not 2 <= len(results) <= len(ascii_uppercase):
        raise UserError(f"compare takes 2 to {len(ascii_uppercase)} results, not {len(results)}")
    loaded = [read_result(path, label) for path, label in zip(results, ascii_uppercase, strict=False)]
    obstacles = differing(loaded)
    if obstacles and not anyway:
        names = "\n".join(f"  {result.label} is {result.path}" for result in loaded)
        lines = "\n".join(f"  {line}" for line in obstacles)
        raise UserError(
            f"these results were not measured in the same way:\n{lines}\n{names}\n"
            "Measure again with the same protocol and data, or add --anyway to compare them nevertheless."
        )
    comparison, per_image = _compared(loaded, obstacles)
    if out is not None:
        _write(Path(out), comparison, per_image)
    return comparison


def _compared(
    results: Sequence[Result], obstacles: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """Return the comparison, and each image's differences from the first result, by metric and name."""
    tables: dict[str, ImageTable | NoPairs] = {}
    for result in results:
        try:
            tables[result.label] = read_images(result)
        except NoPairs as reason:
            tables[result.label] = reason
    first, notes = results[0], _notes(results)
    rows: dict[Figure, dict[frozenset[str], dict[str, Any]]] = {}
    per_image: dict[str, dict[str, np.ndarray]] = {}
    for a, b in combinations(results, 2):
        paired, why_not = _pairs(tables[a.label], tables[b.label])
        for figure, row in _differences(a, b, paired).items():
            rows.setdefault(figure, {})[frozenset((a.label, b.label))] = row
        if a is first:
            notes += [f"{b.label} and {a.label} are not compared image by image: {why_not}."] if why_not else []
            for (kind, metric), values in paired.items():
                per_image.setdefault(metric, {})[f"{b.label} − {a.label}, {kind}"] = values
    figures = [
        (kind, metric)
        for kind in dict.fromkeys(kind for result in results for kind in result.document["metrics"])
        for metric in in_order(metric for result in results for k, metric in result.figures() if k == kind)
    ]
    comparison = {
        "format": "latent-ae comparison 1",
        "comparable": not obstacles,
        "differing": obstacles,
        "notes": notes,
        "differences": [row for figure in figures for pair, row in rows.get(figure, {}).items() if first.label in pair],
        "metrics": [_metric(results, figure, rows.get(figure, {})) for figure in figures],
        "method": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "fewest_images": FEWEST_IMAGES},
        "results": [
            {"label": r.label, "name": r.name, "path": str(r.path)}
            | {key: value for key, value in r.document.items() if key not in ("metrics", "intervals", "baseline")}
            for r in results
        ],
    }
    return comparison, per_image


def _pairs(a: ImageTable | NoPairs, b: ImageTable | NoPairs) -> tuple[dict[Figure, np.ndarray], str | None]:
    """Return each image's differences b - a, or none and the reason."""
    for table in (a, b):
        if isinstance(table, NoPairs):
            return {}, str(table)
    assert isinstance(a, ImageTable) and isinstance(b, ImageTable)
    try:
        return paired_differences(a, b), None
    except NoPairs as reason:
        return {}, str(reason)


def _differences(a: Result, b: Result, paired: Mapping[Figure, np.ndarray]) -> dict[Figure, dict[str, Any]]:
    """Return the rows of b - a for every metric that both have."""
    usable = {figure: values for figure, values in paired.items() if np.isfinite(values).any()}
    intervals = dict(zip(usable, mean_intervals(np.stack(list(usable.values()), 1)), strict=True)) if usable else {}
    rows = {}
    interval: tuple[float, float] | None
    for kind, metric in set(a.figures()) & set(b.figures()):
        values = usable.get((kind, metric))
        if values is not None:
            n = int(np.isfinite(values).sum())
            difference = float(np.nanmean(values))
            low, high = map(float, intervals[kind, metric])
            interval, method = (low, high), PAIRED
        else:
            n = min(a.num_images, b.num_images)
            difference = (b.value(kind, metric) or 0.0) - (a.value(kind, metric) or 0.0)
            interval, method = _independent(difference, a.interval(kind, metric), b.interval(kind, metric)), INDEPENDENT
        verdict = UNKNOWN
        if interval is not None and n >= FEWEST_IMAGES:
            verdict = CHANCE if interval[0] <= 0 <= interval[1] else DIFFERS
        rows[kind, metric] = {
            "metric": metric,
            "latent": kind,
            "of": b.label,
            "against": a.label,
            "difference": difference,
            "interval": interval if interval is None else list(interval),
            "verdict": verdict,
            "better": _better(metric, a, b, difference) if verdict == DIFFERS else None,
            "method": method if interval is not None else NONE,
            "n": n,
        }
    return rows


def mean_intervals(values: np.ndarray) -> np.ndarray:
    """Return the percentile bootstrap interval of each column's mean. All columns use the same resamples.

    Args:
        values: (n, m) values of n images, nan where an image has none. n = 1 gives intervals of no width.

    Returns:
        (m, 2) low and high ends.
    """
    n = len(values)
    known = np.isfinite(values)
    sums_of, counts_of = np.where(known, values, 0.0), known.astype(np.float64)
    generator = np.random.default_rng(SEED)
    means = []
    for start in range(0, RESAMPLES, step := max(1, CHUNK // n)):
        drawn = generator.integers(n, size=(min(step, RESAMPLES - start), n))
        # how often each image was drawn: turns the sums over resampled rows into one matrix product
        weights = np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a resample may miss every image that has a value
            means.append((weights @ sums_of) / (weights @ counts_of))
    tail = 100 * (1 - CONFIDENCE) / 2
    return np.nanpercentile(np.concatenate(means), [tail, 100 - tail], axis=0).T


def _independent(
    difference: float, a: tuple[float, float] | None, b: tuple[float, float] | None
) -> tuple[float, float] | None:
    """Return the interval of a difference from two intervals, as if they were of different images: squares add."""
    if a is None or b is None:
        return None
    half = float(np.hypot(a[1] - a[0], b[1] - b[0])) / 2
    return difference - half, difference + half


def _better(metric: str, a: Result, b: Result, difference: float) -> str | None:
    direction = label_of(metric).better
    if direction is None:
        return None
    return b.label if (difference > 0) == (direction == "higher") else a.label


def _metric(
    results: Sequence[Result], figure: Figure, rows: Mapping[frozenset[str], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return all results' values of a metric; the best is named only if it is better than every other beyond chance."""
    kind, metric = figure
    values = {result.label: result.value(kind, metric) for result in results}
    having = [label for label, value in values.items() if value is not None]
    best = [
        label
        for label in having
        if len(having) > 1
        and all(rows[frozenset((label, other))]["better"] == label for other in having if other != label)
    ]
    return {
        "metric": metric,
        "latent": kind,
        "direction": label_of(metric).better,
        "values": values,
        "intervals": {result.label: result.interval(kind, metric) for result in results},
        "best": best[0] if best else None,
    }


def _notes(results: Sequence[Result]) -> list[str]:
    """Return notes on differences that do not prevent a comparison."""
    notes = []
    smallest = min(result.num_images for result in results)
    if smallest < FEWEST_IMAGES:
        notes.append(f"{smallest} images are too few to tell a difference from chance; take {FEWEST_IMAGES} or more.")
    for kind in dict.fromkeys(kind for result in results for kind in result.document["metrics"]):
        lacking = [result.label for result in results if not result.document["metrics"].get(kind)]
        if lacking:
            notes.append(f"{', '.join(lacking)}: no figures for the latent's {kind}.")
    everywhere = {figure for result in results for figure in result.figures()}
    for result in results:
        kinds = {kind for kind, _ in result.figures()}
        missing = in_order({metric for kind, metric in everywhere - set(result.figures()) if kind in kinds})
        if missing:
            notes.append(f"{result.label} lacks {', '.join(label_of(metric).name for metric in missing)}.")
    versions = [result.document.get("versions") or {} for result in results]
    for package in dict.fromkeys(package for known in versions for package in known):
        texts = [str(known.get(package, "not recorded")) for known in versions]
        if len(set(texts)) > 1:
            listed = ", ".join(f"{result.label} {text}" for result, text in zip(results, texts, strict=True))
            notes.append(f"Versions of {package} differ: {listed}.")
    notes += _cost_notes(results)
    own: dict[str, list[str]] = {}
    for result in results:
        for note in result.document.get("notes") or []:
            own.setdefault(str(note), []).append(result.label)
    return notes + [f"{', '.join(labels)}: {note}" for note, labels in own.items()]


def _cost_notes(results: Sequence[Result]) -> list[str]:
    """Return notes on missing costs, which are then not drawn, and on times that were taken in different ways."""
    costs = {result.label: result.document.get("cost") for result in results}
    older = [label for label, cost in costs.items() if not isinstance(cost, dict)]
    if older:
        return [
            f"{', '.join(older)}: measured by an older version that did not record times and sizes, so quality is not "
            "drawn against them; measure again to see it."
        ]
    without = [label for label, cost in costs.items() if number_at(cost, "seconds_per_image", "decode") is None]
    notes = [f"{', '.join(without)}: no time to decode, so quality is not drawn against it."] if without else []
    ways = {label: known for label, cost in costs.items() if (known := conditions(cost))}
    if len(set(ways.values())) > 1:
        listed = "; ".join(f"{label} {way}" for label, way in ways.items())
        notes.append(f"Times were not taken in the same way: {listed}.")
    return notes


def _write(folder: Path, comparison: dict[str, Any], per_image: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    from latent_ae_eval.compare.report import comparison_page

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    page.write(folder / "comparison.html", comparison_page(comparison, per_image))
