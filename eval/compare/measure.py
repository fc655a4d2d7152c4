"""Compares measured first stages: which one is better, and which differences are more than chance.

from latent_ae_eval.compare.measure import compare
comparison = compare(["runs/a/recon", "runs/b/recon/result.json"])
print(comparison["differences"])
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from latent_ae.config import UserError
from latent_ae.files import write_json, writing
from latent_ae.metrics.labels import in_order, label_of
from latent_ae.report import page
from latent_ae_eval.compare.results import (
    Figure,
    ImageTable,
    Model,
    NoPairs,
    Result,
    differing,
    models_of,
    names_of,
    paired_differences,
    read_images,
    read_result,
)
from latent_ae_eval.cost import conditions, number_at
from latent_ae_eval.job import JOBS, job_of

DESCRIBING = (
    "format",
    "model",
    "protocol",
    "networks",
    "data",
    "seed",
    "settings",
    "versions",
    "device",
    "cost",
    "notes",
)
"""Keys of a result that a comparison repeats: what was measured, how, and what it costs."""
PerImage = dict[tuple[str, str], dict[str, np.ndarray]]
"""Each image's differences, (n,), by evaluation and metric, and the name of the two models and of what was measured."""
CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
CHUNK = 1 << 22
"""Number of random numbers drawn at a time, so that memory does not grow with resamples x images."""
FEWEST_IMAGES = 20
"""With fewer images a bootstrap interval is much too narrow, so no verdict is given."""

DIFFERS, CHANCE, UNKNOWN = "differs", "no difference beyond chance", "cannot be told"
OTHERWISE = "not comparable"
PAIRED, INDEPENDENT, NONE = "paired bootstrap", "independent intervals", "no interval"


def compare(results: Sequence[str | Path], *, anyway: bool = False, out: str | Path | None = None) -> dict[str, Any]:
    """Compare each measured model with the first one.

    Results of the same weights belong to one model, which has at most one of each evaluation; a second one of the same
    evaluation is compared like another model's. A difference has a 95 % interval: from a paired bootstrap over images
    if both models' reconstructions have images.parquet of the same images, and otherwise from the two results' own
    intervals. Its verdict is "differs" if the interval does not contain zero.

    Args:
        results: Files that evaluations wrote, or their folders, of at least two models.
        anyway: Also compare results of different protocols, settings, data, N or seeds.
        out: Folder for comparison.json and comparison.html; None writes nothing.

    Returns:
        The comparison, JSON-ready.

    Raises:
        UserError: If a file is no such result, all are of one model, the results were not measured in the same way, or
            `out` cannot be written.
    """
    models = models_of(_read(results))
    if len(models) < 2:
        raise UserError(
            "compare takes results of at least two models" + (", and these are all of one" if models else "")
        )
    obstacles = differing(models)
    if obstacles and not anyway:
        names = "\n".join(f"  {model.label} is {result.path}" for model in models for result in model.results.values())
        lines = [f"  {line}" for found in obstacles.values() for line in found]
        older = " What is not recorded was left out by an older version." if "not recorded" in str(lines) else ""
        raise UserError(
            "these results were not measured in the same way:\n" + "\n".join(lines) + f"\n{names}\n"
            f"Measure again with the same protocol and data, or add --anyway to compare them nevertheless.{older}"
        )
    comparison, per_image = _compared(models, obstacles)
    if out is not None:
        _write(Path(out), comparison, per_image)
    return comparison


def _read(paths: Sequence[str | Path]) -> list[Result]:
    """Read results. Raises one UserError that names every path that is none."""
    read, problems = [], []
    for path in paths:
        try:
            read.append(read_result(path))
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        raise UserError("\n".join(problems))
    return read


