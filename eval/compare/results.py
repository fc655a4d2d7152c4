"""Reads results of evaluations safely, groups them by model, and checks whether they can be compared."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from latent_ae.config import UserError
from latent_ae.metrics.labels import number, short_name, value_at
from latent_ae.report.page import flattened
from latent_ae.text import choice_in_words
from latent_ae_eval.job import JOBS, Figures, job_of

NOT_COMPARED = ("latents", "changed", "changed.latents")
"""Keys of a protocol that may differ: each kind of latent is compared with its own kind only, so a deterministic model
needs no sample; and `changed` without further keys is empty."""
INCIDENTAL = (
    *("subfolder", "revision", "variant", "ema", "dtype"),
    *("device", "num_workers", "max_bad_fraction", "num_pictures"),
    *("dinov2_model", "clip_model"),  # `networks` says which they are
)
"""Settings of other evaluations that may differ: they choose the model, or how it is run and what is shown."""
AGREEMENT = 1e-4
"""Relative tolerance: a table whose means differ more from the result's comes from another measurement."""


class Figure(NamedTuple):
    """What is compared."""

    job: str
    """The evaluation."""
    part: str
    """A kind of latent or a set of images; empty if the evaluation has only one."""
    metric: str


@dataclass(frozen=True)
class Result:
    """What one evaluation found on one model."""

    path: Path
    job: str
    document: Mapping[str, Any]
    found: Figures

    @property
    def model(self) -> tuple[str, ...]:
        """What tells the model apart: its weights, or without their digest where it comes from."""
        model = self.document["model"]
        known = model.get("sha256")
        keys = ("dtype",) if known else ("location", "class", "weights", "dtype")
        return tuple(str(part) for part in (known, *(model.get(key) for key in keys)))

    def num_images(self, part: str = "") -> int | None:
        """Return the number of images that a part was measured on, if it is known."""
        size = part.removesuffix(" px")  # of eval text
        counts = [
            value_at(self.document, "metrics", part, "n"),
            value_at(self.document, "groups", "size_px", size, "metrics", "n"),
            self.document["data"].get("num_images"),
        ]
        return next((int(count) for value in counts if (count := number(value)) is not None), None)


@dataclass(frozen=True)
class Model:
    """A measured model with its results, at most one of each evaluation."""

    label: str
    """A, B, ..."""
    results: dict[str, Result] = field(default_factory=dict)
    """By evaluation."""

    @property
    def name(self) -> str:
        """The name of the model, without its label."""
        model = self.first.document["model"]
        return short_name(model.get("location"), str(model.get("class") or "model"))

    @property
    def first(self) -> Result:
        """The result that was given first."""
        return next(iter(self.results.values()))

    def figures(self) -> list[Figure]:
        """Return what it has values of."""
        return [Figure(job, *key) for job, result in self.results.items() for key in result.found]

    def value(self, figure: Figure) -> float | None:
        """Return a value, or None."""
        return self._found(figure)[0]

    def interval(self, figure: Figure) -> tuple[float, float] | None:
        """Return the 95 % interval of a value, or None."""
        return self._found(figure)[1]

    def _found(self, figure: Figure) -> tuple[float | None, tuple[float, float] | None]:
        result = self.results.get(figure.job)
        return (None, None) if result is None else result.found.get(figure[1:], (None, None))


def models_of(results: Sequence[Result]) -> list[Model]:
    """Return results grouped by model, in their order. A second result of the same evaluation is another model's."""
    models: list[Model] = []
    for result in results:
        for model in models:
            if result.job not in model.results and model.first.model == result.model:
                break
        else:
            models.append(model := Model(label_at(len(models))))
        model.results[result.job] = result
    return models


def names_of(models: Sequence[Model]) -> dict[str, str]:
    """Return the names of models by label, with the folder of the first result where names are the same."""
    names = [model.name for model in models]
    return {
        model.label: f"{model.label} {model.name}"
        + (f" ({model.first.path.parent.name})" if names.count(model.name) > 1 else "")
        for model in models
    }


def label_at(position: int) -> str:
    """Return the label of a model by its position: A to Z, then AA, AB and so on, as a spreadsheet's columns."""
    before, last = divmod(position, len(ascii_uppercase))
    return (label_at(before - 1) if before else "") + ascii_uppercase[last]


def read_result(path: str | Path) -> Result:
    """Read a result of an evaluation.

    Args:
        path: A result.json, or the folder that holds one.

    Raises:
        UserError: If there is no such file, or it holds something else.
    """
    path = Path(path)
    file = path / "result.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give a result.json, or the folder that `eval` wrote") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); give the result.json of `latent-ae eval`") from None
    stated = document.get("format") if isinstance(document, dict) else None
    job = next((name for name in JOBS if stated == job_of(name).format), "")
    problem = _problem(document, job)
    if not problem:
        try:
            return Result(file, job, document, job_of(job).figures(document))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            problem = f"what `eval {job}` writes is missing or damaged ({type(error).__name__}: {error})"
    again = f"latent-ae eval {job or 'recon'}"
    raise UserError(f"{file}: not a result that can be compared: {problem}; measure again: {again}")


def _problem(document: Any, job: str) -> str | None:
    if not isinstance(document, dict):
        return "it is not a JSON object"
    if not job:
        return f'its "format" is {json.dumps(document.get("format"))}, not that of an evaluation of this version'
    for key in ("model", "data", *(("protocol", "metrics") if job == "recon" else ("settings",))):
        if not isinstance(document.get(key), dict):
            return f'"{key}" is not an object'
    for key in ("versions", "networks"):
        if not isinstance(document.get(key) or {}, dict):
            return f'"{key}" is not an object'
    if not isinstance(document.get("notes") or [], list):
        return '"notes" is not a list'
    if job != "recon":
        return None
    for key in ("metrics", "intervals"):
        parts = document.get(key)
        kinds = parts.values() if isinstance(parts, dict) else [parts]
        if not all(values is None or isinstance(values, dict) for values in kinds):
            return f'"{key}" does not hold an object for each kind of latent'
    count = document["data"].get("num_images")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return '"data.num_images" is not a positive whole number'
    return None


def differing(models: Sequence[Model]) -> dict[str, list[str]]:
    """Return what prevents a comparison by evaluation: a line for each difference with every model's value."""
    obstacles = {}
    for job in JOBS:
        found = _differing({model.label: model.results[job] for model in models if job in model.results})
        if found:
            obstacles[job] = found if job == "recon" else [f"eval {job}, {line}" for line in found]
    return obstacles


def _differing(results: Mapping[str, Result]) -> list[str]:
    """Return what differs between results of one evaluation by their labels."""
    documents = {label: result.document for label, result in results.items()}
    conditions = {label: _conditions(result) for label, result in results.items()}
    names = dict.fromkeys(name for values in conditions.values() for name in values)
    obstacles = []
    for name in names:
        values = {label: known.get(name) for label, known in conditions.items()}
        if len(set(values.values())) > 1:
            obstacles.append(_differing_line(name, values))
    networks = {label: one.get("networks") or {} for label, one in documents.items()}
    for name in dict.fromkeys(name for known in networks.values() for name in known):
        # one that a result lacks is missing for a metric, which prevents nothing
        weights = {label: str(known[name])[:16] for label, known in networks.items() if name in known}
        if len(set(weights.values())) > 1:
            obstacles.append(_differing_line(f"networks.{name}", weights))
    data = _data(results)
    name = next((name for name, _ in data.values()), "")
    if len(set(data.values())) > 1 or not all(text for _, text in data.values()):  # one not recorded may be any
        obstacles.append(_differing_line(name, {label: text or None for label, (_, text) in data.items()}))
    choices = {label: _choice(result) for label, result in results.items()}
    if len(set(choices.values())) > 1 and (name == "data.location" or len(set(data.values())) > 1):
        words = {label: known and known[0] for label, known in choices.items()}
        if len(set(words.values())) == 1:  # they differ in their numbers alone
            words = {label: known and known[1] for label, known in choices.items()}
        obstacles.append(
            _differing_line("images chosen from the data", words)
            + "; if the data is the same, measure again with the same limit and seed"
        )
    seeds = {key: str(one.get("seed")) for key, one in documents.items() if (one.get("metrics") or {}).get("sample")}
    if len(set(seeds.values())) > 1:
        obstacles.append(_differing_line("seed of the posterior's samples", seeds))
    return obstacles


def _conditions(result: Result) -> dict[str, Any]:
    """Return under which conditions a result was measured, besides its data."""
    if result.job == "recon":
        protocol = flattened(result.document["protocol"])
        known = {f"protocol.{path}": text for path, text in protocol if path not in NOT_COMPARED}
    else:
        job = job_of(result.job)
        # a preset's values are in `conditions`
        settings = {
            key: value
            for key, value in result.document["settings"].items()
            if key not in (*INCIDENTAL, *job.incidental) and not _in_conditions(key, result, job.conditions)
        }
        known = dict(flattened(settings))
        for path in job.conditions:
            section = value_at(result.document, *path.split("."))
            known |= dict(flattened({path: section} if section is not None else {}))
        known.pop("recipe.parameters", None)  # a larger latent needs a larger transformer
    count = result.num_images()
    return known | {"number of images": None if count is None else f"{count:,}"}