def _compared(models: Sequence[Model], obstacles: Mapping[str, list[str]]) -> tuple[dict[str, Any], PerImage]:
    """Return the comparison, and each image's differences from the first model."""
    tables: dict[str, dict[str, ImageTable | NoPairs]] = {}
    for job in (job for job in JOBS if job_of(job).images):
        tables[job] = {model.label: _table(model, job) for model in models if job in model.results}
    first, notes, names = models[0], _notes(models), names_of(models)
    rows: dict[Figure, dict[frozenset[str], dict[str, Any]]] = {}
    per_image: PerImage = {}
    for a, b in combinations(models, 2):
        paired: dict[Figure, np.ndarray] = {}
        for job, known in tables.items():
            found, why_not = _pairs(*(known[label] for label in (a.label, b.label) if label in known))
            paired |= found
            if a is first and why_not:
                of = "" if job == "recon" else f"eval {job}: "
                notes.append(f"{of}{b.label} and {a.label} are not compared image by image: {why_not}.")
        for figure, row in _differences(a, b, paired, obstacles).items():
            rows.setdefault(figure, {})[frozenset((a.label, b.label))] = row
        if a is first:
            for figure, values in paired.items():
                pair_name = ", ".join(filter(None, (f"{b.label} − {a.label}", figure.part)))
                per_image.setdefault((figure.job, figure.metric), {})[pair_name] = values
    everything = [figure for model in models for figure in model.figures()]
    figures = [
        Figure(job, part, metric)
        for job in JOBS
        for part in dict.fromkeys(figure.part for figure in everything if figure.job == job)
        for metric in in_order(figure.metric for figure in everything if figure[:2] == (job, part))
    ]
    comparison = {
        "format": "latent-ae comparison 2",
        "comparable": not obstacles,
        "differing": [line for found in obstacles.values() for line in found],
        "notes": notes,
        "differences": [row for figure in figures for pair, row in rows.get(figure, {}).items() if first.label in pair],
        "metrics": [_metric(models, figure, rows.get(figure, {})) for figure in figures],
        "method": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "fewest_images": FEWEST_IMAGES},
        "models": [
            {
                "label": model.label,
                "name": names[model.label],
                "results": {
                    job: {"path": str(result.path)} | {k: v for k, v in result.document.items() if k in DESCRIBING}
                    for job, result in model.results.items()
                },
            }
            for model in models
        ],
    }
    return comparison, per_image


def _table(model: Model, job: str) -> ImageTable | NoPairs:
    """Return the table of a model's images, or the reason why it cannot be used."""
    try:
        return read_images(model, job)
    except NoPairs as reason:
        return reason


def _pairs(*tables: ImageTable | NoPairs) -> tuple[dict[Figure, np.ndarray], str | None]:
    """Return each image's differences b - a of two tables, or none and the reason; fewer tables need no reason."""
    for table in tables:
        if isinstance(table, NoPairs):
            return {}, str(table)
    if len(tables) < 2:
        return {}, None
    a, b = tables
    assert isinstance(a, ImageTable) and isinstance(b, ImageTable)
    try:
        return paired_differences(a, b), None
    except NoPairs as reason:
        return {}, str(reason)


def _differences(
    a: Model, b: Model, paired: Mapping[Figure, np.ndarray], obstacles: Mapping[str, list[str]]
) -> dict[Figure, dict[str, Any]]:
    """Return the rows of b - a for everything that both have; there is no verdict on what was measured otherwise."""
    usable = {figure: values for figure, values in paired.items() if np.isfinite(values).any()}
    intervals: dict[Figure, np.ndarray] = {}
    for job in {figure.job for figure in usable}:  # each has images of its own
        of_job = {figure: values for figure, values in usable.items() if figure.job == job}
        intervals |= dict(zip(of_job, mean_intervals(np.stack(list(of_job.values()), 1)), strict=True))
    rows = {}
    interval: tuple[float, float] | None
    for figure in set(a.figures()) & set(b.figures()):
        values, n = usable.get(figure), fewest_images((a, b), figure)
        if values is not None:
            n = int(np.isfinite(values).sum())
            difference = float(np.nanmean(values))
            low, high = map(float, intervals[figure])
            interval, method = (low, high), PAIRED
        else:
            ends = [(model.value(figure) or 0.0, model.interval(figure)) for model in (a, b)]
            difference = ends[1][0] - ends[0][0]
            interval, method = independent_interval(*ends), INDEPENDENT
        verdict = UNKNOWN
        if figure.job in obstacles:
            verdict = OTHERWISE
        elif interval is not None and (n is None or n >= FEWEST_IMAGES):
            verdict = CHANCE if interval[0] <= 0 <= interval[1] else DIFFERS
        rows[figure] = figure._asdict() | {
            "of": b.label,
            "against": a.label,
            "difference": difference,
            "interval": interval if interval is None else list(interval),
            "verdict": verdict,
            "better": _better(figure.metric, a, b, difference) if verdict == DIFFERS else None,
            "method": method if interval is not None else NONE,
            "n": n,
        }
    return rows


def fewest_images(models: Sequence[Model], figure: Figure) -> int | None:
    """Return the smallest number of images that models were measured on, if it is known."""
    counts = [model.results[figure.job].num_images(figure.part) for model in models]
    return min((count for count in counts if count is not None), default=None)


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


def independent_interval(
    a: tuple[float, tuple[float, float] | None], b: tuple[float, tuple[float, float] | None]
) -> tuple[float, float] | None:
    """Return the interval of b - a from their own intervals, as if they were of different images.

    Of each side the squares of the distances add (Zou and Donner 2008, "MOVER"), so an interval that is longer on one
    side, as near a bound, stays so.

    Args:
        a: A value and its interval.
        b: The other value and its interval.
    """
    (value_a, interval_a), (value_b, interval_b) = a, b
    if interval_a is None or interval_b is None:
        return None
    difference = value_b - value_a
    low = float(np.hypot(value_b - interval_b[0], interval_a[1] - value_a))
    high = float(np.hypot(interval_b[1] - value_b, value_a - interval_a[0]))
    return difference - low, difference + high


def _better(metric: str, a: Model, b: Model, difference: float) -> str | None:
    direction = label_of(metric).better
    if direction is None:
        return None
    return b.label if (difference > 0) == (direction == "higher") else a.label


def _metric(
    models: Sequence[Model], figure: Figure, rows: Mapping[frozenset[str], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return all models' values of a metric; the best is named only if it is better than every other beyond chance."""
    values = {model.label: model.value(figure) for model in models}
    having = [label for label, value in values.items() if value is not None]
    best = [
        label
        for label in having
        if len(having) > 1
        and all(rows[frozenset((label, other))]["better"] == label for other in having if other != label)
    ]
    return figure._asdict() | {
        "direction": label_of(figure.metric).better,
        "values": values,
        "intervals": {model.label: model.interval(figure) for model in models},
        "best": best[0] if best else None,
    }


def _notes(models: Sequence[Model]) -> list[str]:
    """Return notes on differences that do not prevent a comparison."""
    notes = []
    for job in (job for job in JOBS if any(job in model.results for model in models)):
        having = [model for model in models if job in model.results]
        if lacking := [model.label for model in models if model not in having]:
            notes.append(f"{', '.join(lacking)}: no result of eval {job}.")
        notes += [note if job == "recon" else f"eval {job}: {note}" for note in _notes_of(job, having)]
    notes += _cost_notes([model for model in models if "recon" in model.results])
    own: dict[str, list[str]] = {}
    for model in models:
        for note in dict.fromkeys(
            str(note) for one in model.results.values() for note in one.document.get("notes") or []
        ):
            own.setdefault(note, []).append(model.label)
    return notes + [f"{', '.join(labels)}: {note}" for note, labels in own.items()]


def _notes_of(job: str, models: Sequence[Model]) -> list[str]:
    """Return notes on results of one evaluation, which all these models have."""
    notes = []
    smallest = fewest_images(models, Figure(job, "", ""))
    if smallest is not None and smallest < FEWEST_IMAGES:
        notes.append(f"{smallest} images are too few to tell a difference from chance; take {FEWEST_IMAGES} or more.")
    found = {model.label: [figure for figure in model.figures() if figure.job == job] for model in models}
    everywhere = dict.fromkeys(figure for figures in found.values() for figure in figures)
    for part in dict.fromkeys(figure.part for figure in everywhere):
        if lacking := [label for label, figures in found.items() if part not in {figure.part for figure in figures}]:
            what = f"the latent's {part}" if job == "recon" else part
            notes.append(f"{', '.join(lacking)}: no figures for {what}.")
    for label, figures in found.items():
        parts = {figure.part for figure in figures}
        missing = in_order(figure.metric for figure in everywhere if figure.part in parts and figure not in figures)
        if missing:
            notes.append(f"{label} lacks {', '.join(label_of(metric, job).name for metric in missing)}.")
    versions = {model.label: model.results[job].document.get("versions") or {} for model in models}
    for package in dict.fromkeys(package for known in versions.values() for package in known):
        texts = {label: str(known.get(package, "not recorded")) for label, known in versions.items()}
        if len(set(texts.values())) > 1:
            listed = ", ".join(f"{label} {text}" for label, text in texts.items())
            notes.append(f"Versions of {package} differ: {listed}.")
    return notes


def _cost_notes(models: Sequence[Model]) -> list[str]:
    """Return notes on missing costs, which are then not drawn, and on times that were taken in different ways."""
    costs = {model.label: model.results["recon"].document.get("cost") for model in models}
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


def _write(folder: Path, comparison: dict[str, Any], per_image: PerImage) -> None:
    from latent_ae_eval.compare.report import comparison_page

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    page.write(folder / "comparison.html", comparison_page(comparison, per_image))