def _in_conditions(key: str, result: Result, conditions: Sequence[str]) -> bool:
    """Return whether one of the sections that must agree holds the value of a setting."""
    sections = (value_at(result.document, *path.split(".")) for path in conditions)
    return any(isinstance(section, Mapping) and key in section for section in sections)


def _data(results: Mapping[str, Result]) -> dict[str, tuple[str, str]]:
    """Return what tells the data of each result of an evaluation apart, and its name.

    This is the location if one of the results has no fingerprint, except for reconstructions, which have always had it.
    """
    found = {}
    for label, result in results.items():
        data = result.document["data"]
        prints = [data["fingerprint"]] if data.get("fingerprint") else data.get("fingerprints") or []
        if not prints and result.job != "recon":
            break
        found[label] = "data.fingerprint", " ".join(str(print_)[:16] for print_ in prints)
    else:
        return found
    sections = {label: result.document["data"] for label, result in results.items()}
    return {
        label: ("data.location", f"{str(data.get('location')).rstrip('/')} {data.get('split') or ''}".rstrip())
        for label, data in sections.items()
    }


def _choice(result: Result) -> tuple[str, str] | None:
    """Return in words which images of the data were measured, and the digest of their numbers."""
    choice = result.document["data"].get("choice")
    return (choice_in_words(choice), str(choice.get("fingerprint"))[:16]) if isinstance(choice, dict) else None


def _differing_line(name: str, values: Mapping[str, str | None]) -> str:
    shown = (
        f"{label} {'not recorded' if value is None else ' '.join(value.splitlines())}"
        for label, value in values.items()
    )
    return f"{name}: {', '.join(shown)}"


class NoPairs(ValueError):
    """Images cannot be compared one by one; the message is the reason."""


@dataclass(frozen=True)
class ImageTable:
    """The content of images.parquet: a row per image, sorted by the images' digests."""

    keys: list[tuple[str, int]]
    """Sorted pairs of a digest and a number, which distinguishes images that are equal byte for byte."""
    columns: Mapping[Figure, np.ndarray]
    """(n,) float64, nan where an image has no value."""


def read_images(model: Model, job: str) -> ImageTable:
    """Read the table of images next to a result. Raises NoPairs if there is none, or it is of another measurement."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    result = model.results[job]
    path = result.path.parent / job_of(job).images
    try:
        table = read_table(path, partitioning=None)
        column_of = job_of(job).image_column
        names = {
            Figure(job, part, metric): column_of.format(part=part, metric=metric).lstrip("_")
            for part, metric in result.found
        }
        # a deterministic model's samples are its mode
        names |= {
            figure: f"mode_{figure.metric}"
            for figure, column in names.items()
            if figure.part == "sample" and column not in table.column_names
        }
        copies: Counter[str] = Counter()
        rows = []
        for digest in table["digest"].to_pylist():
            rows.append((digest, copies[digest]))
            copies[digest] += 1
        order = sorted(range(len(rows)), key=rows.__getitem__)
        columns = {
            figure: table[column].to_numpy().astype(np.float64)[order]
            for figure, column in names.items()
            if column in table.column_names
        }
    except FileNotFoundError:
        raise NoPairs(f"{model.label} has no {path.name}") from None
    except (OSError, ArrowException, KeyError, TypeError, ValueError) as error:
        raise NoPairs(f"{path} cannot be read ({error})") from None
    if len(rows) != result.num_images() or not all(digest for digest, _ in rows):
        raise NoPairs(f"{path} does not hold the images of its result, each with a digest")
    for figure, values in columns.items():
        mean = np.nanmean(values) if np.isfinite(values).any() else np.nan
        if not np.isclose(mean, model.value(figure), rtol=AGREEMENT, atol=1e-9):
            raise NoPairs(f"{path} and its result differ in {'_'.join(figure[1:])}: they are of different measurements")
    return ImageTable([rows[position] for position in order], columns)


def paired_differences(a: ImageTable, b: ImageTable) -> dict[Figure, np.ndarray]:
    """Return b - a, (n,), nan where either has no value.

    Raises:
        NoPairs: If the images differ.
    """
    if a.keys != b.keys:
        raise NoPairs("their images are not the same")
    return {figure: b.columns[figure] - values for figure, values in a.columns.items() if figure in b.columns}
